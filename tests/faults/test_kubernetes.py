"""The Job that `launch kubernetes` prints, held to Kubernetes' schema, and run by a simulation of its contract on this machine.

A SIMULATION: pods are processes here, and names resolve to the loopback. It was never run on a cluster.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from jaxtrain.launch.supervisor import free_port
from jaxtrain.verbs.launch import main as launch
from tests.faults.runs import COMPILED, CONFIG, ROOT, Faulty, environment
from tests.launch.pods import action, environment_of_pod

STEPS = 16


def documents(capsys, kind, run, *own):
    """Of the manifest, by kind."""
    flags = ["--dry_run", f"--kind={kind}", "--cpu", "--hosts=2", "--devices_per_host=4", "--image=registry.example/jaxtrain:1"]
    more = [CONFIG, f"--run_dir={run.run_dir}", f"--train.steps={STEPS}", f"--train.compilation_cache={COMPILED}"]
    assert launch(["kubernetes", *flags, f"--mount={run.folder.parent}", *own, "--", *more]) == 0
    return {document["kind"]: document for document in yaml.safe_load_all(capsys.readouterr().out)}


@pytest.mark.parametrize("kind", ["job", "jobset"])
def test_the_manifest_fits_the_schema(capsys, tmp_path, kind, monkeypatch):
    """Of a JobSet the Job inside it: the schema of JobSet itself is in no package."""
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate (108 MB)")
    monkeypatch.chdir(ROOT)
    found = documents(capsys, kind, Faulty(tmp_path / "run", STEPS))
    assert sorted(found) == {"job": ["Job", "Service"], "jobset": ["JobSet"]}[kind]
    for document in found.values():
        if document["kind"] == "JobSet":
            (replicated,) = document["spec"]["replicatedJobs"]
            document = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **replicated["template"]}
        validate.validate(document, "1.31", strict=True)  # raises ValidationError


class Pods:
    """An indexed Job's pods as processes: each is started again by itself, as the Job's rules and backoffLimit say."""

    def __init__(self, job: dict, folder: Path):
        self.spec, self.folder, self.failures = job["spec"], folder, []
        (self.container,) = self.spec["template"]["spec"]["containers"]
        self.running = {index: self.start(index) for index in range(self.spec["completions"])}

    def start(self, index: int) -> subprocess.Popen:
        """A pod of that index, in the environment that the manifest gives it."""
        seen = environment_of_pod(self.container, index, "127.0.0.1")
        host, _, port = seen["JAXTRAIN_COORDINATOR"].rpartition(":")
        assert host == "faulty-0.faulty"  # which only a cluster's name service knows
        seen["JAXTRAIN_COORDINATOR"] = f"127.0.0.1:{port}"
        python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        with open(self.folder / f"pod-{index}.log", "a") as log:
            command = self.container["command"] + self.container["args"]
            return subprocess.Popen(
                command, cwd=ROOT, env=environment(self.folder) | python | seen, stdout=log, stderr=subprocess.STDOUT
            )

    def run(self, seconds: float) -> str:
        """Complete or Failed, as the Job's condition would say."""
        until, done = time.monotonic() + seconds, set()
        while time.monotonic() < until and len(done) < len(self.running):
            time.sleep(0.1)
            for index, pod in self.running.items():
                code = pod.poll()
                if code is None or index in done:
                    continue
                if code == 0:
                    done.add(index)
                    continue
                what = action(self.spec["podFailurePolicy"]["rules"], code if code > 0 else 128 - code)[1]
                self.failures += [(index, code)] if what == "Count" else []
                if what == "FailJob" or len(self.failures) > self.spec["backoffLimit"]:
                    return "Failed"
                time.sleep(1.0)  # Kubernetes waits ten seconds, and longer every time
                self.running[index] = self.start(index)
        return "Complete" if len(done) == len(self.running) else "unfinished"

    def stop(self) -> None:
        """Ends all."""
        for pod in self.running.values():
            if pod.poll() is None:
                pod.kill()
            pod.wait()


@pytest.mark.slow
def test_simulated_pods_train_lose_one_and_go_on(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    run = Faulty(tmp_path / "run", STEPS)
    run.plan([(6, 1, "saved:4+kill")])
    job = documents(capsys, "job", run, f"--port={free_port()}")["Job"]
    pods = Pods(job, run.folder)
    try:
        assert pods.run(300) == "Complete", (run.folder / "pod-0.log").read_text()[-2000:]
    finally:
        pods.stop()
    assert (1, -9) in pods.failures  # and its peer with it, which then waited for it
    assert "resume     from step 4" in (run.folder / "pod-0.log").read_text()
    assert sorted(run.losses()) == list(range(1, STEPS + 1))
    assert run.token_ids().keys() == run.losses().keys()
