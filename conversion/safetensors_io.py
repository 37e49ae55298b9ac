"""Tensor files, read by memory map and written one tensor at a time: nothing here ever holds a whole model."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from tqdm import tqdm

from ..configuration_openvla import write_json
from ..errors_openvla import OpenVLAValueError
from ..publishing_openvla import INDEX_FILE, PICKLED_FILE, PICKLED_INDEX_FILE, SINGLE_FILE, warn_of_two_sets
from .direct_io import PIECE, DirectWriter, Place, read_spans
from .torch_archive import damaged_record, is_archive, mapped_to_read, require_intact

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
    mapped = is_archive(path)
    with open(path, "rb") as file:
        head = file.read(len(LEGACY_MAGIC))
    if not mapped and head != LEGACY_MAGIC:
        reason = "it is empty" if not head else "it is truncated, or no PyTorch checkpoint"
        raise OpenVLAValueError(f"{path} cannot be read: {reason}. Copy it again from its source.")
    name = str(path)  # before torch 2.3 a Path cannot be mapped
    try:
        return torch.load(name, map_location="cpu", mmap=mapped, weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError ... by the kind of damage
        first = str(error).replace("\n", " ")
        if mapped and os.strerror(errno.ENOMEM) in first:
            return mapped_to_read(path)
        code = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+\w)", first)
        if code:
            raise OpenVLAValueError(
                f"{path} holds code, {code[1]}, not only tensors; it was not run. Ask its author for tensors alone."
            ) from error
        raise OpenVLAValueError(f"{path} is damaged: {first[:300]}. Copy it again from its source.") from error


def weight_files(folder: Path) -> dict[str, Path]:
    """Return which file of a Hub folder holds which tensor, as transformers loads it; files are safetensors.

    Raises:
        ValueError: There are none, an index names a file outside the folder or one that is not there.
    """
    index, single = folder / INDEX_FILE, folder / SINGLE_FILE
    warn_of_two_sets(folder)
    if single.is_file():
        return dict.fromkeys(_names(single), single)
    if index.is_file():
        return _indexed(index)
    raise OpenVLAValueError(
        f"{folder} holds neither {SINGLE_FILE} nor {INDEX_FILE}; give a folder of whole weights without a variant in "
        "their names. An adapter becomes one with: openvla merge ADAPTER OUT."
    )


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
    if (folder / PICKLED_FILE).is_file() or not index.is_file():
        require_intact(folder / PICKLED_FILE)
        return read_pickle(folder / PICKLED_FILE)
    files = _indexed(index)
    for path in set(files.values()):
        require_intact(path)
    parts = {path: read_pickle(path) for path in set(files.values())}
    missing = sorted(name for name, path in files.items() if name not in parts[path])
    if missing:
        raise OpenVLAValueError(f"{index} names tensors that are not in their files: {missing}.")
    return {name: parts[path][name] for name, path in files.items()}


def _indexed(index: Path) -> dict[str, Path]:
    """The weight map of an index, none of whose files lies outside its folder."""
    folder = index.parent
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise OpenVLAValueError(f"{index} is no index of weight files: {error}.") from error
    files = {}
    for name, file in weight_map.items():
        path = folder / file
        if not file or Path(file).name != file:
            raise OpenVLAValueError(f"{index} names {file!r}, which lies outside the folder; refused.")
        if not path.is_file():
            raise OpenVLAValueError(f"{index} names {file!r}, which is not there. Download it again.")
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
    places: Mapping[str, Place] | None = None,
) -> dict[str, str]:
    """Write tensors as safetensors shards with their index, casting floats to ``dtype`` one piece at a time.

    ``change(name, tensor)``, of the same shape and dtype, is written in a tensor's place; it is called one at a time.
    Tensors with ``places`` are read from there, past the cache, and their checksums are of the very bytes that were
    used. Each finished shard is read back from the disk while the next one is written, and must have the digests that
    were computed of the source.

    Returns:
        The sha256 of every tensor's bytes as written.

    Raises:
        ValueError: A tensor read back does not equal what was written, or a source is damaged.
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
    with progress, ThreadPoolExecutor(max_workers=1) as hashing, ThreadPoolExecutor(max_workers=1) as checking:
        checks = []
        for number, names in enumerate(shards, start=1):
            file = SINGLE_FILE if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            part = {name: tensors[name] for name in names}
            header = _header(part, dtype)
            contents = _contents(part, dtype, change, places or {})
            written = _write_file(folder / file, header, contents, progress, hashing)
            checks.append(checking.submit(_require_written, folder / file, header, written))
            digests.update(written)
            weight_map.update(dict.fromkeys(names, file))
        progress.set_description("reading back")
        for check in checks:
            check.result()
    if len(shards) > 1:
        write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return digests


def require_equal(files: Mapping[str, Path], expected: Mapping[str, str]) -> None:
    """Raise ValueError, with their names, if tensors on disk have other digests."""
    found = digests(places_of(files))
    wrong = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    if wrong:
        raise OpenVLAValueError(
            f"Tensors {wrong} changed or missing in {sorted({str(file) for file in files.values()})}."
        )


def places_of(files: Mapping[str, Path]) -> dict[str, Place]:
    """Where the tensors of safetensors files lie."""
    found = {}
    for path in dict.fromkeys(files.values()):
        begin, header = _read_header(path)
        for name, (start, end) in ((name, entry["data_offsets"]) for name, entry in header.items()):
            if files.get(name) == path:
                found[name] = Place(path, begin + start, end - start)
    return found


