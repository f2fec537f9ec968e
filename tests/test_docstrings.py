"""DESIGN's style, as far as a program can hold it: everything public is documented, and nothing is too long."""

import ast
import collections
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxtrain"
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
LONGEST_FUNCTION = 60
LONGEST_FILE = 520
LONGER_FILES = {"config/fields.py": 640}  # mostly fields and their help texts

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
CLASSES = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
METHODS = {node.name: {item.name for item in node.body if isinstance(item, ast.FunctionDef)} for node in CLASSES}
BASES = {node.name: [ast.unparse(base).rpartition(".")[2] for base in node.bases] for node in CLASSES}
DOCUMENTED_METHODS = {
    (node.name, item.name)
    for node in CLASSES
    for item in node.body
    if isinstance(item, ast.FunctionDef) and ast.get_docstring(item)
}


def inherits_docstring(class_name: str, method: str) -> bool:
    """Whether a base class of ours, or a protocol that this class fulfils, documents the method: no need to say it again."""
    bases = [base for base in BASES.get(class_name, []) if base in BASES]
    protocols = [name for name, of in BASES.items() if "Protocol" in of and METHODS[name] <= METHODS.get(class_name, set())]
    documented = [base for base in (*bases, *protocols) if base != class_name]
    return any((base, method) in DOCUMENTED_METHODS or inherits_docstring(base, method) for base in documented)


def public(body: list[ast.stmt], inside: str = "") -> Iterator[tuple[str, Definition]]:
    """Public functions, classes, and methods of public classes; not what stands inside functions, and no dunder."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield inside + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body, f"{inside}{node.name}.")


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_documented(name: str):
    tree = TREES[name]
    if any(not isinstance(node, ast.Expr) for node in tree.body):
        assert ast.get_docstring(tree), f"{name} says nothing about itself"
    silent = []
    for path, node in public(tree.body):
        owner, _, method = path.rpartition(".")
        if not ast.get_docstring(node) and not inherits_docstring(owner, method):
            silent.append(f"{name}:{node.lineno} {path}")
    assert silent == []


def test_no_class_name_stands_twice():
    names = collections.Counter(node.name for tree in TREES.values() for node in tree.body if isinstance(node, ast.ClassDef))
    assert [name for name, count in names.items() if count > 1] == []


def test_the_walk_finds_definitions():
    """The test of the test: functions, classes and methods of a file that is known to have all three."""
    found = {path for path, _ in public(TREES["models/decoder.py"].body)}
    assert {"initialize", "Decoder", "Decoder.loss_functions"} <= found
    assert not any(part[0] == "_" for path in found for part in path.split("."))


@pytest.mark.parametrize("name", MODULES)
def test_no_function_is_too_long(name: str):
    functions = [node for node in ast.walk(TREES[name]) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {f"{name}:{node.lineno} {node.name}": (node.end_lineno or 0) - node.lineno + 1 for node in functions}
    assert {where: length for where, length in lengths.items() if length > LONGEST_FUNCTION} == {}


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_too_long(name: str):
    assert len(MODULES[name].read_text().splitlines()) <= LONGER_FILES.get(name, LONGEST_FILE)


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_named_for_nothing(name: str):
    assert not set(Path(name).with_suffix("").parts) & {"utils", "util", "helpers", "helper", "misc", "common"}
