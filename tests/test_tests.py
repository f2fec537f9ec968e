"""Every test asserts something itself, so that a reader sees at the test what would make it fail."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
FILES = sorted(str(path.relative_to(TESTS)) for path in TESTS.rglob("test_*.py"))


def asserts(test: ast.AST) -> bool:
    """Whether there is an assert, a call of `pytest.raises`, of a function named as an assertion, or one with check=True."""
    calls = [node for node in ast.walk(test) if isinstance(node, ast.Call)]
    names = [ast.unparse(call.func).rpartition(".")[2] for call in calls]
    return (
        any(isinstance(node, ast.Assert) for node in ast.walk(test))
        or any(name in ("raises", "warns", "fail") or name.startswith("assert_") for name in names)
        or any(keyword.arg == "check" and ast.unparse(keyword.value) == "True" for call in calls for keyword in call.keywords)
    )


@pytest.mark.parametrize("file", FILES)
def test_every_test_asserts(file: str):
    tree = ast.parse((TESTS / file).read_text())
    tests = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    assert [test.name for test in tests if not asserts(test)] == []


def test_the_walk_sees_a_test_without():
    assert not asserts(ast.parse("def test_a():\n    check(b)"))
    assert asserts(ast.parse("def test_a():\n    np.testing.assert_allclose(b, c)"))
