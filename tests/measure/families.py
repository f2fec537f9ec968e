"""The worst errors of every family's tiny model against `transformers`' goldens, by mesh: `python -m tests.measure.families`.

    .venv/bin/python -m tests.measure.families [FAMILY ...] [--mesh="fsdp x context x tensor"]
    .venv/bin/python -m tests.measure.families [FAMILY ...] --live

Prints a line a family and mesh: the largest error of a logit (float32) in the row of one document and in the row that packs
documents and ends in padding, and the largest error of a gradient, relative to its norm. Needs neither torch nor a GPU; all of
it takes 20 minutes on two cores. With --live, which needs the extra `hf`: the largest difference of the logits that
`transformers` computes from our export, and how many of 64 greedy tokens of three prompts are the same.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from tests.quick import fake_devices

fake_devices(8)

from jaxtrain.errors import ConfigError  # noqa: E402
from tests.huggingface import tiny  # noqa: E402
from tests.huggingface.test_live import compare_answers, error_of_export  # noqa: E402
from tests.huggingface.test_oracle import MESHES, Ours, is_for  # noqa: E402


def line(family: str, mesh: str) -> str:
    """Return the errors of a family on a mesh, or why it is refused."""
    try:
        ours = Ours(family, **MESHES[mesh])
    except ConfigError as error:
        return f"refused: {'; '.join(error.problems)}"
    whole, packed = ours.logits_errors()
    error, weight = ours.gradient_error()
    return f"{whole:.1e}  {packed:.1e}  {error:.1e} ({weight})"


def live(family: str) -> str:
    """Return what `transformers` makes of our export, and whether it answers as we do."""
    with tempfile.TemporaryDirectory() as folder:
        error = error_of_export(family, Path(folder) / "export")
        equal, margins = compare_answers(family, Path(folder) / "greedy")
    return f"{error:.1e}  {equal}, smallest margins {', '.join(f'{margin:.1e}' for margin in margins)}"


def main() -> None:
    """Measure, and print as it goes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("family", nargs="*", default=list(tiny.FAMILIES))
    parser.add_argument("--mesh", action="append", choices=list(MESHES))
    parser.add_argument("--live", action="store_true")
    asked = parser.parse_args()
    if asked.live:
        print("family: difference of the logits of our export, equal tokens of 64")
        for family in asked.family:
            print(f"{family:20} {live(family)}", flush=True)
        return
    print("family, mesh: error of logits with one document, with packed documents and padding, of gradients (of which weight)")
    for family in asked.family:
        for mesh in [mesh for mesh in asked.mesh or MESHES if is_for(family, mesh)]:
            print(f"{family:20} {mesh:24} {line(family, mesh)}", flush=True)


if __name__ == "__main__":
    main()
