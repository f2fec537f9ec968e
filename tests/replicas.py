"""The algorithms of `parallel/sync.py` in one process and plain numpy: the oracle that the distributed ones are held to.

Parameters are {name: array}; names that begin with "layers" have the layers as first axis. Nothing here knows of devices, but
for quantised exchanges, where the cut into one chunk a replica and into blocks decides what a scale covers.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from jaxtrain.config import SyncConfig

Tree = dict[str, np.ndarray]


def quantised(x: np.ndarray, compression: str) -> np.ndarray:
    """What [..., block] comes back as, straight from the formulas."""
    if compression == "bfloat16":
        return x.astype(ml_dtypes.bfloat16).astype(np.float32)
    largest = np.float32(127 if compression == "int8" else 448)
    scale = np.maximum(np.abs(x).max(-1, keepdims=True) / largest, np.float32(2.0**-126))
    number = np.clip(x / scale, -largest, largest)
    number = np.round(number) if compression == "int8" else number.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    return number * scale


def blocked(x: np.ndarray, block: int) -> np.ndarray:
    """[R, ...] -> [R, chunk, blocks of it, block]; chunk r belongs to replica r."""
    flat = x.reshape(len(x), -1)
    flat = np.pad(flat, ((0, 0), (0, -flat.shape[1] % (len(x) * block))))
    return flat.reshape(len(x), len(x), -1, block)


def mean_exchanged(x: np.ndarray, residual: np.ndarray, compression: str, block: int) -> tuple[np.ndarray, np.ndarray]:
    """(mean over the first axis as it arrives, what each replica lost)"""
    if compression == "none":
        return x.mean(0, dtype=np.float32), np.zeros_like(x)
    replicas, shape = len(x), x.shape[1:]
    cut = blocked(x + residual, block)
    sent = quantised(cut, compression)
    own = sent.sum(0) / np.float32(replicas)
    sent_on = quantised(own, compression)
    lost = cut - sent + np.eye(replicas, dtype=np.float32)[:, :, None, None] * replicas * (own - sent_on)

    def whole(a: np.ndarray) -> np.ndarray:
        return a.reshape(-1)[: int(np.prod(shape))].reshape(shape)

    return whole(sent_on), np.stack([whole(each) for each in lost])


def divergence(params: list[Tree]) -> float:
    """|P_r - mean P| / |mean P| over all numbers of all leaves, in the mean of replicas r."""
    whole = np.stack([np.concatenate([leaf.reshape(-1) for leaf in each.values()]) for each in params]).astype(np.float64)
    mean = whole.mean(0)
    return float(np.mean(np.linalg.norm(whole - mean, axis=1)) / np.linalg.norm(mean))


class OuterSimulation:
    """local and diloco, in fragments, late and compressed: call `after` with the replicas' parameters after each inner step."""

    def __init__(self, sync: SyncConfig, params: Tree, replicas: int):
        self.sync, self.replicas = sync, replicas
        self.anchor = {name: leaf.copy() for name, leaf in params.items()}
        self.momentum = {name: np.zeros_like(leaf) for name, leaf in params.items()}
        self.residual = {name: np.zeros((replicas, *leaf.shape), np.float32) for name, leaf in params.items()}
        self.late: dict[tuple[int, int], Tree] = {}
        self.arrivals = 0
        self.divergence: dict[int, float] = {}
        """By the step in which a fragment travels (overlap 0 or 1): how far replicas were apart when that began."""

    def _places(self, fragment: int) -> dict[str, Any]:
        """Where a fragment lies in each leaf."""
        stacked = slice(fragment, None, self.sync.fragments)
        return {n: stacked if n.startswith("layers") else ... for n in self.anchor if n.startswith("layers") or fragment == 0}

    def after(self, step: int, params: list[Tree]) -> list[Tree]:
        """The replicas' parameters as the next step finds them; steps count from 1."""
        sync = self.sync
        for fragment in range(sync.fragments):
            places, phase = self._places(fragment), fragment * sync.every // sync.fragments
            if step % sync.every == phase:
                away = {n: np.stack([self.anchor[n][at] - p[n][at] for p in params]) for n, at in places.items()}
                self.late[fragment, step + sync.overlap] = away
                self.divergence[step + sync.overlap] = divergence([{n: p[n][at] for n, at in places.items()} for p in params])
            if (fragment, step) in self.late:
                for name, away in self.late.pop((fragment, step)).items():
                    self._outer_step(name, places[name], away)
                kept = sync.mixing if sync.overlap else 0.0
                params = [dict(p) for p in params]
                for p in params:
                    for name, at in places.items():
                        p[name] = p[name].copy()
                        p[name][at] = kept * p[name][at] + (1 - kept) * self.anchor[name][at]
                self.arrivals += 1
        return params

    def _outer_step(self, name: str, at: Any, away: np.ndarray) -> None:
        sync = self.sync
        residual = self.residual[name][(slice(None), at)] if at is not ... else self.residual[name]
        flat, lost = away.reshape(self.replicas, -1), residual.reshape(self.replicas, -1)
        pieces = max(sync.overlap, 1)
        cuts = [flat.shape[1] * i // pieces for i in range(1, pieces)]
        exchanged = [
            mean_exchanged(x, e, sync.compression, sync.compression_block)
            for x, e in zip(np.split(flat, cuts, axis=1), np.split(lost, cuts, axis=1), strict=True)
        ]
        gradient = np.concatenate([mean for mean, _ in exchanged]).reshape(away.shape[1:])
        if sync.error_feedback:
            residual[...] = np.concatenate([lost for _, lost in exchanged], axis=1).reshape(away.shape)
        if sync.mode == "local":
            self.anchor[name][at] -= gradient
            return
        self.momentum[name][at] = sync.outer_momentum * self.momentum[name][at] + gradient
        self.anchor[name][at] -= sync.outer_lr * (gradient + sync.outer_momentum * self.momentum[name][at])


class GradientSimulation:
    """every_step and delayed: call `mean` with each replica's gradients (means over its own targets) and counts of targets."""

    def __init__(self, sync: SyncConfig, params: Tree, replicas: int):
        self.sync, self.delay = sync, sync.delay if sync.mode == "delayed" else 0
        self.residual = {name: np.zeros((replicas, *leaf.shape), np.float32) for name, leaf in params.items()}
        self.waiting: list[tuple[list[Tree], np.ndarray]] = []

    def mean(self, gradients: list[Tree], targets: np.ndarray) -> Tree | None:
        """The gradients to apply in this step; None while the first ones are still on their way."""
        self.waiting.append((gradients, targets))
        if len(self.waiting) <= self.delay:
            return None
        gradients, targets = self.waiting.pop(0)
        weight = (len(targets) * targets / targets.sum()).astype(np.float32)
        mean = {}
        for name in gradients[0]:
            x = np.stack([w * g[name] for w, g in zip(weight, gradients, strict=True)])
            mean[name], lost = mean_exchanged(x, self.residual[name], self.sync.compression, self.sync.compression_block)
            if self.sync.error_feedback:
                self.residual[name] = lost
        return mean
