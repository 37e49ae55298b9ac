"""Tensor files, read by memory map and written one tensor at a time: nothing here ever holds a whole model."""

from __future__ import annotations

import hashlib
import json
import os
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from .configuration_openvla import write_json

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
PICKLED_INDEX_FILE = "pytorch_model.bin.index.json"
PICKLED_FILE = "pytorch_model.bin"
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save before 1.6
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
# The format's names (https://github.com/huggingface/safetensors#format).
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def read_pickle(path: Path) -> dict[str, Any]:
    """The content of a ``torch.save`` file, its tensors mapped from disk; only tensors and containers are allowed.

    Raises:
        ValueError: The file is truncated, is no checkpoint, or holds code; the message names the file and the reason.
    """
    mapped = zipfile.is_zipfile(path)
    with open(path, "rb") as file:
        head = file.read(len(LEGACY_MAGIC))
    if not mapped and head != LEGACY_MAGIC:
        reason = "it is empty" if not head else "it is truncated, or no PyTorch checkpoint"
        raise ValueError(f"{path} cannot be read: {reason}. Copy it again from its source.")
    try:
        return torch.load(path, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError ... by the kind of damage
        first = str(error).replace("\n", " ")
        code = re.search(r"GLOBAL (\S+)", first)
        if code:
            raise ValueError(
                f"{path} holds code, {code[1]}, not only tensors; it was not run. Ask its author for tensors alone."
            ) from error
        raise ValueError(f"{path} is damaged: {first[:300]}. Copy it again from its source.") from error


def weight_files(folder: Path) -> dict[str, Path]:
    """Which file of a Hub folder holds which tensor; files are safetensors.

    Raises:
        ValueError: There are none, an index names a file outside the folder or one that is not there.
    """
    index = folder / INDEX_FILE
    if index.is_file():
        return _indexed(index)
    if not (folder / SINGLE_FILE).is_file():
        raise ValueError(f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}.")
    return dict.fromkeys(_names(folder / SINGLE_FILE), folder / SINGLE_FILE)


def has_safetensors(folder: Path) -> bool:
    """Whether a Hub folder's weights are safetensors, and not only transformers' older files."""
    return any((folder / name).is_file() for name in (INDEX_FILE, SINGLE_FILE)) or not any(
        (folder / name).is_file() for name in (PICKLED_INDEX_FILE, PICKLED_FILE)
    )


def pickled_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of a Hub folder that has pytorch_model.bin, in one file or in several, mapped from disk.

    Raises:
        ValueError: As :func:`read_pickle` and :func:`weight_files`.
    """
    index = folder / PICKLED_INDEX_FILE
    if not index.is_file():
        require_intact(folder / PICKLED_FILE)
        return read_pickle(folder / PICKLED_FILE)
    files = _indexed(index)
    for path in set(files.values()):
        require_intact(path)
    parts = {path: read_pickle(path) for path in set(files.values())}
    missing = sorted(name for name, path in files.items() if name not in parts[path])
    if missing:
        raise ValueError(f"{index} names tensors that are not in their files: {missing}.")
    return {name: parts[path][name] for name, path in files.items()}


def _indexed(index: Path) -> dict[str, Path]:
    """The weight map of an index, none of whose files lies outside its folder."""
    folder = index.parent
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is no index of weight files: {error}.") from error
    files = {}
    for name, file in weight_map.items():
        path = folder / file
        if not file or Path(file).name != file:
            raise ValueError(f"{index} names {file!r}, which lies outside the folder; refused.")
        if not path.is_file():
            raise ValueError(f"{index} names {file!r}, which is not there. Download it again.")
        files[name] = path
    return files


def read_tensors(files: Mapping[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and tensors, mapped from disk, file by file."""
    for path in dict.fromkeys(files.values()):
        with _open(path) as opened:
            for name in [name for name, file in files.items() if file == path]:
                yield name, opened.get_tensor(name)


def shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, without reading any."""
    found = {}
    for path in dict.fromkeys(files.values()):
        with _open(path) as opened:
            for name in [name for name, file in files.items() if file == path]:
                found[name] = tuple(opened.get_slice(name).get_shape())
    return found


def write_shards(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    change: Callable[[str, torch.Tensor], torch.Tensor] | None = None,
) -> dict[str, str]:
    """Write tensors as safetensors shards with their index, casting floats to ``dtype`` one at a time.

    ``change(name, tensor)``, of the same shape and dtype, is written in a tensor's place; it is called one at a time.
    Hashing runs beside writing, and a finished shard is read back while the next one is written.

    Returns:
        The sha256 of every tensor's bytes as written.

    Raises:
        ValueError: A tensor read back does not equal what was written.
    """
    shards, size = [[]], 0
    for name, tensor in tensors.items():
        count = tensor.numel() * _target(tensor, dtype).itemsize
        if shards[-1] and size + count > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    digests, weight_map = {}, {}
    total = sum(tensor.numel() * _target(tensor, dtype).itemsize for tensor in tensors.values())
    progress = tqdm(total=total, unit="B", unit_scale=True, desc="writing", leave=False)
    with progress, ThreadPoolExecutor(max_workers=2) as beside:
        checks = []
        for number, names in enumerate(shards, start=1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            part = {name: tensors[name] for name in names}
            path = folder / file
            written = _write_file(path, part, dtype, change, progress, beside)
            if change is None:
                checks.append(beside.submit(_require_same, path, part, dtype))
            else:  # not computed twice
                checks.append(beside.submit(require_equal, dict.fromkeys(names, path), written))
            digests.update(written)
            weight_map.update(dict.fromkeys(names, file))
        progress.set_description("reading back")
        for check in checks:
            check.result()
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return digests


def require_intact(path: Path) -> None:
    """Raise ValueError if a ``torch.save`` file's content is not what its own checksums say; torch does not look.

    Files from before torch 1.6 have none.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        try:
            damaged = archive.testzip()
        except (zipfile.BadZipFile, EOFError) as error:
            damaged = str(error)
    if damaged:
        raise ValueError(f"{path} is damaged: {damaged} does not match its checksum. Copy it again from its source.")


def require_equal(files: Mapping[str, Path], digests: Mapping[str, str]) -> None:
    """Raise ValueError, with their names, if tensors on disk have other digests."""
    found = {name: digest(tensor) for name, tensor in read_tensors(files)}
    wrong = sorted(name for name in {*found, *digests} if found.get(name) != digests.get(name))
    if wrong:
        raise ValueError(f"Tensors {wrong} changed or missing in {sorted({str(file) for file in files.values()})}.")


def digest(tensor: torch.Tensor) -> str:
    """sha256 of a tensor's bytes."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def digest_file(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB".

    Raises:
        ValueError: Another form.
    """
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in UNITS or not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise ValueError(f"A size looks like 5GB or 500MB, got {text!r}.")
    return int(float(number) * UNITS[unit])


def _write_file(
    path: Path,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
    change: Callable[[str, torch.Tensor], torch.Tensor] | None,
    progress: tqdm,
    beside: ThreadPoolExecutor,
) -> dict[str, str]:
    """One safetensors file: header, then each tensor's bytes, hashed ``beside``."""
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors.items():
        target = _target(tensor, dtype)
        end = offset + tensor.numel() * target.itemsize
        header[name] = {"dtype": DTYPE_NAMES[target], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digests = {}
    with open(path, "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, tensor in tensors.items():
            changed = tensor if change is None else change(name, tensor)
            content = _bytes(changed.to(_target(tensor, dtype)))
            hashed = beside.submit(hashlib.sha256, content)
            file.write(content)
            digests[name] = hashed.result().hexdigest()
            progress.update(len(content))
        file.flush()
        os.fsync(file.fileno())
    return digests


def _require_same(path: Path, tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> None:
    """Raise ValueError if a file does not hold exactly these tensors, cast to ``dtype``."""
    with _open(path) as opened:
        wrong = set(opened.keys()) ^ set(tensors)
        for name in set(tensors) - wrong:
            found, expected = opened.get_tensor(name), tensors[name].to(_target(tensors[name], dtype))
            if not same_tensor(found, expected):
                wrong.add(name)
    if wrong:
        raise ValueError(f"{path} does not hold what was written: tensors {sorted(wrong)}. The disk may be failing.")


def same_tensor(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether dtype, shape and every byte agree (NaN equals itself). Eight bytes at a time, which makes it fast."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    left, right = (np.asarray(_bytes(tensor)) for tensor in (first, second))
    whole = left.size - left.size % 8
    words = np.array_equal(left[:whole].view(np.uint64), right[:whole].view(np.uint64))
    return words and np.array_equal(left[whole:], right[whole:])


def _target(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def _names(path: Path) -> Iterable[str]:
    with _open(path) as opened:
        return list(opened.keys())


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises its own error class from Rust
        raise ValueError(f"{path} is no whole safetensors file: {error}. Download it again.") from error


def _digest(file: Any) -> str:
    running = hashlib.sha256()
    for chunk in iter(lambda: file.read(1 << 20), b""):
        running.update(chunk)
    return running.hexdigest()
