"""Scripts for clusters: what they say is executed, with stand-ins for srun, mpirun, Kubernetes and Ray, not on clusters."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from jaxtrain.config import DistributedConfig
from jaxtrain.errors import ConfigError, ExplainedError, UsageError
from jaxtrain.launch import on_ray
from jaxtrain.launch.distributed import find_place
from jaxtrain.launch.slurm import seconds
from jaxtrain.verbs.launch import main as launch
from tests.launch.pods import action, environment_of_pod

ROOT = Path(__file__).parents[2]
RUN = ["--", "--config=configs/quickstart.py", "--mesh.fsdp=2", "--mesh.data=2"]
HOSTS = ["--devices_per_host=2", "--cpu"]

# A process of the run: notes its place, and ends (or waits for a signal) as the file `plan` says for its turn and index.
PROCESS = """
import dataclasses, json, os, signal, sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
from jaxtrain.config import DistributedConfig
from jaxtrain.launch import distributed
signalled = []
def work():
    place = distributed.find_place(DistributedConfig(), os.environ)
    with open({folder!r} + "/places", "a") as file:
        print(json.dumps(dataclasses.asdict(place) | dict(arguments=sys.argv[1:], seen=os.environ.get("SEEN"))), file=file)
    turn = sum(json.loads(line)["process"] == place.process for line in open({folder!r} + "/places")) - 1
    while len(open({folder!r} + "/places").readlines()) < 2 * turn + 2:
        time.sleep(0.01)  # so that neither ends before the other is there
    action = json.loads(Path({folder!r}, "plan").read_text())[turn][place.process]
    if action == "wait":
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, lambda *_: signalled.append(True))
        Path({folder!r}, f"waits-{{place.process}}").touch()
        while not signalled:
            time.sleep(0.01)
        return 76
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    return action
distributed.run_and_exit(work)
"""

SRUN = """
import os, subprocess, sys, time
command = [word for word in sys.argv[1:]]
while command[0].startswith("--"): command.pop(0)
tasks = []
for i in range(2):
    own = dict(SLURM_PROCID=str(i), SLURM_NODEID=str(i), SLURM_LOCALID="0", SLURM_NTASKS="2",
               SLURM_STEP_NODELIST="n[1-2]", SLURM_STEP_TASKS_PER_NODE="1(x2)")
    tasks.append(subprocess.Popen(command, env=os.environ | own))
while all(task.poll() in (None, 0) for task in tasks) and any(task.poll() is None for task in tasks): time.sleep(0.01)
if any(task.poll() for task in tasks): [task.kill() for task in tasks if task.poll() is None]  # --kill-on-bad-exit
codes = [task.wait() for task in tasks]
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""

MPIRUN = """
import os, signal, subprocess, sys
words, count = sys.argv[1:], 0
while words[0].startswith("-"):
    name, value = words.pop(0), words.pop(0)
    if name == "-np": count = int(value)
    if name == "-x" and "=" in value: os.environ.update([value.split("=", 1)])
ranks = []
signal.signal(signal.SIGUSR1, lambda number, _: [rank.send_signal(number) for rank in ranks])
for i in range(count):
    own = dict(OMPI_COMM_WORLD_RANK=str(i), OMPI_COMM_WORLD_SIZE=str(count), OMPI_COMM_WORLD_LOCAL_SIZE="1",
               OMPI_COMM_WORLD_LOCAL_RANK="0")
    ranks.append(subprocess.Popen(words, env=os.environ | own))
sys.exit(1 if any([rank.wait() for rank in ranks]) else 0)
"""


def script_of(capsys, name, *own, run=RUN):
    """What the verb prints."""
    capsys.readouterr()
    assert launch([name, "--dry_run", *own, *run]) == 0
    return capsys.readouterr().out


