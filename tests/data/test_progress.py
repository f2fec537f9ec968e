"""Plain lines where there is no terminal, and silence for short work."""

import pytest

from jaxtrain.data import progress as progress_module
from jaxtrain.data.progress import progress, readable_bytes


def test_short_work_is_silent(capsys):
    with progress("reading", 100) as advance:
        advance(100)
    assert capsys.readouterr().err == ""


def test_long_work_prints_whole_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "QUIET_SECONDS", 0)
    with progress("reading", 4_000_000) as advance:
        advance(1_000_000)
        advance(3_000_000)  # too soon after the first line to get one
    first, last = capsys.readouterr().err.splitlines()
    assert first == "reading: 25% of 4.0 MB"
    assert last.startswith("reading: done, 4.0 MB in ")


def test_a_terminal_gets_a_live_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress("reading", 10) as advance:
        advance(10)
    assert "reading" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 kB"), (11_600_000, "11.6 MB"), (2.5e13, "25.0 TB")]
)
def test_readable_bytes(count, words):
    assert readable_bytes(count) == words
