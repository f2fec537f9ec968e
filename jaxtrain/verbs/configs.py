"""`jaxtrain configs`: list the shipped configs."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence

from jaxtrain.command import NoFlags, Usage, parse
from jaxtrain.config.loading import SHIPPED, load_config, shipped_configs
from jaxtrain.errors import EXIT_DONE, ExplainedError

USAGE = Usage("configs", "List the configs that are shipped: name, parameters, one line.", NoFlags, config="none")


def main(arguments: Sequence[str]) -> int:
    """Parse, load each config, print; return the exit code."""
    parse(USAGE, arguments)

    from jaxtrain.command.help import print_list
    from jaxtrain.planner.wording import scaled
    from jaxtrain.telemetry.flops import num_parameters

    rows = {}
    for name, file in shipped_configs().items():
        text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
        about = re.split(r"\.(?= [A-Z]|$)|\n", text)[0].rstrip(".")
        count = scaled(num_parameters(load_config(file).model).total).replace("G", "B")
        rows[name] = f"{count:>7}  {about}"
    if not rows:
        raise ExplainedError(f"there are no configs in {SHIPPED}: they are in the repository, not in the installed package")
    print_list("jaxtrain train --config=NAME [flags]", f"Shipped in {SHIPPED}, with their parameters:", rows)
    return EXIT_DONE
