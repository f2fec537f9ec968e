"""What a path means that a person wrote: a path that exists is itself, whatever characters are in its name."""

from __future__ import annotations

import os
from pathlib import Path


def user_path(path: str | os.PathLike[str]) -> Path:
    """The path, with a leading ~ or ~user as a home folder unless something of that very name is in the working directory."""
    name = os.fspath(path)
    return Path(name if os.path.lexists(name.partition("/")[0]) else os.path.expanduser(name))
