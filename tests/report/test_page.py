"""The report: whole and self-contained whatever the runs hold, thin where they are long, and as tables."""

import os
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from jaxtrain.report.curves import averaged, chart_keys, thinned, tick
from jaxtrain.report.page import render
from jaxtrain.report.runs import read_runs
from jaxtrain.verbs.report import main
from tests.report.test_runs import row, write_run


def page_of(*folders: Path) -> str:
    return render(read_runs([str(folder) for folder in folders]))


def test_a_page_has_its_parts_and_nothing_from_the_net(tmp_path: Path):
    one = write_run(
        tmp_path / "<one> & $x$", rows=[row(step, stage="warm <up>" if step < 50 else "rest") for step in range(1, 101)]
    )
    page = page_of(one)
    assert "&lt;one&gt; &amp; $x$" in page
    assert "<one>" not in page
    assert "return &lt;x&gt; &amp; y" in page
    assert not re.search(r"https?://(?!www\.w3\.org)|<script|<link|@import|url\(", page)
    assert page.count("<svg ") == 3 * len(chart_keys(read_runs([str(one)])))
    assert "warm &lt;up&gt;" in page
    assert "rollback: step 60" in page  # a tooltip
    for svg in re.findall(r"<svg .*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(svg)


def test_runs_of_different_kinds_stand_side_by_side(tmp_path: Path):
    sft = write_run(
        tmp_path / "sft",
        rows=[
            *(row(s) for s in range(1, 90)),
            {
                "step": 90,
                "validation_loss": 1.0,
                "task_sums_accuracy": 0.25,
                "validation_loss/books": 1.2,
                "validation_tokens": 90,
            },
        ],
    )
    grpo = write_run(tmp_path / "grpo", None, rows=[row(s, reward=s / 50, tokens=None) for s in range(1, 50)])
    never = write_run(tmp_path / "never", rows=[], log="")
    keys = chart_keys(read_runs([str(sft), str(grpo), str(never)]))
    held_out = ["validation_loss", "task_sums_accuracy", "validation_loss/books"]
    assert list(keys) == ["loss", *held_out, "reward", "learning_rate"]
    assert keys["validation_loss/books"] == "Held-out loss: books"
    assert keys["task_sums_accuracy"] == "Task sums: accuracy"
    page = page_of(sft, grpo, never)
    assert "no step logged" in page
    assert "no run knows its FLOPs" in page  # of the reward: that run has no config
    assert "No run has logged a step yet" in page_of(never)


def test_names_that_are_not_utf8_and_non_finite_values(tmp_path: Path):
    folder = write_run(tmp_path / os.fsdecode(b"caf\xe9"), rows=[row(1, loss=None), row(2, loss=None, grad_norm=None)])
    page = page_of(folder)
    assert r"caf\udce9" in page.encode().decode()


def test_curves_of_many_rows_are_thinned():
    x = np.arange(100_000.0)
    y = np.sin(x / 1000)
    y[31_234] = 50.0
    thin_x, thin_y = thinned(x, y)
    assert len(thin_x) <= 502
    assert (thin_x[0], thin_x[-1], thin_y.max()) == (0, 99_999, 50.0)
    mean_x, mean_y = averaged(x, y)
    assert len(mean_x) == 500
    assert mean_y.mean() == pytest.approx(y.mean())
    assert averaged(x[:3], y[:3])[0] is not None


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.25, "0.25"),
        (1.95, "1.95"),
        (0.0045, "4.5e-3"),
        (0.02, "0.02"),
        (-3e-5, "-3e-5"),
        (1.5e6, "1.5 M"),
        (40, "40"),
    ],
)
def test_ticks_are_exact(value: float, text: str):
    assert tick(value) == text


def test_the_verb_prints_tables_and_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    one, other = (str(write_run(tmp_path / name)) for name in ("one", "other"))
    assert main([one, other]) == 0
    said = capsys.readouterr().out
    assert "goodput" in said
    assert "its loss is nan" in said
    page = tmp_path / "report.html"
    assert main([one, other, f"--html={page}"]) == 0
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(Exception, match="there is a file already; give --overwrite"):
        main([one, f"--html={page}"])


@pytest.mark.slow
def test_a_hundred_thousand_rows(tmp_path: Path):
    folder = write_run(tmp_path / "long", rows=[row(step, grad_norm=1.0, validation_loss=2.0) for step in range(1, 100_001)])
    assert len(page_of(folder)) < 2_000_000
