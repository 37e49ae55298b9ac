"""A per-process cache of open dataset files."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

# File handles inherited across fork; never closed in the child, because closing would block on reader threads that do
# not exist there.
_INHERITED: list[OrderedDict[Path, Any]] = []


class FileHandleCache:
    """Open files of this process, closed in least-recently-used order; a forked or spawned process opens its own.

    Args:
        opener: Open a file; returns an object with ``close()``.
        limit: Number of files kept open.
    """

    def __init__(self, opener: Callable[[Path], Any], limit: int = 8) -> None:
        self.opener, self.limit = opener, limit
        self._process = os.getpid()
        self._handles: OrderedDict[Path, Any] = OrderedDict()

    def __getitem__(self, path: Path) -> Any:
        if self._process != os.getpid():
            _INHERITED.append(self._handles)
            self._process, self._handles = os.getpid(), OrderedDict()
        if path not in self._handles:
            if len(self._handles) >= self.limit:
                self._handles.popitem(last=False)[1].close()
            self._handles[path] = self.opener(path)
        self._handles.move_to_end(path)
        return self._handles[path]

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle without the open files."""
        return type(self), (self.opener, self.limit)
