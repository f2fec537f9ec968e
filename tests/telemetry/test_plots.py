import json

import matplotlib.image
import numpy as np
import pytest

from jaxtrain.telemetry import plots
from jaxtrain.telemetry.plots import column, plot_losses, smooth


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


TRAINING = [{"step": s, "loss": 5.0 / s, "learning_rate": 1e-3} for s in range(1, 30)]
VALIDATION = [{"step": s, "validation_loss": 4.0 / s, "validation_bits_per_byte": 6.0 / s} for s in (10, 20)]


@pytest.mark.parametrize(
    ("rows", "width"),
    [
        (TRAINING + VALIDATION, 550),
        (TRAINING, 340),
        (TRAINING[:1], 340),
        (TRAINING[:1] + VALIDATION[:1], 550),
        ([*TRAINING, {"step": 30, "loss": None, "not_finite": {"loss": "nan"}}], 340),
    ],
)
def test_the_picture_is_a_png_of_the_stated_size(tmp_path, rows, width):
    write(tmp_path / "metrics.jsonl", rows)
    picture = tmp_path / "loss.png"
    assert plot_losses(tmp_path / "metrics.jsonl", picture, "a run", {"gzip -9": 2.02}, dots_per_inch=50)
    pixels = matplotlib.image.imread(picture, format="png")
    assert pixels.shape[:2] == (230, width)
    assert pixels[..., :3].std() > 0.05
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".new"] == []


def test_nothing_is_drawn_before_there_is_a_loss(tmp_path):
    assert not plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    write(tmp_path / "metrics.jsonl", VALIDATION)
    assert not plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()


def test_a_column_leaves_out_null():
    steps, values = column([{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}, {"step": 3}], "loss")
    assert steps.tolist() == [1.0]
    assert values.tolist() == [2.0]


def test_smoothing_keeps_a_constant_and_does_not_lag():
    assert smooth(np.full(9, 3.0), 2.0) == pytest.approx(np.full(9, 3.0))
    line = np.arange(50.0)
    assert smooth(line, 3.0) == pytest.approx(line), "nor bend at the ends"
    assert smooth(line[:2], 3.0) == pytest.approx(line[:2])
    assert smooth(line, 0.5) == pytest.approx(line)
    rough = np.random.default_rng(0).normal(size=400)
    assert smooth(rough, 5.0)[50:350].std() < 0.4
    assert smooth(np.array([7.0]), 4.0).tolist() == [7.0]


def test_no_point_is_cut_off_and_every_panel_says_what_it_shows(tmp_path, monkeypatch):
    """From a sharp fall at the beginning to the last row, but for a spike above the first loss."""
    losses = [7.6, 7.2, 6.5, 5.5, *(4.0 + 0.1 * (-1) ** step for step in range(200))]
    losses[100] = 500.0
    rows = [{"step": s, "loss": loss, "learning_rate": 1e-3} for s, loss in enumerate(losses, 1)]
    write(tmp_path / "metrics.jsonl", rows + VALIDATION)
    figures, draw = [], plots._draw
    monkeypatch.setattr(plots, "_draw", lambda figure, *rest: (figures.append(figure), draw(figure, *rest)))
    assert plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", dots_per_inch=20)
    loss, rate, held_out = figures[0].axes
    low, high = loss.get_ylim()
    assert low < min(losses)
    assert 7.6 < high < 10
    assert loss.get_xlim()[0] <= 1
    assert all(panel.get_ylabel() for panel in (loss, rate, held_out))
