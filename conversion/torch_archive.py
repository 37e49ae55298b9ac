"""Read ``torch.save`` files: tensors mapped from disk, checksums verified, no code run."""

from __future__ import annotations

import errno
import mmap
import os
import re
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from ..errors_openvla import OpenVLAValueError

ZIP_ERRORS = (zipfile.BadZipFile, EOFError, RuntimeError, ValueError, zlib.error)  # which one depends on the damage
LEGACY_MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19"  # torch.save before 1.6
READ_BYTES = 1 << 24


def load_torch_file(path: Path) -> Any:
    """Load the content of a ``torch.save`` file with its tensors mapped from disk.

    Only tensors and containers are allowed (``weights_only``). Checksums are not verified here, see
    :func:`require_intact`.

    Raises:
        ValueError: The file is truncated, is no checkpoint, or holds code; the message names the file and the reason.
    """
    is_zip = is_zip_archive(path)
    with open(path, "rb") as file:
        head = file.read(len(LEGACY_MAGIC))
    if not is_zip and head != LEGACY_MAGIC:
        reason = "it is empty" if not head else "it is truncated, or no PyTorch checkpoint"
        raise OpenVLAValueError(f"{path} cannot be read: {reason}. Copy it again from its source.")
    name = str(path)  # torch before 2.3 maps no Path
    try:
        return torch.load(name, map_location="cpu", mmap=is_zip, weights_only=True)
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, EOFError ... depending on the damage
        message = str(error).replace("\n", " ")
        if is_zip and os.strerror(errno.ENOMEM) in message:
            return _load_mapped_read_only(path)
        code = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+\w)", message)
        if code:
            raise OpenVLAValueError(
                f"{path} holds code, {code[1]}, not only tensors; it was not run. Ask its author for tensors alone."
            ) from error
        raise OpenVLAValueError(f"{path} is damaged: {message[:300]}. Copy it again from its source.") from error


def load_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Load a state dict from a ``torch.save`` file as :func:`load_torch_file` does.

    Raises:
        ValueError: As :func:`load_torch_file`, or the file holds anything but a dictionary of tensors.
    """
    content = load_torch_file(path)
    if not isinstance(content, Mapping) or not all(isinstance(tensor, torch.Tensor) for tensor in content.values()):
        raise OpenVLAValueError(f"{path} holds no state dict of tensors.")
    return dict(content)


def is_zip_archive(path: Path) -> bool:
    """Return whether a ``torch.save`` file is a zip archive, as it is from torch 1.6 on."""
    with _damage_reported(path):
        return zipfile.is_zipfile(path)


def require_intact(path: Path) -> None:
    """Read a whole ``torch.save`` file and raise ValueError if its content does not match its checksums.

    torch itself does not verify them. Files from before torch 1.6 have none.
    """
    if not is_zip_archive(path):
        return
    with _damage_reported(path), zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            try:
                with archive.open(info) as record:
                    while record.read(READ_BYTES):
                        pass
            except ZIP_ERRORS as error:
                raise OpenVLAValueError(
                    f"{path} is damaged: {info.filename} does not match its checksum. Copy it again from its source."
                ) from error


def _load_mapped_read_only(path: Path) -> Any:
    """Load a zip archive that is larger than memory and swap.

    torch maps a file so that the tensors can be changed in memory, for which Linux reserves memory: it refuses files
    that are larger than memory and swap. A read-only mapping reserves none. Its tensors must not be changed.

    Raises:
        ValueError: torch does not report where tensors lie, or their bytes are in another processor's order.
    """
    too_large = OpenVLAValueError(f"{path} is larger than memory and swap; to map it, add swap or take a newer torch.")
    if not _has_native_byte_order(path):
        raise too_large
    try:
        with FakeTensorMode():
            content = torch.load(path, map_location="cpu", weights_only=True)
    except NameError as error:  # torch 2.2
        raise too_large from error
    with open(path, "rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    storages: dict[int, torch.UntypedStorage] = {}

    def mapped_storage(fake: torch.UntypedStorage) -> torch.UntypedStorage:
        if not fake.nbytes():
            return torch.UntypedStorage()
        offset: int | None = getattr(fake, "_checkpoint_offset", None)
        if offset is None:
            raise too_large
        if offset not in storages:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns that the memory is not writable
                flat = torch.frombuffer(mapping, dtype=torch.uint8, count=fake.nbytes(), offset=offset)
            storages[offset] = flat.untyped_storage()
        return storages[offset]

    def materialize(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: materialize(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(map(materialize, value))
        if not isinstance(value, torch.Tensor):
            return value
        storage = mapped_storage(value.untyped_storage())
        return torch.empty(0, dtype=value.dtype).set_(storage, value.storage_offset(), value.shape, value.stride())

    return materialize(content)


def _has_native_byte_order(path: Path) -> bool:
    with _damage_reported(path), zipfile.ZipFile(path) as archive:
        orders = [archive.read(name) for name in archive.namelist() if name.endswith("/byteorder")]
    return all(order == sys.byteorder.encode() for order in orders)


@contextmanager
def _damage_reported(path: Path) -> Iterator[None]:
    """Raise ValueError that names the file in place of the errors of a damaged zip archive."""
    try:
        yield
    except OpenVLAValueError:
        raise
    except ZIP_ERRORS as error:
        raise OpenVLAValueError(f"{path} is damaged: {error}. Copy it again from its source.") from error
