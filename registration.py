"""Register this package's classes with transformers' Auto classes as soon as transformers is imported."""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _ImportWatcher(importlib.abc.MetaPathFinder):
    """Finder that registers the classes after transformers, or the module of this package that needs it, is imported.

    ``import openvla`` shall be quick and still make ``AutoModel.from_pretrained`` find these classes. So neither
    transformers nor the model code is imported by it. Registration needs both complete: it waits until no module
    of either is in the middle of its import.
    """

    def __init__(self) -> None:
        self.depth = 0  # imports of watched modules that are under way

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "transformers" and not fullname.startswith(f"{__package__}."):
            return None
        specs = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and spec.loader is not None:
            # On the instance: the import system creates one loader for each module.
            spec.loader.exec_module = functools.partial(self._execute, spec.loader.exec_module)  # type: ignore[method-assign]
        return spec

    def _execute(self, exec_module: Any, module: ModuleType) -> None:
        self.depth += 1
        try:
            exec_module(module)
        finally:
            self.depth -= 1
        if self.depth == 0 and self in sys.meta_path and "transformers" in sys.modules:
            sys.meta_path.remove(self)
            _register()


def _register() -> None:
    importlib.import_module(f"{__package__}.loading").register_auto_classes()


def register_with_transformers() -> None:
    """Register now where transformers is imported, and otherwise as soon as it is."""
    if "transformers" in sys.modules:
        _register()
    elif not any(isinstance(finder, _ImportWatcher) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportWatcher())