class Stage:
    """A folder with programs of our own in front of the machine's."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._program("process", PROCESS.format(root=str(ROOT), folder=str(folder)))
        self._program("srun", SRUN)
        self._program("mpirun", MPIRUN)
        self._shell("scontrol", f'echo "$@" >> {shlex.quote(str(folder))}/requeued')
        self._shell("sleep", ":")
        self.python = f"--python={folder}/process"

    def _program(self, name, text):
        self._write(name, f"#!{sys.executable} -S\n{textwrap.dedent(text)}")

    def _shell(self, name, text):
        self._write(name, f"#!/bin/sh\n{text}\n")

    def _write(self, name, text):
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def start(self, script, plan, **environ):
        (self.folder / "plan").write_text(json.dumps(plan))
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX", "SLURM", "OMPI", "XLA"))}
        env = kept | {"PATH": f"{self.folder}:{os.environ['PATH']}"} | environ
        return subprocess.Popen(["bash", "-c", script], cwd=self.folder, env=env, stderr=subprocess.PIPE, text=True)

    def run(self, script, plan, **environ):
        """(exit code, errors) of the script, its processes ending as planned."""
        running = self.start(script, plan, **environ)
        errors = running.communicate(timeout=60)[1]
        return running.returncode, errors

    @property
    def places(self):
        """What the processes found out, as dicts, by turn."""
        rows = [json.loads(line) for line in (self.folder / "places").read_text().splitlines()]
        turns = [rows[i : i + 2] for i in range(0, len(rows), 2)]
        return [sorted(turn, key=lambda row: row["process"]) for turn in turns]


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def assert_one_run(turn, count=2):
    """Ranks 0 to n - 1, one coordinator, one process a host."""
    assert [row["process"] for row in turn] == list(range(count))
    assert {row["processes"] for row in turn} == {count}
    assert {row["local_processes"] for row in turn} == {1}
    assert len({row["coordinator"] for row in turn}) == 1


# ---------------------------------------------------------------------------------------------------------------------
# SLURM


@pytest.mark.parametrize(
    ("plan", "turn", "code", "requeued", "words"),
    [
        ([0, 0], "0", 0, False, ""),
        ([75, "kill"], "0", 137, True, ""),
        ([76, 76], "2", 76, True, ""),
        ([75, "wait"], "3", 137, False, "exit code 137 after 3 restarts"),
        ([2, "wait"], "0", 2, False, "starting again would end the same way"),
        (["wait", 1], "0", 1, False, "starting again would end the same way"),
    ],
)
def test_slurm_queues_again_what_may_end_otherwise(stage, capsys, plan, turn, code, requeued, words):
    script = script_of(capsys, "slurm", *HOSTS, stage.python, "--restarts=3", "--env", "SEEN=a b'c")
    environ = {"SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "2", "SLURM_RESTART_COUNT": turn, "SLURM_NTASKS": "2"}
    ended, errors = stage.run(script, [plan], **environ)
    assert ended == code
    assert words in errors
    assert (stage.folder / "requeued").exists() is requeued
    (first,) = stage.places
    assert_one_run(first)
    assert first[0]["coordinator"].startswith("n1:")
    assert first[0]["arguments"] == ["-m", "jaxtrain", "train", *RUN[1:]]
    assert first[0]["seen"] == "a b'c"


def test_slurm_is_asked_for_the_whole_of_every_node(capsys):
    options = re.findall(r"^#SBATCH --(.*)$", script_of(capsys, "slurm", "--devices_per_host=2", "--partition=gpu"), re.M)
    assert {"nodes=2", "ntasks-per-node=1", "gpus-per-node=2", "exclusive", "requeue", "open-mode=append"} <= set(options)
    assert {"signal=TERM@300", "partition=gpu", "job-name=quickstart"} <= set(options)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("90", 5400), ("90:30", 5430), ("1:30:05", 5405), ("1-12", 129600), ("1-0:30", 88200), ("1-0:0:9", 86409), ("1h", None)],
)
def test_time_limits(text, expected):
    assert seconds(text) == expected


# ---------------------------------------------------------------------------------------------------------------------
# Open MPI


@pytest.mark.parametrize(
    ("plan", "code", "turns"),
    [
        ([[0, 0]], 0, 1),
        ([["kill", 75], [75, 70], [0, 0]], 0, 3),
        ([["kill", 75]] * 3, 1, 3),
        ([[2, 75]], 2, 1),
        ([[76, 76]], 76, 1),
    ],
)
def test_mpirun_is_started_again_on_a_fresh_port(stage, capsys, plan, code, turns):
    script = script_of(capsys, "mpi", *HOSTS, stage.python, "--restarts=2", "--host_names", "a", "b", "--env", "SEEN")
    assert stage.run(script, plan, SEEN="yes")[0] == code
    assert len(stage.places) == turns
    for turn, places in enumerate(stage.places):
        assert_one_run(places)
        assert places[0]["coordinator"] == f"a:{61440 + turn}"
        assert places[1]["seen"] == "yes"


def test_a_signal_to_the_script_saves_and_stops_all_ranks(stage, capsys):
    script = script_of(capsys, "mpi", *HOSTS, stage.python, "--host_names", "a", "b")
    running = stage.start(script, [["wait", "wait"]])
    until = time.monotonic() + 60
    while not all((stage.folder / f"waits-{i}").exists() for i in range(2)):
        assert time.monotonic() < until
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    errors = running.communicate(timeout=60)[1]
    assert running.returncode == 76
    assert "goes on from the newest checkpoint" in errors
    assert len(stage.places) == 1


def test_what_is_passed_on_must_be_there(stage, capsys):
    script = script_of(capsys, "mpi", *HOSTS, stage.python, "--host_names", "a", "b", "--env", "SEEN")
    code, errors = stage.run(script, [[0, 0]])
    assert code != 0
    assert "SEEN: is to be passed on, but is not set" in errors


# ---------------------------------------------------------------------------------------------------------------------
# Kubernetes

POD = ["--image=registry.example/jaxtrain:1", "--devices_per_host=2"]
IN_CLAIM = [*RUN, "--run_dir=/runs/q"]


def manifest(capsys, *own):
    """The documents that the verb prints, by kind."""
    documents = yaml.safe_load_all(script_of(capsys, "kubernetes", *POD, *own, run=IN_CLAIM))
    return {document["kind"]: document for document in documents}


@pytest.mark.parametrize("kind", ["job", "jobset"])
def test_pods_find_one_another(capsys, kind):
    documents = manifest(capsys, f"--kind={kind}", "--env", "SEEN=$(a) \"b\"", "WANDB_API_KEY")  # fmt: skip
    if kind == "job":
        job, service = documents["Job"]["spec"], documents["Service"]
        pod = job["template"]["spec"]
        assert pod["subdomain"] == service["metadata"]["name"]
        assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": documents["Job"]["metadata"]["name"]}
        assert service["spec"]["clusterIP"] == "None"
        name = f"{documents['Job']['metadata']['name']}-0.{pod['subdomain']}"
    else:
        jobset = documents["JobSet"]
        (replicated,) = jobset["spec"]["replicatedJobs"]
        job = replicated["template"]["spec"]
        pod = job["template"]["spec"]
        name = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['spec']['network']['subdomain']}"
    (container,) = pod["containers"]
    assert job["completionMode"] == "Indexed"
    assert job["completions"] == job["parallelism"] == 2
    assert container["command"] + container["args"] == ["python", "-m", "jaxtrain", "train", *IN_CLAIM[1:]]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 2}
    seen = [environment_of_pod(container, index) for index in range(2)]
    places = [find_place(DistributedConfig(), environ) for environ in seen]
    assert_one_run([vars(place) for place in places])
    assert places[0].coordinator == f"{name}:8476"
    assert seen[0]["JAX_COORDINATOR_BIND_ADDRESS"] == "10.0.0.0:8476"
    assert seen[0]["SEEN"] == '$(a) "b"'
    secret = container["env"][-1]
    assert secret == {
        "name": "WANDB_API_KEY",
        "valueFrom": {"secretKeyRef": {"name": "jaxtrain", "key": "WANDB_API_KEY"}},
    }


@pytest.mark.parametrize(("code", "expected"), [(1, "FailJob"), (2, "FailJob"), (76, "Ignore"), (75, "Count"), (137, "Count")])
def test_exit_codes_in_a_job(capsys, code, expected):
    spec = manifest(capsys, "--restarts=5")["Job"]["spec"]
    assert action(spec["podFailurePolicy"]["rules"], code)[1] == expected
    assert spec["backoffLimit"] == 5 * 2
    assert spec["template"]["spec"]["restartPolicy"] == "Never"


@pytest.mark.parametrize(
    ("code", "expected"),
    [(2, "FailJobSet"), (76, "RestartJobSetAndIgnoreMaxRestarts"), (75, "RestartJobSet"), (137, "RestartJobSet")],
)
def test_exit_codes_in_a_jobset(capsys, code, expected):
    """The Job ends with a message that names the rule of its pods; the JobSet's first rule that fits it decides."""
    spec = manifest(capsys, "--kind=jobset")["JobSet"]["spec"]
    job = spec["replicatedJobs"][0]["template"]["spec"]
    place, what = action(job["podFailurePolicy"]["rules"], code)
    assert job["backoffLimit"] == 0
    reason, message = "BackoffLimitExceeded", "Job has reached the specified backoff limit"
    if what == "FailJob":
        reason = "PodFailurePolicy"
        message = f"Container train for pod a/b failed with exit code {code} matching FailJob rule at index {place}"
    fitting = [
        rule["action"]
        for rule in spec["failurePolicy"]["rules"]
        if reason in rule["onJobFailureReasons"] and any(re.search(p, message) for p in rule["onJobFailureMessagePatterns"])
    ]
    assert (fitting or ["RestartJobSet"])[0] == expected


