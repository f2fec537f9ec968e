"""`jaxtrain plan --explain --compile`: the table for a person, as JSON, without the compiler, and wrong usage."""

import json

import pytest

from jaxtrain.errors import ExplainedError
from jaxtrain.planner import deviceless
from jaxtrain.planner.compiled_traffic import deviates
from jaxtrain.verbs.plan import main

EXPLAIN = ["--explain", "--compile"]
SEVEN = ["--config=configs/7b.py", "--mesh.fsdp=8", "--mesh.tensor=8"]
LAYER = 4 * 4096**2 + 3 * 4096 * 11008
TINY = ["--model.num_layers=2", "--model.embed_dim=256", "--model.num_heads=4", "--model.num_kv_heads=4", "--model.head_dim=64"]
TINY += ["--model.mlp_dim=512", "--model.vocab_size=512", "--data.sequence_length=256", "--train.global_batch_size=8"]


@pytest.fixture
def without_plugin(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deviceless, "find_obstacle", lambda: "no compiler: install it")


@pytest.mark.usefixtures("without_plugin")
def test_without_the_compiler_the_closed_form_alone(capsys: pytest.CaptureFixture[str]):
    assert main([*SEVEN, *EXPLAIN]) == 0
    said = capsys.readouterr()
    assert said.err == "the closed form alone: no compiler: install it\n"
    assert "7b on 64 x h100-sxm, fsdp=8 x tensor=8: a device's step, closed form" in said.out
    gathered = 2 * (2 * 32 * LAYER + 2 * 32000 * 4096) / 8
    assert f"{gathered / 2**20:,.3f}" in said.out
    assert f"{gathered * 7 / 8 / 2**20:,.3f}" in said.out
    assert "is exposed" not in said.out


@pytest.mark.usefixtures("without_plugin")
def test_one_device_sends_nothing(capsys: pytest.CaptureFixture[str]):
    assert main([*TINY, *EXPLAIN, "--config=configs/7b.py", "--mesh.fsdp=1", "--hosts=1", "--devices_per_host=1"]) == 0
    assert "nothing travels" in capsys.readouterr().out


@pytest.mark.usefixtures("without_plugin")
def test_json(capsys: pytest.CaptureFixture[str]):
    assert main([*SEVEN, *EXPLAIN, "--json", "--hardware", "h200"]) == 0
    said = json.loads(capsys.readouterr().out)
    whole = said["compiled"]
    assert said["devices"] == 64
    assert (whole["chip"], whole["devices"], whole["mesh"], whole["compiled"]) == ("h200", 64, {"fsdp": 8, "tensor": 8}, False)
    (row,) = [row for row in whole["rows"] if (row["axes"], row["kind"]) == ("fsdp", "reduce-scatter")]
    assert row["formula"]["payload"] == 4 * (32 * LAYER + 2 * 32000 * 4096) / 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/7b.py", "--mesh.fsdp=8", "--hardware=tpu-v5p"], "--hardware=tpu-v5p: no program can be compiled"),
        (["--config=configs/7b.py", "--mesh.fsdp=7"], "train.global_batch_size=64"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str):
    with pytest.raises(ExplainedError, match=message):
        main([*arguments, *EXPLAIN])


def test_deviation():
    formula = {"payload": 1e6, "unread": 1e5}
    outcomes = {payload: deviates({"payload": payload}, formula) for payload in (1e6, 1.01e6, 0.9e6, 1.03e6, 0.87e6)}
    assert list(outcomes.values()) == [False, False, False, True, True]
    assert deviates({"payload": 2048.0}, None)
    assert deviates({}, formula)


@pytest.mark.plan
def test_compiled(capsys: pytest.CaptureFixture[str]):
    assert main(["--config=configs/7b.py", "--mesh.fsdp=4", *TINY, *EXPLAIN]) == 0
    said = capsys.readouterr()
    assert "compiling for 4 x h100-sxm" in said.err
    assert "differs" not in said.out
    assert "on the wire is exposed" in said.out
    assert "+0.00% from the closed form" in said.out
