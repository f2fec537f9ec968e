"""`jaxtrain ladder --config=configs/1b.py --sizes=4`: what a large run will reach, and which learning rate it wants.

Trains small models of the config, fits the law of their losses (`planner/scaling_law.py`), and writes ladder.json, which
`jaxtrain plan --ladder` reads. The same command goes on with a ladder that was stopped.

Exit codes: 0 done, 1 an error explained in one message, 2 wrong usage, 76 stopped by a signal after saving.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jaxtrain.command import Usage, parse
from jaxtrain.errors import EXIT_DONE
from jaxtrain.files import user_path
from jaxtrain.planner.ladder_flags import LadderFlags, check_flags
from jaxtrain.text import open_console, tell

WIDTH = 120
"""Columns of the tables without a terminal."""
USAGE = Usage(
    "ladder",
    "Train small models of a config on this machine's devices, fit the law of their losses, and foretell what the config "
    "itself reaches and which learning rate it wants. Layout flags given here (--mesh, --train.microbatches) are those of the "
    "small runs.",
    LadderFlags,
)


def main(arguments: Sequence[str]) -> int:
    """Parse, check, train what is left, print; return the exit code."""
    line = parse(USAGE, arguments)
    flags = line.own
    check_flags(flags)

    from jaxtrain.measure.ladder import Climb, of_one_machine
    from jaxtrain.planner.ladder import FILE, check_config
    from jaxtrain.planner.ladder_tables import law_words, result_table, size_lines
    from jaxtrain.tables import print_table

    check_config(line.config)
    folder = user_path(flags.folder) if flags.folder else Path(f"{line.config.directory}-ladder")
    climb = Climb(of_one_machine(line.config, line.given), flags, folder, tell)
    for words in size_lines(climb.config, climb.sizes, climb.planned(), flags):
        tell(words)
    if flags.dry_run:
        return EXIT_DONE
    forecast = climb.run()
    if flags.json:
        print(climb.ladder.to_json(forecast), end="")
        return EXIT_DONE
    console = open_console(WIDTH)
    print_table(console, result_table(climb.ladder, climb.config.name, flags.tokens))
    console.print(f"\n{law_words(climb.ladder, forecast)}", soft_wrap=not console.is_terminal)
    tell(f"wrote {folder / FILE}; jaxtrain plan --ladder={folder / FILE} prints the predicted loss beside the cost")
    return EXIT_DONE
