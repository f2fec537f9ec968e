"""Programs of a cluster that a test needs: there, or installed where an environment variable asks for it, or skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping

import pytest

ASKED = "JAXTRAIN_TEST_INSTALL"


def needs(programs: Mapping[str, str]) -> None:
    """Skips the test, with the reason, unless it is root's and all programs are there: {program: Debian's package}."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    missing = sorted({package for program, package in programs.items() if shutil.which(program) is None})
    if missing and os.environ.get(ASKED) and shutil.which("apt-get"):
        for words in (["update"], ["install", "-y", "--no-install-recommends", *missing]):
            subprocess.run(["apt-get", "-q", *words], check=True, env=os.environ | {"DEBIAN_FRONTEND": "noninteractive"})
        missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.skip(f"needs the packages {', '.join(missing)}; with {ASKED}=1 the test installs them")
