"""A ladder under way: which runs it makes, what it makes of them, and that it goes on where it was stopped."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from jaxtrain.config import Config
from jaxtrain.errors import EXIT_DONE, EXIT_ERROR, EXIT_STOPPED, ExplainedError, Stopped
from jaxtrain.measure.ladder import Climb
from jaxtrain.planner.ladder import FILE, parameters_of, tokens_of
from jaxtrain.planner.ladder_flags import LadderFlags
from jaxtrain.planner.scaling_law import ScalingLaw
from jaxtrain.telemetry.metrics import to_json_line
from jaxtrain.verbs.ladder import main
from tests.tiny import tiny

LAW = ScalingLaw(E=1.5, A=30.0, alpha=0.4, B=60.0, beta=0.4)
LARGE = tiny(
    name="large",
    model={"num_layers": 12, "embed_dim": 64, "num_heads": 16, "num_kv_heads": 16, "head_dim": 4, "mlp_dim": 128},
    train={"steps": 4000},
    optimizer={"peak_lr": 1e-2, "warmup_steps": 100},
)


def wanted_rate(config: Config) -> float:
    return 0.4 * parameters_of(config.model) ** -0.5


def write_result(config: Config) -> int:
    """Leave what `jaxtrain train` leaves: the loss of LAW, worse beside the best rate; too high a rate diverges."""
    off = math.log(config.optimizer.peak_lr / wanted_rate(config))
    config.directory.mkdir(parents=True)
    row = {
        "step": config.train.steps,
        "validation_loss": LAW.loss(parameters_of(config.model), tokens_of(config)) + 0.02 * off**2,
    }
    if off > math.log(5):
        row = {"step": 7, "bad_step": "its loss is nan", "policy": "stop"}
    (config.directory / "metrics.jsonl").write_text(to_json_line(row) + "\n")
    return EXIT_ERROR if "bad_step" in row else EXIT_DONE


def climb(folder: Path, train: Callable[[Config], int] = write_result, config: Config = LARGE) -> tuple[Climb, list[str]]:
    said: list[str] = []
    return Climb(config, LadderFlags(), folder, said.append, train), said


def test_a_ladder_finds_the_law_and_the_rates(tmp_path: Path):
    ladder, said = climb(tmp_path)
    forecast = ladder.run()
    assert forecast.loss.value == pytest.approx(LAW.loss(forecast.parameters, forecast.tokens), rel=2e-3)
    assert forecast.rate.value == pytest.approx(wanted_rate(LARGE), rel=0.02)
    assert all(best.inside for best in ladder.ladder.best_rates().values())
    assert len(said) == len(ladder.ladder.runs) >= len(ladder.planned()) == 20
    written = json.loads((tmp_path / FILE).read_text())
    assert written["forecast"]["loss"]["value"] == forecast.loss.value


def test_rates_are_looked_for_far_from_the_first(tmp_path: Path):
    for peak_lr in (1e-1, 1e-4):  # at the first all diverge
        config = replace(LARGE, optimizer=replace(LARGE.optimizer, peak_lr=peak_lr))
        ladder, _ = climb(tmp_path / f"{peak_lr}", config=config)
        assert ladder.run().rate.value == pytest.approx(wanted_rate(LARGE), rel=0.05)


def test_a_stopped_ladder_goes_on_to_the_same_end(tmp_path: Path):
    whole, _ = climb(tmp_path / "whole")
    whole.run()
    made: list[str] = []

    def interrupted(config: Config) -> int:
        made.append(config.run_dir)
        return EXIT_STOPPED if len(made) % 4 == 0 else write_result(config)

    for _ in range(20):
        ladder, _ = climb(tmp_path / "parts", interrupted)
        try:
            ladder.run()
            break
        except Stopped:
            assert len(read_runs(tmp_path / "parts")) >= len(made) - len(made) // 4
    assert read_runs(tmp_path / "parts") == read_runs(tmp_path / "whole")
    assert len(made) - len(made) // 4 == len(read_runs(tmp_path / "whole")) == len(set(made))


def read_runs(folder: Path) -> list[dict]:
    return json.loads((folder / FILE).read_text())["runs"]


def test_a_run_that_finished_without_being_noted_is_not_repeated(tmp_path: Path):
    first, _ = climb(tmp_path, lambda config: write_result(config) and EXIT_DONE)
    first.run()
    (tmp_path / FILE).unlink()

    def never(config: Config) -> int:
        raise AssertionError(config.run_dir)

    again, _ = climb(tmp_path, never)
    again.run()
    assert again.ladder.runs == first.ladder.runs


def test_what_is_wrong_is_said(tmp_path: Path):
    ladder, _ = climb(tmp_path, lambda config: EXIT_DONE)
    with pytest.raises(ExplainedError, match=r"no held-out loss at step .* raise --data\.validation_fraction"):
        ladder.run()
    ladder, _ = climb(tmp_path, lambda config: EXIT_ERROR)
    with pytest.raises(ExplainedError, match="ended with exit code 1; its output is in"):
        ladder.run()
    climb(tmp_path)[0].run()
    other = tiny(model={**vars(LARGE.model)}, train={"steps": 5000}, name="other")
    with pytest.raises(ExplainedError, match=r"differs in optimizer\.peak_lr, .*train\.steps; give another --folder"):
        climb(tmp_path, config=other)
    older = json.loads((tmp_path / FILE).read_text())
    del older["config"]["train"]["z_loss"], older["config"]["telemetry"]  # fields that another version did not have
    (tmp_path / FILE).write_text(json.dumps(older))
    assert climb(tmp_path)[0].ladder.runs
    (tmp_path / FILE).write_text("{")
    with pytest.raises(ExplainedError, match="cannot be read"):
        climb(tmp_path)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--sizes=1", "--sizes=1: give at least 2"),
        ("--largest=1.5", "--largest=1.5: give a share"),
        ("--tokens=1,1", "at least two different multiples"),
        ("--rates=2", "the points of a parabola"),
        ("--rate_step=nan", "give more than 1"),
        ("--size=4", "no such flag; did you mean --sizes"),
    ],
)
def test_wrong_usage(flag: str, message: str):
    with pytest.raises(ExplainedError, match=message) as raised:
        main(["--config=configs/quickstart.py", flag])
    assert raised.value.exit_code == 2


def test_the_sizes_are_told_before_anything_is_trained(capsys: pytest.CaptureFixture[str]):
    flags = ["--model.embed_dim=768", "--model.num_heads=12", "--model.num_kv_heads=12", "--model.num_layers=12"]
    assert main(["--config=configs/quickstart.py", "--train.steps=5000", "--dry_run", *flags]) == 0
    said = capsys.readouterr().err
    assert "12    768     12" in said
    assert "FLOPs in all" in said
