"""DESIGN's rooms: a file imports only from floors below its own, or from its own folder on the same floor."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "jaxtrain"

# Prefixes of module names, the longest match counts. `jaxtrain.train` is on two floors: pure functions below, the loop above.
FLOORS = {
    "config": 0,
    "config_fields": 0,
    "config_file": 0,
    "config_notes": 0,
    "config_rules": 0,
    "source_rules": 0,
    "command_help": 0,
    "command_line": 0,
    "chip": 0,
    "chip_file": 0,
    "hardware": 0,
    "host_memory": 0,
    "errors": 0,
    "files": 0,
    "jax_private": 0,
    "parts": 0,
    "paths": 0,
    "early": 0,
    "signals": 0,
    "text": 0,
    "agreement": 1,
    "mesh": 1,
    "numerics": 1,
    "processes": 1,
    "safetensors": 1,
    "sharding": 1,
    "ops": 2,
    "models": 3,
    "parallel": 3,
    "train.rounding": 4,
    "train.schedule": 4,
    "train.optimizer": 4,
    "train.balance": 4,
    "train.step_acceptance": 4,
    "train.nan_probe": 4,
    "train.exchange": 4,
    "train.state": 4,
    "train.step": 4,
    "train.layer_moments": 4,
    "train.xla_options": 4,
    "train.xla_costs": 4,
    "data": 4,
    "telemetry": 4,
    "checkpoint": 4,
    "generate": 4,
    "eval": 4,
    "hf": 4,
    "train.loop": 5,
    "train.hooks": 5,
    "train.feed": 5,
    "train.bad_steps": 5,
    "train.state_check": 5,
    "train.rollbacks": 5,
    "train.recompute_check": 5,
    "train.replay": 5,
    "train.run": 5,
    "train.run_dir": 5,
    "planner": 5,
    # Readers of a compiled program's text: they know chips, and nothing of models or training.
    "planner.hlo": 3,
    "planner.hlo_groups": 3,
    "planner.hlo_collectives": 3,
    "launch": 6,
    "preflight": 6,
    "measure": 6,
    "cli": 7,
    "main": 7,
    "__main__": 7,
    "verbs": 7,
}
# Within a floor: files of one folder may know one another, and so may these.
SAME_FLOOR = {
    ("agreement", "processes"),
    ("config", "errors"),
    ("config", "paths"),
    ("config", "parts"),
    ("errors", "paths"),
    ("hardware", "paths"),
    ("config_fields", "config"),
    ("config_fields", "errors"),
    ("config_file", "config"),
    ("config_notes", "config"),
    ("config_file", "errors"),
    ("config_file", "paths"),
    ("command_help", "command_line"),
    ("command_help", "config"),
    ("command_help", "config_fields"),
    ("command_help", "errors"),
    ("command_line", "command_help"),
    ("command_line", "config"),
    ("command_line", "config_fields"),
    ("command_line", "config_file"),
    ("command_line", "config_rules"),
    ("command_line", "errors"),
    ("config_rules", "config"),
    ("config_rules", "hardware"),
    ("config_rules", "errors"),
    ("config_rules", "source_rules"),
    ("source_rules", "config"),
    ("hardware", "errors"),
    ("hardware", "chip"),
    ("hardware", "chip_file"),
    ("chip_file", "chip"),
    ("chip_file", "errors"),
    ("chip_file", "paths"),
    ("chip_file", "files"),
    ("text", "errors"),
    ("models", "parallel"),
    ("__main__", "cli"),
    ("main", "cli"),
    ("verbs", "cli"),
}
NO_JAX = ("config", "config_rules", "hardware", "chip", "chip_file", "errors", "files", "paths", "signals", "text")
SLOW_OUTSIDE = {"jax", "jaxlib", "flax", "optax", "orbax", "numpy", "tensorstore", "grain"}
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}


def room_of(module: str) -> str:
    """The longest entry of FLOORS that this module is, or lies in."""
    parts = module.split(".")
    found = [".".join(parts[:n]) for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in FLOORS]
    assert found, f"jaxtrain/{module.replace('.', '/')}.py is in no room: give it a floor in DESIGN and here"
    return found[0]


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
    """Which modules of jaxtrain a file imports, without the leading name."""
    own = {name.removeprefix("jaxtrain.") for name in imported_names(path) if name.startswith("jaxtrain.")}
    return own & set(MODULES)


def may_import(importer: str, imported: str) -> bool:
    one, other = room_of(importer), room_of(imported)
    if FLOORS[one] != FLOORS[other]:
        return FLOORS[one] > FLOORS[other]
    same_folder = importer.rpartition(".")[0] == imported.rpartition(".")[0] != ""
    return same_folder or one == other or (one, other) in SAME_FLOOR


@pytest.mark.parametrize("module", MODULES)
def test_arrows_point_down(module: str):
    upward = {name for name in own_imports(MODULES[module]) if not may_import(module, name)}
    floors = {name: FLOORS[room_of(name)] for name in upward}
    assert not upward, f"{module} (floor {FLOORS[room_of(module)]}) imports {floors}"


def test_the_walk_sees_imports():
    """The test of the test: imports at the top, inside functions, and by `from package import module`."""
    assert {"cli", "config_rules", "telemetry.progress", "train.run"} <= own_imports(MODULES["verbs.train"])
    assert "models.decoder" in own_imports(MODULES["train.state"])
    assert not may_import("models.decoder", "train.state")
    assert not may_import("telemetry.metrics", "train.step")
    assert may_import("train.run", "checkpoint")


def test_every_exception_is_used():
    """An exception that no file needs any longer is taken out of the table."""
    used = {(room_of(m), room_of(n)) for m, path in MODULES.items() for n in own_imports(path)}
    assert used >= SAME_FLOOR


@pytest.mark.parametrize("module", NO_JAX)
def test_the_ground_floor_imports_nothing_slow(module: str):
    assert not {name.partition(".")[0] for name in imported_names(MODULES[module])} & SLOW_OUTSIDE


def test_one_module_knows_what_jax_keeps_private():
    """`jax._src` changes without notice: what is used of it is in jax_private.py, and tests/test_jax_private.py holds it."""
    using = {m for m, path in MODULES.items() if any(name.startswith("jax._src") for name in imported_names(path))}
    assert using == {"jax_private"}


def test_schedules_are_tables_of_numpy():
    """`parallel.pipeline_schedule` is read by planners and tests that have no device: no jax."""
    outside = {name.partition(".")[0] for name in imported_names(MODULES["parallel.pipeline_schedule"])}
    assert outside <= {"__future__", "collections", "dataclasses", "numpy"}


def test_nothing_starts_jax_by_being_imported():
    """Importing every module leaves no backend initialised: distributed start-up must come first."""
    names = ", ".join(f"jaxtrain.{module}" for module in MODULES)
    program = f"import {names}\nprint(jaxtrain.jax_private.backends_are_initialized())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
