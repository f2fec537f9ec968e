"""XLA options: the table by kind of layout, what a run says over it, and options that this XLA does not know."""

from dataclasses import replace

import jax
import pytest

from jaxtrain.config import Config, MeshConfig
from jaxtrain.errors import ExplainedError
from jaxtrain.layout import most_layers_per_iteration
from jaxtrain.train.xla_options import compile_with_options, default_options, parse_options

KNOWN = "xla_llvm_disable_expensive_passes"


def test_the_table_is_for_gpus_only_and_differs_by_layout():
    weights = replace(Config(), mesh=MeshConfig(fsdp=8))
    activations = replace(Config(), mesh=MeshConfig(fsdp=4, tensor=2))
    assert default_options(activations, "cpu") == {}
    assert default_options(weights, "gpu") == default_options(weights, "cuda")
    assert default_options(weights, "gpu")["xla_gpu_enable_pipelined_all_gather"] is True
    assert default_options(activations, "gpu")["xla_gpu_enable_pipelined_all_gather"] is False
    assert default_options(activations, "gpu")["xla_gpu_unsupported_use_ragged_all_to_all_one_shot_kernel"] is False
    assert [most_layers_per_iteration(config.mesh, "gpu") for config in (weights, activations)] == [1, 4]
    assert most_layers_per_iteration(activations.mesh, "cpu") == 1


def test_options_are_read_as_what_they_are():
    assert parse_options(("a=true", "b=False", "c=-3", "d = all=x")) == {"a": True, "b": False, "c": -3, "d": "all=x"}
    with pytest.raises(ExplainedError, match="'xla_gpu_x' is not name=value"):
        parse_options(("xla_gpu_x",))


def test_an_unknown_default_is_dropped_and_an_unknown_wish_refused(capsys: pytest.CaptureFixture[str]):
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    compiled = compile_with_options(lowered, {"xla_of_the_future": True, KNOWN: True}, {})
    assert compiled(1.0) == 2.0
    assert "without xla_of_the_future" in capsys.readouterr().err
    with pytest.raises(ExplainedError, match="xla_of_the_future=3: this XLA has no such option"):
        compile_with_options(lowered, {KNOWN: True}, {"xla_of_the_future": 3})
    with pytest.raises(ExplainedError, match=f"{KNOWN}=perhaps: .*not a valid bool"):
        compile_with_options(lowered, {}, {KNOWN: "perhaps"})
