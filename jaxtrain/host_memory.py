"""Measure how much memory of the host this process may still take, according to Linux."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int | None:
    """Return min(free and reclaimable memory with swap, what the control groups leave, what RLIMIT_AS leaves), in bytes.

    None where the system reports none of them.

    Args:
      root: where /proc and /sys/fs/cgroup are.
    """
    limits = [*_of_host(root), *_of_groups(root), *_of_address_space(root)]
    return max(0, min(limits)) if limits else None


def _fields(file: Path, unit: int = 1) -> dict[str, int]:
    """{name: number} of a file of "name number" lines; empty if it cannot be read."""
    with contextlib.suppress(OSError):
        return {
            name: unit * int(number)
            for name, number in re.findall(r"^(\w+):?\s+(\d+)", file.read_text(encoding="utf-8"), re.MULTILINE)
        }
    return {}


def _of_host(root: Path) -> Iterator[int]:
    found = _fields(root / "proc/meminfo", 1024)
    if "MemAvailable" in found:
        yield found["MemAvailable"] + found.get("SwapFree", 0)


def _number(file: Path) -> int | None:
    """Return the number that a file begins with; None for "max", and if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(file.read_text(encoding="utf-8").split()[0])
    return None


def _of_groups(root: Path) -> Iterator[int]:
    """Yield each enclosing control group's limit less its unreclaimable memory (versions 1 and 2).

    In a container the path may be the host's; the root of the mount is then this process's group.
    """
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            mount, limit, held = root / "sys/fs/cgroup", "memory.max", "memory.current"
            if "memory" in controllers.split(","):
                mount, limit, held = mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes"
            elif controllers:
                continue
            inner = mount / path.lstrip("/")
            for group in [inner, *[parent for parent in inner.parents if parent.is_relative_to(mount)]]:
                most, now, of = _number(group / limit), _number(group / held), _fields(group / "memory.stat")
                if most is not None and now is not None:
                    yield most - now + of.get("inactive_file", 0) + of.get("active_file", 0)


def _of_address_space(root: Path) -> Iterator[int]:
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit != resource.RLIM_INFINITY:
        yield limit - (_number(root / "proc/self/statm") or 0) * resource.getpagesize()
