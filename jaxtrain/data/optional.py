"""Import packages that only some sources need."""

from __future__ import annotations

import importlib
from typing import Any

from jaxtrain.errors import DataError


def require(module: str, needed_by: str) -> Any:
    """Import an optional package, or raise a DataError that says how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0].replace("_", "-")
        raise DataError(f"{needed_by} needs the package {package}: pip install 'jaxtrain[data]'") from error
