"""`jaxtrain plan`: wrong usage in one line, one layout explained, grids, and a search from the flags to the files."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain.config.loading import load_config
from jaxtrain.config.rules import validate
from jaxtrain.errors import ExplainedError, UsageError
from jaxtrain.planner.ladder import tokens_of
from jaxtrain.verbs.plan import main
from tests.planner.test_ladder import ladder_of

SEVEN = ["--config=configs/7b.py"]
SMALL = ["--config=configs/1b.py", "--verify=0", "--train.global_batch_size=64"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--hardware=h1000"], "--hardware='h1000' is no chip we know"),
        (["--hosts=0"], "--hosts=0: give at least 1"),
        (["--devices-per-host=0"], "--devices_per_host=0: give at least 1"),
        (["--verify=-1"], "--verify=-1: give at least 0"),
        (["--tokens=-1"], "--tokens=-1.0: give a number of 0 or more"),
        (["--days=nan"], "--days=nan: give a number"),
        (["--price-per-gpu-hour=2"], "give --tokens or --days too"),
        (["--explain", "--sweep=mesh.tensor=1"], "give one of them"),
        (["--run"], "go with --sweep"),
        (["--sweep=mesh.tensor=1", "--write=x.py"], "--write saves the best layout of a search"),
        (["--sweep=mesh.tensor=1", "--ladder=x.json"], "--ladder speaks of the best layout of a search"),
        (["--ladder=none.json"], "--ladder=none.json: No such file"),
        (["--html=no/folder/page.html"], "there is no folder no/folder"),
        (["--model.head_dim=3"], "head_dim=3"),
        (["--hardware=none.json"], "none.json"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str):
    with pytest.raises(ExplainedError, match=message) as raised:
        main([*SEVEN, *arguments])
    assert raised.value.exit_code == 2


def test_explain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "140")
    assert main([*SEVEN, "--explain", "--hosts=2", "--mesh.pipe=2", "--mesh.tensor=4", "--train.microbatches=4"]) == 0
    said = capsys.readouterr().out
    assert "7b on 16 × h100-sxm (2 hosts of 8): pipe=2 × fsdp=2 × tensor=4" in said
    for words in (
        "master weights in float32",
        "weights of a layer, forward",
        "activations to the next stage",
        "waiting",
        "stage 1",
    ):
        assert (words in said) == (words != "waiting")
    assert "of 6,738,415,616" in said
    assert "Schedule: 1f1b, 2 stages, 4 microbatches, bubble 20.0%" in said  # (S - 1) / (M + S - 1)


def test_explain_as_json(capsys: pytest.CaptureFixture[str]):
    assert main([*SEVEN, "--explain", "--json", "--mesh.tensor=8"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["mesh"] == {"tensor": 8}
    assert {row["axes"] for row in said["transfers"]} == {"tensor"}
    assert not any(wire["crosses_hosts"] for wire in said["wires"])


def test_sweep(capsys: pytest.CaptureFixture[str]):
    assert main([*SEVEN, "--sweep", "mesh.tensor=1,2", "--sweep", "train.microbatches=1,2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["values"] for row in rows] == [
        {"mesh.tensor": t, "train.microbatches": m} for t in ("1", "2") for m in ("1", "2")
    ]
    assert all(row["estimate"]["step_seconds"] > 0 for row in rows)


def test_a_search_from_flags_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    config, page, plan = tmp_path / "best.py", tmp_path / "best.html", tmp_path / "plan.json"
    arguments = [*SMALL, f"--write={config}", f"--html={page}", "--tokens=1e12", "--price-per-gpu-hour=2"]
    ladder = tmp_path / "ladder.json"
    ladder.write_text(ladder_of(load_config("1b")).to_json())
    arguments.append(f"--ladder={ladder}")
    assert main(arguments) == 0
    said = capsys.readouterr()
    assert "1b on 8 × h100-sxm (1 host of 8), best by time" in said.out
    assert "Memory of the fullest device, GiB" in said.out
    assert "GPU-hours" in said.out
    assert "With twice the batch" in said.out
    reached = "parameters on 1,000,000,000,000 tokens reach a held-out loss of 2.0"
    assert reached in said.out
    assert reached in page.read_text()
    best = load_config(config)
    assert validate(best, 8) == best  # what main runs, unchanged
    with pytest.raises(UsageError, match=r"--write=.*best.py: there is a file already; give --overwrite"):
        main(arguments)
    into = [f"--html={page}", f"--write={tmp_path / 'best.json'}"]
    assert main([*SMALL, *into, "--overwrite", "--json", f"--ladder={ladder}"]) == 0
    plan.write_text(capsys.readouterr().out)
    found = json.loads(plan.read_text())
    assert load_config(plan) == load_config(tmp_path / "best.json") == best
    assert found["ranked"][0]["mesh"] == {axis: size for axis, size in found["best_config"]["mesh"].items() if size > 1}
    assert tuple(found["best_config"]["mesh"].values()) == best.mesh.shape
    assert found["forecast"]["tokens"] == tokens_of(best)
    times = [row["step_seconds"] for row in found["ranked"]]
    assert times == sorted(times)


def test_too_large_a_model_is_one_line_with_the_way_out():
    done = subprocess.run(
        [sys.executable, "-m", "jaxtrain", "plan", "--config=configs/70b.py", "--hosts=1", "--train.global_batch_size=8"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: 70b does not fit on 8 × h100-sxm (1 host of 8)")
    assert "Traceback" not in done.stderr
    assert "--hosts=" in line
