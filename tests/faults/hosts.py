"""Two hosts on one machine: network namespaces with names of their own and a link between them that can be cut. Needs root."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

HOSTS = ("jaxtrain-h0", "jaxtrain-h1")
ADDRESSES = ("10.99.37.1", "10.99.37.2")


def ip(*words: str) -> None:
    """Runs `ip`."""
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def two_hosts() -> Iterator[None]:
    """Both exist, and each resolves both names; skips the test where this machine allows no such thing."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the program ip (iproute2)")
    remove()
    try:
        try:
            for host in HOSTS:
                ip("netns", "add", host)
                Path("/etc/netns", host).mkdir(parents=True, exist_ok=True)
                names = "".join(f"{address} {name}\n" for address, name in zip(ADDRESSES, HOSTS, strict=True))
                Path("/etc/netns", host, "hosts").write_text("127.0.0.1 localhost\n" + names)
            ip("link", "add", "veth0", "netns", HOSTS[0], "type", "veth", "peer", "name", "veth1", "netns", HOSTS[1])
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces here: {error.stderr.strip()}")
        for i, host in enumerate(HOSTS):
            ip("-n", host, "addr", "add", f"{ADDRESSES[i]}/24", "dev", f"veth{i}")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "link", "set", f"veth{i}", "up")
        yield
    finally:
        remove()


def remove() -> None:
    """Takes away what a test, perhaps one that was killed, has set up."""
    for host in HOSTS:
        if Path("/var/run/netns", host).exists():
            ip("netns", "delete", host)
        shutil.rmtree(Path("/etc/netns", host), ignore_errors=True)


def link(state: str) -> None:
    """Sets the link between the hosts "up" or "down"."""
    ip("-n", HOSTS[0], "link", "set", "veth0", state)


def on(host: int, command: Sequence[str]) -> list[str]:
    """The command that runs `command` on a host, under that host's name, as gloo asks for it."""
    script = f"hostname {HOSTS[host]} && exec {shlex.join(command)}"
    return ["ip", "netns", "exec", HOSTS[host], "unshare", "--uts", "sh", "-c", script]
