"""A bounded folder of downloaded files that several processes share.

A process that reads a file holds a shared lock on it, one that downloads or removes it an exclusive one. The system
releases the locks of a process that ends; a forked process has no part in those of its parent. A file that is being
downloaded has the suffix ``.part`` and its final size in its name; it gets its own name when it is complete, and what
an interrupted download has left is continued.
"""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from ..errors_openvla import OpenVLAError, OpenVLAImportError, OpenVLAValueError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

DEFAULT_GB = 50.0
SIZE_VARIABLE, FOLDER_VARIABLE = "OPENVLA_DATA_CACHE_GB", "OPENVLA_CACHE"
# What is kept when files are removed, as a part of the limit: so files are listed once for many downloads.
_KEPT = 0.9
_LOCK_FILE = ".lock"
_UNFINISHED = re.compile(r".*\.(\d+)\.part")
# How long to wait until other processes have read their files, in seconds: at first, with a warning, and in all.
_POLL_SECONDS, _PATIENCE_SECONDS, _MAX_WAIT_SECONDS = 0.02, 10.0, 1800.0


class RemoteError(OpenVLAError, OSError):
    """A remote file cannot be brought to this machine. ``skip_bad`` does not leave out its episodes."""


class _Entry(NamedTuple):
    """A file of the cache: its time of last use, its path, and its size in bytes when it is complete."""

    used: int
    path: Path
    size: int


def cache_folder() -> Path:
    """Return the folder of what can be made or downloaded again: $OPENVLA_CACHE, else openvla in the user's cache."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(FOLDER_VARIABLE) or Path(home) / "openvla")


def cache_limit() -> int:
    """Return the cache's limit in bytes: $OPENVLA_DATA_CACHE_GB (10**9 bytes each), else 50 GB.

    Raises:
        OpenVLAValueError: The variable is not a positive number.
    """
    text = os.environ.get(SIZE_VARIABLE) or str(DEFAULT_GB)
    try:
        limit = int(float(text) * 1e9)
    except (ValueError, OverflowError):
        limit = 0
    if limit <= 0:
        raise OpenVLAValueError(f"{SIZE_VARIABLE} must be a number of gigabytes above 0, got {text!r}.")
    return limit


class FileCache:
    """Downloaded files, of which the least recently used are removed when there is no room for another.

    Args:
        folder: Where the files are; created if it does not exist.
        limit: Largest sum of the files' sizes in bytes, unfinished downloads included.

    Raises:
        OpenVLAImportError: The system has no file locks (Windows).
    """

    def __init__(self, folder: Path, limit: int) -> None:
        if fcntl is None:
            raise OpenVLAImportError("Remote datasets need file locks, which Windows lacks: download the dataset.")
        self.folder, self.limit = folder, limit

    @contextmanager
    def use(self, name: str, size: int, download: Callable[[IO[bytes]], None]) -> Iterator[Path]:
        """Give a file, which is not removed inside the ``with`` block; it is downloaded if it is not there.

        Args:
            name: The file's name in the cache; different content must have different names.
            size: Its size in bytes.
            download: Append to an open, unbuffered file what is missing of it. If it raises, the file is kept for the
                next time.

        Raises:
            RemoteError: The file is larger than the limit, other processes leave no room for it, or the folder cannot
                be written.
        """
        path = self.folder / name
        try:
            while (file := _open_locked(path, "rb", fcntl.LOCK_SH)) is None:
                self._add(path, size, download)
            os.utime(path)
        except OpenVLAError:
            raise
        except OSError as error:
            raise RemoteError(
                f"{self.folder}, where files of remote datasets are kept, cannot be written: {error}. Set "
                f"{FOLDER_VARIABLE} to a folder on a disk with room."
            ) from error
        with _unlock_after(file):
            yield path

    def _add(self, path: Path, size: int, download: Callable[[IO[bytes]], None]) -> None:
        """Download a file, or wait until another process has done so."""
        part = path.with_name(f"{path.name}.{size}.part")
        file = self._reserve(path, part, size)
        if file is None:
            if waited := _open_locked(part, "rb", fcntl.LOCK_SH):
                _unlock(waited)
            return
        with _unlock_after(file):
            download(file)
            os.fsync(file.fileno())
            with self._locked_total():
                os.replace(part, path)

    def _reserve(self, path: Path, part: Path, size: int) -> IO[bytes] | None:
        """Return the locked file to download to, when there is room; None if another process has or downloads it."""
        if size > self.limit:
            raise RemoteError(
                f"{part.name} has {size / 1e9:.3g} GB, more than the cache of remote files may hold: set "
                f"{SIZE_VARIABLE} above {size / 1e9:.3g} (now {self.limit / 1e9:.3g})."
            )
        start, has_warned = time.monotonic(), False
        while True:
            with self._locked_total() as total_file:
                if path.exists():
                    return None
                if part.exists() or self._make_room(total_file, size):
                    part.touch()
                    return _open_locked(part, "r+b", fcntl.LOCK_EX | fcntl.LOCK_NB)
            waited = time.monotonic() - start
            if waited > _MAX_WAIT_SECONDS:
                raise RemoteError(
                    f"{part.name} ({size / 1e9:.3g} GB) has found no room in {self.folder} for {waited:.0f} s, because "
                    f"other processes read its {self.limit / 1e9:.3g} GB: set a larger {SIZE_VARIABLE}."
                )
            if waited > _PATIENCE_SECONDS and not has_warned:
                has_warned = True
                logger.warning(
                    "%s waits for room in %s: other processes read its files; set a larger %s.",
                    *(part.name, self.folder, SIZE_VARIABLE),
                )
            time.sleep(_POLL_SECONDS)

    @contextmanager
    def _locked_total(self) -> Iterator[IO[bytes]]:
        """Lock the cache against other processes that add or remove; give the file with the sum of the sizes."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with _unlock_after(open(self.folder / _LOCK_FILE, "a+b")) as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield file

    def _make_room(self, total_file: IO[bytes], size: int) -> bool:
        """Count ``size`` bytes as used, after removing files if needed; False if files in use leave no room.

        The stored sum may be too large (after a crash, or if files were removed by hand), never too small.
        """
        total_file.seek(0)
        text = total_file.read()
        total = int(text) if text.isdigit() else self.limit + 1
        if total + size > self.limit:
            entries = self._entries()
            total = sum(entry.size for entry in entries)
            aim = max(0, int(self.limit * _KEPT) - size)
            for entry in entries if total + size > self.limit else ():
                if total <= aim:
                    break
                total -= entry.size if _remove(entry.path) else 0
        has_room = total + size <= self.limit
        total_file.truncate(0)
        total_file.write(str(total + size if has_room else total).encode())
        total_file.flush()
        return has_room

    def _entries(self) -> list[_Entry]:
        """Return the cache's files, the least recently used first."""
        entries = []
        for file in os.scandir(self.folder):
            if file.name != _LOCK_FILE and file.is_file():
                status, unfinished = file.stat(), _UNFINISHED.fullmatch(file.name)
                size = int(unfinished[1]) if unfinished else status.st_size
                entries.append(_Entry(status.st_mtime_ns, Path(file.path), size))
        return sorted(entries)


