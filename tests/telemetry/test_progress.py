import io

import pytest
from rich.console import Console

from jaxtrain.telemetry.progress import (
    LiveProgress,
    PlainProgress,
    Progress,
    fill,
    open_progress,
    readable_seconds,
)
from jaxtrain.text import readable_size
from tests.lines import STAMP, unstamped

TRAINING = {
    "step": 100,
    "loss": 2.3451,
    "grad_norm": 0.812,
    "learning_rate": 3e-4,
    "tokens_per_second": 12345.4,
    "step_seconds": 0.5,
    "data_wait_seconds": 0.001,
    "tflops_per_second_per_device_full": 451.2,
    "mfu_full": 0.456,
    "mfu_causal": 0.421,
    "device_memory_bytes": 2**34,
    "eta_seconds": 64.4,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_rows_are_one_greppable_line_each():
    stream = io.StringIO()
    with open_progress(1000, stream=stream) as progress:
        assert isinstance(progress, PlainProgress)
        for step in range(1, 101):
            progress.advance(step)
        progress.update(TRAINING)
        progress.update({"step": 100, "validation_loss": 2.2, "validation_bits_per_byte": 1.987654})
        progress.say("checkpoint saved: runs/[red]/100")
    assert all(STAMP.match(line) for line in stream.getvalue().splitlines())
    assert unstamped(stream.getvalue()).splitlines() == [
        "step 100/1000 | loss 2.345 | 12,345 tokens/s | 451 TFLOP/s/device | MFU 45.6% full | 42.1% causal | data wait 0.2% | "
        "grad norm 0.81 | lr 3.00e-04 | 16.0 GiB device | ETA 1m 04s",
        "step 100/1000 | validation loss 2.2000 | 1.9877 bits/byte",
        "checkpoint saved: runs/[red]/100",
    ]


def test_what_is_unknown_is_left_out_and_nan_is_shown():
    stream = io.StringIO()
    open_progress(10, stream=stream).update({"step": 1, "loss": float("nan"), "mfu_full": None, "eta_seconds": None})
    assert all(STAMP.match(line) for line in stream.getvalue().splitlines())
    assert unstamped(stream.getvalue()).splitlines() == ["step 1/10 | loss nan"]


def test_energy_is_shown_where_it_is_measured():
    stream = io.StringIO()
    row = {"step": 1, "loss": 2.0, "watts": 5432.1, "joules_per_token": 0.01234, "energy_kwh": 1.5, "energy_kwh_at_end": 12.25}
    open_progress(10, stream=stream).update(row)
    assert all(STAMP.match(line) for line in stream.getvalue().splitlines())
    assert unstamped(stream.getvalue()).splitlines() == ["step 1/10 | loss 2.000 | 5,432 W | 0.0123 J/token | 1.5 of 12.2 kWh"]


def test_other_processes_are_silent(capsys):
    with open_progress(10, process_index=3) as progress:
        assert type(progress) is Progress
        progress.advance(1)
        progress.update(TRAINING)
        progress.say("hello")
    assert capsys.readouterr().out == ""


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_progress(10, stream=Terminal()), PlainProgress)


def test_the_bar_shows_the_newest_figures_and_messages_stay_above_it(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with open_progress(1000, stream=stream) as progress:
        assert isinstance(progress, LiveProgress)
        progress.advance(100)
        progress.update(TRAINING)
        progress.say("saved [1, 2]")
        progress.update({"step": 100, "validation_loss": 2.2, "validation_bits_per_byte": 1.987654})
    text = stream.getvalue()
    assert "saved [1, 2]" in text
    assert "step 100/1000 | validation loss 2.2000 | 1.9877 bits/byte" in text
    last_frame = text[text.rindex("10%") :]
    for words in (
        "step 100/1,000",
        "ETA 1m 04s",
        "loss 2.345",
        "validation 1.988 bits/byte",
        "12,345 tokens/s",
        "data wait 0.2%",
    ):
        assert words in last_frame


def test_the_terminal_is_sane_after_an_interrupt():
    stream = Terminal()
    console = Console(file=stream, force_terminal=True, width=80)

    def interrupted():
        with LiveProgress(10, 0, console) as progress:
            progress.advance(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    hide, show = "\x1b[?25l", "\x1b[?25h"
    assert stream.getvalue().rindex(show) > stream.getvalue().rindex(hide)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(None, "?"), (0.4, "0s"), (59.4, "59s"), (59.6, "1m 00s"), (200, "3m 20s"), (7500, "2h 05m"), (273600, "3d 04h")],
)
def test_durations(seconds, words):
    assert readable_seconds(seconds) == words


def test_figures_fill_lines_without_being_broken():
    assert fill(["aaaa", "bb", "cc", "a long one indeed"], 12) == ["aaaa · bb", "cc", "a long one indeed"]
    assert fill(["abc"], 2) == ["abc"]


@pytest.mark.parametrize(
    ("size", "words"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.50 KiB"),
        (700 * 2**20, "700 MiB"),
        (12.3456 * 2**30, "12.3 GiB"),
        (2**40, "1.00 TiB"),
        (5000 * 2**40, "5000 TiB"),
    ],
)
def test_readable_size(size: float, words: str):
    assert readable_size(size) == words
