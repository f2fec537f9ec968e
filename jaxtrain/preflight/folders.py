"""Check the run's folder and its checkpoint folder: every process can write, flush and read back, all see the same folder, and
there is enough space.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from pathlib import Path

import jax

from jaxtrain.checkpoint import committed_steps
from jaxtrain.config import Config
from jaxtrain.preflight.checks import BLOCK, Check, Finding, Site, write_probe
from jaxtrain.processes import exchange
from jaxtrain.text import readable_size
from jaxtrain.train.state import Canonical

SEEN_WITHIN = 5.0
"""Seconds that a network file system may take to show one host another host's file."""
NEIGHBOURS = 64
"""Largest number of other processes whose files a process looks for."""


def folders(config: Config) -> list[Path]:
    """Return the folders that a run of this config writes into."""
    return [config.directory, *([config.directory / "checkpoints"] if config.checkpoint.every else [])]


def _probe(folder: Path, token: str, process: int) -> Path:
    return folder / f".preflight-{token}-{process}"


def _block(token: str, process: int) -> bytes:
    return (f"{token}-{process} ".encode() * (BLOCK // 8))[:BLOCK]


def look_at_writing(site: Site) -> dict[str, float]:
    """Write a file, flush it to disk and read it back in each folder; return the seconds."""
    # Before the exchange, which is a barrier: each process that finds a folder missing removes it afterwards, and the last
    # one to remove its file succeeds.
    missing = [path for folder in folders(site.config) for path in (folder, *folder.parents) if not path.exists()]
    site.closing.callback(_forget, missing)
    token = site.token = exchange("preflight token", os.urandom(6).hex(), 60.0)[0]
    process, seconds = jax.process_index(), {}
    for folder in folders(site.config):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            seconds[str(folder)] = write_probe(site, _probe(folder, token, process), _block(token, process))
        except OSError as error:
            why = error.strerror or str(error)
            raise OSError(f"{folder} cannot be written: {why} ({error.filename}); give another --run_dir") from None
    return seconds


def _forget(made: list[Path]) -> None:
    """Remove the folders made for the probe, the deepest first, if still empty."""
    for path in sorted(set(made), key=lambda path: len(path.parts), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()


def judge_writing(site: Site, seen: list[dict[str, float]]) -> list[Finding]:
    """Report ok with the time of the slowest process; a failed write has already raised."""
    findings = []
    for folder in map(str, folders(site.config)):
        slowest = max(facts[folder] for facts in seen)
        words = f"{folder}: {readable_size(BLOCK)} written, flushed and read back in {slowest:.3f} s"
        findings.append(Finding("folders", "ok", words, {"seconds": slowest}))
    return findings


def look_at_sharing(site: Site) -> dict[str, list[int]]:
    """{folder: processes whose file this process cannot read}, of process 0 and the processes after this one."""
    count, own = len(site.hosts), jax.process_index()
    others = sorted({0, *((own + i) % count for i in range(1, min(count, NEIGHBOURS)))} - {own})
    until, missing = time.monotonic() + SEEN_WITHIN, {}
    for folder in folders(site.config):
        missing[str(folder)] = [other for other in others if not _can_read(folder, site.token, other, until)]
    return missing


def _can_read(folder: Path, token: str, process: int, until: float) -> bool:
    """Return whether that process's file is there, whole."""
    while True:
        with contextlib.suppress(OSError):
            if _probe(folder, token, process).read_bytes() == _block(token, process):
                return True
        if time.monotonic() > until:
            return False
        time.sleep(0.1)


def judge_sharing(site: Site, seen: list[dict[str, list[int]]]) -> list[Finding]:
    """Report folders that are not shared: each host would hold only a part of each checkpoint."""
    findings = []
    for folder in map(str, folders(site.config)):
        blind = {process: facts[folder] for process, facts in enumerate(seen) if facts[folder]}
        for process, missing in list(blind.items())[:4]:
            words = f"{site.name(process)} does not see in {folder} what {site.name(missing[0])} has written"
            more = f" (nor {len(missing) - 1} others)" if len(missing) > 1 else ""
            findings.append(Finding("shared folder", "failed", f"{words}{more}; put --run_dir on a file system of all hosts"))
    words = "one process" if len(seen) == 1 else f"the same folder for all {len(seen)} processes"
    return findings or [Finding("shared folder", "ok", words)]


def checkpoint_bytes(site: Site) -> int:
    """Return the bytes of the arrays of one checkpoint."""
    from jaxtrain.train.optimizer import optimizer_of

    config = site.config
    optimizer = optimizer_of(config)
    abstract = Canonical(config, site.mesh, optimizer).abstract
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(abstract))


def checkpoints_to_come(config: Config, present: int) -> int:
    """Return how many checkpoints the folder will gain at most: `keep`, one being written, multiples of `keep_every`."""
    checkpoint, steps = config.checkpoint, config.train.steps
    written = -(-steps // checkpoint.every)
    for_good = steps // checkpoint.keep_every if checkpoint.keep_every else 0
    return max(min(written, checkpoint.keep + 1 + for_good) - present, 0)


def look_at_space(site: Site) -> dict[str, int]:
    """Return the free bytes, and the bytes of the checkpoints to come."""
    folder = folders(site.config)[-1]
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    one = checkpoint_bytes(site) if site.config.checkpoint.every else 0
    present = len(committed_steps(folder)) if one else 0
    return {"free": shutil.disk_usage(nearest).free, "checkpoint": one, "present": present}


def judge_space(site: Site, seen: list[dict[str, int]]) -> list[Finding]:
    """Judge the process that sees the least space."""
    process = min(range(len(seen)), key=lambda i: seen[i]["free"])
    facts = seen[process]
    if not facts["checkpoint"]:
        return [Finding("disk", "ok", f"{readable_size(facts['free'])} free; checkpoint.every=0 saves nothing")]
    count = checkpoints_to_come(site.config, facts["present"])
    needed = count * facts["checkpoint"]
    words = (
        f"{readable_size(facts['free'])} free in {site.name(process)}; {count} more checkpoints of "
        f"{readable_size(facts['checkpoint'])} take {readable_size(needed)}"
    )
    if needed > facts["free"]:
        return [Finding("disk", "failed", f"{words}: fewer with --checkpoint.keep, or another --run_dir", facts)]
    return [Finding("disk", "ok", words, facts)]


def checks() -> list[Check]:
    """Return the checks in order: the second finds the files of the first."""
    return [
        Check("folders", look_at_writing, judge_writing),
        Check("shared folder", look_at_sharing, judge_sharing),
        Check("disk", look_at_space, judge_space),
    ]
