"""Build the named device mesh, with its axes laid onto hosts so that the axes with most traffic stay inside a host."""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxtrain.config import MESH_AXES, MeshConfig
from jaxtrain.errors import ConfigError, ExplainedError
from jaxtrain.quiet_plugin import NVIDIA_DRIVER

MEMORY_FRACTION = "0.93"
"""Share of a GPU's memory that jax takes; CUDA, NCCL and cuBLAS need the rest (`planner.estimates.Cluster.reserved_bytes`)."""


@contextlib.contextmanager
def _quiet_without_driver() -> Iterator[None]:
    """Suppress the traceback that jax logs if its CUDA plugin (extra `plan`) is on a host without NVIDIA's driver."""

    def has_more_to_say(record: logging.LogRecord) -> bool:
        return NVIDIA_DRIVER.exists() or not record.getMessage().startswith("Jax plugin configuration error")

    logger = logging.getLogger("jax._src.xla_bridge")
    logger.addFilter(has_more_to_say)
    try:
        yield
    finally:
        logger.removeFilter(has_more_to_say)


def count_devices() -> int:
    """Return jax's number of devices over all processes. The first call initialises them.

    Raises:
      ExplainedError: none, or not of the kind that JAX_PLATFORMS requests.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", MEMORY_FRACTION)  # jax's default is 0.75
    # XLA's limit is 64 GiB a process, whose devices may have more on the host (`train/README.md`, "Memory of the host").
    of_host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") >> 30
    os.environ.setdefault("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", str(of_host))
    try:
        with _quiet_without_driver():
            return jax.device_count()
    except (RuntimeError, AssertionError) as error:  # the assertion: JAX_PLATFORMS=cuda without jax's CUDA plugin
        wanted = os.environ.get("JAX_PLATFORMS", "")
        why = (str(error).splitlines() or ["jax has no backend of that name"])[0]
        raise ExplainedError(
            f"no device can be used with JAX_PLATFORMS={wanted!r}: {why}; unset it to take what there is, "
            "or for NVIDIA GPUs install jaxtrain[cuda12] or jaxtrain[cuda13]"
        ) from error


def split_over_hosts(shape: Sequence[int], devices_per_host: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Cut each axis into a factor inside a host and a factor across hosts: shape = inside * across, axis by axis.

    The last axis (tensor) fills a host first, then the one before it: the order of MESH_AXES is the order of traffic.

    Raises:
      ConfigError: the axes do not fill a host evenly.
    """
    inside, left = [], devices_per_host
    for size in reversed(shape):
        inside.append(math.gcd(size, left))
        left //= inside[-1]
    inside = inside[::-1]
    if left > 1:
        words = " x ".join(f"{axis}={size}" for axis, size in zip(MESH_AXES, shape, strict=True) if size > 1)
        raise ConfigError(
            [
                f"mesh: {words} cannot be laid onto hosts of {devices_per_host} devices; "
                f"choose axes whose factors make up {devices_per_host}"
            ]
        )
    return tuple(inside), tuple(size // own for size, own in zip(shape, inside, strict=True))


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Return the mesh of a resolved config (no axis -1), all seven axes present, each device once.

    On one host devices are laid in order, tensor innermost. On several, `mesh_utils` makes a hybrid mesh whose inner part is a
    host (`split_over_hosts`).
    """
    devices = list(devices if devices is not None else jax.devices())
    per_host = Counter(device.process_index for device in devices)
    if len(set(per_host.values())) != 1:
        raise ConfigError([f"mesh: hosts hold different numbers of devices: {dict(per_host)}; every host needs the same"])
    ordered = sorted(devices, key=lambda device: (device.process_index, device.id))
    if len(per_host) == 1:
        grid = np.array(ordered).reshape(config.shape)
    else:
        inside, across = split_over_hosts(config.shape, per_host[ordered[0].process_index])
        grid = mesh_utils.create_hybrid_device_mesh(inside, across, ordered, process_is_granule=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def describe_mesh(mesh: Mesh) -> str:
    """Return one line for the log: the axes above 1, the devices, and which axes cross hosts."""
    words = " x ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    hosts = np.vectorize(lambda device: device.process_index)(mesh.devices)
    crossing = [axis for i, axis in enumerate(MESH_AXES) if (hosts != np.take(hosts, [0], axis=i)).any()]
    kind = mesh.devices.flat[0].device_kind
    tail = f", {len(set(hosts.flat))} hosts ({', '.join(crossing)} across hosts)" if crossing else ""
    return f"{words} ({mesh.devices.size} x {kind}{tail})"
