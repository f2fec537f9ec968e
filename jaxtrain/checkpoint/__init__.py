"""Checkpoints: the training state and what it belongs to, one folder a step, committed whole or not at all, and verified."""

from jaxtrain.checkpoint.same_run import Differences, check_same_run, differences
from jaxtrain.checkpoint.stored import COMMIT_MARK, METADATA_FILE, committed_steps, read_metadata, restore, wrong_leaves
from jaxtrain.checkpoint.writing import Checkpoints

__all__ = ["COMMIT_MARK", "METADATA_FILE", "Checkpoints", "Differences", "check_same_run", "committed_steps", "differences"]
__all__ += ["read_metadata", "restore", "wrong_leaves"]
