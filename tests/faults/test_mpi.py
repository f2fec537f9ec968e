"""Real Open MPI: a rank on each of two hosts (network namespaces), started by the script that `launch mpi` prints.

`pytest -m cluster tests/faults/test_mpi.py`. Needs root and mpirun; with JAXTRAIN_TEST_INSTALL=1 the test installs it.
"""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxtrain.errors import EXIT_DONE, EXIT_STOPPED
from tests.faults.hosts import HOSTS, on, two_hosts
from tests.faults.installed import needs
from tests.faults.runs import COMPILED, CONFIG, ROOT, Faulty, environment, wait_until

pytestmark = pytest.mark.cluster
STEPS = 32
# What mpirun takes for ssh: it enters the host's namespace under the host's name.
AGENT = """#!/bin/sh
host=$1
shift
exec ip netns exec "$host" unshare --uts sh -c "hostname $host; $*"
"""


def for_mpirun(agent: Path) -> dict[str, str]:
    """Its parameters: how it reaches the other host, and over which link."""
    link = dict.fromkeys(("OMPI_MCA_oob_tcp_if_include", "OMPI_MCA_btl_tcp_if_include"), "10.99.37.0/24")
    root = dict.fromkeys(("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1")
    return {"OMPI_MCA_plm_rsh_agent": str(agent), **link, **root}


def script(run: Faulty, port: int) -> str:
    """What the verb prints for two hosts of four devices."""
    seen = environment(run.folder)
    own = ["--cpu", "--hosts=2", "--devices_per_host=4", "--restarts=2", f"--port={port}", f"--python={sys.executable}"]
    own += ["--host_names", *HOSTS]
    own += ["--env", *(f"{name}={seen[name]}" for name in ("XLA_FLAGS", "JAXTRAIN_TEST_FOLDER"))]
    more = [CONFIG, f"--run_dir={run.run_dir}", f"--train.steps={run.steps}", f"--train.compilation_cache={COMPILED}"]
    command = [sys.executable, "-m", "jaxtrain", "launch", "mpi", "--dry_run", *own, "--", *more]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_a_killed_rank_is_started_again_and_a_signal_saves(tmp_path):
    needs({"mpirun": "openmpi-bin"})
    run = Faulty(tmp_path / "run", STEPS)
    run.plan([(6, 1, "saved:4+kill")], [(14, 1, "wait_for:told")])
    agent = tmp_path / "agent"
    agent.write_text(AGENT)
    agent.chmod(0o755)
    with two_hosts():
        (tmp_path / "run.sh").write_text(script(run, 5000))
        command, env = on(0, ["bash", str(tmp_path / "run.sh")]), environment(run.folder) | for_mpirun(agent)
        with open(tmp_path / "log", "a") as log:
            started = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
        try:
            wait_until((run.folder / "told-awaited").exists, 400, "the second turn")
            started.send_signal(signal.SIGTERM)
            wait_until(lambda: "SIGUSR1 received" in (tmp_path / "log").read_text(), 60, "a rank hears of it")
            (run.folder / "told").touch()
            assert started.wait(100) == EXIT_STOPPED, (tmp_path / "log").read_text()[-3000:]
            with open(tmp_path / "log", "a") as log:
                again = subprocess.run(command, cwd=ROOT, env=env, stdout=log, stderr=log, timeout=400)
        finally:
            if started.poll() is None:
                started.kill()
    said = (tmp_path / "log").read_text()
    assert again.returncode == EXIT_DONE, said[-3000:]
    assert f"process 0 of 2, from Open MPI, with 4 of 8 devices; process 0 is at {HOSTS[0]}:5000" in said
    first, second = (int(step) for step in re.findall(r"resume +from step (\d+)", said))
    assert first == 4
    assert 13 <= second <= 16
    assert sorted(run.losses()) == list(range(1, STEPS + 1))
    assert run.token_ids().keys() == run.losses().keys()
