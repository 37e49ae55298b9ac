"""Read and write large files without the system's page cache (O_DIRECT).

A checkpoint and its copy are larger than the page cache, so cached pages would be evicted before they are used again.
And data that is read back to verify a write must come from the disk, not from memory. Where the system or the file
system has no O_DIRECT, files go through the page cache, and a file's pages are dropped before it is read.
"""

from __future__ import annotations

import errno
import io
import mmap
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from ..errors_openvla import OpenVLAValueError

O_DIRECT = getattr(os, "O_DIRECT", 0)  # defined on Linux
BLOCK = (
    1 << 16
)  # O_DIRECT needs offsets and sizes that are multiples of the disk's block: 512 or 4096 bytes, rarely more
PIECE = 1 << 24  # bytes per read or write; each reader or writer has two buffers of this size


class Span(NamedTuple):
    """A range of bytes of a file: the tensor that it belongs to, where it begins, and its number of bytes."""

    name: str
    offset: int
    size: int


def read_spans(path: Path, spans: Iterable[Span]) -> Iterator[tuple[str, memoryview]]:
    """Read spans of a file in pieces of at most ``PIECE`` bytes; the next piece is read in the background.

    Yields:
        The span's name and a piece of its bytes, in order. A piece is valid until the next one is requested.

    Raises:
        ValueError: The file ends before a span does.
    """
    buffers = [_page_aligned_buffer(PIECE + 2 * BLOCK), _page_aligned_buffer(PIECE + 2 * BLOCK)]
    with _open(path, "rb") as file, ThreadPoolExecutor(max_workers=1) as executor:
        pending: tuple[str, Future[memoryview]] | None = None
        for number, piece in enumerate(_split(spans)):
            end = piece.offset + piece.size
            following = piece.name, executor.submit(_read, file, buffers[number % 2], piece.offset, end)
            if pending:
                yield pending[0], pending[1].result()
            pending = following
        if pending:
            yield pending[0], pending[1].result()


class DirectWriter:
    """A new file that is written sequentially; one buffer is written to disk while the other one is filled.

    The file is complete and on the disk when the ``with`` block ends without an error.

    Raises:
        OSError: The disk is full or fails; raised by a later call than the one whose data is lost.
    """

    def __init__(self, path: Path) -> None:
        self._file = _open(path, "wb")
        self._executor = ThreadPoolExecutor(max_workers=1)
        self._buffers = [_page_aligned_buffer(PIECE), _page_aligned_buffer(PIECE)]
        self._filled = self._size = 0
        self._pending: Future[None] | None = None

    def write(self, content: bytes | memoryview) -> int:
        """Append bytes; return their number."""
        remaining = memoryview(content).cast("B")
        count = len(remaining)
        while remaining:
            fitting = min(len(remaining), PIECE - self._filled)
            self._buffers[0][self._filled : self._filled + fitting] = remaining[:fitting]
            self._filled += fitting
            remaining = remaining[fitting:]
            if self._filled == PIECE:
                self._submit(PIECE)
        self._size += count
        return count

    def flush(self) -> None:
        """Do nothing: ``torch.save`` calls this, and data is complete at the end of the ``with`` block only."""

    def __enter__(self) -> DirectWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._submit(-(-self._filled // BLOCK) * BLOCK)  # whole blocks; the excess is truncated below
                self._wait()
                self._file.truncate(self._size)
                os.fsync(self._file.fileno())
                _drop_from_page_cache(self._file.fileno())
        finally:
            self._executor.shutdown()
            self._file.close()

    def _submit(self, count: int) -> None:
        self._wait()
        self._pending = self._executor.submit(_write, self._file, self._buffers[0][:count])
        self._buffers.reverse()
        self._filled = 0

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()


def _page_aligned_buffer(size: int) -> memoryview:
    """Return memory that begins at a page, as O_DIRECT requires."""
    return memoryview(mmap.mmap(-1, size))


def _open(path: Path, mode: str) -> io.FileIO:
    """Open a file unbuffered, with O_DIRECT where it is supported."""

    def opener(name: str, flags: int) -> int:
        try:
            return os.open(name, flags | O_DIRECT, 0o666)
        except OSError as error:
            if not O_DIRECT or error.errno != errno.EINVAL:  # EINVAL: this file system has no O_DIRECT
                raise
        descriptor = os.open(name, flags, 0o666)
        _drop_from_page_cache(descriptor)
        return descriptor

    return io.FileIO(path, mode, opener=opener)


def _drop_from_page_cache(descriptor: int) -> None:
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _split(spans: Iterable[Span]) -> Iterator[Span]:
    """Split spans into pieces of at most ``PIECE`` bytes."""
    for name, offset, size in spans:
        for start in range(offset, offset + size, PIECE):
            yield Span(name, start, min(start + PIECE, offset + size) - start)


def _read(file: io.FileIO, buffer: memoryview, start: int, end: int) -> memoryview:
    """Read the blocks around ``start`` to ``end`` into the buffer; return the view of exactly these bytes."""
    first = start // BLOCK * BLOCK
    needed, count = end - first, 0
    file.seek(first)
    while count < needed:
        read = file.readinto(buffer[count : -(-needed // BLOCK) * BLOCK])
        if not read:
            raise OpenVLAValueError(
                f"{os.fsdecode(file.name)} ends at byte {first + count}, before {end}. Copy it again from its source."
            )
        count += read
    return buffer[start - first : needed]


def _write(file: io.FileIO, content: memoryview) -> None:
    while content:
        content = content[file.write(content) :]
