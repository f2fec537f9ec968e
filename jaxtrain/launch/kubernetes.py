"""Start a run on Kubernetes: an indexed Job, or a JobSet if its controller (0.10 or newer) is installed.

Both are a headless service that gives pod 0 a name, and pods that know their index. They differ after a loss: the Job restarts
each pod as it ends, and counts every pod against --restarts x hosts; the JobSet restarts all pods at once. In both, 1 and 2
(errors that a restart would not mend) fail the run, and 76 (saved after a signal) and evictions are not counted. The pods make
no API call, and the manifests are text: no yaml package is needed.

Never run on a cluster: the manifests were checked offline, and tests execute their environment.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jaxtrain.errors import EXIT_ERROR, EXIT_STOPPED, EXIT_USAGE, ConfigError
from jaxtrain.launch.job import Job, JobFlags, check_shared
from jaxtrain.launch.shell import comment

_LONGEST_NAME = 48  # of a host name's 63 letters; controllers append e.g. -train-0-999
_REFUSED, _SAVED = 0, 1  # indices of the rules in the pods' failure policy: the JobSet finds them in the Job's message
_EVICTED = 2


@dataclass(frozen=True)
class KubernetesFlags(JobFlags):
    """Flags of `launch kubernetes`."""

    image: str = ""
    """Image with jaxtrain and jax[cuda13]. Its working directory is --directory, or the image's."""
    python: str = "python"
    """Python interpreter of the image."""
    kind: Literal["job", "jobset"] = "job"
    """job needs no controller; jobset restarts all pods together."""
    namespace: str = ""
    """Namespace; empty: kubectl's current one."""
    claim: str = "runs"
    """PersistentVolumeClaim for checkpoints, which all hosts can write at once (ReadWriteMany)."""
    mount: str = "/runs"
    """Mount point of the claim; run_dir must be inside."""
    secret: str = "jaxtrain"
    """Secret that holds the values of --env NAME."""
    gpu_resource: str = "nvidia.com/gpu"
    """The cluster's resource name for a GPU."""
    shared_memory_gib: int = 16
    """GiB of /dev/shm in each pod: NCCL needs more than Kubernetes' 64 MiB."""
    save_seconds: int = 300
    """Seconds that an evicted pod has to save."""
    port: int = 8476
    """TCP port of process 0."""


def render(job: Job, flags: KubernetesFlags) -> str:
    """Return the manifest.

    Raises:
      ConfigError: there is no image, run_dir is lost with its pod, or a name is invalid in Kubernetes.
    """
    _check(flags)
    check_shared(job, flags.mount, "unless it is in the mounted claim")
    name = name_of(job.config.name)
    where = {"job": f"{name}-0.{name}", "jobset": f"{name}-train-0-0.{name}"}[flags.kind]
    environment = {
        "JAXTRAIN_COORDINATOR": f"{where}:{flags.port}",
        "JAXTRAIN_PROCESSES": str(job.hosts),
        "JAXTRAIN_STARTER": f"Kubernetes {'Job' if flags.kind == 'job' else 'JobSet'} {name}",
        **job.environment,
    }
    pod = _pod(job, flags, environment)
    head = f"{comment(job)}\n# Never run on a cluster; checked offline only.\n"
    if flags.kind == "jobset":
        return head + _jobset(name, flags, _job_spec(job, pod, backoff=0, on_saved="FailJob", on_evicted="FailJob"))
    pod = f"subdomain: {name}\n{pod}"
    spec = _job_spec(job, pod, backoff=flags.restarts * job.hosts, on_saved="Ignore", on_evicted="Ignore")
    return head + _service(name, flags) + "---\n" + _document("batch/v1", "Job", name, flags, spec)


def name_of(run: str) -> str:
    """Return a run's name as Kubernetes allows it: lower-case letters, digits and dashes.

    Raises:
      ConfigError: nothing is left of it, or it is too long.
    """
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    name = f"run-{name}" if name[:1].isdigit() else name  # the name of a service begins with a letter
    if not name or len(name) > _LONGEST_NAME:
        raise ConfigError([f"name={run!r} becomes {name!r} in Kubernetes: use 1 to {_LONGEST_NAME} letters, digits and dashes"])
    return name


def _pod(job: Job, flags: KubernetesFlags, environment: dict[str, str]) -> str:
    def value_from(name: str, source: str) -> str:
        return f"- name: {name}\n  valueFrom:\n    {source}\n"

    variables = "".join(f"- name: {name}\n  value: {_text(value)}\n" for name, value in environment.items())
    # Process 0 listens only on its pod's address, and must not wait until DNS resolves it.
    variables += value_from("POD_IP", "fieldRef: {fieldPath: status.podIP}")
    variables += f'- name: JAX_COORDINATOR_BIND_ADDRESS\n  value: "$(POD_IP):{flags.port}"\n'
    for name in job.passed_on:
        variables += value_from(name, f"secretKeyRef: {{name: {flags.secret}, key: {name}}}")
    gpus = "" if flags.cpu else f"resources:\n  limits:\n    {flags.gpu_resource}: {job.devices_per_host}\n"
    directory = f"workingDir: {_text(flags.directory)}\n" if flags.directory else ""
    arguments = "".join(f"- {_text(word)}\n" for word in job.command[3:])
    container = (
        f"name: train\nimage: {_text(flags.image)}\n{directory}command: [{', '.join(map(_text, job.command[:3]))}]\n"
        f"args:\n{arguments}"
        f"env:\n{variables}ports:\n- name: coordinator\n  containerPort: {flags.port}\n{gpus}"
        f"volumeMounts:\n- name: runs\n  mountPath: {_text(flags.mount)}\n- name: shared-memory\n  mountPath: /dev/shm\n"
    )
    return (
        f"restartPolicy: Never # the Job starts pods again, by exit code\n"
        f"terminationGracePeriodSeconds: {flags.save_seconds} # to save after an eviction\n"
        f"containers:\n{_item(container)}"
        f"volumes:\n- name: runs\n  persistentVolumeClaim: {{claimName: {flags.claim}}}\n"
        f"- name: shared-memory\n  emptyDir: {{medium: Memory, sizeLimit: {flags.shared_memory_gib}Gi}}\n"
    )


