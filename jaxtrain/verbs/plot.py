"""`jaxtrain plot compared.png runs/one runs/other`: draw the losses of several runs into one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtrain.command import Usage, parse
from jaxtrain.errors import EXIT_DONE, UsageError
from jaxtrain.files import check_output, user_path


@dataclass(frozen=True)
class PlotFlags:
    """Flags of `jaxtrain plot`."""

    picture: str
    """PNG file to write."""
    runs: tuple[str, ...]
    """Folders of runs, each with its metrics.jsonl."""
    title: str = ""
    """Title of the picture."""
    overwrite: bool = False
    """Replace an existing picture."""


USAGE = Usage(
    "plot",
    "Draw the losses of several runs into one picture, each under its folder's name.",
    PlotFlags,
    words=("picture", "runs"),
    config="none",
)


def main(arguments: Sequence[str]) -> int:
    """Parse, check, draw; return the exit code."""
    flags = parse(USAGE, arguments).own
    if not flags.picture.endswith(".png"):
        raise UsageError(f"{flags.picture}: a picture is a PNG file; give a name that ends in .png")

    from jaxtrain.telemetry.metrics import read_rows
    from jaxtrain.telemetry.plots import plot_comparison

    files = {user_path(run).name: user_path(run) / "metrics.jsonl" for run in flags.runs}
    for file in files.values():
        if not read_rows(file):
            raise UsageError(f"{file.parent} is no folder of a run: it has no metrics.jsonl with rows in it")
    check_output("picture", flags.picture, flags.overwrite)
    plot_comparison(files, user_path(flags.picture), flags.title)
    return EXIT_DONE
