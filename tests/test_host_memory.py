"""The memory that is left is the least of what the host, its control groups and the limits of the process leave."""

import resource
from pathlib import Path

import pytest

from jaxtrain.host_memory import available_bytes

MEMINFO = "MemTotal: 2000 kB\nMemAvailable:    1000 kB\nSwapFree: 24 kB\n"
MEBI = 2**20


@pytest.fixture
def host(tmp_path: Path):
    """host(files) -> a root with these files; 1 MiB is available on the host itself."""

    def host(files: dict[str, str]) -> Path:
        for name, text in ({"proc/meminfo": MEMINFO, "proc/self/statm": "1 1 1"} | files).items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return host


def test_the_host_alone(tmp_path: Path):
    assert available_bytes(tmp_path) is None
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(MEMINFO)
    assert available_bytes(tmp_path) == MEBI


GROUPS = {
    "version 2": {
        "proc/self/cgroup": "0::/job/step\n",
        "sys/fs/cgroup/job/step/memory.max": "max\n",
        "sys/fs/cgroup/job/step/memory.current": "400\n",
        "sys/fs/cgroup/job/memory.max": "900\n",
        "sys/fs/cgroup/job/memory.current": "500\n",
        "sys/fs/cgroup/job/memory.stat": "anon 300\ninactive_file 60\nactive_file 40\n",
    },
    "version 1": {
        "proc/self/cgroup": "5:cpu:/\n4:memory:/job\n0::/\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "900\n",
        "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "500\n",
        "sys/fs/cgroup/memory/job/memory.stat": "inactive_file 60\nactive_file 40\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "500\n",
    },
    "a container, whose path is the host's": {
        "proc/self/cgroup": "0::/kubepods/pod1/abc\n",
        "sys/fs/cgroup/memory.max": "900\n",
        "sys/fs/cgroup/memory.current": "400\n",
    },
}


@pytest.mark.parametrize("name", GROUPS)
def test_a_control_group_leaves_less(name: str, host):
    assert available_bytes(host(GROUPS[name])) == 500


def test_a_group_beyond_its_limit_leaves_nothing(host):
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "10", "sys/fs/cgroup/memory.current": "20"}
    assert available_bytes(host(files)) == 0


def test_the_address_space_leaves_less(host, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (100 * resource.getpagesize(), resource.RLIM_INFINITY))
    assert available_bytes(host({"proc/self/statm": "60 1 1"})) == 40 * resource.getpagesize()


def test_this_machine_says_something():
    assert (available_bytes() or 0) > MEBI
