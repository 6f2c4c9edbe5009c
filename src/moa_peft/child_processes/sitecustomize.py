"""Registration in the processes that a program started by `moa exec` starts itself (accelerate's launcher, workers).

Python runs a module of this name at start-up when its folder is on PYTHONPATH, which `moa exec` sees to. Nothing is
imported until the process imports PEFT; right after that the method is registered.
"""

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = str(Path(__file__).parent)


class _ThenRegister(Loader):
    """Loads PEFT as its own loader does, and registers the method afterwards."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        importlib.import_module("moa_peft")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


class _AfterPeft(MetaPathFinder):
    """Finds PEFT once, and steps aside."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != "peft":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec("peft")
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def _run_shadowed_sitecustomize() -> None:
    """Run the environment's own sitecustomize, which this file stands in front of."""
    spec = PathFinder.find_spec("sitecustomize", [entry for entry in sys.path if entry != HERE])
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _AfterPeft())
_run_shadowed_sitecustomize()