# ---------------------------------------------------------------------------------------------------------------------
# Ray


class FakeRay(SimpleNamespace):
    """Ray's words, as far as the adapter uses them, with a thread for an actor's method."""

    class RayActorError(Exception):
        pass

    def __init__(self, lose_host=()):
        self.exceptions = SimpleNamespace(RayActorError=self.RayActorError)
        strategy = SimpleNamespace(PlacementGroupSchedulingStrategy=lambda *_, **__: None)
        self.util = SimpleNamespace(scheduling_strategies=strategy, placement_group=self._placement_group)
        self.pool, self.bundles, self.losses = ThreadPoolExecutor(8), None, list(lose_host)

    def _placement_group(self, bundles, strategy):
        assert strategy == "STRICT_SPREAD"
        self.bundles = bundles
        return SimpleNamespace(ready=lambda: self.pool.submit(lambda: None))

    def get(self, futures):
        if isinstance(futures, list):
            codes = [future.result() for future in futures]
            if self.losses:
                raise self.RayActorError(self.losses.pop())
            return codes
        return futures.result()

    def kill(self, actor):
        pass

    def remote(self, cls):
        def make():
            host = cls()
            host.address = lambda: "10.0.0.1:4321"
            methods = {name: getattr(host, name) for name in ("address", "train", "stop")}
            later = {
                name: SimpleNamespace(remote=lambda *a, method=method: self.pool.submit(method, *a))
                for name, method in methods.items()
            }
            return SimpleNamespace(**later)

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make))


