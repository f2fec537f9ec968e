"""The worst errors of every family's tiny model against `transformers`' goldens, by mesh: `python -m tests.measure.families`.

    .venv/bin/python -m tests.measure.families [FAMILY ...] [--mesh="fsdp x context x tensor"]

Prints a line a family and mesh: the largest error of a logit (float32) in the row of one document and in the row that packs
documents and ends in padding, and the largest error of a gradient, relative to its norm. Needs neither torch nor a GPU; all of
it takes about 25 minutes on two cores.
"""

from __future__ import annotations

import argparse

from tests.quick import fake_devices

fake_devices(8)

from jaxtrain.errors import ConfigError  # noqa: E402
from tests.huggingface import tiny  # noqa: E402
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


def main() -> None:
    """Measure, and print as it goes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("family", nargs="*", default=list(tiny.FAMILIES))
    parser.add_argument("--mesh", action="append", choices=list(MESHES))
    asked = parser.parse_args()
    print("family, mesh: error of logits with one document, with packed documents and padding, of gradients (of which weight)")
    for family in asked.family:
        for mesh in [mesh for mesh in asked.mesh or MESHES if is_for(family, mesh)]:
            print(f"{family:20} {mesh:24} {line(family, mesh)}", flush=True)


if __name__ == "__main__":
    main()
