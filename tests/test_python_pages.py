"""jaxtrain/README.md: its pages of Python run one after the other, and its config file is layout-invariant."""

import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pytest

from jaxtrain.checkpoint import check_same_run
from jaxtrain.config import to_json, to_plain
from jaxtrain.config.loading import config_of, load_config
from jaxtrain.measure.layouts import as_task, compare, random_configs
from jaxtrain.parts import digests

mpl.use("Agg")
PAGES = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[1] / "jaxtrain" / "README.md").read_text(), re.DOTALL)
RUN = [page for page in PAGES if not page.startswith("# mine.py")]


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """What the pages define."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("pages"))
        for page in RUN:
            exec(compile(page, "README", "exec"), found)  # noqa: S102, our own text
        found["folder"], found["logged"] = Path.cwd(), found["trainer"].metrics
    return found


def test_training_lowers_the_loss_and_leaves_a_picture(names):
    metrics = names["logged"]
    assert metrics["step"].tolist() == [1, 5, 10, 15, 20, 25, 30, 35, 40]
    assert metrics["loss"][-1] < metrics["loss"][0] - 1
    assert metrics["validation_step"].tolist() == [20, 40]
    assert (names["folder"] / "figures" / "loss.png").stat().st_size > 5000
    assert (names["folder"] / "runs" / "notebook" / "checkpoints").is_dir()


def test_the_lock_is_free_and_a_restored_trainer_says_the_same(names, monkeypatch):
    monkeypatch.chdir(names["folder"])
    before, trainer = names["trainer"].evaluate(), names["Trainer"](names["config"], documents=names["texts"])
    assert trainer.restore() == 40
    assert trainer.evaluate() == before
    assert trainer.restore(20) == 20
    losses = [trainer.step()["loss"] for _ in range(5)]
    assert losses[-1] == pytest.approx(names["logged"]["loss"][5], rel=1e-6)  # of step 25: the data goes on


def test_a_schedule_of_ones_own_computes_the_same(names):
    metrics = names["pipelined"].metrics
    assert metrics["step"].tolist() == [1]
    assert metrics["loss"][0] == pytest.approx(names["logged"]["loss"][0], rel=1e-6)
    assert metrics["grad_norm"][0] == pytest.approx(names["logged"]["grad_norm"][0], rel=1e-5)


def test_training_goes_on_from_the_steps_taken_and_what_was_left_out(names, monkeypatch):
    monkeypatch.chdir(names["folder"])
    config = names["replace"](names["config"], run_dir="runs/both")
    trainer = names["Trainer"](config, documents=names["texts"])
    trainer._rollbacks.add(bad_step=2, back_to=0, reason="a test", batches=1)  # batch 1 is left out
    losses = [trainer.step()["loss"], trainer.step()["loss"]]
    assert losses[0] == pytest.approx(names["logged"]["loss"][0], rel=1e-6)
    trainer.train()
    assert trainer.metrics["step"].tolist() == [1, 2, 5, *range(10, 41, 5)]
    assert trainer.metrics["loss"][:2].tolist() == losses
    assert len(trainer._rollbacks) == 1
    assert trainer.metrics["loss"][2] != names["logged"]["loss"][1]  # of step 5, on another batch


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    (page,) = [page for page in PAGES if page.startswith("# mine.py")]
    path = tmp_path_factory.mktemp("mine") / "mine.py"
    path.write_text(page)
    return path


def test_a_config_files_parts_are_layout_invariant(mine):
    config = load_config(mine)
    (layout,) = random_configs(1, 8, seed=3, task=as_task(config))
    assert layout.parts.objective is config.parts.objective
    assert compare(layout).problem is None


def test_a_config_files_parts_travel_by_its_name(mine):
    config = load_config(mine)
    again = config_of(to_json(config))
    assert to_plain(again) == to_plain(config)
    assert again.train.focus == 2.0
    assert digests(again.parts) == digests(config.parts)
    assert list(digests(config.parts)) == ["objective", "file"]
    one, other = (each.parts.objective(np.log(0.25), {}) for each in (config, again))
    assert one == other == pytest.approx(-(0.75**2) * np.log(0.25))


def test_a_resume_names_the_part_that_has_changed(mine):
    before = {"parts": digests(load_config(mine).parts)}
    mine.write_text(mine.read_text().replace("** config.train.focus", "** (config.train.focus + 1)"))
    changed = check_same_run(before, {"parts": digests(load_config(mine).parts)}, mine.parent)
    assert [line.partition(":")[0] for line in changed] == ["parts.objective", "parts.file"]
    assert all("focal" in line or "mine.py" in line for line in changed)


def test_flags_come_before_the_parts(mine):
    command = [sys.executable, "-m", "jaxtrain", "train", f"--config={mine}", "--train.focus=1.5", "--dry_run"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, env={"JAX_PLATFORMS": "cpu"}).stdout
    assert re.search(r"train\.focus=1\.5 +flag", said)
