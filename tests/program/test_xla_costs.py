"""What XLA's scheduler is told: for which programs, and in which words."""

import dataclasses
from dataclasses import replace

import jax

from jaxtrain.config import Config, DataConfig, MeshConfig, ModelConfig, MoEConfig, ShardingConfig, TrainConfig
from jaxtrain.mesh import make_mesh
from jaxtrain.program import xla_costs

DROPLESS = MoEConfig(num_experts=8, experts_per_token=2, mlp_dim=2048)
MIXTURE = Config(
    model=ModelConfig(num_layers=4, embed_dim=1024, num_heads=8, num_kv_heads=8, head_dim=128, vocab_size=512, moe=DROPLESS),
    data=DataConfig(sequence_length=1024, mask_documents=False),
    train=TrainConfig(global_batch_size=64),
    mesh=MeshConfig(fsdp=2, expert=8),
    sharding=ShardingConfig(),
)


@dataclasses.dataclass(frozen=True)
class Devices:
    """As much of a mesh as is asked for."""

    platform: str
    device_kind: str

    @property
    def devices(self):
        return self

    @property
    def flat(self):
        return [self]


def test_dropless_experts_on_several_known_gpus_need_costs():
    h100, other = Devices("gpu", "NVIDIA H100 80GB HBM3"), Devices("gpu", "a GPU of the future")
    capacity = replace(MIXTURE, model=replace(MIXTURE.model, moe=replace(DROPLESS, dispatch="capacity")))
    dense = replace(MIXTURE, model=replace(MIXTURE.model, moe=None))
    assert xla_costs.needs_costs(MIXTURE, h100)  # type: ignore[arg-type]
    assert not xla_costs.needs_costs(MIXTURE, other)  # type: ignore[arg-type]
    assert not xla_costs.needs_costs(MIXTURE, make_mesh(MeshConfig(fsdp=1), jax.devices()[:1]))
    for config in (capacity, dense, replace(MIXTURE, mesh=MeshConfig(fsdp=16))):
        assert not xla_costs.needs_costs(config, h100)  # type: ignore[arg-type]


def test_a_profile_is_named_by_what_it_says(tmp_path):
    costs = {"all-gather-start.1": 2.055e-3, "fusion": 1e-6}
    path = xla_costs.write_profile(costs, str(tmp_path))
    assert path.read_text() == (
        'costs { name: "all-gather-start.1" cost_us: 2055.000 }\ncosts { name: "fusion" cost_us: 1.000 }\n'
    )
    assert xla_costs.write_profile(costs, str(tmp_path)) == path
    assert xla_costs.write_profile(costs | {"fusion": 2e-6}, str(tmp_path)) != path
    assert len(list(tmp_path.iterdir())) == 2
