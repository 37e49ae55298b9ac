"""Large files from and to the disk itself, past the system's page cache (O_DIRECT).

A checkpoint and its copy are larger than the cache: on their way through it each page pushes out one that is needed
again, and what is read back from it is what memory holds, not what the disk holds. Where the system or the file system
has no O_DIRECT, files go through the cache, which is told first to let go of what is to be read.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from ..errors_openvla import OpenVLAValueError

O_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it
BLOCK = 1 << 16  # O_DIRECT starts and ends at multiples of a disk's block, which is 512 or 4096 bytes, seldom more
PIECE = 1 << 24  # bytes per read or write; each reader or writer has two buffers


class Place(NamedTuple):
    """Where a tensor's bytes lie; in a torch.save file also their record's name and checksum (CRC-32)."""

    path: Path
    offset: int
    size: int
    record: str | None = None
    checksum: int | None = None


def read_spans(path: Path, spans: Iterable[tuple[Any, int, int]]) -> Iterator[tuple[Any, memoryview]]:
    """The bytes of spans (key, offset, size) in pieces, each with its span's key; the next one is read meanwhile.

    All pieces of a span but the last have PIECE bytes; a piece is valid until the next one is asked for.

    Raises:
        ValueError: The file ends before a span does.
    """
    buffers = [_buffer(PIECE + 2 * BLOCK), _buffer(PIECE + 2 * BLOCK)]  # whole blocks around a piece
    with _opened(path, "rb") as file, ThreadPoolExecutor(max_workers=1) as beside:
        ready = None
        for number, (key, start, end) in enumerate(_pieces(spans)):
            following = key, beside.submit(_read, file, buffers[number % 2], start, end)
            if ready:
                yield ready[0], ready[1].result()
            ready = following
        if ready:
            yield ready[0], ready[1].result()


class DirectWriter:
    """A new file, written front to back; the disk is busy with one piece while the next one is filled.

    It is whole, and on the disk, when the ``with`` block ends well.

    Raises:
        OSError: The disk is full, or fails; it comes up in a later call.
    """

    def __init__(self, path: Path) -> None:
        self._file = _opened(path, "wb")
        self._beside = ThreadPoolExecutor(max_workers=1)
        self._buffers = [_buffer(PIECE), _buffer(PIECE)]
        self._filled = self._size = 0
        self._writing: Future | None = None

    def __enter__(self) -> DirectWriter:
        return self

    def write(self, content: Any) -> int:
        """Append bytes."""
        left = memoryview(content).cast("B")
        count = len(left)
        while left:
            taken = min(len(left), PIECE - self._filled)
            self._buffers[0][self._filled : self._filled + taken] = left[:taken]
            self._filled += taken
            left = left[taken:]
            if self._filled == PIECE:
                self._hand_over(PIECE)
        self._size += count
        return count

    def flush(self) -> None:
        """For torch.save, which asks for it; nothing is promised before the end."""

    def __exit__(self, kind: Any, *rest: Any) -> None:
        try:
            if kind is None:
                self._hand_over(-(-self._filled // BLOCK) * BLOCK)  # more than was given; cut off below
                self._wait()
                self._file.truncate(self._size)
                os.fsync(self._file.fileno())
        finally:
            self._beside.shutdown()
            self._file.close()

    def _hand_over(self, count: int) -> None:
        self._wait()
        self._writing = self._beside.submit(_write, self._file, self._buffers[0][:count])
        self._buffers.reverse()
        self._filled = 0

    def _wait(self) -> None:
        if self._writing is not None:
            self._writing.result()


def _buffer(size: int) -> memoryview:
    """Memory that begins at a page, as O_DIRECT wants it."""
    return memoryview(mmap.mmap(-1, size))


def _opened(path: Path, mode: str) -> io.FileIO:
    def past_the_cache(name: str, flags: int) -> int:
        try:
            return os.open(name, flags | O_DIRECT, 0o666)
        except OSError as error:
            if not O_DIRECT or error.errno != errno.EINVAL:  # what a file system without O_DIRECT says
                raise
        descriptor = os.open(name, flags, 0o666)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return descriptor

    return open(path, mode, buffering=0, opener=past_the_cache)


def _pieces(spans: Iterable[tuple[Any, int, int]]) -> Iterator[tuple[Any, int, int]]:
    """Key, start and end of each piece."""
    for key, offset, size in spans:
        for start in range(offset, offset + size, PIECE):
            yield key, start, min(start + PIECE, offset + size)


def _read(file: io.FileIO, buffer: memoryview, start: int, end: int) -> memoryview:
    first = start // BLOCK * BLOCK
    wanted, found = end - first, 0
    file.seek(first)
    while found < wanted:
        count = file.readinto(buffer[found : -(-wanted // BLOCK) * BLOCK])
        if not count:
            raise OpenVLAValueError(
                f"{file.name} ends at byte {first + found}, before {end}. Copy it again from its source."
            )
        found += count
    return buffer[start - first : wanted]


def _write(file: io.FileIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]
