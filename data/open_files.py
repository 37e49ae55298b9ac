"""Files of a dataset that stay open between reads, in every process for itself."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Files that a parent process opened, kept from being closed here.
_INHERITED: list[Any] = []


class Handles:
    """Open files of this process, the least recently used closed first; a forked or spawned process opens its own."""

    def __init__(self, opener: Callable[[Path], Any], limit: int = 8) -> None:
        self.opener, self.limit = opener, limit
        self.process, self.opened = os.getpid(), OrderedDict()

    def __getitem__(self, path: Path) -> Any:
        if self.process != os.getpid():
            # A library's threads do not survive a fork. Closing what was inherited would wait for them forever.
            _INHERITED.append(self.opened)
            self.process, self.opened = os.getpid(), OrderedDict()
        if path not in self.opened:
            if len(self.opened) >= self.limit:
                self.opened.popitem(last=False)[1].close()
            self.opened[path] = self.opener(path)
        self.opened.move_to_end(path)
        return self.opened[path]

    def __getstate__(self) -> dict[str, Any]:
        return {"opener": self.opener, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)
