"""From host rows to global arrays, on eight devices of this process and as if they were several hosts'."""

import jax
import numpy as np
import pytest

from jaxtrain.config import MeshConfig
from jaxtrain.mesh import make_mesh
from jaxtrain.train import feed
from jaxtrain.train.feed import owned_rows, to_global
from jaxtrain.train.gradients import batch_sharding

ROWS, LENGTH = 16, 6
WHOLE = {
    "tokens": np.arange(ROWS * LENGTH, dtype=np.int32).reshape(ROWS, LENGTH),
    "targets": -np.arange(ROWS * LENGTH, dtype=np.int32).reshape(ROWS, LENGTH),
}
MESHES = [
    MeshConfig(fsdp=8),
    MeshConfig(data=2, fsdp=2, tensor=2),
    MeshConfig(pipe=2, data=2, fsdp=1, tensor=2),
    MeshConfig(pipe=8, fsdp=1),
]
ids = [str([(a, n) for a, n in zip("rpdfect", mesh.shape, strict=True) if n > 1]) for mesh in MESHES]


class OfHost:
    """The sharding as host `host` of `hosts` sees it: its devices are consecutive, as `make_mesh` lays them."""

    def __init__(self, sharding, host, hosts):
        self.sharding, self.host, self.hosts = sharding, host, hosts

    def addressable_devices_indices_map(self, shape):
        size = len(jax.devices()) // self.hosts
        mine = jax.devices()[self.host * size : (self.host + 1) * size]
        return {device: index for device, index in self.sharding.devices_indices_map(shape).items() if device in mine}


@pytest.mark.parametrize("mesh", MESHES, ids=ids)
def test_the_global_arrays_are_the_whole_batch(mesh):
    sharding = batch_sharding(make_mesh(mesh))
    rows = owned_rows(sharding, (ROWS, LENGTH))
    assert rows == slice(0, ROWS)
    placed = to_global(WHOLE, rows, ROWS, ("tokens", "targets"), sharding)
    assert sorted(placed) == ["targets", "tokens"]
    for name, array in placed.items():
        assert array.sharding == sharding
        np.testing.assert_array_equal(array, WHOLE[name])
        assert {shard.data.shape for shard in array.addressable_shards} == {(ROWS // mesh.batch_shards, LENGTH)}


def test_only_the_named_arrays_are_placed():
    sharding = batch_sharding(make_mesh(MESHES[0]))
    assert list(to_global(WHOLE, slice(0, ROWS), ROWS, ("targets",), sharding)) == ["targets"]


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("mesh", MESHES[:2], ids=ids[:2])
def test_hosts_partition_the_rows(mesh, hosts):
    sharding = batch_sharding(make_mesh(mesh))
    slices = [owned_rows(OfHost(sharding, host, hosts), (ROWS, LENGTH)) for host in range(hosts)]
    assert [row for rows in slices for row in range(ROWS)[rows]] == list(range(ROWS))


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_of_different_stages_read_the_same_rows(hosts):
    sharding = batch_sharding(make_mesh(MESHES[2]))
    read = [range(ROWS)[owned_rows(OfHost(sharding, host, hosts), (ROWS, LENGTH))] for host in range(hosts)]
    assert read[: hosts // 2] == read[hosts // 2 :]
    assert [row for rows in read[: hosts // 2] for row in rows] == list(range(ROWS))


@pytest.mark.parametrize("hosts", [2, 4])
@pytest.mark.parametrize("mesh", MESHES, ids=ids)
def test_a_host_fills_its_shards_from_its_own_rows(mesh, hosts, monkeypatch):
    """Every device's shard, cut from nothing but the rows that its host read."""
    sharding = batch_sharding(make_mesh(mesh))
    made = {}
    monkeypatch.setattr(feed.jax, "make_array_from_callback", lambda shape, sharding, callback: callback)
    for host in range(hosts):
        seen = OfHost(sharding, host, hosts)
        rows = owned_rows(seen, (ROWS, LENGTH))
        local = {name: array[rows] for name, array in WHOLE.items()}
        shard = to_global(local, rows, ROWS, ("tokens",), sharding)["tokens"]
        made |= {d: (index, shard(index)) for d, index in seen.addressable_devices_indices_map((ROWS, LENGTH)).items()}
    assert len(made) == 8
    for index, shard in made.values():
        np.testing.assert_array_equal(shard, WHOLE["tokens"][index])
