"""Sizes of a ladder: like the large model but smaller; and its file, which `jaxtrain plan` reads."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

from jaxtrain.config import Config, to_plain
from jaxtrain.config.loading import load_config
from jaxtrain.config.rules import find_problems
from jaxtrain.errors import ExplainedError, UsageError
from jaxtrain.planner.ladder import (
    Ladder,
    SmallRun,
    check_config,
    forecast_words,
    open_ladder,
    parameters_of,
    read_ladder,
    sizes_of,
    small_run,
    tokens_of,
)
from jaxtrain.planner.ladder_flags import LadderFlags
from tests.tiny import tiny


@pytest.mark.parametrize("name", ["1b", "70b", "mixtral_8x7b", "qwen3_30b_a3b", "deepseek_v3"])
def test_sizes_are_the_model_but_smaller(name: str):
    config = load_config(name)
    whole, flags = parameters_of(config.model), LadderFlags()
    for share, size in zip((1 / 32, 1 / 16, 1 / 8, 1 / 4), sizes_of(config, flags), strict=True):
        model, large = size.model, config.model
        assert parameters_of(model) / whole == pytest.approx(share, rel=0.35)
        assert model.head_dim == large.head_dim
        assert model.num_heads * large.num_kv_heads == model.num_kv_heads * large.num_heads
        assert model.embed_dim * large.num_heads == model.num_heads * large.embed_dim
        assert model.num_layers % len(model.kinds) == 0
        assert (model.moe and model.moe.num_experts) == (large.moe and large.moe.num_experts)
        one = replace(size, mesh=tiny().mesh, train=replace(size.train, microbatches=1), pipeline=tiny().pipeline)
        assert find_problems(one, 1)[1] == []


def test_a_model_that_cannot_shrink_is_refused():
    with pytest.raises(ExplainedError, match="no smaller model has about"):
        sizes_of(tiny(), LadderFlags(sizes=4, largest=0.01))
    with pytest.raises(ExplainedError, match="give fewer, or a larger --ratio"):
        sizes_of(tiny(model={"num_layers": 8}), LadderFlags(sizes=4, ratio=1.01))


def test_a_small_run_keeps_tokens_per_parameter_and_the_share_of_warm_up():
    config = tiny(model={"num_layers": 8}, train={"steps": 4000}, optimizer={"warmup_steps": 400})
    size = sizes_of(config, LadderFlags(sizes=1, largest=0.5))[0]
    run = small_run(size, config, 2.0, 1e-2)
    per_parameter = tokens_of(config) / parameters_of(config.model)
    assert tokens_of(run) / parameters_of(run.model) == pytest.approx(2 * per_parameter, rel=1e-3)
    assert run.optimizer.warmup_steps == round(run.train.steps / 10)
    assert (run.optimizer.peak_lr, run.train.validate_every) == (1e-2, run.train.steps)
    with pytest.raises(ExplainedError, match=r"would train for \d+ steps; the least is 20"):
        small_run(size, replace(config, train=replace(config.train, steps=30)), 1.0, 1e-2)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (tiny(data={"validation_fraction": 0.0}), "data.validation_fraction=0"),
        (tiny(lora={"rank": 4}), "lora.rank=4"),
        (tiny(init_from="runs/other"), "init_from"),
        (tiny(objective={"kind": "sft"}), "objective.kind=sft"),
    ],
)
def test_configs_without_a_law_are_refused(config: Config, words: str):
    with pytest.raises(UsageError, match=words):
        check_config(config)


def ladder_of(config: Config) -> Ladder:
    """A ladder whose losses are 2 + 50 / N^0.5 + 90 / D^0.5 at its best rate, 3e-3, and worse beside it."""
    runs = []
    for size, n in enumerate((1000, 2000, 4000, 8000)):
        for multiple, rates in ((1.0, (1e-3, 3e-3, 9e-3)), (0.5, (3e-3,)), (2.0, (3e-3,))):
            d = round(20 * n * multiple)
            loss = 2 + 50 / n**0.5 + 90 / d**0.5
            runs += [SmallRun("x", size, multiple, n, d, rate, loss + 0.01 * math.log(rate / 3e-3) ** 2) for rate in rates]
    return Ladder(json.loads(json.dumps(to_plain(config))), tuple(runs))


def test_a_ladder_foretells_and_survives_its_file():
    ladder = ladder_of(tiny())
    forecast = ladder.forecast(32_000, 640_000)
    assert forecast.loss.value == pytest.approx(2 + 50 / 32_000**0.5 + 90 / 640_000**0.5, rel=1e-4)
    assert forecast.rate.value == pytest.approx(3e-3, rel=1e-6)
    assert forecast.beyond == 4
    assert "32,000 parameters on 640,000 tokens reach a held-out loss of 2.39" in forecast_words(forecast)
    assert read_ladder(ladder.to_json(forecast)) == ladder
    diverged = replace(ladder, runs=(*ladder.runs, replace(ladder.runs[0], rate=0.1, loss=math.inf)))
    assert read_ladder(diverged.to_json()) == diverged
    assert len(diverged.points()) == 12


def test_files_that_are_no_ladder_of_these_tokens_are_refused(tmp_path: Path):
    path = tmp_path / "ladder.json"
    with pytest.raises(UsageError, match="No such file"):
        open_ladder(str(path), tiny())
    for text in ("{", "[]", '{"config": {}, "runs": [{"loss": 1}]}'):
        path.write_text(text)
        with pytest.raises(UsageError, match=r"give a ladder\.json"):
            open_ladder(str(path), tiny())
    path.write_text(Ladder({}, ()).to_json())
    with pytest.raises(UsageError, match="no small run is done"):
        open_ladder(str(path), tiny())
    path.write_text(ladder_of(tiny(data={"tokenizer": "byte"})).to_json())
    with pytest.raises(UsageError, match=r"data\.tokenizer=byte, and this config has bpe:64"):
        open_ladder(str(path), tiny(data={"tokenizer": "bpe:64"}))
