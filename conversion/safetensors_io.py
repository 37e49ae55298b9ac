"""Read and write safetensors files one tensor at a time, so that memory never holds a whole model or shard."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import safe_open
from tqdm import tqdm

from ..configuration_openvla import write_json
from ..errors_openvla import OpenVLAValueError
from ..saved_folder import INDEX_FILE
from ..vq_openvla import VQ_MODULE
from .direct_io import PIECE, DirectWriter, Span, read_spans

SIZE_UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9}
FILENAME_PATTERN = "model{suffix}.safetensors"  # transformers' names, with huggingface_hub's suffixes of shards
# Names of the format (https://github.com/huggingface/safetensors#format).
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
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # integers to compare bits, by item size

Transform = Callable[[str, torch.Tensor], torch.Tensor]
Header = dict[str, dict[str, Any]]  # per tensor: dtype, shape, data_offsets


class TensorLocation(NamedTuple):
    """Where a tensor's bytes lie in a file."""

    path: Path
    offset: int
    size: int


def tensor_names(path: Path) -> list[str]:
    """Return the names of a safetensors file's tensors.

    Raises:
        ValueError: The file is damaged.
    """
    with _open(path) as file:
        return list(file.keys())


def read_tensors(files: Mapping[str, Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and tensors, mapped from disk, file by file.

    Args:
        files: The file that holds each tensor.
    """
    for path, names in _names_by_file(files).items():
        with _open(path) as file:
            for name in names:
                yield name, file.get_tensor(name)


def tensor_shapes(files: Mapping[str, Path]) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor from the files' headers."""
    shapes = {}
    for path, names in _names_by_file(files).items():
        with _open(path) as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in names})
    return shapes


def tensor_locations(files: Mapping[str, Path]) -> dict[str, TensorLocation]:
    """Return where the tensors of safetensors files lie."""
    locations = {}
    for path, names in _names_by_file(files).items():
        data_start, header = _read_header(path)
        for name in names:
            if name in header:
                start, end = header[name]["data_offsets"]
                locations[name] = TensorLocation(path, data_start + start, end - start)
    return locations


def tensor_digests(files: Mapping[str, Path]) -> dict[str, str]:
    """Return the sha256 of every tensor's bytes, read from the disk past the page cache, in two threads."""
    spans: dict[Path, list[Span]] = defaultdict(list)
    for name, location in sorted(tensor_locations(files).items(), key=lambda item: item[1]):
        spans[location.path].append(Span(name, location.offset, location.size))
    halves = [(path, spans_of_file[first::2]) for path, spans_of_file in spans.items() for first in (0, 1)]
    with ThreadPoolExecutor(max_workers=2) as executor:
        digests = executor.map(lambda half: _digest_spans(*half), halves)
        return {name: digest for part in digests for name, digest in part.items()}


def require_digests(files: Mapping[str, Path], expected: Mapping[str, str]) -> None:
    """Raise ValueError, naming the tensors, if tensors on disk do not have the expected digests."""
    digests = tensor_digests(files)
    wrong = sorted(name for name in {*digests, *expected} if digests.get(name) != expected.get(name))
    if wrong:
        raise OpenVLAValueError(
            f"Tensors {wrong} changed or missing in {sorted({str(file) for file in files.values()})}."
        )


