"""DESIGN's rooms: a file imports only from floors below its own, or from its own folder; no import goes in a circle."""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxtrain"

ROOMS = (
    ("early", "errors", "host_memory", "jax_private", "parts", "quiet_plugin", "signals"),
    ("files", "numerics", "stores", "tables", "text"),
    ("hardware", "processes"),
    ("config",),
    ("layout",),
    ("agreement", "mesh", "program", "sharding"),
    ("ops",),
    ("objectives",),
    ("parallel",),
    ("models",),
    ("checkpoint", "data", "evaluation", "inference", "telemetry"),
    ("huggingface",),
    ("train",),
    ("launch", "planner"),
    ("measure",),
    ("preflight",),
    ("command",),
    ("report",),
    ("cli",),
    ("verbs",),
    ("__main__", "main"),
)
"""Folders and top-level files, from the ground up; each imports from the rows before its own, and from inside itself."""
FLOORS = {room: floor for floor, row in enumerate(ROOMS) for room in row}
NO_JAX = ("config.", "hardware.", "early", "errors", "files", "layout", "signals", "text")
SLOW_OUTSIDE = {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "tensorstore", "grain"}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def room_of(module: str) -> str:
    """The folder that this module lies in, or the module itself at the top level."""
    room = module.partition(".")[0]
    assert room in FLOORS, f"jaxtrain/{module.replace('.', '/')}.py is in no room: give it a floor in DESIGN and here"
    return room


def imported_names(path: Path) -> set[str]:
    """Every module that a file imports, at its top or inside a function, in dotted form; `from a import b` gives a.b too."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write imports in full"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def own_imports(path: Path) -> set[str]:
    """Which modules and packages of jaxtrain a file imports, without the leading name."""
    own = {name.removeprefix("jaxtrain.") for name in imported_names(path) if name.startswith("jaxtrain.")}
    return own & ({*MODULES} | {module.rpartition(".")[0] for module in MODULES})


def may_import(importer: str, imported: str) -> bool:
    one, other = room_of(importer), room_of(imported)
    return one == other or FLOORS[one] > FLOORS[other]


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str):
    upward = {name for name in own_imports(MODULES[module]) if not may_import(module, name)}
    floors = {name: FLOORS[room_of(name)] for name in upward}
    assert not upward, f"{module} (floor {FLOORS[room_of(module)]}) imports {floors}"


def test_the_walk_sees_imports():
    """The test of the test: imports at the top, inside functions, and by `from package import module`."""
    assert {"cli", "config.rules", "telemetry.progress", "train.trainer"} <= own_imports(MODULES["verbs.train"])
    assert "models.decoder" in own_imports(MODULES["train.state"])
    assert not may_import("models.decoder", "train.state")
    assert not may_import("telemetry.metrics", "train.step")
    assert may_import("train.run", "checkpoint")


def test_no_import_goes_in_a_circle():
    """Inside a room too, where every file could import every other."""
    packages = {".".join(path.parent.relative_to(PACKAGE).parts): path for path in PACKAGE.rglob("*/__init__.py")}
    imports = {name: own_imports(path) for name, path in (MODULES | packages).items()}
    in_order = graphlib.TopologicalSorter(imports).static_order()  # raises CycleError
    assert set(in_order) >= imports.keys()


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith(NO_JAX)])
def test_the_ground_floor_imports_nothing_slow(module: str):
    assert not {name.partition(".")[0] for name in imported_names(MODULES[module])} & SLOW_OUTSIDE


def test_no_help_imports_anything_slow():
    program = """
import contextlib, importlib, sys
from jaxtrain.cli import VERBS, module_of
from jaxtrain.command import parse
for verb in VERBS:
    module = importlib.import_module(module_of(verb))
    for usage in getattr(module, "USAGES", {}).values() or [module.USAGE]:
        with contextlib.suppress(SystemExit):
            parse(usage, ["--help"])
"""
    program += f"print('slow:', [name for name in {sorted(SLOW_OUTSIDE | {'rich', 'matplotlib'})} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "slow: []"


def test_one_module_knows_what_jax_keeps_private():
    """`jax._src` changes without notice: what is used of it is in jax_private.py, and tests/test_jax_private.py holds it."""
    using = {m for m, path in MODULES.items() if any(name.startswith("jax._src") for name in imported_names(path))}
    assert using == {"jax_private"}


WITHOUT_JAX = ("jaxtrain.config", "jaxtrain.errors", "jaxtrain.layout")


def test_schedules_are_tables_of_numpy():
    """`parallel.pipeline_schedule` is read by planners and tests that have no device: no jax."""
    names = imported_names(MODULES["parallel.pipeline_schedule"])
    outside = {name.partition(".")[0] for name in names if not name.startswith(WITHOUT_JAX)}
    assert outside <= {"__future__", "collections", "dataclasses", "functools", "numpy", "typing"}


def test_nothing_starts_jax_by_being_imported():
    """Importing every module leaves no backend initialised: distributed start-up must come first."""
    names = ", ".join(f"jaxtrain.{module}" for module in MODULES)
    program = f"import {names}\nprint(jaxtrain.jax_private.backends_are_initialized())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