def _job_spec(job: Job, pod: str, backoff: int, on_saved: str, on_evicted: str) -> str:
    def on_exit(action: str, codes: Sequence[int]) -> str:
        return f"- action: {action}\n  onExitCodes: {{containerName: train, operator: In, values: {list(codes)}}}\n"

    rules = {
        _REFUSED: on_exit("FailJob", [EXIT_ERROR, EXIT_USAGE]),
        _SAVED: on_exit(on_saved, [EXIT_STOPPED]),
        _EVICTED: f'- action: {on_evicted}\n  onPodConditions:\n  - {{type: DisruptionTarget, status: "True"}}\n',
    }
    return (
        f"completionMode: Indexed\ncompletions: {job.hosts}\nparallelism: {job.hosts}\nbackoffLimit: {backoff}\n"
        f"podFailurePolicy:\n  rules:\n{_in(''.join(rules[place] for place in sorted(rules)), 2)}"
        f"template:\n  spec:\n{_in(pod, 4)}"
    )


def _service(name: str, flags: KubernetesFlags) -> str:
    spec = (
        f"clusterIP: None # only names: pod 0 is {name}-0.{name}\n"
        f"publishNotReadyAddresses: true\nselector:\n  batch.kubernetes.io/job-name: {name}\n"
        f"ports:\n- name: coordinator\n  port: {flags.port}\n"
    )
    return _document("v1", "Service", name, flags, spec)


def _jobset(name: str, flags: KubernetesFlags, job_spec: str) -> str:
    def rule(called: str, action: str, place: int) -> str:
        return (
            f"- name: {called}\n  action: {action}\n  onJobFailureReasons: [PodFailurePolicy]\n"
            f'  onJobFailureMessagePatterns: ["matching FailJob rule at index {place}$"]\n'
        )

    free = "RestartJobSetAndIgnoreMaxRestarts"
    rules = rule("refused", "FailJobSet", _REFUSED) + rule("saved", free, _SAVED) + rule("evicted", free, _EVICTED)
    spec = (
        f"network:\n  enableDNSHostnames: true\n  publishNotReadyAddresses: true\n  subdomain: {name}\n"
        f"failurePolicy:\n  maxRestarts: {flags.restarts}\n  rules:\n{_in(rules, 2)}"
        f"replicatedJobs:\n- name: train\n  replicas: 1\n  template:\n    spec:\n{_in(job_spec, 6)}"
    )
    return _document("jobset.x-k8s.io/v1alpha2", "JobSet", name, flags, spec)


def _document(version: str, kind: str, name: str, flags: KubernetesFlags, spec: str) -> str:
    namespace = f"  namespace: {flags.namespace}\n" if flags.namespace else ""
    return f"apiVersion: {version}\nkind: {kind}\nmetadata:\n  name: {name}\n{namespace}spec:\n{_in(spec, 2)}"


def _check(flags: KubernetesFlags) -> None:
    problems = (
        [] if flags.image else ["--image: which image? one with jaxtrain in it, e.g. --image=registry.example/jaxtrain:1"]
    )
    for field in ("namespace", "claim", "secret"):
        value = getattr(flags, field)
        if value and not re.fullmatch(r"[a-z0-9]([-.a-z0-9]*[a-z0-9])?", value):
            problems.append(f"--{field}={value!r} is not a valid Kubernetes name: lower-case letters, digits, dashes")
    if not re.fullmatch(r"[a-z0-9.-]+/[A-Za-z0-9._-]+", flags.gpu_resource):
        problems.append(f"--gpu_resource={flags.gpu_resource!r} must be like nvidia.com/gpu")
    if not flags.mount.startswith("/"):
        problems.append(f"--mount={flags.mount!r} must begin with /")
    if not 1 <= flags.port <= 65535:
        problems.append(f"--port={flags.port} must lie in 1 to 65535")
    if flags.save_seconds < 1 or flags.shared_memory_gib < 1:
        problems.append(
            f"--save_seconds={flags.save_seconds} and --shared_memory_gib={flags.shared_memory_gib} must be at least 1"
        )
    if problems:
        raise ConfigError(problems)


# ---------------------------------------------------------------------------------------------------------------------
# As much YAML as is needed: every string is a JSON string, which is valid YAML


def _text(value: str) -> str:
    """Return a quoted string; Kubernetes would expand $( as a variable."""
    return json.dumps(value.replace("$(", "$$("))


def _in(block: str, by: int) -> str:
    return textwrap.indent(block, " " * by)


def _item(block: str) -> str:
    """Return a block as a list item."""
    return "- " + _in(block, 2)[2:]
