"""Check the hosts: the same software and config everywhere, and clocks that agree."""

from __future__ import annotations

import platform
import re
import socket
import statistics
import time
from pathlib import Path

from jaxtrain import agreement
from jaxtrain.errors import PeersDiffer
from jaxtrain.preflight.checks import Check, Finding, Site, odd_ones
from jaxtrain.processes import exchange

MORE_PACKAGES = ("jaxtrain", "tensorstore")
"""Packages compared beside those that a run itself compares."""
MAY_DIFFER = ("python", "driver")
"""Versions that may differ without breaking a run."""
SKEW_SECONDS = 1.0
ROUNDS = 3
now = time.time


def nvidia_driver(version_file: Path = Path("/proc/driver/nvidia/version")) -> str:
    """Return the version of NVIDIA's kernel driver, or "none"."""
    try:
        found = re.search(r"Module.*?\s(\d+\.[\d.]+)\s", version_file.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "none"
    return found[1] if found else "unknown"


def look_at_software(site: Site) -> dict[str, str]:
    """Return the versions that must be the same in all processes, and the host's name."""
    more = {name: agreement.version_of(name) for name in MORE_PACKAGES} | {"python": platform.python_version()}
    return {"host": socket.gethostname(), "driver": nvidia_driver(), **agreement.software_facts(), **more}


def judge_software(site: Site, seen: list[dict[str, str]]) -> list[Finding]:
    """Report processes whose versions differ from most; from here on the site knows its hosts."""
    site.hosts = [facts["host"] for facts in seen]
    findings = []
    for name in seen[0]:
        common, others = odd_ones([facts[name] for facts in seen])
        if name == "host" or not others:
            continue
        who = "; ".join(f"{name} {value!r} in {site.name(i)}" for i, value in others.items())
        words = f"{who}, but {common!r} in the other{'s' if len(seen) - len(others) > 1 else ''}"
        findings.append(Finding("software", "warning" if name in MAY_DIFFER else "failed", words))
    first = seen[0]
    words = (
        f"jaxtrain {first['jaxtrain']} (code {first[agreement.CODE]}), jax {first['jax']}, jaxlib {first['jaxlib']}, "
        f"python {first['python']}, NVIDIA driver {first['driver']}"
    )
    return findings or [Finding("software", "ok", words, {"versions": seen})]


def look_at_config(site: Site) -> list[str]:
    """Return what differs from process 0's config in any process."""
    try:
        agreement.compare("config", agreement.config_facts(site.config), "", 60.0)
    except PeersDiffer as error:
        return error.problems
    return []


def judge_config(site: Site, seen: list[list[str]]) -> list[Finding]:
    """Report every difference as a failure: the processes would train different models, or wait for one another for ever."""
    problems, count = seen[0], len(seen)
    words = "one process" if count == 1 else f"the same in all {count} processes"
    return [Finding("config", "failed", problem) for problem in problems] or [Finding("config", "ok", words)]


def look_at_clock(site: Site) -> list[float]:
    """Return this host's time just after a signal from process 0, for several rounds."""
    times = []
    for number in range(ROUNDS):
        exchange(f"preflight clock {number}", None, 60.0)
        times.append(now())
    return times


def judge_clocks(site: Site, seen: list[list[float]]) -> list[Finding]:
    """Report the skew against the median host, in the round where it is smallest: a late message looks like a late clock."""
    rounds = [[times[i] - statistics.median(other[i] for other in seen) for times in seen] for i in range(ROUNDS)]
    skews = [min((round_[process] for round_ in rounds), key=abs) for process in range(len(seen))]
    values = {"skew_seconds": skews}
    wrong = [i for i, skew in enumerate(skews) if abs(skew) > SKEW_SECONDS]
    if len(seen) == 2 and wrong:
        apart = abs(skews[1] - skews[0])
        words = f"{site.name(0)} and {site.name(1)} are {apart:.1f} s apart; let NTP or chrony set both"
        return [Finding("clocks", "warning", words, values)]
    if wrong:
        words = "; ".join(f"{site.name(i)} is {abs(skews[i]):.1f} s {'ahead' if skews[i] > 0 else 'behind'}" for i in wrong)
        return [Finding("clocks", "warning", f"{words} of the median; let NTP or chrony set it", values)]
    words = f"{1000 * (max(skews) - min(skews)):.1f} ms apart at most" if len(seen) > 1 else "one process"
    return [Finding("clocks", "ok", words, values)]


def checks() -> list[Check]:
    """Return the checks in their order; the first gives the hosts their names."""
    return [
        Check("software", look_at_software, judge_software),
        Check("config", look_at_config, judge_config),
        Check("clocks", look_at_clock, judge_clocks),
    ]