def find_mismatches(expected: Iterable[tuple[str, torch.Tensor]], tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Return the names of the expected tensors that ``tensors`` lacks or has with another dtype, shape or bytes."""
    return sorted(name for name, tensor in expected if name not in tensors or not _is_identical(tensor, tensors[name]))


def write_shards(
    folder: Path,
    tensors: Mapping[str, torch.Tensor],
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    transform: Transform | None = None,
) -> dict[str, str]:
    """Write tensors as safetensors shards with their index, casting floats to ``dtype`` one piece at a time.

    Each finished shard is read back from the disk while the next one is written, and its tensors must have the digests
    of what was written.

    Args:
        folder: Where to write.
        tensors: Tensors by name, in the order in which they are written.
        dtype: Floating-point tensors are cast to it, but not those of a VQ autoencoder; None keeps each tensor's own.
        max_shard_bytes: Size above which a new shard is begun. A larger tensor gets a shard of its own.
        transform: Called with name and tensor, one at a time; its result, of the same shape and dtype, is written.

    Returns:
        The sha256 of every tensor's bytes as written.

    Raises:
        ValueError: A tensor read back does not equal what was written.
    """
    sizes = {id(t): t.numel() * _written_dtype(name, t, dtype).itemsize for name, t in tensors.items()}
    shards = split_state_dict_into_shards_factory(
        dict(tensors),
        get_storage_size=lambda tensor: sizes[id(tensor)],
        filename_pattern=FILENAME_PATTERN,
        max_shard_size=max_shard_bytes,
    )
    digests: dict[str, str] = {}
    progress = tqdm(total=shards.metadata["total_size"], unit="B", unit_scale=True, desc="writing", leave=False)
    with progress, ThreadPoolExecutor(max_workers=1) as hashing, ThreadPoolExecutor(max_workers=1) as checking:
        checks = []
        for filename, names in shards.filename_to_tensors.items():
            path, shard = folder / filename, {name: tensors[name] for name in names}
            header = _make_header(shard, dtype)
            written = _write_file(path, header, _pieces(shard, dtype, transform), progress, hashing)
            checks.append(checking.submit(_require_written, path, header, written))
            digests.update(written)
        progress.set_description("reading back")
        for check in checks:
            check.result()
    if shards.is_sharded:
        metadata = {"total_size": shards.metadata["total_size"]}
        weight_map = {name: shards.tensor_to_filename[name] for name in tensors}
        write_json(folder / INDEX_FILE, {"metadata": metadata, "weight_map": weight_map})
    return {name: digests[name] for name in tensors}


def parse_size(text: str) -> int:
    """Return the number of bytes of a size such as "5GB" or "500MB".

    Raises:
        ValueError: The size is written in another form.
    """
    number, unit = text[:-2].strip(), text[-2:].upper()
    if unit not in SIZE_UNITS or not number.replace(".", "", 1).isdigit() or float(number) <= 0:
        raise OpenVLAValueError(f"A size looks like 5GB or 500MB, got {text!r}.")
    return int(float(number) * SIZE_UNITS[unit])


def _names_by_file(files: Mapping[str, Path]) -> dict[Path, list[str]]:
    names: dict[Path, list[str]] = defaultdict(list)
    for name, path in files.items():
        names[path].append(name)
    return names


def _make_header(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None) -> Header:
    """Return the header of a safetensors file that holds the tensors in this order."""
    header: Header = {}
    offset = 0
    for name, tensor in tensors.items():
        written_dtype = _written_dtype(name, tensor, dtype)
        end = offset + tensor.numel() * written_dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[written_dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    return header


def _pieces(
    tensors: Mapping[str, torch.Tensor], dtype: torch.dtype | None, transform: Transform | None
) -> Iterator[tuple[str, memoryview]]:
    """Yield names and the bytes to write, at most ``PIECE`` source bytes at a time."""
    for name, tensor in tensors.items():
        flat = _flat(tensor if transform is None else transform(name, tensor))
        for piece in flat.split(PIECE // flat.itemsize):
            yield name, _bytes(piece.to(_written_dtype(name, tensor, dtype)))


def _write_file(
    path: Path,
    header: Header,
    pieces: Iterable[tuple[str, memoryview]],
    progress: tqdm,
    hashing: ThreadPoolExecutor,
) -> dict[str, str]:
    """Write a safetensors file, header first; return the sha256 of every tensor, computed in the thread ``hashing``."""
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    digests = {name: hashlib.sha256() for name in header}
    with DirectWriter(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, piece in pieces:
            hashed = hashing.submit(digests[name].update, piece)
            file.write(piece)
            hashed.result()
            progress.update(len(piece))
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _require_written(path: Path, expected_header: Header, expected_digests: Mapping[str, str]) -> None:
    """Raise ValueError if a file does not hold exactly these tensors."""
    _, header = _read_header(path)
    digests = tensor_digests(dict.fromkeys(header, path))
    wrong = sorted(
        name
        for name in {*header, *expected_header}
        if header.get(name) != expected_header.get(name) or digests.get(name) != expected_digests.get(name)
    )
    if wrong:
        raise OpenVLAValueError(f"{path} does not hold what was written: tensors {wrong}. The disk may be failing.")


def _read_header(path: Path) -> tuple[int, Header]:
    """Return where the data of a safetensors file begins, and its header."""
    with _open(path):  # raises if the header is damaged or does not fit the file
        pass
    size = int.from_bytes(_read_bytes(path, 0, 8), "little")
    header = json.loads(_read_bytes(path, 8, size))
    header.pop("__metadata__", None)
    return 8 + size, header


def _read_bytes(path: Path, offset: int, size: int) -> bytes:
    return b"".join(bytes(piece) for _, piece in read_spans(path, [Span("", offset, size)]))


def _digest_spans(path: Path, spans: list[Span]) -> dict[str, str]:
    digests = {span.name: hashlib.sha256() for span in spans}
    for name, piece in read_spans(path, spans):
        digests[name].update(piece)
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _is_identical(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Return whether tensors have one dtype and shape and the same bytes; NaN equals NaN of the same bits."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    bits = BITS[first.itemsize]
    return torch.equal(_flat(first).view(bits), _flat(second).view(bits))


def _written_dtype(name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype in which a tensor is written; a VQ autoencoder keeps its own."""
    is_cast = dtype is not None and tensor.is_floating_point() and not name.startswith(f"{VQ_MODULE}.")
    return dtype if is_cast and dtype is not None else tensor.dtype


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1)


def _bytes(flat: torch.Tensor) -> memoryview:
    return flat.view(torch.uint8).numpy().data


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises an error class of its own, written in Rust
        raise OpenVLAValueError(f"{path} is no whole safetensors file: {error}. Download it again.") from error
