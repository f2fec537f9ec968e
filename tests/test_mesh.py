"""Which device stands where: tensor inside a host, whatever the hosts."""

import logging
import math
import os
import re
from dataclasses import dataclass

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from jaxtrain import mesh as mesh_module
from jaxtrain.config import MESH_AXES, MeshConfig
from jaxtrain.errors import ConfigError
from jaxtrain.mesh import count_devices, describe_mesh, make_mesh, split_over_hosts


@dataclass(frozen=True)
class FakeDevice:
    """As much of a jax device as placing it takes."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "fake chip"


def fake_hosts(hosts: int, per_host: int, shuffle: bool = True) -> list[FakeDevice]:
    """Devices of several hosts, in no order; ids are not dense, as under gloo."""
    devices = [FakeDevice(2048 * host + local, host) for host in range(hosts) for local in range(per_host)]
    return [devices[i] for i in np.random.default_rng(0).permutation(len(devices))] if shuffle else devices


def hosts_of(mesh: jax.sharding.Mesh) -> np.ndarray:
    return np.vectorize(lambda device: device.process_index)(mesh.devices)


sizes = st.lists(st.sampled_from([1, 1, 2, 3, 4, 6, 8]), min_size=7, max_size=7)


@given(sizes, st.sampled_from([1, 2, 3, 4, 6, 8, 12]))
def test_a_split_over_hosts_loses_no_device(shape: list[int], per_host: int):
    """Refused only where the devices do not make whole hosts."""
    if math.prod(shape) % per_host:
        with pytest.raises(ConfigError, match=f"cannot be laid onto hosts of {per_host} devices"):
            split_over_hosts(shape, per_host)
        return
    inside, across = split_over_hosts(shape, per_host)
    assert [i * a for i, a in zip(inside, across, strict=True)] == list(shape)
    assert math.prod(inside) == per_host


@given(st.integers(0, 6), st.integers(0, 6))
def test_tensor_fills_a_host_first(tensor: int, others: int):
    """Powers of two: as much of tensor as a host of 8 holds is inside, and only then anything else."""
    inside, across = split_over_hosts((1, 1, 2**others, 8, 1, 1, 2**tensor), 8)
    assert inside[-1] == min(2**tensor, 8)
    assert inside[3] == 8 // inside[-1]
    assert across[2] == 2**others


def test_axes_that_do_not_fill_a_host_are_named():
    with pytest.raises(ConfigError, match=re.escape("data=3 x tensor=4 cannot be laid onto hosts of 8 devices")):
        split_over_hosts((1, 1, 3, 1, 1, 1, 4), 8)


def test_one_host_is_laid_out_in_order():
    mesh = make_mesh(MeshConfig(pipe=2, fsdp=2, tensor=2))
    assert mesh.axis_names == MESH_AXES
    assert mesh.devices.shape == (1, 2, 1, 2, 1, 1, 2)
    assert [device.id for device in mesh.devices.flat] == sorted(device.id for device in jax.devices())
    assert mesh.axis_types == (AxisType.Auto,) * 7


def test_the_order_of_the_devices_given_does_not_matter():
    backwards = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2), jax.devices()[::-1])
    assert (backwards.devices == make_mesh(MeshConfig(data=4, fsdp=1, tensor=2)).devices).all()


@pytest.mark.parametrize(
    "config",
    [
        MeshConfig(data=4, fsdp=1, tensor=8),
        MeshConfig(data=2, fsdp=4, tensor=4),
        MeshConfig(pipe=4, fsdp=2, tensor=4),
        MeshConfig(pipe=2, data=2, fsdp=4, tensor=2),
        MeshConfig(fsdp=16, tensor=2),
        MeshConfig(pipe=4, fsdp=8),
    ],
    ids=str,
)
def test_tensor_stays_inside_a_host(config: MeshConfig):
    mesh = make_mesh(config, fake_hosts(4, 8))
    hosts = hosts_of(mesh)
    assert (hosts == hosts[..., :1]).all()
    assert len({device.id for device in mesh.devices.flat}) == 32
    # A host is one block: along every axis it reaches as far as `split_over_hosts` says.
    inside, _ = split_over_hosts(config.shape, 8)
    for host in range(4):
        places = np.argwhere(hosts == host)
        assert tuple(np.ptp(places, axis=0) + 1) == inside


def test_tensor_larger_than_a_host_fills_hosts_whole():
    hosts = hosts_of(make_mesh(MeshConfig(data=2, fsdp=1, tensor=16), fake_hosts(4, 8)))
    assert [sorted(set(row)) for row in hosts.reshape(2, 16).tolist()] == [[0, 1], [2, 3]]


def test_hosts_must_hold_equally_many_devices():
    with pytest.raises(ConfigError, match=re.escape("hosts hold different numbers of devices: {0: 4, 1: 3}")):
        make_mesh(MeshConfig(fsdp=7), fake_hosts(2, 4, shuffle=False)[:-1])


def test_what_the_log_says():
    mesh = make_mesh(MeshConfig(pipe=2, data=2, fsdp=2, tensor=4), fake_hosts(4, 8))
    assert describe_mesh(mesh) == "pipe=2 x data=2 x fsdp=2 x tensor=4 (32 x fake chip, 4 hosts (pipe, data across hosts))"
    alone = make_mesh(MeshConfig(fsdp=1), [FakeDevice(0, 0)])
    assert describe_mesh(alone) == "one device (1 x fake chip)"


@pytest.mark.parametrize("driver", [False, True])
def test_a_missing_cuda_is_told_only_where_there_is_a_driver(monkeypatch, caplog, tmp_path, driver):
    """The extra `plan` brings jax's CUDA plugin to hosts without GPUs, where jax logs a traceback about it at every start."""

    def device_count():
        logger = logging.getLogger("jax._src.xla_bridge")
        logger.error("Jax plugin configuration error: Exception when calling jax_plugins.xla_cuda12.initialize()")
        logger.error("something else")
        return 3

    monkeypatch.setattr(mesh_module, "NVIDIA_DRIVER", tmp_path if driver else tmp_path / "none")
    monkeypatch.setattr(jax, "device_count", device_count)
    assert mesh_module.count_devices() == 3
    assert [record.getMessage()[:10] for record in caplog.records] == [*["Jax plugin"] * driver, "something "]


def test_a_process_may_pin_all_memory_of_its_host_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "7")  # so that it is put back in the end
    monkeypatch.delenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")
    assert count_devices() == jax.device_count()
    assert int(os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"]) >= 1
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "7")
    count_devices()
    assert os.environ["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] == "7"
    assert os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.5"
