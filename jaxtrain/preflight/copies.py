"""Check the other places of a run's state, if configured: the snapshot folder on every host, and the mirror."""

from __future__ import annotations

import math
import os
import shutil
import time
from collections import defaultdict
from typing import Any

import jax

from jaxtrain.checkpoint.fast import KEPT
from jaxtrain.checkpoint.mirror import Mirror
from jaxtrain.config import Config
from jaxtrain.files import user_path
from jaxtrain.preflight.checks import BLOCK, Check, Finding, Site, write_probe
from jaxtrain.text import readable_size


def snapshot_bytes(site: Site) -> int:
    """Return the bytes of one snapshot of this process: every distinct shard of the state on its devices."""
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
    """Write a file and read it back; return the free bytes and the largest size of this process's snapshots."""
    folder = user_path(site.config.checkpoint.fast_dir)
    try:
        write_probe(site, folder / f".preflight-{site.token}-{jax.process_index()}", os.urandom(BLOCK))
    except OSError as error:
        return {"problem": error.strerror or str(error)}
    return {"problem": "", "free": shutil.disk_usage(folder).free, "needed": (KEPT + 1) * snapshot_bytes(site)}


def judge_snapshots(site: Site, seen: list[dict[str, Any]]) -> list[Finding]:
    """Sum over the processes of a host, which share its memory. Failing snapshots stop no run, so these are warnings."""
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
    """Write an object, read it back and remove it in process 0; return the seconds."""
    if jax.process_index() != 0:
        return None
    started = time.perf_counter()
    Mirror(site.config.directory / "checkpoints", site.config.checkpoint).probe(f".preflight-{site.token}", os.urandom(BLOCK))
    return time.perf_counter() - started


def judge_mirror(site: Site, seen: list[float | None]) -> list[Finding]:
    """Report ok; a failed probe has already raised."""
    words = f"{site.config.checkpoint.mirror}: {readable_size(BLOCK)} written, read back and removed in {seen[0]:.3f} s"
    return [Finding("mirror", "ok", words, {"seconds": seen[0]})]


def checks(config: Config) -> list[Check]:
    """Return the checks of the configured places."""
    snapshots = [Check("snapshots", look_at_snapshots, judge_snapshots)] if config.checkpoint.fast_every else []
    return snapshots + ([Check("mirror", look_at_mirror, judge_mirror)] if config.checkpoint.mirror else [])
