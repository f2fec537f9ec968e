"""The flags of `jaxtrain ladder`, apart from what they start: --help imports nothing slow."""

import math
from dataclasses import dataclass

from jaxtrain.errors import UsageError, violated


@dataclass(frozen=True)
class LadderFlags:
    """Flags of `jaxtrain ladder`."""

    sizes: int = 4
    """Number of small models."""
    largest: float = 0.25
    """N of the largest small model, as a share of the config's."""
    ratio: float = 2.0
    """N of a small model over that of the next smaller one."""
    tokens: tuple[float, ...] = (1.0, 0.5, 2.0)
    """Lengths of each size's runs, in multiples of the config's own tokens per parameter; learning rates are compared at the
    first."""
    rates: int = 3
    """Learning rates to begin with, around optimizer.peak_lr and then around the best of the size below; more are tried while
    the best is the lowest or the highest, and one near the vertex of their parabola."""
    rate_step: float = 2.0
    """Factor between two learning rates."""
    folder: str = ""
    """Folder of the small runs and of ladder.json; empty: the config's run_dir with -ladder."""
    dry_run: bool = False
    """Print the sizes, the runs and their FLOPs; train nothing."""
    json: bool = False
    """Print ladder.json instead of tables."""


def check_flags(flags: LadderFlags) -> None:
    """Raise UsageError for flags that are out of range."""
    wrong = {
        f"--sizes={flags.sizes}: give at least 2": flags.sizes < 2,
        f"--largest={flags.largest:g}: give a share above 0 and below 1": not 0 < flags.largest < 1,
        f"--ratio={flags.ratio:g}: give more than 1": not 1 < flags.ratio < math.inf,
        f"--rates={flags.rates}: give at least 3, the points of a parabola": flags.rates < 3,
        f"--rate_step={flags.rate_step:g}: give more than 1": not 1 < flags.rate_step < math.inf,
        "--tokens: give at least two different multiples, all above 0, e.g. 1,0.5,2": len(set(flags.tokens)) < 2
        or len(set(flags.tokens)) < len(flags.tokens)
        or not all(0 < multiple < math.inf for multiple in flags.tokens),
        f"--sizes={flags.sizes} and {len(flags.tokens)} --tokens give fewer than the 6 losses that the law needs": flags.sizes
        * len(flags.tokens)
        < 6,
    }
    if problems := violated(wrong):
        raise UsageError("; ".join(problems))
