"""DESIGN's style, as far as a program can hold it: everything public is documented, and nothing is too long."""

import ast
import collections
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxtrain"
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}
LONGEST_FUNCTION = 60
LONGEST_FILE = 450

VERBS = set(
    """
    Add Append Apply Ask Average Begin Bring Build Call Carry Check Choose Claim Clean Close Collect Combine Commit Compare
    Compile Compute Continue Convert Copy Count Create Cut Delete Describe Detach Dispatch Do Draw Drop Emulate Encode End
    Estimate Evaluate Expand Explain Export Fetch Fill Find Fix Flush Fold Format Free Generate Give Group Have Hold
    Identity Ignore Import Initialise Iterate Join Judge Keep Leave Let List Load Lock Log Look Lower Make Map Mark Measure
    Merge Move Name Open Orthogonalise Pad Parse Pass Plan Plot Post Prepare Print Prove Put Queue Raise Rank Read Record
    Redirect Refuse Register Remove Rename Render Replace Report Reset Resolve Restore Return Rotate Round Run Sample Save
    Say Scale Score Search Send Set Show Skip Sleep Solve Sort Split Stack Start Step Stop Submit Sum Suppress Take Tell
    Time Tokenize Train Translate Try Turn Type Update Use Validate Verify Visit Wait Wrap Write Yield
""".split()
)
"""First words of a function's docstring: verbs in the imperative, and the formula "Identity"."""

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
TREES = {name: ast.parse(path.read_text()) for name, path in MODULES.items()}
CLASSES = [node for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
METHODS = {
    node.name: {item.name for item in node.body if isinstance(item, ast.FunctionDef) and not item.decorator_list}
    for node in CLASSES
}
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


def is_property(node: Definition) -> bool:
    """Return whether the definition is a property, which reads as an attribute: a noun describes it."""
    return any("property" in ast.unparse(decorator) for decorator in node.decorator_list)


def speaks_for_itself(node: Definition) -> bool:
    """Return whether name and type may say it all: a property, or a method or function that only returns one expression."""
    return not isinstance(node, ast.ClassDef) and (is_property(node) or [*map(type, node.body)] == [ast.Return])


def begins_badly(docstring: str) -> bool:
    """Return whether a function's docstring begins neither with a verb in the imperative nor with a formula."""
    first, line = docstring.split()[0], docstring.splitlines()[0]
    return (
        first.rstrip(",.;:") not in VERBS
        if re.fullmatch(r"[A-Z][a-z-]+[,.;:]?", first)
        else not re.search(r"[][(){}=<>|/*+^`\"]", line)
    )


@pytest.mark.parametrize("name", MODULES)
def test_classes_and_properties_are_described_by_no_question(name: str):
    """ "What ..." and "How ..." name neither a thing nor an action."""
    described = [
        n for n in ast.walk(TREES[name]) if isinstance(n, ast.ClassDef) or (isinstance(n, Definition) and is_property(n))
    ]
    first = {n.name: text.split()[0] for n in described if (text := ast.get_docstring(n))}
    assert not {
        n: word for n, word in first.items() if word in ("What", "Where", "Whether", "Which", "How", "When", "Why", "Of")
    }


@pytest.mark.parametrize("name", MODULES)
def test_a_function_is_documented_by_an_imperative_or_a_formula(name: str):
    functions = [
        n for n in ast.walk(TREES[name]) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef) and not is_property(n)
    ]
    documented = [(n, ast.get_docstring(n)) for n in functions]
    bad = [f"{name}:{n.lineno} {n.name}: {text.splitlines()[0]}" for n, text in documented if text and begins_badly(text)]
    assert bad == [], "begin with a verb of VERBS (add yours there if it is one), or with a formula"


def test_the_law_of_docstrings_can_be_broken():
    noun_fragments = (
        "The mean loss.",
        "Of one device.",
        "Where it lies.",
        "Returns the loss.",
        "Bytes of a leaf.",
        "uint32 words.",
    )
    assert all(begins_badly(text) for text in noun_fragments)
    assert not any(begins_badly(text) for text in ("Return the mean loss.", "x / sum(x).", "(params, state) after a step."))


@pytest.mark.parametrize("name", MODULES)
def test_everything_public_is_documented(name: str):
    tree = TREES[name]
    if any(not isinstance(node, ast.Expr) for node in tree.body):
        assert ast.get_docstring(tree), f"{name} has no docstring"
    silent = []
    for path, node in public(tree.body):
        owner, _, method = path.rpartition(".")
        if not ast.get_docstring(node) and not inherits_docstring(owner, method) and not speaks_for_itself(node):
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
    assert len(MODULES[name].read_text().splitlines()) <= LONGEST_FILE


@pytest.mark.parametrize("name", MODULES)
def test_no_file_is_named_for_nothing(name: str):
    assert not set(Path(name).with_suffix("").parts) & {"utils", "util", "helpers", "helper", "misc", "common"}