@pytest.mark.parametrize(
    ("plan", "lost", "code", "turns"),
    [([[0, 0]], [], 0, 1), ([[75, "kill"], [0, 0]], [], 0, 2), ([[2, 75]], [], 2, 1), ([[76, 76]], [], 76, 1)]
    + [([[75, 75], [0, 0]], ["node died"], 0, 2), ([[75, 75]] * 2, [], 75, 2)],
)
def test_ray_starts_the_same_processes(stage, plan, lost, code, turns, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own
    (stage.folder / "plan").write_text(json.dumps(plan))
    ray, command = FakeRay(lost), [f"{stage.folder}/process", "-m", "jaxtrain.main", "--config=x.py"]
    assert on_ray.run(ray, 2, 8, 1, command, pause=0) == code
    assert ray.bundles == [{"CPU": 1, "GPU": 8}] * 2
    assert len(stage.places) == turns
    for turn in stage.places:
        assert_one_run(turn)
        assert {(row["starter"], row["coordinator"]) for row in turn} == {("Ray", "10.0.0.1:4321")}


def test_ray_job_carries_the_environment_to_every_host(stage, capsys):
    """The script's command line, with `ray job submit --` taken off, ends in the command of a process."""
    script = script_of(capsys, "ray", *HOSTS, "--env", "SEEN=a b'c", "--directory=/", stage.python)
    stage._shell("ray", f'printf "%s\\n" "$@" > {shlex.quote(str(stage.folder))}/words')
    assert stage.run(script, [])[0] == 0
    words = (stage.folder / "words").read_text().splitlines()
    at = words.index("env")
    assert words[:3] == ["job", "submit", "--"]
    assert words[at - 3 : at] == ["2", "0", "20"]
    assert {"JAXTRAIN_CPU_DEVICES=2", "SEEN=a b'c"} <= set(words[at:])
    assert words[-len(RUN) + 1 :] == RUN[1:]


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input, and the scripts that stand in the repository


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["slurm", *RUN], "the mesh has 4 devices, which do not fill hosts of --devices_per_host=8; use --devices_per_host=4"),
        (["slurm", "--hosts=2", "--devices_per_host=4", *RUN], "8"),
        (["slurm", "--", "--config=configs/quickstart.py"], "--hosts=2"),
        (["slurm", "--hosts=1", "--devices_per_host=3", "--", "--config=configs/quickstart.py"], "global_batch_size"),
        (["slurm", *HOSTS, "--time=1h", *RUN], "--time='1h'"),
        (["slurm", *HOSTS, "--time=5", *RUN], "--time=5 is 300 s"),
        (["slurm", *HOSTS, "--options", "a b", *RUN], "--options='a b'"),
        (["slurm", *HOSTS, "--partition=a b", *RUN], "--partition='a b'"),
        (["slurm", "--devices_per_host=0", "--restarts=-1", *RUN], "--restarts=-1 must be at least 0"),
        (["mpi", *HOSTS, *RUN], "needs 2 different hosts, but --host_names has 1"),
        (["mpi", *HOSTS, "--host_names", "a", "b;reboot", *RUN], "'b;reboot' is no name of a host"),
        (["mpi", *HOSTS, "--host_names", "a", "b", "--port=65530", *RUN], "--port=65530"),
        (["mpi", *HOSTS, "--env", "WANDB_API_KEY=1234", *RUN], "give the name alone"),
        (["mpi", *HOSTS, "--env", "A B=1", *RUN], "A B"),
        (["kubernetes", *HOSTS, *IN_CLAIM], "--image"),
        (["kubernetes", *POD, *RUN], "use --run_dir=/runs/quickstart"),
        (["kubernetes", *POD, "--claim=A_B", *IN_CLAIM], "--claim='A_B'"),
        (["kubernetes", *POD, *IN_CLAIM, "--name=" + "x" * 60], "1 to 48 letters"),
        (["ray", *HOSTS, "--env", "WANDB_API_KEY", *RUN], "to everybody"),
    ],
)
def test_wrong_input_is_refused_before_anything_is_submitted(arguments, words, capsys):
    with pytest.raises(ConfigError) as caught:
        launch([arguments[0], "--dry_run", *arguments[1:]])
    assert words in str(caught.value)
    assert "1234" not in str(caught.value)
    assert capsys.readouterr().out == ""


