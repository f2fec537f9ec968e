"""Keep a notice of jax's CUDA plugin (extra `plan`) off standard error on a host without NVIDIA's driver.

Its C++ modules, which `import jax` loads, and its compiler, which the first look at the devices loads, each print
"cudart_stub.cc: Could not find cuda drivers", before any log level holds.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ExtensionFileLoader, ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

NVIDIA_DRIVER = Path("/proc/driver/nvidia")
_MODULES = re.compile(r"jax_cuda\d+_plugin\.|jax_plugins\.xla_cuda\d+$")


def install() -> None:
    """Suppress what the plugin prints while it is loaded, in the rest of this process."""
    if not NVIDIA_DRIVER.exists():
        sys.meta_path.insert(0, _Finder())


class _Finder:
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path, target) if _MODULES.match(name) else None
        if spec is not None and isinstance(spec.loader, ExtensionFileLoader):
            spec.loader = _Extension(name, spec.loader.path)
        elif spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Source(name, spec.loader.path)
        return spec


class _Extension(ExtensionFileLoader):
    def create_module(self, spec: ModuleSpec) -> Any:
        with _without_stderr():
            return super().create_module(spec)


class _Source(SourceFileLoader):
    def exec_module(self, module: Any) -> None:
        super().exec_module(module)
        if hasattr(module, "initialize"):  # jax calls it, and it loads the compiler
            module.initialize = _without_stderr()(module.initialize)


@contextmanager
def _without_stderr() -> Iterator[None]:
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
