"""The flags of `jaxtrain ladder`, apart from what they start: --help imports nothing slow."""

from dataclasses import dataclass


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