def digests(places: Mapping[str, Place]) -> dict[str, str]:
    """sha256 of tensors' bytes, read from the disk past the cache, two at a time."""
    inside = {place.path: [] for place in places.values()}
    for name, place in sorted(places.items(), key=lambda item: item[1][:2]):
        inside[place.path].append((name, place.offset, place.size))
    parts = [(path, spans[first::2]) for path, spans in inside.items() for first in (0, 1)]
    with ThreadPoolExecutor(max_workers=2) as beside:
        return {name: sha for part in beside.map(_digests, parts) for name, sha in part.items()}


def differing(first: Mapping[str, Place], second: Mapping[str, Place]) -> list[str]:
    """Names of the tensors of ``first`` that ``second`` lacks or has with other bytes, read from the disk."""
    wrong = [name for name, place in first.items() if name not in second or second[name].size != place.size]
    both = {name: (place, second[name]) for name, place in first.items() if name not in wrong}
    for paths in dict.fromkeys((one.path, other.path) for one, other in both.values()):
        pairs = {n: pair for n, pair in both.items() if (pair[0].path, pair[1].path) == paths}
        sides = [[(n, pair[side].offset, pair[side].size) for n, pair in pairs.items()] for side in (0, 1)]
        for (name, one), (_, other) in zip(*map(read_spans, paths, sides)):
            if not _same_bytes(one, other):
                wrong.append(name)
    return sorted(set(wrong))


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
        raise OpenVLAValueError(f"A size looks like 5GB or 500MB, got {text!r}.")
    return int(float(number) * UNITS[unit])


def _header(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> dict[str, dict[str, Any]]:
    """What a safetensors file says of its tensors, which lie in this order."""
    header, offset = {}, 0
    for name, tensor in tensors.items():
        target = _target(tensor, dtype)
        end = offset + tensor.numel() * target.itemsize
        header[name] = {"dtype": DTYPE_NAMES[target], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    return header


def _contents(
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
    change: Callable[[str, torch.Tensor], torch.Tensor] | None,
    places: Mapping[str, Place],
) -> Iterator[tuple[str, memoryview]]:
    """The bytes to write, in pieces that are valid until the next one is asked for."""
    from_disk = {name: places[name] for name in tensors if name in places and change is None}
    spans = {place.path: [] for place in from_disk.values()}
    for name, place in from_disk.items():
        spans[place.path].append((name, place.offset, place.size))
    streams = {path: read_spans(path, wanted) for path, wanted in spans.items()}
    for name, tensor in tensors.items():
        target = _target(tensor, dtype)
        if name not in from_disk:
            flat = (tensor if change is None else change(name, tensor)).detach().contiguous().reshape(-1)
            for piece in flat.split(PIECE // flat.itemsize):
                yield name, _bytes(piece.to(target))
            continue
        place, done, checksum = from_disk[name], 0, 0
        while done < place.size:
            _, raw = next(streams[place.path])
            yield name, raw if target == tensor.dtype else _bytes(torch.frombuffer(raw, dtype=tensor.dtype).to(target))
            checksum = zlib.crc32(raw, checksum)  # after the bytes were used: they were still the right ones
            done += len(raw)
        if place.checksum not in (None, checksum):
            raise damaged_record(place.path, place.record)


def _write_file(
    path: Path,
    header: Mapping[str, Any],
    contents: Iterable[tuple[str, memoryview]],
    progress: tqdm,
    hashing: ThreadPoolExecutor,
) -> dict[str, str]:
    """One safetensors file: header, then each tensor's bytes, hashed beside; digests by name."""
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    running = {name: hashlib.sha256() for name in header}
    with DirectWriter(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, content in contents:
            hashed = hashing.submit(running[name].update, content)
            file.write(content)
            hashed.result()
            progress.update(len(content))
    return {name: hashed.hexdigest() for name, hashed in running.items()}


def _require_written(path: Path, header: Mapping[str, Any], written: Mapping[str, str]) -> None:
    """Raise ValueError if a file does not hold exactly these tensors."""
    found = _read_header(path)[1]
    same = digests(places_of(dict.fromkeys(found, path)))
    wrong = sorted(
        name for name in {*found, *header} if found.get(name) != header.get(name) or same.get(name) != written.get(name)
    )
    if wrong:
        raise OpenVLAValueError(f"{path} does not hold what was written: tensors {wrong}. The disk may be failing.")


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the data of a safetensors file begins, and what its header says of each tensor."""
    with _open(path):  # which checks that the header is sound and fits the file
        pass
    size = int.from_bytes(_read_all(path, 0, 8), "little")
    header = json.loads(_read_all(path, 8, size))
    header.pop("__metadata__", None)
    return 8 + size, header


def _read_all(path: Path, offset: int, size: int) -> bytes:
    return b"".join(bytes(piece) for _, piece in read_spans(path, [(None, offset, size)]))


def _digests(part: tuple[Path, list[tuple[str, int, int]]]) -> dict[str, str]:
    path, spans = part
    running = {name: hashlib.sha256() for name, _, _ in spans}
    for name, piece in read_spans(path, spans):
        running[name].update(piece)
    return {name: hashed.hexdigest() for name, hashed in running.items()}


def _same_bytes(first: memoryview, second: memoryview) -> bool:
    """Eight bytes at a time, which makes it fast."""
    left, right = (np.frombuffer(side, np.uint8) for side in (first, second))
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
        raise OpenVLAValueError(f"{path} is no whole safetensors file: {error}. Download it again.") from error


def _digest(file: Any) -> str:
    running = hashlib.sha256()
    for chunk in iter(lambda: file.read(1 << 20), b""):
        running.update(chunk)
    return running.hexdigest()
