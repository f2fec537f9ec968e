"""Real Ray: two nodes on this machine, a run by the script that `launch ray` prints, and a process of it killed.

`pytest -m cluster tests/faults/test_ray.py` where ray is installed: `pip install "ray[default]"`, 200 MB.
"""

import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from jaxtrain.errors import EXIT_DONE
from tests.faults.runs import COMPILED, CONFIG, ROOT, Faulty, environment
from tests.launch.processes import free_port

pytestmark = pytest.mark.cluster
STEPS = 16
RAY = Path(sys.executable).with_name("ray")


@pytest.fixture
def cluster():
    """(the job server's address, the environment of its nodes); two nodes, so that Ray spreads two actors over them."""
    pytest.importorskip("ray", reason='needs `pip install "ray[default]"`')
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # short: Ray's sockets lie in it
    head, jobs = free_port(), free_port()
    env = environment(Path(folder)) | {
        "RAY_raylet_start_wait_time_s": "120",
        "RAY_TMPDIR": folder,
        "PATH": f"{RAY.parent}:/usr/bin:/bin:/usr/sbin:/sbin",
    }
    own = ["--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats"]
    first = ["--head", "--node-ip-address=127.0.0.1", f"--port={head}", f"--dashboard-port={jobs}", f"--temp-dir={folder}"]
    second = [f"--address=127.0.0.1:{head}", "--node-ip-address=127.0.0.2"]
    nodes = []
    try:
        for which in (first, second):
            with open(Path(folder) / f"node-{len(nodes)}.log", "w") as log:
                command = [RAY, "start", "--block", *which, *own]
                nodes.append(subprocess.Popen(command, env=env, stdout=log, stderr=log, start_new_session=True))
            wait_for_port(head if len(nodes) == 1 else jobs)
        yield f"http://127.0.0.1:{jobs}", env
    finally:
        for node in reversed(nodes):
            node.terminate()  # and the processes of that node with it
        for node in nodes:
            node.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def wait_for_port(port: int, seconds: float = 120) -> None:
    """Until somebody listens there."""
    until = time.monotonic() + seconds
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        assert time.monotonic() < until, f"no server listens on port {port}"
        time.sleep(0.2)


def test_a_killed_process_is_started_again(tmp_path, cluster):
    address, env = cluster
    run = Faulty(tmp_path, STEPS)
    run.plan([(6, 1, "saved:4+kill")])
    own = ["--cpu", "--hosts=2", "--devices_per_host=2", "--restarts=2", f"--address={address}", f"--python={sys.executable}"]
    own += ["--env", *(f"{name}={environment(run.folder)[name]}" for name in ("XLA_FLAGS", "JAXTRAIN_TEST_FOLDER"))]
    more = [CONFIG, "--mesh.data=2", f"--run_dir={run.run_dir}", f"--train.steps={STEPS}"]
    command = [sys.executable, "-m", "jaxtrain", "launch", "ray", "--dry_run", *own, "--", *more]
    command += [f"--train.compilation_cache={COMPILED}"]
    script = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == EXIT_DONE, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"process 0 of 2, from Ray, with 2 of 4 devices", done.stdout)
    assert "restart 1 of at most 2" in done.stdout
    assert re.search(r"resume +from step 4", done.stdout)
    assert sorted(run.losses()) == list(range(1, STEPS + 1))
    assert run.token_ids().keys() == run.losses().keys()
    assert run.leftovers() == []
