"""The description of a verb's command line."""

from __future__ import annotations

import dataclasses
from typing import Generic, Literal, TypeVar

Flags = TypeVar("Flags")


@dataclasses.dataclass(frozen=True)
class NoFlags:
    """A verb without flags of its own."""


@dataclasses.dataclass(frozen=True)
class Usage(Generic[Flags]):
    """The command line of a verb."""

    verb: str
    """Its name, after `jaxtrain`."""
    about: str
    """Its description, for --help."""
    own: type[Flags]
    """A dataclass whose fields are the verb's flags. A bool is set by its bare name, `--json`; each further value is added to
    a tuple; of texts, commas included."""
    words: tuple[str, ...] = ()
    """The fields given by position, in this order; a tuple takes the rest."""
    config: Literal["needed", "taken", "none"] = "needed"
    """Whether it takes or needs --config and the fields of a config."""

    def word(self, name: str) -> str:
        """Return the text of a flag in usage lines."""
        return name.upper() if name in self.words else f"--{name}"
