"""`jaxtrain layouts`: what is drawn of a config, what is printed, and which exit code."""

import pytest

from jaxtrain.config.rules import find_problems
from jaxtrain.errors import ExplainedError, UsageError
from jaxtrain.measure import layouts
from jaxtrain.verbs import layouts as verb

CONFIG = """
from jaxtrain.config import *

def get_config():
    model = ModelConfig(num_layers=2, embed_dim=16, num_heads=4, num_kv_heads=4, head_dim=4, mlp_dim=32, vocab_size=50)
    data = DataConfig(sources=(DataSource(kind="synthetic"),), sequence_length=16)
    train = TrainConfig(steps=3, global_batch_size=16, loss_chunk=8, validate_every=0)
    return Config(name="mine", model=model, data=data, train=train, mesh=MeshConfig(replica=2), sync=SyncConfig(mode="diloco"))
"""


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """--config=FILE; the environment is as before afterwards."""
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (tmp_path / "mine.py").write_text(CONFIG)
    return f"--config={tmp_path / 'mine.py'}"


def test_layouts_of_a_config_are_drawn_valid_and_told_by_axis(mine, monkeypatch, capsys):
    drawn = []

    def compare(config):
        drawn.append(config)
        return layouts.Errors(True, 1e-7, 2e-7 * config.mesh.tensor, 1e-7)

    monkeypatch.setattr(layouts, "compare", compare)
    assert verb.main([mine, "--draws=12", "--model.mlp_dim=64", "--seed=3"]) == 0
    assert len(drawn) == 12
    for config in drawn:
        assert find_problems(config, 8)[1] == []
        assert (config.name, config.model.mlp_dim, config.model.dtype, config.sync.mode) == (
            "mine",
            64,
            "float32",
            "every_step",
        )
    assert len({config.mesh for config in drawn}) > 3
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith("12/12 ")
    tensor = max(config.mesh.tensor for config in drawn)
    assert f"| any | 12 | yes | 1.0e-07 | {2e-7 * tensor:.1e} | 1.0e-07 |" in said.out
    assert said.out.endswith("\n0 layouts change the result\n")


def test_a_layout_that_changes_the_result_is_printed(mine, monkeypatch, capsys):
    def compare(config):
        if config.mesh.tensor > 1:
            raise ZeroDivisionError("in the layer")
        return layouts.Errors(config.mesh.pipe == 1, 1e-7, 1e-3, 1e-7)

    monkeypatch.setattr(layouts, "compare", compare)
    assert verb.main([mine, "--draws=8"]) == 1
    said = capsys.readouterr().out
    assert "8 layouts change the result" in said
    assert "gradient is off by 1.0e-03\nConfig(name='mine'" in said
    assert "initial parameters differ; " in said
    assert "ZeroDivisionError: in the layer" in said


@pytest.mark.parametrize("flag", ["--draws=0", "--devices=6", "--devices=1"])
def test_wrong_usage(flag):
    with pytest.raises(UsageError, match=flag):
        verb.main([flag])


def test_a_config_without_a_layout(mine, monkeypatch):
    monkeypatch.setattr(layouts, "MOST_TRIES", 2)
    with pytest.raises(ExplainedError, match="no layout over 8 devices that was drawn is valid"):
        verb.main([mine, "--train.global_batch_size=1", "--model.num_layers=1", "--data.sequence_length=17"])


@pytest.mark.slow
@pytest.mark.parametrize("own", [True, False])
def test_the_whole_verb(own, mine, capsys):
    assert verb.main([*([mine] if own else []), "--draws=2"]) == 0
    assert "| any | 2 | yes |" in capsys.readouterr().out
