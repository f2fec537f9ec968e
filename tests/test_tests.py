"""Every test asserts something itself, so that a reader sees at the test what would make it fail; long ones come first."""

import ast
from pathlib import Path

import pytest

from tests.order import LONG, dealt

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


def test_every_worker_begins_with_long_files():
    tests = [(file, number) for file in FILES for number in range(7)]
    order = dealt(tests, lambda test: test[0], 3)
    assert sorted(order) == sorted(tests)
    size = -(-len(tests) // 3)
    assert [order[worker * size][0] for worker in range(3)] == list(LONG[:3])
    assert all(file not in LONG for file, _ in order[size - 7 : size])
    assert [test for test in order if test[0] not in LONG] == [test for test in tests if test[0] not in LONG]
    assert set(LONG) <= set(FILES)
