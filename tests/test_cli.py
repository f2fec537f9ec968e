"""How every verb starts and ends: signals from the first line on, and the exit codes that they give."""

import ast
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxtrain"
VERBS = ["main", "plan", "launch", "tokenize", "checkpoint", "collectives", "calibrate", "bench", "replay", "preflight"]


def module_of(verb):
    """The file that `python -m jaxtrain.VERB` runs."""
    return PACKAGE / verb / "__main__.py" if (PACKAGE / verb).is_dir() else PACKAGE / f"{verb}.py"


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_takes_signals_before_it_imports_anything(verb):
    """Also by way of the package that it is in."""
    docstring, _, first, *rest = ast.parse(module_of(verb).read_text(encoding="utf-8")).body
    early, cli, run = map(ast.unparse, first.body)
    assert (ast.unparse(first.test), early, cli) == (
        "__name__ == '__main__'",
        "import jaxtrain.early",
        "from jaxtrain import cli",
    )
    name = ".".join(module_of(verb).relative_to(PACKAGE.parent).with_suffix("").parts)
    assert run.startswith(f"cli.run('{name}'")
    packages = "import sys, jaxtrain.checkpoint, jaxtrain.launch, jaxtrain.preflight; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", packages], capture_output=True, text=True).stdout == "False\n"


EARLY = "import jaxtrain.early, os, signal; os.kill(os.getpid(), signal.{}); print('went on')"


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_the_first_milliseconds(name, code):
    done = subprocess.run([sys.executable, "-c", EARLY.format(name)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (code, "", f"interrupted by {name}\n")


VERB = """
import os, sys, time
from jaxtrain import cli

def wait():
    os.write(1, b"at work\\n")
    time.sleep(60)

def orderly(arguments):
    try:
        wait()
    finally:
        print("cleaned up")

def greedy(arguments):
    for _ in range(2):
        try:
            wait()
        except BaseException:
            pass

def done(arguments):
    import atexit
    atexit.register(wait)
    return 7

if __name__ == "__main__":
    cli.UNWINDING_SECONDS = 0.1
    cli.run("verb", sys.argv.pop())
"""


@pytest.mark.parametrize(
    ("function", "number", "code", "out", "errors"),
    [
        ("orderly", signal.SIGINT, 130, "cleaned up\n", "interrupted by SIGINT\n"),
        ("orderly", signal.SIGTERM, 143, "cleaned up\n", "interrupted by SIGTERM\n"),
        ("greedy", signal.SIGINT, 130, "at work\n", "interrupted by SIGINT\n"),
        ("done", signal.SIGINT, 7, "", ""),
    ],
)
def test_a_verb_at_work(tmp_path, function, number, code, out, errors):
    """It cleans up; where the interrupt is swallowed it ends all the same; when it is done it keeps its exit code."""
    (tmp_path / "verb.py").write_text(VERB, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, tmp_path / "verb.py", function], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout.readline() == "at work\n"
        process.send_signal(number)
        assert process.communicate(timeout=60) == (out, errors)
        assert process.returncode == code
    finally:
        process.kill()
