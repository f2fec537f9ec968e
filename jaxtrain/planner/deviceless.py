"""Compile the train step for NVIDIA GPUs on a machine without one, and report its FLOPs, memory and traffic.

It is the program that those GPUs would run: the same XLA, from the plugin of the extra `plan`, runs its whole GPU pipeline
(collectives, schedule, Triton, cuBLAS and cuDNN calls, buffer assignment) for a described target. The process itself must be on
the CPU backend: the plugin's own backend would look for a GPU. XLA ends the process if the target's description is wrong, so
for user input call `report_in_subprocess`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxtrain.config import Config
from jaxtrain.config.loading import config_of, for_another_process
from jaxtrain.errors import ExplainedError
from jaxtrain.hardware import find_chip
from jaxtrain.jax_private import backends_are_initialized, fused_attention
from jaxtrain.planner.targets import UNLIMITED, find_target
from jaxtrain.program.collectives import CollectiveRow, read_collectives, table
from jaxtrain.program.groups import layout_of
from jaxtrain.program.hlo import matmul_flops

if TYPE_CHECKING:
    from jaxtrain.parallel.sync import ReplicaExchange

PLUGINS = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
NEEDS_PTXAS = (0, 11)
"""The first jaxlib whose XLA assembles programs with NVIDIA's own tools."""
PTXAS_PACKAGE = "nvidia-cuda-nvcc-cu12"
CUDA_TOOLKITS = ("/usr/local/cuda", "/opt/cuda")
DEVICES_PER_HOST = 8
CUDNN_VERSION = 91000
_MARK = "jaxtrain-answer:"


@dataclass(frozen=True)
class CompiledStep:
    """One device's figures for one step of a compiled program."""

    flops: float
    """Matmul FLOPs (`hlo.matmul_flops`); for dropless experts, at an even spread."""
    rows: tuple[CollectiveRow, ...]
    """Bytes between devices (`program.collectives.table`)."""
    argument_bytes: int
    """Parameters, optimizer state and batch."""
    temp_bytes: int
    """Working memory of XLA's buffer assignment."""
    output_bytes: int
    alias_bytes: int
    """Bytes of the output that alias arguments."""
    attention: str
    """Attention backend and the reason."""

    @property
    def memory_bytes(self) -> int:
        """All bytes of the program on a device; the CUDA context, NCCL's buffers and fragmentation come on top."""
        return self.argument_bytes + self.temp_bytes + self.output_bytes - self.alias_bytes


def find_obstacle() -> str | None:
    """Return why this machine cannot compile for NVIDIA GPUs and how to change that, in one line; None if it can."""
    if importlib.util.find_spec("jax_plugins") is None or not any(map(importlib.util.find_spec, PLUGINS)):
        return 'XLA\'s compiler for NVIDIA GPUs is not installed (it needs no GPU): pip install "jaxtrain[plan]"'
    version = importlib.metadata.version("jaxlib")
    if tuple(map(int, version.split(".")[:2])) >= NEEDS_PTXAS and not _has_ptxas():
        return f"XLA's compiler for NVIDIA GPUs (jaxlib {version}) needs ptxas and libdevice: pip install {PTXAS_PACKAGE}"
    return None


def _has_ptxas() -> bool:
    """Return whether XLA finds NVIDIA's assembler: with libdevice, in a package, on the PATH, or in a CUDA toolkit.

    Without it XLA ends the process by SIGSEGV.
    """
    packages = importlib.util.find_spec("nvidia")
    folders = [Path(folder) for folder in packages.submodule_search_locations or ()] if packages else []
    in_packages = any(path for folder in folders for path in folder.glob("*/bin/ptxas"))
    return in_packages or shutil.which("ptxas") is not None or any(Path(kit, "bin/ptxas").exists() for kit in CUDA_TOOLKITS)


def has_plugin() -> bool:
    """Return whether this machine can compile for NVIDIA GPUs."""
    return find_obstacle() is None


def require_plugin() -> None:
    """Check that this machine can compile for NVIDIA GPUs.

    Raises:
      ExplainedError: it cannot; says how to install what is missing.
    """
    obstacle = find_obstacle()
    if obstacle:
        raise ExplainedError(obstacle)


def _require_cpu_backend() -> None:
    import jax

    if not backends_are_initialized():
        jax.config.update("jax_platforms", "cpu")
    if (jax.config.jax_platforms or "") != "cpu":  # type: ignore[attr-defined]
        raise ExplainedError(
            f"jax already runs on {jax.default_backend()} (JAX_PLATFORMS={jax.config.jax_platforms!r}); "  # type: ignore[attr-defined]
            "set JAX_PLATFORMS=cpu before starting to compile for GPUs that are not there"
        )


def make_devices(chip: str, count: int, devices_per_host: int = DEVICES_PER_HOST, memory_bytes: int = UNLIMITED) -> list[Any]:
    """Return devices that programs can only be compiled for, `devices_per_host` to a process.

    Args:
      chip: a name in `targets.TARGETS`.
      count: number of devices; a multiple of `devices_per_host`, or fewer than that.
      memory_bytes: memory at which XLA begins to recompute to save memory; by default unlimited.

    Raises:
      ExplainedError: the plugin is missing, jax is already on another backend, or count does not fill hosts.
    """
    require_plugin()
    _require_cpu_backend()
    from jax.experimental import topologies

    per_host = min(count, devices_per_host)
    if count % per_host:
        raise ExplainedError(f"{count} devices do not fill hosts of {per_host}; use a multiple of {per_host}")
    text = find_target(chip).text(memory_bytes)
    topology = topologies.get_topology_desc(platform="cuda", target_config=text, topology=f"1x{count // per_host}x{per_host}")
    return list(topology.devices)