def _open_locked(path: Path, mode: str, operation: int) -> IO[bytes] | None:
    """Return the opened and locked file; None if it does not exist, no longer has its name, or may not be waited for.

    Args:
        path: The file.
        mode: As of ``open``, binary.
        operation: As of ``fcntl.flock``.
    """
    try:
        file: IO[bytes] = open(path, mode, buffering=0)  # noqa: SIM115
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(file, operation)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
            return file
    except (BlockingIOError, FileNotFoundError):  # locked by others; renamed or removed before the lock was given
        pass
    _unlock(file)
    return None


def _unlock(file: IO[bytes]) -> None:
    """Unlock a file and close it. Closing alone leaves the lock to a process that was forked meanwhile."""
    fcntl.flock(file, fcntl.LOCK_UN)
    file.close()


@contextmanager
def _unlock_after(file: IO[bytes]) -> Iterator[IO[bytes]]:
    """Unlock a file and close it at the end of the ``with`` block; a process forked in the block only closes it."""
    process = os.getpid()
    try:
        yield file
    finally:
        if os.getpid() == process:
            _unlock(file)
        else:
            file.close()


def _remove(path: Path) -> bool:
    """Remove a file that nobody uses, and return whether it was removed.

    It is emptied too, because a process may still have it open between two uses; its next use opens the file anew.
    """
    file = _open_locked(path, "r+b", fcntl.LOCK_EX | fcntl.LOCK_NB)
    if file is None:
        return False
    with _unlock_after(file):
        path.unlink()
        file.truncate(0)
    return True
