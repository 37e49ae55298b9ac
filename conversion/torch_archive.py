"""The zip archive that a torch.save file is: which of its records a tensor is, and whether its checksums hold."""

from __future__ import annotations

import mmap
import os
import sys
import warnings
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors_openvla import OpenVLAValueError
from .direct_io import PIECE, Place

ZIP_ERRORS = (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, zlib.error)  # by what is damaged
MAPS = Path("/proc/self/maps")  # Linux: what this process has mapped, and where


def is_archive(path: Path) -> bool:
    """Whether a torch.save file is a zip archive, as it is from torch 1.6 on."""
    with _damage_named(path):
        return zipfile.is_zipfile(path)


def mapped_to_read(path: Path) -> Any:
    """The content of a torch.save archive, its tensors mapped so that they can be read but not changed.

    torch maps a file so that memory could be changed, for which Linux sets memory aside: it refuses files larger than
    all memory and swap. Such a map needs none.

    Raises:
        ValueError: torch is too old to say where tensors lie, or the bytes are in the order of another processor.
    """
    try:
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except NameError as error:  # torch 2.2
        raise _too_large(path) from error
    with open(path, "rb") as file:
        whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    begins = _stored(path)
    storages = {}

    def real(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: real(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(real, value))
        if not isinstance(value, torch.Tensor):
            return value
        size, offset = value.untyped_storage().nbytes(), getattr(value.untyped_storage(), "_checkpoint_offset", None)
        if size and offset not in begins:
            raise _too_large(path)
        if size and offset not in storages:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it cannot be written
                storages[offset] = torch.frombuffer(whole, dtype=torch.uint8, count=size, offset=offset)
        storage = storages[offset].untyped_storage() if size else torch.UntypedStorage()
        return torch.empty(0, dtype=value.dtype).set_(storage, value.storage_offset(), value.shape, value.stride())

    return real(content)


def _too_large(path: Path) -> ValueError:
    return ValueError(f"{path} is larger than memory and swap; to map it, add swap or take a newer torch.")


def records(path: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, Place]:
    """Which record of a torch.save file each mapped tensor is; those that are only a part of one are left out.

    A tensor says where it lies in memory, the system where in memory the file lies, the file's directory where records
    lie in the file.

    Raises:
        ValueError: A record's own header is damaged.
    """
    found = _stored(path)
    begins = _mapped_at(path)
    begins = _fitting(found, tensors) if begins is None else begins
    return {
        name: place
        for name, tensor in tensors.items()
        for begin in begins
        if (place := found.get(tensor.data_ptr() - begin))
        and tensor.is_contiguous()
        and tensor.nbytes == place.size
        and place.offset % tensor.itemsize == 0
    }


def require_intact(path: Path, but: Collection[str] = ()) -> None:
    """Raise ValueError if a ``torch.save`` file's content is not what its own checksums say; torch does not look.

    Records named by ``but`` are left out. Files from before torch 1.6 have no checksums.
    """
    if not is_archive(path):
        return
    with _archive(path) as archive:
        for info in archive.infolist():
            if info.filename not in but:
                with _opened(archive, info) as record:
                    while record.read(PIECE):
                        pass


def damaged_record(path: Path, record: str) -> ValueError:
    """The error to raise."""
    return ValueError(f"{path} is damaged: {record} does not match its checksum. Copy it again from its source.")


def _mapped_at(path: Path) -> list[int] | None:
    """The addresses at which this process has the beginning of a file mapped; None where the system does not say."""
    if not MAPS.exists():
        return None
    fields = [line.split(maxsplit=5) for line in MAPS.read_bytes().splitlines()]  # addresses, rights, offset, …, path
    begins = [line for line in fields if len(line) == 6 and int(line[2], 16) == 0 and os.path.exists(line[5])]
    return [int(line[0].partition(b"-")[0], 16) for line in begins if os.path.samefile(line[5], path)]


def _fitting(found: dict[int, Place], tensors: Mapping[str, torch.Tensor]) -> list[int]:
    """The address, if there is just one, from which on every tensor's storage would be a record of its size."""
    storages = {s.data_ptr(): s.nbytes() for s in (tensor.untyped_storage() for tensor in tensors.values())}
    storages = {address: size for address, size in storages.items() if size}
    lowest = min(storages, default=0)
    begins = [
        lowest - offset
        for offset, place in found.items()
        if place.size == storages.get(lowest) and (lowest - offset) % mmap.PAGESIZE == 0
    ]
    fitting = [
        begin
        for begin in begins
        if all(address - begin in found and found[address - begin].size == n for address, n in storages.items())
    ]
    return fitting if len(fitting) == 1 else []


def _stored(path: Path) -> dict[int, Place]:
    """Records of a torch.save file that are in it as they are in memory, by their offset."""
    if not is_archive(path):
        return {}
    found = {}
    with _archive(path) as archive, open(path, "rb") as file:
        for info in archive.infolist():
            with _opened(archive, info) as record:
                if info.filename.endswith("/byteorder") and record.read() != sys.byteorder.encode():
                    return {}  # torch has swapped the bytes in memory
            file.seek(info.header_offset + 26)
            lengths = file.read(4)  # of the name and of what pads it
            offset = info.header_offset + 30 + sum(int.from_bytes(lengths[i : i + 2], "little") for i in (0, 2))
            if info.compress_type == zipfile.ZIP_STORED and info.file_size:
                found[offset] = Place(path, offset, info.file_size, info.filename, info.CRC)
    return found


def _archive(path: Path) -> zipfile.ZipFile:
    with _damage_named(path):
        return zipfile.ZipFile(path)


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    try:
        yield
    except ZIP_ERRORS as error:
        raise OpenVLAValueError(f"{path} is damaged: {error}. Copy it again from its source.") from error


@contextmanager
def _opened(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Iterator[Any]:
    """A record of a torch.save file; a wrong header, or a wrong checksum at its end, is raised."""
    try:
        with archive.open(info) as record:
            yield record
    except ZIP_ERRORS as error:
        raise damaged_record(Path(archive.filename), info.filename) from error
