"""layout.py makes each decision that trainer and planner share, and no other file makes one of them again."""

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxtrain import layout
from jaxtrain.config import Config, MeshConfig, MoEConfig, OptimizerConfig, ShardingConfig, TrainConfig
from jaxtrain.layout import fewer_rows

PACKAGE = Path(layout.__file__).parent
TREES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}
RULES = {node.name for node in TREES["layout.py"].body if isinstance(node, ast.FunctionDef)}
CONSTANTS = {node.targets[0].id for node in TREES["layout.py"].body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]


def names(node: ast.AST) -> set[str]:
    """Names and attributes that stand anywhere in an expression."""
    found = {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return found | {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def compares(*wanted: str) -> Callable[[ast.AST], bool]:
    """Whether a node compares one of these with a number."""
    return lambda node: isinstance(node, ast.Compare) and bool(names(node.left) & set(wanted)) and _has_number(node)


def _has_number(node: ast.Compare) -> bool:
    return any(isinstance(c, ast.Constant) and isinstance(c.value, int) for c in (node.left, *node.comparators))


def either_moves(node: ast.AST) -> bool:
    """Whether a node asks if tensor or expert is above 1."""
    return isinstance(node, ast.BoolOp) and isinstance(node.op, ast.Or) and {"tensor", "expert"} <= names(node)


def divides(left: str, *others: str) -> Callable[[ast.AST], bool]:
    """Whether a node divides by something, with these names in it."""
    kinds = (ast.Div, ast.FloorDiv)
    return lambda node: isinstance(node, ast.BinOp) and isinstance(node.op, kinds) and {left, *others} <= names(node)


def multiplies(name: str) -> Callable[[ast.AST], bool]:
    """Whether a node multiplies by something of this name."""
    return lambda node: isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult) and name in names(node)


def reads(attribute: str) -> Callable[[ast.AST], bool]:
    return lambda node: isinstance(node, ast.Attribute) and node.attr == attribute and isinstance(node.ctx, ast.Load)


def maps_optimizers(node: ast.AST) -> bool:
    """Whether a node is a table of numbers by optimizer."""
    if not isinstance(node, ast.Dict):
        return False
    keys = {key.value for key in node.keys if isinstance(key, ast.Constant)}
    return {"adamw", "lion"} <= keys and any(isinstance(v, ast.Constant) and isinstance(v.value, int) for v in node.values)


def names_of_dots(node: ast.AST) -> bool:
    """Whether a node lists what remat `dots` keeps by name."""
    listed = (
        {e.value for e in node.elts if isinstance(e, ast.Constant)}
        if isinstance(node, ast.Tuple | ast.List | ast.Set)
        else set()
    )
    return {"attention", "expert_in"} <= listed or {"query", "mlp_gate"} <= listed


MARKS: dict[str, tuple[Callable[[ast.AST], bool], set[str]]] = {
    "moves_activations": (either_moves, {"config/rules.py"}),
    "parts_in_turns": (reads("take_turns"), {"planner/answer.py"}),
    "ZeRO levels": (compares("zero"), {"planner/memory.py"}),
    "whole_moments": (maps_optimizers, set()),
    "kept_names": (names_of_dots, {"config/fields.py"}),
    "room_of_expert": (multiplies("capacity_factor"), set()),
    "layers_per_part": (divides("stages", "chunks"), set()),
    "loss_chunks": (divides("chunk", "tensor"), set()),
    "microbatch_rows": (divides("batch_shards", "microbatches"), {"launch/elastic.py"}),
}
"""By decision: what a second copy of it would look like, and files that may hold that for another reason."""


def places(mark: Callable[[ast.AST], bool]) -> Iterator[str]:
    for name, tree in TREES.items():
        yield from (name for node in ast.walk(tree) if mark(node))


@pytest.mark.parametrize("decision", MARKS)
def test_a_decision_is_made_once(decision: str):
    mark, others = MARKS[decision]
    found = set(places(mark))
    assert "layout.py" in found, "the mark no longer finds the decision itself"
    assert found <= {"layout.py", *others}, f"{decision}: import it from jaxtrain.layout"


def test_no_other_file_defines_one_of_its_names():
    for name, tree in TREES.items():
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        defined |= {t.id for node in tree.body if isinstance(node, ast.Assign) for t in node.targets if isinstance(t, ast.Name)}
        assert name == "layout.py" or not defined & (RULES | CONSTANTS), name


def test_every_decision_is_shared():
    """A rule that only one room needs belongs there."""
    used = {name: names(tree) for name, tree in TREES.items() if name != "layout.py"}
    for rule in RULES:
        rooms = {name.partition("/")[0] for name, found in used.items() if rule in found}
        assert rooms, f"{rule} is used nowhere"


def test_decisions():
    tensor, weights = MeshConfig(fsdp=4, tensor=2), MeshConfig(fsdp=8)
    assert [layout.parts_in_turns(ShardingConfig(), tensor, rows) for rows in (1, 2, 3, 4)] == [1, 2, 1, 2]
    assert layout.parts_in_turns(ShardingConfig(), weights, 4) == layout.parts_in_turns(
        ShardingConfig(take_turns=False), tensor, 4
    )
    assert [layout.layers_per_iteration(layers, 4) for layers in (1, 4, 6, 7, 8, 12)] == [1, 2, 3, 1, 4, 4]
    assert layout.loss_chunks(4096, 512, 1) == (8, 512)
    assert layout.loss_chunks(5, 4, 2) == (3, 2)
    assert MoEConfig().group(64) == 64
    assert layout.padded_rows(10, 2, 1) == 10
    assert layout.padded_rows(10, 2, 4) == 16
    # 100 tokens a device, 3 experts each, 4 devices: all that may come; 1.25 of an even spread, which rounds up; never more.
    assert [layout.exchange_rows(100, 3, 4, 2, factor) for factor in (0.0, 1.25, 1.001, 9.0)] == [800, 375, 301, 800]
    assert layout.exchange_rows(100, 3, 1, 8, 1.0) == 300  # on one device nothing is sent, and nothing dropped
    assert [layout.whole_moments(OptimizerConfig(name="sgd", beta1=beta)) for beta in (0.0, 0.9)] == [0, 1]
    assert layout.keeps(TrainConfig(remat="dots"), "query")
    assert not layout.keeps(TrainConfig(remat="named", remat_save=("attention",)), "query")


@pytest.mark.parametrize(
    ("rows", "microbatches", "mesh", "needed", "found"),
    [
        (256, 1, {}, 200, (256, 1)),
        (256, 1, {}, 192, (192, 1)),
        (256, 1, {"fsdp": 8}, 3, (64, 1)),
        (16, 2, {"fsdp": 8}, 3, (8, 1)),  # a row of a device in each microbatch
        (16, 2, {"pipe": 2, "fsdp": 4}, 9, (16, 2)),  # three quarters of two rows
        (32, 4, {"pipe": 2, "fsdp": 4}, 9, (16, 2)),
        (32, 2, {"pipe": 2, "fsdp": 4}, 9, (16, 2)),  # half a turn of the pipeline is none
    ],
)
def test_fewer_rows_divide_over_devices_and_microbatches(rows, microbatches, mesh, needed, found):
    config = Config(mesh=MeshConfig(**{"fsdp": 1} | mesh), train=TrainConfig(global_batch_size=rows, microbatches=microbatches))
    assert fewer_rows(config, needed) == found
