"""The other places of a run's state, where the config names some: the folder of snapshots on every host, and the mirror."""

from __future__ import annotations

import math
import os
import shutil
from collections import defaultdict
from typing import Any

import jax

from jaxtrain.checkpoint.fast import KEPT
from jaxtrain.checkpoint.mirror import Mirror
from jaxtrain.config import Config
from jaxtrain.files import user_path
from jaxtrain.preflight.checks import Check, Elapsed, Finding, Site
from jaxtrain.text import readable_size

BLOCK = 2**20
"""Bytes written to each place."""


def snapshot_bytes(site: Site) -> int:
    """Return the bytes of one snapshot of this process: every different part of the state that its devices hold."""
    from jaxtrain.train.optimizer import optimizer_of
    from jaxtrain.train.state import abstract_state

    config = site.config
    optimizer = optimizer_of(config)
    total = 0
    for leaf in jax.tree.leaves(abstract_state(config, site.mesh, optimizer)):
        places = {repr(index) for index in leaf.sharding.addressable_devices_indices_map(leaf.shape).values()}
        total += len(places) * math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return total


def look_at_snapshots(site: Site) -> dict[str, Any]:
    """Write and read back a file of its own; bytes free, and those that this process's snapshots take at their most."""
    folder = user_path(site.config.checkpoint.fast_dir)
    path, block = folder / f".preflight-{site.token}-{jax.process_index()}", os.urandom(BLOCK)
    try:
        with open(path, "xb") as file:
            site.closing.callback(path.unlink, missing_ok=True)
            file.write(block)
        if path.read_bytes() != block:
            raise OSError("what was written is not what is read back")
    except OSError as error:
        return {"problem": error.strerror or str(error)}
    return {"problem": "", "free": shutil.disk_usage(folder).free, "needed": (KEPT + 1) * snapshot_bytes(site)}


def judge_snapshots(site: Site, seen: list[dict[str, Any]]) -> list[Finding]:
    """Return the processes of a host share its memory. Snapshots that fail stop no run, so these are warnings."""
    folder, findings = site.config.checkpoint.fast_dir, []
    for process, facts in enumerate(seen):
        if facts["problem"]:
            words = f"{site.name(process)} cannot write {folder}: {facts['problem']}; give another --checkpoint.fast_dir"
            findings.append(Finding("snapshots", "warning", words))
    hosts: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for host, facts in zip(site.hosts, seen, strict=True):
        if not facts["problem"]:
            hosts[host].append(facts)
    for host, members in hosts.items():
        needed, free = sum(facts["needed"] for facts in members), min(facts["free"] for facts in members)
        words = f"{folder} on {host}: {readable_size(free)} free, {KEPT + 1} snapshots take {readable_size(needed)}"
        if needed > free:
            findings.append(Finding("snapshots", "warning", f"{words}: give another --checkpoint.fast_dir"))
        elif host == site.hosts[0]:
            findings.append(Finding("snapshots", "ok", words, {"free": free, "needed": needed}))
    return findings


def look_at_mirror(site: Site) -> float | None:
    """Process 0 writes an object, reads it back and removes it: seconds."""
    if jax.process_index() != 0:
        return None
    clock = Elapsed()
    Mirror(site.config.directory / "checkpoints", site.config.checkpoint).probe(f".preflight-{site.token}", os.urandom(BLOCK))
    return clock()


def judge_mirror(site: Site, seen: list[float | None]) -> list[Finding]:
    """It has worked, or the look has raised."""
    words = f"{site.config.checkpoint.mirror}: {readable_size(BLOCK)} written, read back and removed in {seen[0]:.3f} s"
    return [Finding("mirror", "ok", words, {"seconds": seen[0]})]


def checks(config: Config) -> list[Check]:
    """Of the places that the config names."""
    snapshots = [Check("snapshots", look_at_snapshots, judge_snapshots)] if config.checkpoint.fast_every else []
    return snapshots + ([Check("mirror", look_at_mirror, judge_mirror)] if config.checkpoint.mirror else [])
