"""Arrays that are read block by block, as Orbax or an import has stored them."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.checkpoint import blocks
from jaxtrain.checkpoint.inspection import verify
from jaxtrain.checkpoint.streamed import Leaf, save_streamed
from jaxtrain.checkpoint.writing import Checkpoints
from jaxtrain.config import CheckpointConfig
from jaxtrain.errors import DamagedCheckpoint

WHOLE = np.arange(6 * 40 * 30, dtype=np.float32).reshape(6, 40, 30)


def test_a_save_cuts_large_arrays_along_the_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 5000)
    mesh = jax.make_mesh((2, 2), ("a", "b"), devices=jax.devices()[:4])
    places = {"inner": PartitionSpec(None, "a", "b"), "layers": PartitionSpec("a"), "whole": PartitionSpec()}
    state = {name: jax.device_put(WHOLE, NamedSharding(mesh, place)) for name, place in places.items()}
    scalar = jax.device_put(jnp.float32(3), NamedSharding(mesh, PartitionSpec()))
    with Checkpoints(tmp_path, CheckpointConfig()) as checkpoints:
        checkpoints.save(1, state | {"scalar": scalar}, {})
    for name in places:
        held = blocks.StoredArray(tmp_path / "1", name)
        assert held.block[0] == 1, name
        np.testing.assert_array_equal(held.read(), WHOLE)
        np.testing.assert_array_equal(held.read((4,)), WHOLE[4])
        np.testing.assert_array_equal(held.read((4, 21)), WHOLE[4, 21])
    assert blocks.StoredArray(tmp_path / "1", "scalar").read() == 3
    with pytest.raises(DamagedCheckpoint, match="nothing cannot be read"):
        blocks.StoredArray(tmp_path / "1", "nothing")


def test_what_is_saved_block_by_block_has_its_checksum(tmp_path: Path):
    whole = {"params/one": WHOLE, "params/zero": np.zeros(7, np.float32)}
    parts = {"params/one": (4, 40, 7), "params/zero": (2,)}
    leaves = [Leaf(name, array.shape, array.dtype, parts[name], array.__getitem__) for name, array in whole.items()]
    save_streamed(tmp_path, 0, leaves, {})
    assert verify(str(tmp_path), every=True) == 0
    held = blocks.StoredArray(tmp_path / "0", "params/one")
    np.testing.assert_array_equal(held.read(dtype=np.float16), WHOLE.astype(np.float16))
    np.testing.assert_array_equal([held.read((layer,)) for layer in (5, 0, 1)], WHOLE[[5, 0, 1]])
