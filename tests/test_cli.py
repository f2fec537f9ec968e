"""How every verb starts and ends: signals from the first line on, and the exit codes that they give."""

import ast
import os
import shutil
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

from jaxtrain import cli
from jaxtrain.verbs import configs

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jaxtrain"
VERBS = ["train", "plan", "launch", "preflight", "checkpoint", "import", "export", "generate", "evaluate", "replay"]
VERBS += ["tokenize", "bench", "calibrate", "layouts", "ladder", "report", "configs"]
INSIDE = {"planner/deviceless.py", "launch/on_ray.py"}
"""Programs that this one starts itself."""


def run(*command, **variables):
    """(exit code, standard output, standard error) of a Python program."""
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | variables, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def test_one_command_takes_signals_before_it_imports_anything():
    """Also by way of the package that it is in; and `python -m jaxtrain.main` is one of its verbs."""
    whole = ast.parse((PACKAGE / "__main__.py").read_text(encoding="utf-8")).body
    assert list(map(ast.unparse, whole[1:])) == [
        "import jaxtrain.early",
        "from jaxtrain.cli import main",
        "if __name__ == '__main__':\n    main()",
    ]
    (face,) = ast.parse((PACKAGE / "main.py").read_text(encoding="utf-8")).body[1:]
    assert list(map(ast.unparse, face.body)) == ["import jaxtrain.early", "from jaxtrain.cli import main", "main('train')"]
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert scripts == {"jaxtrain": "jaxtrain.__main__:main"}
    packages = "import sys, jaxtrain.launch, jaxtrain.preflight; print('jax' in sys.modules)"
    assert run("-c", packages) == (0, "False\n", "")


def test_there_is_no_other_command():
    own = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if 'if __name__ == "__main__":' in path.read_text()}
    assert own == {"__main__.py", "main.py"} | INSIDE
    assert list(cli.VERBS) == VERBS
    files = {path.stem for path in (PACKAGE / "verbs").glob("*.py")}
    assert files == {cli.module_of(verb).rpartition(".")[2] for verb in VERBS} | {"__init__"}


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_helps_without_jax(verb):
    """In one style; nothing that takes long is imported for it, nor for a wrong flag."""
    program = "import sys, jaxtrain.cli; sys.argv[1:] = {}; import atexit; {}; jaxtrain.cli.main()"
    loaded = "atexit.register(lambda: print(sorted({'jax', 'rich'} & {*sys.modules}), file=sys.stderr))"
    code, text, errors = run("-c", program.format([verb, "--help"], loaded))
    assert (code, errors) == (0, "[]\n")
    assert text.startswith(f"usage: jaxtrain {verb} ")
    code, text, errors = run("-c", program.format([verb, "--config=7b", "--no.such.flag=1"], loaded))
    assert (code, text) == (2, "")
    assert errors.startswith("error: ")
    assert "--no.such.flag" in errors or f"jaxtrain {verb}" in errors
    assert errors.endswith("[]\n")


def test_the_shipped_configs_are_listed(capsys):
    assert configs.main([]) == 0
    rows = [line.split(maxsplit=3) for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert {row[0] for row in rows} == {path.stem for path in (ROOT / "configs").glob("*.py")}
    assert ["7b", "6.74", "B"] in [row[:3] for row in rows]
    assert all(len(row) == 4 for row in rows)


def test_without_a_verb():
    code, text, errors = run("-m", "jaxtrain", "--help")
    assert (code, errors) == (0, "")
    assert [line.split()[0] for line in text.splitlines() if line.startswith("  ")] == VERBS
    assert len(text.splitlines()) < 24
    assert max(len(line) for line in text.splitlines() if line.startswith("  ")) <= 100
    assert run("-m", "jaxtrain") == (0, text, "")
    assert run("-m", "jaxtrain", "--version") == (0, f"jaxtrain {version('jaxtrain')}\n", "")
    code, _, errors = run("-m", "jaxtrain", "trian", "--config=7b")
    assert (code, "did you mean 'train'?" in errors) == (2, True)
    code, _, errors = run("-m", "jaxtrain", "--config=7b")
    assert (code, "jaxtrain train --config=7b" in errors) == (2, True)


@pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")
@pytest.mark.parametrize(
    ("line", "words"),
    [
        (["pl"], ["plan"]),
        (["train", "--dr"], ["--dry_run"]),
        (["train", "--mesh.f"], ["--mesh.fsdp"]),
        (["plan", "--model.moe.num"], ["--model.moe.num_experts"]),
        (["checkpoint", "ver"], ["verify"]),
        (["tokenize", "--mesh"], []),
    ],
)
def test_completion(line, words):
    ask = f"COMP_WORDS=(jaxtrain {' '.join(line)}); COMP_CWORD={len(line)}; _jaxtrain; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", f"{cli.completion()}\n{ask}"], capture_output=True, text=True)
    assert (done.stdout.split(), done.stderr) == (words, "")


@pytest.mark.parametrize("command", [["jaxtrain", "train"], ["jaxtrain.main"]])
def test_train_has_two_names(command):
    code, text, errors = run("-m", *command, "--config=7b", "--help=mesh")
    assert (code, errors) == (0, "")
    assert text.startswith("mesh: ")


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

def imports(arguments):
    import swallows

def done(arguments):
    import atexit
    atexit.register(wait)
    return 7

if __name__ == "__main__":
    cli.UNWINDING_SECONDS = 0.1
    cli.run("verb", sys.argv.pop())
"""


SWALLOWS = """
import verb
try:
    verb.wait()
except BaseException:
    print("swallowed")
"""


@pytest.mark.parametrize(
    ("function", "number", "code", "out", "errors"),
    [
        ("orderly", signal.SIGINT, 130, "cleaned up\n", "interrupted by SIGINT\n"),
        ("orderly", signal.SIGTERM, 143, "cleaned up\n", "interrupted by SIGTERM\n"),
        ("greedy", signal.SIGINT, 130, "at work\n", "interrupted by SIGINT\n"),
        ("imports", signal.SIGINT, 130, "", "interrupted by SIGINT\n"),
        ("done", signal.SIGINT, 7, "", ""),
    ],
)
def test_a_verb_at_work(tmp_path, function, number, code, out, errors):
    """It cleans up; where the interrupt is swallowed, or would be by what it imports, it ends all the same; when it is done it
    keeps its exit code."""
    (tmp_path / "verb.py").write_text(VERB, encoding="utf-8")
    (tmp_path / "swallows.py").write_text(SWALLOWS, encoding="utf-8")
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
