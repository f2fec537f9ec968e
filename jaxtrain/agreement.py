"""Compare with process 0, before the first step, all that the processes of a run must have in common.

Processes that differ would train on different data, or compile different programs and wait in XLA for one another. So each
compares what it found for itself: the config and the software before any device is touched, the data once it is open, and each
lowered program before it is compiled. All processes raise the same error, which names a process and both values.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jaxtrain
from jaxtrain import processes
from jaxtrain.config import PARTS, Config
from jaxtrain.config.names import field_values
from jaxtrain.errors import PeersDiffer
from jaxtrain.parts import digests

PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "ml_dtypes", "orbax-checkpoint")
CODE = "code of jaxtrain"
"""Name of the fact that holds `code_digest`."""
OF_ONE_PROCESS = ("distributed.process_id",)
"""Fields of the config that may differ."""
VARIABLES = ("NVIDIA_TF32_OVERRIDE", "NCCL_ALGO", "NCCL_PROTO", "LIBTPU_INIT_ARGS")
"""Environment variables that change numbers or transfers, beside jax's and XLA's flags."""
SHOWN = 8
"""Largest number of differences in one message."""
_LOCAL_JAX_FLAG = re.compile(
    r"visible_devices|num_cpu_devices|mock|cache|_dir$|_to$|_path|_file|log|dump|traceback|color|profil|address|preemption"
)
_LOCAL_XLA_FLAG = re.compile(r"^--(xla_dump|xla_force_host_platform_device_count)|_(dir|file|path)(=|$)")
_NAME = re.compile(r"%\w+(:\d+)?")  # a value in a lowered program; values are numbered, so one more renames all after it
_LONGEST_PROGRAM = 2_000_000  # compressed bytes sent through the key-value store


def check_start(config: Config) -> None:
    """Compare config, software, code and flags. Touches no device.

    Raises:
      PeersDiffer: a process differs from process 0, in all processes.
      PeerMissing: a process did not come within distributed.start_timeout_seconds.
    """
    seconds = float(config.distributed.start_timeout_seconds)
    compare("config", config_facts(config), "give all processes the same command line and config", seconds)
    compare("software", software_facts(), "use the same environment on every host", seconds)


def config_facts(config: Config) -> dict[str, Any]:
    """Return the fields of a config by dotted name."""
    facts = field_values(config) | {PARTS: digests(config.parts, config.model.parts)}
    return {name: value for name, value in facts.items() if name not in OF_ONE_PROCESS}


@functools.cache
def code_digest() -> str:
    """Return a hash of this package's source files: two checkouts may have the same version."""
    root = Path(jaxtrain.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def version_of(package: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def software_facts() -> dict[str, Any]:
    """Return versions, the hash of this package's code, and flags of jax and XLA that may change numbers."""
    import jax

    flags = {
        name: str(value) for name, value in jax.config.values.items() if value is not None and not _LOCAL_JAX_FLAG.search(name)
    }
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        **{package: version_of(package) for package in PACKAGES},
        CODE: code_digest(),
        **flags,
        "XLA_FLAGS": xla_flags(os.environ),
        **{name: os.environ.get(name, "") for name in VARIABLES},
    }


def xla_flags(environ: Mapping[str, str]) -> str:
    """Return the flags of XLA_FLAGS in order of name, without those that may differ: dumps, paths, fake devices."""
    return " ".join(sorted(flag for flag in environ.get("XLA_FLAGS", "").split() if not _LOCAL_XLA_FLAG.search(flag)))


def compare(name: str, facts: Mapping[str, Any], way_out: str, seconds: float) -> None:
    """Compare facts of this process with those of process 0. Each `name` can be used once.

    Raises:
      PeersDiffer: in all processes, if one differs; names it, its first differences and both values.
      PeerMissing: a process did not come in time.
    """
    if not processes.are_several():
        return
    if processes.own_index() == 0:
        processes.post(f"facts/{name}", json.dumps(facts))
        problems = []
    else:
        problems = differences(json.loads(processes.wait_for(f"facts/{name}", seconds)), facts, processes.own_index())
    found = [problem for problems in processes.exchange(f"same {name}", problems[:SHOWN], seconds) for problem in problems]
    if found:
        raise PeersDiffer(shortened(found), way_out)


def differences(first: Mapping[str, Any], mine: Mapping[str, Any], process: int) -> list[str]:
    """Return one line for each fact in which this process differs from process 0."""
    first, mine = (json.loads(json.dumps(facts)) for facts in (first, mine))  # tuples become lists
    return [
        f"{name}={mine.get(name)!r} in process {process}, but {first.get(name)!r} in process 0"
        for name in {**first, **mine}
        if first.get(name) != mine.get(name)
    ]


def shortened(lines: list[str], most: int = SHOWN) -> list[str]:
    """Return at most `most` lines, and a last one that counts the rest."""
    return [*lines[:most], *([f"... and {len(lines) - most} more"] if len(lines) > most else [])]


def compare_program(name: str, lowered: Any) -> None:
    """Compare a lowered program before it is compiled, by its text, which holds no source locations and no device ids.

    Args:
      lowered: a `jax.stages.Lowered`.

    Raises:
      PeersDiffer: a process lowered another program; names the first line that differs.
      PeerMissing: a process did not come in time.
    """
    if not processes.are_several():
        return
    text: str = lowered.as_text()
    own, seconds = processes.own_index(), processes.LONG_SECONDS  # a peer may still read its data, or restore
    digests = processes.exchange_next(hashlib.sha256(text.encode()).hexdigest(), seconds)
    odd = [process for process, digest in enumerate(digests) if digest != digests[0]]
    if not odd:
        return
    packed = base64.b64encode(zlib.compress(text.encode())).decode() if own == 0 else ""
    first = processes.from_first(packed if len(packed) <= _LONGEST_PROGRAM else "")
    line = first_difference(zlib.decompress(base64.b64decode(first)).decode(), text) if own == odd[0] and first else ""
    line = processes.exchange_next(line)[odd[0]]
    raise PeersDiffer(
        [f"the lowered {name} of {processes.name_processes(odd)} is not that of process 0" + (line and f", first in {line}")],
        "config and software are the same, so look for code that reads the host's own name, time, files or random numbers",
    )


def first_difference(first: str, mine: str) -> str:
    """Return the number of the first line that differs beyond names of values, with both texts from where they differ."""
    ours, theirs = ([_NAME.sub("%", line) for line in text.splitlines()] for text in (mine, first))
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    pair = [lines[at] if at < len(lines) else "" for lines in (ours, theirs)]
    begin = max(len(os.path.commonprefix(pair)) - 20, 0)
    here, there = (line[begin : begin + 80].strip() for line in pair)
    return f"line {at + 1}: {here!r}, but {there!r} in process 0"
