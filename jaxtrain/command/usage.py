"""What a verb takes on its command line."""

from __future__ import annotations

import dataclasses
from typing import Generic, Literal, TypeVar

Flags = TypeVar("Flags")


@dataclasses.dataclass(frozen=True)
class NoFlags:
    """A verb without flags of its own."""


@dataclasses.dataclass(frozen=True)
class Usage(Generic[Flags]):
    """What a verb takes on its command line."""

    verb: str
    """Its name, which stands after `jaxtrain`."""
    about: str
    """What it does, for --help."""
    own: type[Flags]
    """A dataclass whose fields are the verb's flags. A bool is set by its bare name, `--json`; a tuple is added to by each
    further value, commas and all."""
    words: tuple[str, ...] = ()
    """Those of them that are given in this order without their names; a tuple takes the rest."""
    config: Literal["needed", "taken", "none"] = "needed"
    """Whether it takes --config and the fields of a config, and must be given it."""

    def word(self, name: str) -> str:
        """Return how a flag of the verb's own is shown."""
        return name.upper() if name in self.words else f"--{name}"
