"""Plain lines where there is no terminal, and silence for short work."""

from jaxtrain.data import progress as progress_module
from jaxtrain.data.progress import progress


def test_short_work_is_silent(capsys):
    with progress("reading", 100) as advance:
        advance(100)
    assert capsys.readouterr().err == ""


def test_long_work_prints_whole_lines(capsys, monkeypatch):
    monkeypatch.setattr(progress_module, "QUIET_SECONDS", 0)
    with progress("reading", 4 << 20) as advance:
        advance(1 << 20)
        advance(3 << 20)  # too soon after the first line to get one
    first, last = capsys.readouterr().err.splitlines()
    assert first == "reading: 25% of 4.00 MiB"
    assert last.startswith("reading: done, 4.00 MiB in ")


def test_a_terminal_gets_a_live_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with progress("reading", 10) as advance:
        advance(10)
    assert "reading" in capsys.readouterr().err
