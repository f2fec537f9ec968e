"""A config file is found by path or name, may import its neighbours, and is explained with file and line where it fails."""

import json
import os
import re
import sys
from pathlib import Path

import pytest

from jaxtrain.command import parse_config
from jaxtrain.config import Config, to_json
from jaxtrain.config.loading import SHIPPED, load_config
from jaxtrain.config.names import set_field
from jaxtrain.config.rules import validate
from jaxtrain.errors import ConfigError, ExplainedError

HEAD = "from jaxtrain.config import Config\n"


def write(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(HEAD + text)
    return folder / name


def test_the_config_in_the_readme_is_valid(tmp_path):
    text, *_ = re.findall(r"```python\n(.*?)```", (Path(__file__).parents[2] / "README.md").read_text(), re.DOTALL)
    (tmp_path / "books.py").write_text(text)
    config = parse_config([f"--config={tmp_path}/books.py", "--mesh.pipe=2", "--train.microbatches=8"])
    assert validate(config, 8).mesh.fsdp == 2


# ---------------------------------------------------------------------------------------------------------------------
# Which file


@pytest.mark.parametrize("name", ["quickstart", "quickstart.py", "tiny-moe", "tiny_moe", "7b", "configs/7b", "configs/7b.py"])
def test_a_shipped_config_has_a_name(name: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(SHIPPED.parent if "/" in name else tmp_path)
    assert load_config(name).name == Path(name).stem.replace("-", "_")


def test_a_file_of_the_same_name_at_hand_comes_first(tmp_path: Path, monkeypatch):
    write(tmp_path, "quickstart.py", "def get_config():\n    return Config(name='mine')\n")
    monkeypatch.chdir(tmp_path)
    assert load_config("quickstart").name == "mine"


def test_a_missing_file_names_the_nearest():
    with pytest.raises(ExplainedError, match=r"configs/quickstrat.py: no such file; did you mean 'quickstart.py'\?"):
        load_config(SHIPPED / "quickstrat.py")
    with pytest.raises(ExplainedError, match=r"--config=quickstrat: no such file; did you mean 'quickstart'\?"):
        load_config("quickstrat")


def test_a_missing_folder_is_named(tmp_path: Path):
    with pytest.raises(ExplainedError, match=r"no such file; there is no \.py file in .*nowhere; see configs/"):
        load_config(tmp_path / "nowhere" / "7b.py")


def test_a_folder_is_no_file(tmp_path: Path):
    with pytest.raises(ExplainedError, match="that is a folder"):
        load_config(tmp_path)


def test_a_file_that_is_not_python(tmp_path: Path):
    (tmp_path / "config.toml").write_text("[mesh]\n")
    with pytest.raises(ExplainedError, match="not a Python file"):
        load_config(tmp_path / "config.toml")


# ---------------------------------------------------------------------------------------------------------------------
# JSON


@pytest.mark.parametrize("wrap", [lambda config: config, lambda config: {"config": "7b", "best_config": config}])
def test_what_a_run_or_a_plan_wrote_is_a_config(wrap, tmp_path: Path):
    config = set_field(load_config("tiny_moe"), "data.sources.1.path", "x")
    (tmp_path / "config.json").write_text(json.dumps(wrap(json.loads(to_json(config)))))
    assert load_config(tmp_path / "config.json") == config
    assert parse_config([f"--config={tmp_path}/config.json", "--mesh.fsdp=2"]) == set_field(config, "mesh.fsdp", 2)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "config.json: Expecting property name"),
        ("[1]", "is not an object of fields"),
        ('{"modle": {}}', r"config.json: config.modle: there is no such field; did you mean 'model'\?"),
        ('{"best_config": null}', "config=None is not an object of fields"),
        ('{"name": "x", "train": 3}', "config.train=3 is not an object"),
        ("\xff", "config.json: 'utf-8' codec can't decode"),
    ],
)
def test_json_that_is_no_config(text: str, words: str, tmp_path: Path):
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ExplainedError, match=words):
        load_config(tmp_path / "config.json")


def test_json_of_the_wrong_types_is_told_like_a_flag(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"train": {"steps": "ten"}}')
    with pytest.raises(ConfigError, match="train.steps"):
        validate(load_config(tmp_path / "config.json"), 1)


# ---------------------------------------------------------------------------------------------------------------------
# Neighbours


