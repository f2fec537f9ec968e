"""Any text on any stream: characters that the encoding lacks, bytes that are no text, markup, and readers that have gone."""

import ast
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain.errors import EXIT_UNREAD
from jaxtrain.telemetry.plots import plot_losses
from jaxtrain.telemetry.progress import LiveProgress, PlainProgress
from jaxtrain.text import open_console, printable

PACKAGE = Path(__file__).parent.parent / "jaxtrain"
UGLY = "[/bold] été :smile: \udcff \x1b[2J \x00 $\\frac$ 漢"
"""A name or a sample as it may come: markup, an emoji code, a byte that is no UTF-8, control characters, a broken formula."""


def test_what_cannot_be_shown_is_shown_as_an_escape():
    assert printable("a\tb\nc") == "a\tb\nc"
    assert printable("\x1b[2J\x00\r\x85") == r"\x1b[2J\x00\r\x85"
    assert printable(os.fsdecode(b"caf\xe9")) == r"caf\udce9"
    assert printable("été 漢 [/bold]") == "été 漢 [/bold]"


def test_consoles_take_text_literally(capsys):
    from rich.table import Table

    table = Table(title=UGLY)
    table.add_column(UGLY)
    table.add_row(UGLY)
    console = open_console(200)
    console.print(table)
    console.print(UGLY)
    assert capsys.readouterr().out.count(printable(UGLY)) == 4


def test_progress_takes_text_literally():
    stream = io.TextIOWrapper(io.BytesIO(), "utf-8")
    PlainProgress(10, stream).say(UGLY)
    stream.seek(0)
    assert stream.read().endswith(f" {printable(UGLY)}\n")

    from rich.console import Console

    stream = io.TextIOWrapper(io.BytesIO(), "utf-8")
    with LiveProgress(10, 0, Console(file=stream, force_terminal=True, width=200)) as live:
        live.say(UGLY)
    stream.seek(0)
    assert printable(UGLY) in stream.read()


def test_pictures_have_any_title(tmp_path):
    rows = ({"step": step, "loss": 1.0, "learning_rate": 1.0} for step in (1, 2))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", UGLY, dots_per_inch=40)


# ---------------------------------------------------------------------------------------------------------------------
# Programs: a module that prints, started as every verb is


VERB = """
import sys
from pathlib import Path

def main(arguments):
    print(arguments[0], "\\u6f22 \\udcff", file=sys.stderr)
    for _ in range(int(arguments[1])):
        print(arguments[0], "\\u6f22 \\udcff")
    Path(arguments[2]).write_text("at the end", encoding="utf-8")
    return 0
"""


@pytest.fixture
def start(tmp_path):
    """start(lines, answers, environment, **pipes) -> process; it writes tmp_path/done at its end."""
    (tmp_path / "verb.py").write_text(VERB, encoding="utf-8")
    processes = []

    def start(lines, answers=True, environment=None, before=(), **pipes):
        program = f"from jaxtrain import cli; cli.run('verb', answers_on_stdout={answers})"
        arguments = [*before, sys.executable, "-c", program, b"n\xffame", str(lines), str(tmp_path / "done")]
        path = f"{tmp_path}:{PACKAGE.parent}"
        processes.append(subprocess.Popen(arguments, env={**os.environ, "PYTHONPATH": path, **(environment or {})}, **pipes))
        return processes[-1]

    yield start
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    ("environment", "shown"),
    [
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, rb"n\udcffame \u6f22 \udcff"),
        ({"PYTHONIOENCODING": "cp1252:strict"}, rb"n\udcffame \u6f22 \udcff"),
        ({"PYTHONUTF8": "1"}, b"n\\udcffame \xe6\xbc\xa2 \\udcff"),
    ],
    ids=["ascii", "cp1252", "utf-8"],
)
def test_any_text_on_any_encoding(start, environment, shown):
    out, errors = start(1, True, environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE).communicate()
    assert out == errors == shown + b"\n"


def test_a_verb_whose_reader_has_gone_ends_quietly(start, tmp_path):
    process = start(100_000, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert (process.wait(), errors.count(b"\n")) == (EXIT_UNREAD, 1)
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("gone", ["pipe", "terminal"])
def test_a_verb_that_writes_files_outlives_its_reader(start, tmp_path, gone):
    try:
        reading, writing = os.pipe() if gone == "pipe" else os.openpty()
    except OSError as error:
        pytest.skip(f"no terminal can be opened here: {error}")
    process = start(10_000, False, stdout=writing, stderr=writing)
    os.close(writing)
    os.read(reading, 1)
    os.close(reading)
    assert process.wait() == 0
    assert (tmp_path / "done").exists()


def test_a_full_disk_under_the_answer_is_an_error_of_one_line(start):
    with open("/dev/full", "wb") as full:
        process = start(10, stdout=full, stderr=subprocess.PIPE)
        errors = process.stderr.read().splitlines()
    assert process.wait() == 1
    assert errors[1:] == [b"error: standard output cannot be written: No space left on device"]


def test_closed_streams_are_no_files_of_others(start, tmp_path):
    assert start(10, False, before=["bash", "-c", 'exec "$@" >&- 2>&-', "bash"]).wait() == 0
    assert (tmp_path / "done").read_text(encoding="utf-8") == "at the end"


# ---------------------------------------------------------------------------------------------------------------------
# Files


def calls_without_encoding(path):
    """Lines in which text is read or written in whatever encoding the environment has."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or any(keyword.arg == "encoding" for keyword in node.keywords):
            continue
        function = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        literals = {argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)}
        is_builtin = isinstance(node.func, ast.Name) and function == "open"
        is_text = is_builtin and not any("b" in str(mode) for mode in literals)
        as_text = any(keyword.arg == "text" for keyword in node.keywords) and function in ("run", "Popen")
        if function in ("read_text", "write_text") or is_text or as_text:
            yield node.lineno


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_of_text_have_an_encoding(path):
    assert list(calls_without_encoding(path)) == []


def test_the_walk_sees_a_missing_encoding(tmp_path):
    source = 'open(p)\nopen(p, "w")\nopen(p, "rb")\nf.read_text()\nrun(a, text=True)\nopen(p, encoding="utf-8")\n'
    (tmp_path / "a.py").write_text(source, encoding="utf-8")
    assert list(calls_without_encoding(tmp_path / "a.py")) == [1, 2, 4, 5]
