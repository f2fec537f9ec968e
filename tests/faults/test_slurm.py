"""Real SLURM, two nodes on one machine: a killed process, the time limit and a lost node, in one job that comes back each time.

`pytest -m cluster tests/faults/test_slurm.py`. Needs root, slurmctld, slurmd and munged; with JAXTRAIN_TEST_INSTALL=1 the test
installs them from Debian's packages. All that it starts has its own configuration, keys and folders, and is ended.
"""

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.installed import needs
from tests.faults.runs import COMPILED, CONFIG, ROOT, Faulty, environment, uninterrupted, wait_until

pytestmark = pytest.mark.cluster
STEPS = 32
PROGRAMS = {"slurmctld": "slurm-wlm", "slurmd": "slurm-wlm", "sbatch": "slurm-client", "munged": "munge"}

CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort=17100
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.sock,cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SlurmctldTimeout=20
SlurmdTimeout=20
KillWait=5
ReturnToService=2
JobRequeue=1
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[17101-17102] CPUs=4 RealMemory=4000
PartitionName=all Nodes=ALL Default=YES State=UP
"""


class Cluster:
    """slurmctld, a slurmd for each of two nodes, and munge."""

    def __init__(self, folder: Path):
        self.folder, self.daemons = folder, {}
        (folder / "state").mkdir(parents=True)
        (folder / "slurm.conf").write_text(CONF.format(host=socket.gethostname(), folder=folder))
        (folder / "hosts").write_text(Path("/etc/hosts").read_text() + "127.0.0.1 n1 n2\n")
        (folder / "munge.key").write_bytes(os.urandom(1024))
        (folder / "munge.key").chmod(0o400)

    def start(self, name: str, *command: str) -> None:
        """A daemon in the foreground, which finds the nodes' names in a hosts file of its own, as do the jobs it starts."""
        words = ["unshare", "--mount", "sh", "-c", f'mount --bind {self.folder}/hosts /etc/hosts && exec "$@"', name, *command]
        with open(self.folder / f"{name}.out", "a") as log:
            self.daemons[name] = subprocess.Popen(
                words, env=os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}, stdout=log, stderr=log
            )

    def start_all(self) -> None:
        """Until both nodes are idle."""
        paths = [f"--{what}={self.folder}/munge.{end}" for what, end in (("socket", "sock"), ("key-file", "key"))]
        paths += [f"--{what}={self.folder}/munge.{what}" for what in ("pid-file", "log-file", "seed-file")]
        self.start("munged", "munged", "--foreground", "--force", *paths)
        wait_until((self.folder / "munge.sock").exists, 20, "munge's socket")
        self.start("slurmctld", "slurmctld", "-D")
        for node in ("n1", "n2"):
            self.start_node(node)
        wait_until(lambda: self.says("sinfo", "--noheader", "--format=%D %T").split() == ["2", "idle"], 60, "two idle nodes")

    def start_node(self, node: str) -> None:
        """Its slurmd."""
        self.start(node, "slurmd", "-D", "-N", node)

    def says(self, *command: str) -> str:
        """What one of SLURM's programs prints."""
        env = os.environ | {"SLURM_CONF": str(self.folder / "slurm.conf")}
        return subprocess.run(command, env=env, capture_output=True, text=True).stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What SLURM knows of a job."""
        return dict(re.findall(r"(\w+)=(\S*)", self.says("scontrol", "show", "job", number)))

    def lose(self, node: str) -> None:
        """Power off: its slurmd and all that it has started end at once."""
        daemon = self.daemons[node].pid
        family = [daemon, *descendants(daemon)]
        # A step's daemon has no parent any more, but its environment or name says which node it is for.
        for process in processes():
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{process}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                seen = Path(f"/proc/{process}/environ").read_bytes().split(b"\0")
                if f"SLURMD_NODENAME={node}".encode() in seen or (
                    words.startswith("slurmstepd:") and self.is_of(process, node)
                ):
                    family += [process, *descendants(process)]
        for process in family:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        self.daemons[node].wait()

    def is_of(self, process: int, node: str) -> bool:
        """Whether that process writes to the log of that node."""
        with contextlib.suppress(OSError):
            files = [os.readlink(file) for file in Path(f"/proc/{process}/fd").iterdir()]
            return any(file == str(self.folder / f"{node}.log") or f"{self.folder}/{node}/" in file for file in files)
        return False

    def stop(self) -> None:
        """Ends all daemons and their jobs."""
        self.says("scancel", "--signal=KILL", "--user=root")
        self.says("scancel", "--user=root")
        for name in ("n1", "n2", "slurmctld", "munged"):
            daemon = self.daemons.get(name)
            if daemon is not None and daemon.poll() is None:
                daemon.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    daemon.wait(20)
                daemon.kill()
                daemon.wait()


def processes() -> list[int]:
    """All of this machine."""
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def descendants(process: int) -> list[int]:
    """Children, and theirs."""
    found = []
    for other in processes():
        with contextlib.suppress(OSError, IndexError):
            if int(Path(f"/proc/{other}/stat").read_text().rpartition(")")[2].split()[1]) == process:
                found += [other, *descendants(other)]
    return found


@pytest.fixture
def cluster(tmp_path):
    """A cluster of two idle nodes."""
    needs(PROGRAMS)
    folder = Path("/tmp", f"jaxtrain-slurm-{os.getpid()}")  # munge's socket has a short name only
    cluster = Cluster(folder)
    try:
        cluster.start_all()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_job_survives_a_kill_its_time_limit_and_a_lost_node(tmp_path, cluster):
    run, whole = Faulty(tmp_path / "job", STEPS), uninterrupted(tmp_path, STEPS)
    run.plan([(6, 1, "saved:4+kill")], [(9, 0, "slow:6")], [(20, 0, "saved:16+wait_for:lost")])
    seen = environment(run.folder)
    wanted = ["--cpu", "--hosts=2", "--devices_per_host=4", "--time=2", "--save_seconds=59", "--options=ntasks-per-node=1"]
    wanted += ["--env", *(f"{name}={seen[name]}" for name in ("XLA_FLAGS", "JAXTRAIN_TEST_FOLDER"))]
    more = [CONFIG, f"--run_dir={run.run_dir}", f"--train.steps={STEPS}", f"--train.compilation_cache={COMPILED}"]
    env = environment(run.folder) | {"SLURM_CONF": str(cluster.folder / "slurm.conf")}
    launcher = ["-m", "jaxtrain", "launch", "slurm", *wanted, f"--python={sys.executable}", "--", *more]
    submitted = subprocess.run([sys.executable, *launcher], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    number = re.search(r"Submitted batch job (\d+)", submitted.stdout)[1]
    log = ROOT / f"faulty-{number}.log"
    try:
        wait_until((run.folder / "lost-awaited").exists, 900, "the third turn")
        cluster.lose("n2")
        (run.folder / "lost").touch()
        wait_until(lambda: "down" in cluster.says("sinfo", "--noheader", "--nodes=n2", "--format=%T"), 120, "n2 is down")
        cluster.start_node("n2")
        wait_until(lambda: cluster.job(number).get("JobState") in ("COMPLETED", "FAILED", "CANCELLED"), 1200, "the job's end")
        assert cluster.job(number)["JobState"] == "COMPLETED", log.read_text()[-3000:]
        assert cluster.job(number)["Restarts"] >= "3"  # more where the machine is so busy that two minutes do not suffice
        said = log.read_text()
    finally:
        log.unlink(missing_ok=True)
    assert "SIGTERM received" in said  # the time limit, a minute early
    first, second, third = (int(step) for step in re.findall(r"resume +from step (\d+)", said)[:3])
    assert first == 4
    assert 9 <= second < 20  # what it saved when it was told
    assert third == max(16, second)
    assert run.losses() == pytest.approx(whole.losses(), rel=1e-6)
    assert run.token_ids() == whole.token_ids()