def test_a_config_imports_its_neighbour_wherever_it_lies(tmp_path: Path, monkeypatch):
    """Two folders have a base.py each; neither sees the other's, and nothing of them stays."""
    for folder in ("one", "two"):
        write(tmp_path / folder, "base.py", f"def get_config():\n    return Config(name='{folder}')\n")
        write(tmp_path / folder, "mine.py", "from base import get_config\n")
        write(tmp_path / folder, "late.py", "def get_config():\n    import base\n    return base.get_config()\n")
        write(tmp_path / folder / "parts", "__init__.py", f"NAME = '{folder}'\n")
        write(tmp_path / folder, "packed.py", "from parts import NAME\ndef get_config():\n    return Config(name=NAME)\n")
    monkeypatch.chdir(tmp_path)
    path, modules = list(sys.path), dict(sys.modules)
    for file in ("mine.py", "late.py", "packed.py"):
        assert [load_config(f"{folder}/{file}").name for folder in ("one", "two", "one")] == ["one", "two", "one"]
    assert sys.path == path
    assert {name: module for name, module in sys.modules.items() if modules.get(name) is not module} == {}


def test_a_neighbour_does_not_hide_the_standard_library_or_this_package(tmp_path: Path):
    for name in ("random.py", "jaxtrain.py", "quickstart.py"):
        (tmp_path / name).write_text("raise RuntimeError('hidden')\n")
    file = write(tmp_path, "mine.py", "import random\nget_config = lambda: Config(name=random.Random.__name__)\n")
    assert load_config(file).name == "Random"


def test_a_linked_config_finds_the_neighbours_of_its_target(tmp_path: Path):
    write(tmp_path / "there", "base.py", "def get_config():\n    return Config(name='base')\n")
    (tmp_path / "link.py").symlink_to(write(tmp_path / "there", "mine.py", "from base import get_config\n"))
    assert load_config(tmp_path / "link.py").name == "base"


# ---------------------------------------------------------------------------------------------------------------------
# What fails

FAULTS = {
    "raises": ("\ndef get_config():\n    raise ValueError('no such disk')\n", r"mine.py:4: ValueError: no such disk"),
    "a field that is none": ("\ndef get_config():\n    return Config(modle=3)\n", r"mine.py:4: TypeError: .*'modle'"),
    "syntax": ("\nget_config = 3 +\n", "mine.py:3: SyntaxError: invalid syntax"),
    "indentation": ("def get_config():\nreturn 3\n", "mine.py:3: IndentationError: expected an indented block"),
    "import": ("import no_such_thing\n", "mine.py:2: ModuleNotFoundError: No module named 'no_such_thing'"),
    "name": ("x = nothing\n", "mine.py:2: NameError: name 'nothing' is not defined"),
    "wrong type": (
        "\ndef get_config():\n    return 3\n",
        r"mine.py:3: get_config\(\) gave a int, not a jaxtrain.config.Config",
    ),
    "no get_config": ("config = Config()\n", r"mine.py: defines no get_config\(\) -> Config"),
    "arguments": ("def get_config(size):\n    return Config()\n", "mine.py: .* without arguments; give size a default"),
    "exit": ("import sys\nsys.exit('no GPU')\n", r"mine.py:3: SystemExit: the file ends the program \(no GPU\)"),
    "in a library": ("import json\njson.loads('{')\n", "mine.py:3: JSONDecodeError: Expecting property name"),
    "without words": ("\nraise KeyError\n", "mine.py:3: KeyError"),
    "endless": ("def get_config():\n    return get_config()\n", "mine.py:3: RecursionError"),
    "relative": ("from .base import get_config\n", "mine.py:2: ImportError: attempted relative import"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_fails_is_told_with_file_and_line(name: str, tmp_path: Path):
    text, words = FAULTS[name]
    with pytest.raises(ExplainedError, match=words):
        load_config(write(tmp_path, "mine.py", text))


@pytest.mark.parametrize("text", ["x = 1\ny = nothing\n", "x = 1\nx = 3 +\n"])
def test_the_line_of_a_neighbour_that_fails(text: str, tmp_path: Path):
    write(tmp_path, "base.py", text)
    with pytest.raises(ExplainedError, match=r"--config=.*base.py:3: (NameError|SyntaxError)"):
        load_config(write(tmp_path, "mine.py", "import base\n"))


def test_bytes_that_are_no_text(tmp_path: Path):
    (tmp_path / "mine.py").write_bytes(b"x = 1\ny = '\xff'\n")
    with pytest.raises(ExplainedError, match="mine.py.*SyntaxError"):
        load_config(tmp_path / "mine.py")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read(tmp_path: Path):
    file = write(tmp_path, "mine.py", "")
    file.chmod(0)
    with pytest.raises(ExplainedError, match="PermissionError"):
        load_config(file)


def test_a_config_may_load_another(tmp_path: Path):
    text = (
        f"from jaxtrain.config.loading import load_config\ndef get_config():\n    return load_config('{SHIPPED / '7b.py'}')\n"
    )
    assert load_config(write(tmp_path, "mine.py", text)) == load_config("7b")
    assert isinstance(load_config("7b"), Config)
