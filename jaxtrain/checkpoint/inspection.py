"""The actions of `jaxtrain checkpoint`: list, verify, inspect, compare and prune a run's checkpoints."""

from __future__ import annotations

import datetime
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxtrain.checkpoint.addresses import find
from jaxtrain.checkpoint.blocks import read_arrays
from jaxtrain.checkpoint.branches import branches
from jaxtrain.checkpoint.retention import best_steps, metric_of, outdated, validated
from jaxtrain.checkpoint.same_run import differences
from jaxtrain.checkpoint.stored import (
    COMMIT_MARK,
    absolute,
    committed_steps,
    delete,
    read_metadata,
    read_stored,
    step_path,
    wrong_leaves,
)
from jaxtrain.errors import EXIT_DONE, EXIT_ERROR, CheckpointError, DamagedCheckpoint, cause
from jaxtrain.text import readable_size, show


def arrays(folder: str, step: int, names: Sequence[str] = ()) -> Iterator[tuple[str, Any]]:
    """Yield (name, array) one at a time, so that only one array is in memory; of these names, or of all.

    Raises:
      DamagedCheckpoint: an array cannot be read.
    """
    path, here = step_path(folder, step), SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    leaves = read_stored(path)["leaves"]
    for name in names or leaves:
        words = leaves.get(name)
        if words is None:
            raise CheckpointError(f"{path} holds no {name}")
        dtype, shape = words.rstrip("]").split("[")
        dims = tuple(int(size) for size in shape.split(",") if size)
        leaf = jax.ShapeDtypeStruct(dims, np.dtype(dtype), sharding=here)
        try:
            array = read_arrays(path, {tuple(name.split("/")): leaf})[tuple(name.split("/"))]
        except Exception as error:
            raise DamagedCheckpoint(f"{path}: {name} cannot be read: {cause(error)}") from error
        yield name, array


def list_steps(folder: str) -> int:
    """Print every step folder: name, size, whether it is whole, when it was saved, on which mesh, its validation, whether it is
    the best; then the branches.
    """
    folder, _ = find(folder)
    whole = {str(step) for step in committed_steps(folder)}
    best, scores = best_of(folder)
    for path in sorted(absolute(folder).iterdir(), key=lambda path: (int((re.match(r"\d+", path.name) or [-1])[0]), path.name)):
        if not path.is_dir():
            continue
        size = size_of(path)
        words = "whole" if path.name in whole else "set aside" if "-" in path.name else "not a checkpoint"
        when = ""
        if path.name in whole:
            saved = datetime.datetime.fromtimestamp((path / COMMIT_MARK).stat().mtime)
            try:
                mesh = read_stored(path)["metadata"].get("config", {}).get("mesh", {})
            except CheckpointError as error:
                words, mesh = f"damaged: {error}", {}
            sizes = " x ".join(f"{axis}={size}" for axis, size in mesh.items() if size != 1)
            step = int(path.name)
            score = f"  {scores[step]}{' (best)' if step == best else ''}" if step in scores else ""
            when = f"{saved:%Y-%m-%d %H:%M:%S}  {sizes}{score}"
        show(f"{path.name:>24}  {readable_size(size):>9}  {words}  {when}".rstrip())
    run_dir = Path(folder).parent
    for branch in branches(run_dir):
        steps = ", ".join(map(str, committed_steps(branch / "checkpoints"))) or "none"
        show(f"{os.path.relpath(branch, run_dir)}: steps {steps}")
    return EXIT_DONE


def best_of(folder: str) -> tuple[int | None, dict[int, str]]:
    """Return the best step, if any, and {step: its metric in words} of the steps that validated."""
    metric = metric_of(folder)
    found = {step: row[metric] for step, row in validated(folder).items() if metric in row}
    best = best_steps(folder, 1, metric)
    return best[0] if best else None, {step: f"{metric} {value:.4f}" for step, value in found.items()}


def verify(folder: str, every: bool) -> int:
    """Read every array and compare its checksum."""
    folder, newest = find(folder)
    bad = 0
    for step in committed_steps(folder) if every else [newest]:
        try:
            sums, count, size = read_stored(step_path(folder, step))["checksums"], 0, 0
            for name, array in arrays(folder, step):
                count, size = count + 1, size + array.nbytes
                if wrong_leaves(sums, {name: array}):
                    raise DamagedCheckpoint(f"{name} does not have its checksum")
            show(f"step {step}: {count} arrays, {readable_size(size)}: as they were saved")
        except CheckpointError as error:
            bad += 1
            show(f"step {step}: DAMAGED: {error}")
    return EXIT_ERROR if bad else EXIT_DONE


def inspect(folder: str) -> int:
    """Print a step's metadata, config and arrays."""
    folder, step = find(folder)
    stored = read_stored(step_path(folder, step))
    metadata = stored["metadata"]
    show(f"step {step} in {folder}")
    for name, value in metadata.items():
        if name != "config":
            show(f"{name}: {value}")
    for section, fields in metadata.get("config", {}).items():
        show(f"{section}: {fields}")
    for name, words in stored["leaves"].items():
        show(f"{name:60} {words:32} {stored['checksums'][name]}")
    return EXIT_DONE


def diff(one: str, other: str) -> int:
    """Print the differences between two steps; exit code 1 if arrays or hard config fields differ."""
    (folder, step), (second, other_step) = find(one), find(other)
    found = differences(read_metadata(folder, step), read_metadata(second, other_step))
    for line in (*found.hard, *found.soft):
        show(line)
    stored, against = read_stored(step_path(folder, step)), read_stored(step_path(second, other_step))
    for name in {**stored["leaves"], **against["leaves"]}:
        if stored["leaves"].get(name) != against["leaves"].get(name):
            show(f"{name}: {stored['leaves'].get(name, 'absent')} -> {against['leaves'].get(name, 'absent')}")
    apart = {n for n, value in stored["checksums"].items() if n in against["checksums"] and against["checksums"][n] != value}
    rest = {name: array for name, array in arrays(second, other_step) if name in apart}
    for name, array in arrays(folder, step):
        if name in apart and array.shape == rest[name].shape:
            before, now = np.asarray(array, np.float64), np.asarray(rest[name], np.float64)
            size = float(np.linalg.norm(before)) or 1.0
            show(f"{name}: relative distance {float(np.linalg.norm(now - before)) / size:.3e}")
    if not apart:
        show("all arrays are the same, bit for bit")
    return EXIT_ERROR if apart or found.hard else EXIT_DONE


def prune(folder: str, keep: int, keep_every: int, set_aside: bool, dry_run: bool) -> int:
    """Delete all but the newest `keep` steps, the multiples of `keep_every`, and the best one where the run keeps that; with
    `set_aside` also what was set aside.
    """
    if keep < 1:
        raise CheckpointError(f"--keep={keep}: keep at least 1")
    folder, newest = find(folder)
    config = read_metadata(folder, newest).get("config", {})
    best = best_steps(folder, config.get("checkpoint", {}).get("keep_best", 0), metric_of(folder))
    paths = [absolute(folder) / str(step) for step in outdated(committed_steps(folder), keep, keep_every, best)]
    if set_aside:
        paths += [path for path in absolute(folder).iterdir() if re.fullmatch(r"\d+\.(damaged|rolled-back)-\d+", path.name)]
    for path in paths:
        show(f"{'would delete' if dry_run else 'deleting'} {path}")
        if not dry_run:
            delete(path)
    return EXIT_DONE


def size_of(path: Any) -> int:
    """Return the bytes of all files below a folder (epath has no recursive glob)."""
    return sum(size_of(child) if child.is_dir() else child.stat().length for child in path.iterdir())
