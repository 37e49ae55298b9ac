"""A per-process cache of open dataset files."""

from __future__ import annotations

import os
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .remote import DataPath, on_disk

# File handles inherited across fork; never closed in the child, because closing would block on reader threads that do
# not exist there.
_INHERITED: list[OrderedDict[Any, Any]] = []


class FileHandleCache:
    """Open files of this process, closed in least-recently-used order; a forked or spawned process opens its own.

    Args:
        opener: Open a file; returns an object with ``close()``.
        limit: Number of files kept open.
    """

    def __init__(self, opener: Callable[[Path], Any], limit: int = 8) -> None:
        self.opener, self.limit = opener, limit
        self._handles: OrderedDict[tuple[DataPath, int | None], Any] = OrderedDict()
        _CACHES.add(self)

    def __getitem__(self, path: Path) -> Any:
        """Return the open file of a path on this disk."""
        return self._handle(path, (path, None))

    @contextmanager
    def use(self, path: DataPath) -> Iterator[Any]:
        """Give the open file of a path, for the ``with`` block: so long a remote file is not removed from its cache."""
        with on_disk(path) as file:
            # Its inode differs if it was removed and downloaded again since it was opened.
            yield self._handle(file, (path, None if file is path else file.stat().st_ino))

    def _handle(self, file: Path, key: tuple[DataPath, int | None]) -> Any:
        if key not in self._handles:
            if len(self._handles) >= self.limit:
                self._handles.popitem(last=False)[1].close()
            self._handles[key] = self.opener(file)
        self._handles.move_to_end(key)
        return self._handles[key]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the open files."""
        return type(self), (self.opener, self.limit)


_CACHES: weakref.WeakSet[FileHandleCache] = weakref.WeakSet()


def _keep_inherited() -> None:
    """Keep the handles of a forked process's parent, also those of caches that the garbage collector frees."""
    for cache in _CACHES:
        _INHERITED.append(cache._handles)
        cache._handles = OrderedDict()


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_keep_inherited)
