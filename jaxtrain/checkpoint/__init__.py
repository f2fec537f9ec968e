"""Checkpoints: the training state and what it belongs to, one folder a step, committed whole or not at all, and verified.

Names are imported when they are first asked for, so that `jaxtrain checkpoint` listens to Ctrl-C before jax is there.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxtrain.checkpoint.same_run import Differences, check_same_run, differences
    from jaxtrain.checkpoint.stored import (
        COMMIT_MARK,
        METADATA_FILE,
        committed_steps,
        read_metadata,
        restore,
        wrong_leaves,
    )
    from jaxtrain.checkpoint.writing import Checkpoints

__all__ = [
    "COMMIT_MARK",
    "METADATA_FILE",
    "Checkpoints",
    "Differences",
    "check_same_run",
    "committed_steps",
    "differences",
    "read_metadata",
    "restore",
    "wrong_leaves",
]
_ELSEWHERE = {"Checkpoints": "writing", **dict.fromkeys(("Differences", "check_same_run", "differences"), "same_run")}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'stored')}"), name)