def test_an_unknown_starter():
    with pytest.raises(UsageError, match="did you mean 'slurm'"):
        launch(["slrum", *RUN])


def test_without_the_starters_program(monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ExplainedError, match="sbatch is not on this machine.*--dry_run"):
        launch(["slurm", *HOSTS, *RUN])


def test_sbatch_is_given_the_script_that_is_printed(stage, capsys, monkeypatch):
    stage._shell("sbatch", f"cat > {shlex.quote(str(stage.folder))}/taken; exit 3")
    monkeypatch.setenv("PATH", f"{stage.folder}:{os.environ['PATH']}")
    assert launch(["slurm", *HOSTS, *RUN]) == 3
    assert (stage.folder / "taken").read_text() == script_of(capsys, "slurm", *HOSTS)


@pytest.mark.parametrize("name", ["slurm.sbatch", "mpirun.sh", "kubernetes.yaml", "jobset.yaml", "ray.sh"])
def test_scripts_in_the_repository_are_what_the_verb_prints(name, capsys, monkeypatch):
    """Each says in its head how it was made; to renew it, run that with --dry_run."""
    monkeypatch.chdir(ROOT)
    script = (ROOT / "scripts" / name).read_text()
    made = re.search(r"^#   jaxtrain launch (.*)$", script, re.M)
    assert made is not None
    starter, *own = shlex.split(made[1])
    assert launch([starter, "--dry_run", *own]) == 0
    assert capsys.readouterr().out == script
    if not name.endswith(".yaml"):
        subprocess.run(["bash", "-n", ROOT / "scripts" / name], check=True)
