"""The pictures of the READMEs: makes them again, and knows which are older than what they show.

    python -m tests.pictures              # those that are out of date
    python -m tests.pictures jaxtrain/planner/plan.svg     # by name

Each picture holds a hash of the code that draws it and of the configs it shows, comments and docstrings left out;
`test_pictures` compares.
What training itself computes is not in the hash: `quickstart.png` and `replicas.svg` take four minutes each on two cores.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, PngImagePlugin

ROOT = Path(__file__).parents[1]
KEY = "jaxtrain-made-from"
MARGIN = 24


@dataclass(frozen=True)
class Picture:
    """A picture, and what it depends on."""

    make: Callable[[Path], None]
    """Draws it into a file."""
    sources: tuple[str, ...]
    """Python files, from the root of the repository."""

    def hash(self) -> str:
        """Return a hash of the sources' syntax trees, the same on every Python."""
        trees = [_plain(ast.parse((ROOT / source).read_text(encoding="utf-8"))) for source in self.sources]
        return hashlib.sha256(repr(trees).encode()).hexdigest()[:16]


def _plain(node: object) -> object:
    """Return a syntax tree as nested tuples, without docstrings, and without empty fields, in which Pythons differ."""
    if isinstance(node, list):
        return tuple(_plain(part) for part in node if not _is_docstring(part))
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, _plain(value)) for name, value in ast.iter_fields(node) if value is not None and value != []]
    return type(node).__name__, *fields


def _is_docstring(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def read_stamp(path: Path) -> str:
    """Return the hash that a picture holds; "" where it has none."""
    if path.suffix == ".svg":
        found = re.search(rf"<!-- {KEY}: (\w+) -->", path.read_text())
        return found.group(1) if found else ""
    with Image.open(path) as image:
        return str(image.info.get(KEY, ""))


def write_stamp(path: Path, stamp: str) -> None:
    """Put a hash into a picture."""
    if path.suffix == ".svg":
        path.write_text(f"{path.read_text().rstrip()}\n<!-- {KEY}: {stamp} -->\n")
        return
    with Image.open(path) as image:
        words = PngImagePlugin.PngInfo()
        words.add_text(KEY, stamp)
        image.save(path, pnginfo=words, optimize=True)


def _train(folder: str, *arguments: str, devices: int = 1) -> Path:
    """Run a training in a folder, and return the run's own."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    run = Path(folder, f"run{len(os.listdir(folder))}")
    command = [sys.executable, "-m", "jaxtrain.main", *arguments, f"--run_dir={run}"]
    subprocess.run(command, check=True, env=environment, cwd=ROOT)
    return run


def draw_quickstart(path: Path) -> None:
    """Draw the loss of `scripts/train`."""
    with tempfile.TemporaryDirectory() as folder:
        path.write_bytes((_train(folder, "--config=configs/quickstart.py") / "loss.png").read_bytes())


def draw_replicas(path: Path) -> None:
    """Draw the losses of three ways to keep two replicas together, and what they send."""
    from jaxtrain.report.curves import COLOURS, charts
    from jaxtrain.report.runs import read_runs

    ways = {
        "every_step": (),
        "diloco": ("--sync.mode=diloco", "--sync.every=20"),
        "delayed": ("--sync.mode=delayed", "--sync.delay=1"),
    }
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: _train(folder, "--config=configs/replicas.py", *flags, devices=2) for name, flags in ways.items()}
        losses = charts(read_runs([str(run) for run in runs.values()]), "tokens")[:2]
    names = "".join(f'<tspan dx="24" fill="{colour}">{name}</tspan>' for name, colour in zip(ways, COLOURS, strict=False))
    heads = [f'<text y="9" font-size="12" fill="var(--ink)">{chart.title}{names}</text></svg>' for chart in losses]
    path.write_text(stack([chart.svg.replace("</svg>", head) for chart, head in zip(losses, heads, strict=True)]))


def draw_rewards(path: Path) -> None:
    """Draw the rewards of configs/grpo_quickstart.py, which begins with the weights of configs/grpo_warmup.py."""
    subprocess.run([sys.executable, "configs/grpo_warmup.py"], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT)
    with tempfile.TemporaryDirectory() as folder:
        first = _train(folder, "--config=configs/grpo_warmup.py")
        then = _train(folder, "--config=configs/grpo_quickstart.py", f"--init_from={first}")
        path.write_bytes((then / "loss.png").read_bytes())


def draw_plan(path: Path) -> None:
    """Draw mesh, schedule and map of the best of all layouts of 405b on 16,384 H100s."""
    from jaxtrain.config.loading import load_config
    from jaxtrain.hardware import find_chip
    from jaxtrain.planner.estimates import Cluster
    from jaxtrain.planner.pictures import gantt_picture, map_picture, mesh_picture, svg
    from jaxtrain.planner.search import search

    found = search(load_config(ROOT / "configs/405b.py"), Cluster(find_chip("h100-sxm"), hosts=2048))
    best = found.ranked[0]
    figures = [mesh_picture(best), gantt_picture(best), map_picture(found.points, found.pareto, found.ranked)]
    path.write_text(stack([svg(figure) for figure in figures]))


def stack(pictures: list[str]) -> str:
    """Return pictures of the planner's page below each other, as one SVG file; without the words that a pointer shows."""
    from jaxtrain.planner.page import STYLE

    parts, top, width = [], MARGIN, 0.0
    for picture in pictures:
        width, height = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', picture)[0])
        place = f'<svg x="{MARGIN}" y="{top:g}" width="{width:g}" height="{height:g}" '
        parts.append(re.sub(r"<title>.*?</title>", "", picture).replace("<svg ", place, 1))
        top += height + MARGIN
    size = f'viewBox="0 0 {width + 2 * MARGIN:g} {top:g}"'
    paper = '<rect width="100%" height="100%" fill="var(--card)"/>'
    style = re.sub(r"(?m)^svg \{.*?\}", "", STYLE)  # the page's width of a picture would be that of each part of this one
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{style}</style>{paper}{"".join(parts)}</svg>'


PLOTS, CURVES = "jaxtrain/telemetry/plots.py", "jaxtrain/report/curves.py"
PLANNER = tuple(f"jaxtrain/planner/{name}.py" for name in ("pictures", "timeline", "search", "cost", "memory", "activations"))
PICTURES = {
    ".github/quickstart.png": Picture(draw_quickstart, ("configs/quickstart.py", PLOTS)),
    ".github/rewards.png": Picture(draw_rewards, ("configs/grpo_warmup.py", "configs/grpo_quickstart.py", PLOTS)),
    "jaxtrain/parallel/replicas.svg": Picture(draw_replicas, ("configs/replicas.py", CURVES)),
    "jaxtrain/planner/plan.svg": Picture(draw_plan, ("configs/405b.py", *PLANNER)),
}


def main(names: list[str]) -> None:
    """Make the named pictures, or those that are out of date."""
    for name in names or [name for name in PICTURES if is_stale(name)]:
        path = ROOT / name
        PICTURES[name].make(path)
        write_stamp(path, PICTURES[name].hash())
        print(f"made {path.relative_to(ROOT)}")


def is_stale(name: str) -> bool:
    """Return whether a picture is missing, or is older than what it shows."""
    path = ROOT / name
    return not path.is_file() or read_stamp(path) != PICTURES[name].hash()


if __name__ == "__main__":
    main(sys.argv[1:])
