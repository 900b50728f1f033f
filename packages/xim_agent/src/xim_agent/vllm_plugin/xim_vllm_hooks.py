"""Changes a module of somebody else's right after it was imported, and imports nothing that would not be anyway."""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

Patch = Callable[[ModuleType], None]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds the modules that are to be changed as the others would, and changes them once they are made."""

    def __init__(self) -> None:
        self.patches: dict[str, Patch] = {}
        self._looking: set[str] = set()

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in self.patches or fullname in self._looking:
            return None
        self._looking.add(fullname)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self._looking.discard(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.patches[fullname])
        return spec


class _Loader(importlib.abc.Loader):
    """Another loader, and the change after it."""

    def __init__(self, inner: importlib.abc.Loader, patch: Patch) -> None:
        self._inner, self._patch = inner, patch

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._inner.exec_module(module)
        self._patch(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self._inner, name)  # importlib.resources and inspect ask loaders for more


_FINDER = _Finder()


def after_import(name: str, patch: Patch) -> None:
    """Let `patch` change the module `name` when it is imported; at once where it has been. A second call for the same
    name is ignored: vLLM may load a plugin more than once."""
    if name in _FINDER.patches:
        return
    _FINDER.patches[name] = patch
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    loaded = sys.modules.get(name)
    if loaded is not None:
        patch(loaded)
