"""The network between two hosts fails: both sides end in bounded time, and the run goes on when it is back."""

import signal
import subprocess
import sys
import time

import pytest

from jaxtrain.errors import EXIT_DONE, EXIT_PEER
from tests.faults.hosts import ADDRESSES, link, on, two_hosts
from tests.faults.runs import COMPILED, CONFIG, ROOT, Faulty, environment, wait_until

STEPS = 32
ENDED = (EXIT_PEER, -signal.SIGABRT)  # by the collective's error, or by jax's client, whichever sees it first
LIMIT = 60  # seconds; heartbeats may be missed for 10


def start_both(run: Faulty, port: int, *more: str) -> list[subprocess.Popen]:
    """A process with four devices on each host."""
    flags = [CONFIG, f"--run_dir={run.run_dir}", f"--train.steps={STEPS}", f"--train.compilation_cache={COMPILED}", *more]
    running = []
    for host in range(2):
        place = {
            "JAXTRAIN_COORDINATOR": f"{ADDRESSES[0]}:{port}",
            "JAXTRAIN_PROCESSES": "2",
            "JAXTRAIN_PROCESS_ID": str(host),
            "JAXTRAIN_CPU_DEVICES": "4",
            "JAXTRAIN_STARTER": "a test",
        }
        with open(run.folder / f"{host}.log", "a") as log:
            command = on(host, [sys.executable, "-m", "jaxtrain.main", *flags])
            running.append(
                subprocess.Popen(command, cwd=ROOT, env=environment(run.folder) | place, stdout=log, stderr=subprocess.STDOUT)
            )
    return running


def ends(processes: list[subprocess.Popen], seconds: float) -> list[int]:
    """Their exit codes; all are ended where that takes longer."""
    until = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, until - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()


@pytest.mark.slow
def test_a_partition_ends_both_sides_and_the_run_goes_on_afterwards(tmp_path):
    whole, run = Faulty(tmp_path / "whole", STEPS), Faulty(tmp_path / "cut", STEPS)
    whole.plan()
    run.plan([(10, 0, "saved:8+wait_for:cut")])
    with two_hosts():
        assert ends(start_both(whole, 5001), 240) == [EXIT_DONE] * 2, (whole.folder / "0.log").read_text()[-2000:]
        both = start_both(run, 5002)
        wait_until((run.folder / "cut-awaited").exists, 240, "step 10")
        link("down")
        (run.folder / "cut").touch()
        assert all(code in ENDED for code in ends(both, LIMIT)), [process.returncode for process in both]
        # Started again meanwhile neither finds its peer, and both end too.
        early = start_both(run, 5003, "--distributed.start_timeout_seconds=5")
        assert all(code in ENDED for code in ends(early, LIMIT)), [process.returncode for process in early]
        link("up")
        assert ends(start_both(run, 5004), 240) == [EXIT_DONE] * 2, (run.folder / "0.log").read_text()[-2000:]
    assert "resume     from step 8" in (run.folder / "0.log").read_text()
    assert run.losses() == whole.losses()
    assert run.final_checksums() == whole.final_checksums()
    assert run.token_ids() == whole.token_ids()
    assert run.leftovers() == []