@contextlib.contextmanager
def cudnn_without_a_gpu(compute_capability: tuple[int, int]) -> Iterator[None]:
    """Let JAX lower cuDNN attention for a GPU of this capability without the GPU or libcudnn.

    JAX asks libcudnn only for its version, and its own backend, here the CPU's, for the GPU's capability: without an answer it
    takes no head wider than 128, and no values narrower than keys (multi-head latent attention).
    """

    def parse(capability: str) -> tuple[int, ...]:
        return tuple(int(part) for part in capability.split("."))

    answers: dict[str, Callable[..., Any]] = {
        "check_cudnn_version": lambda: CUDNN_VERSION,
        "check_compute_capability": lambda least: compute_capability >= parse(least),
        "is_cuda_compute_capability_equal": lambda wanted: compute_capability == parse(wanted),
    }
    library = fused_attention()
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.callback(setattr, library, name, getattr(library, name))
            setattr(library, name, answer)
        yield


def compile_for(
    config: Config,
    chip: str = "h100-sxm",
    devices_per_host: int = DEVICES_PER_HOST,
    options: dict[str, Any] | None = None,
    exchange: ReplicaExchange | None = None,
) -> tuple[Any, Any, str]:
    """Compile the train step of a valid config (no mesh axis -1) for as many chips as its mesh has.

    Args:
      chip: as in `make_devices`; empty: for the devices of this process.
      devices_per_host: as in `make_devices`.
      options: XLA options over those that the trainer sets.
      exchange: what the step does between replicas; by default it only averages gradients.

    Returns:
      (the compiled program, its mesh, the attention backend and the reason)

    Raises:
      ExplainedError: as `make_devices`; or the config's attention cannot run on that chip.
    """
    from jaxtrain.mesh import make_mesh
    from jaxtrain.models.building import choose_attention
    from jaxtrain.parallel.sync import ReplicaExchange
    from jaxtrain.train.optimizer import optimizer_of
    from jaxtrain.train.step import compile_train_step

    count, optimizer = math.prod(config.mesh.shape), optimizer_of(config)
    mesh = make_mesh(config.mesh, make_devices(chip, count, devices_per_host) if chip else None)
    with cudnn_without_a_gpu(find_target(chip).architecture.compute_capability) if chip else contextlib.nullcontext():
        backend, why = choose_attention(config, mesh)
        program = compile_train_step(config, mesh, optimizer, backend, options, exchange or ReplicaExchange())
    return program, mesh, f"{backend}: {why}"


def report(
    config: Config,
    chip: str = "h100-sxm",
    devices_per_host: int = DEVICES_PER_HOST,
    options: dict[str, Any] | None = None,
) -> CompiledStep:
    """Compile (see `compile_for`) and report on the program."""
    compiled, mesh, attention = compile_for(config, chip, devices_per_host, options)
    text, memory = compiled.as_text(), compiled.memory_analysis()
    return CompiledStep(
        flops=matmul_flops(text),
        rows=tuple(table(read_collectives(text, layout_of(mesh), find_chip(chip)))) if chip else (),
        argument_bytes=memory.argument_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        alias_bytes=memory.alias_size_in_bytes,
        attention=attention,
    )


def report_in_subprocess(config: Config, chip: str = "h100-sxm", devices_per_host: int = DEVICES_PER_HOST) -> CompiledStep:
    """Do `report` in a process of its own: XLA may end it, and this one may be on any backend.

    Args:
      chip: as in `make_devices`; empty: compile for `devices_per_host` fake CPU devices.

    Raises:
      ExplainedError: the process's error, or how it ended.
    """
    flags = {}
    if chip:
        require_plugin()
    else:
        flags["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices_per_host}"
    request = json.dumps([for_another_process(config), chip, devices_per_host])
    said = ask(request, f"compiling for {chip or f'{devices_per_host} fake CPU devices'}", **flags)
    said["rows"] = tuple(CollectiveRow(**row) for row in said["rows"])
    return CompiledStep(**said)


class CompilerDied(ExplainedError):
    """A compiling process ended without an answer: XLA aborted, or the system ended it."""


def ask(request: str, doing: str, **environment: str) -> dict[str, Any]:
    """Run this module on CPU in its own process with `request` on its standard input; return what it answers.

    Raises:
      ExplainedError: the process's error.
      CompilerDied: how it ended, in one line, after what it was `doing`.
    """
    done = subprocess.run(
        [sys.executable, "-m", "jaxtrain.planner.deviceless"],
        input=request,
        env=os.environ | {"JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    line = next((line for line in done.stdout.splitlines() if line.startswith(_MARK)), None)
    if line is None:
        ended = f"exit code {done.returncode}" if done.returncode >= 0 else signal.Signals(-done.returncode).name
        raise CompilerDied(f"{doing} ended with {ended}: {_cause(done.stderr)}")
    said = json.loads(line.removeprefix(_MARK))
    if "error" in said:
        raise ExplainedError(said["error"])
    return said


def _cause(stderr: str) -> str:
    """Return the line that says why a process crashed: XLA's first fatal one, its first error or warning, or the last."""
    lines = stderr.strip().splitlines() or ["no output"]
    return next((line for level in "FEW" for line in lines if re.match(rf"{level}\d{{4,}} ", line)), lines[-1])


def main() -> None:
    """Read a request of `report_in_subprocess` from standard input, and answer with the report, or with its ExplainedError."""
    config, *arguments = json.loads(sys.stdin.read())
    try:
        said = dataclasses.asdict(report(config_of(config), *arguments))
    except ExplainedError as error:
        said = {"error": str(error)}
    print(_MARK + json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
