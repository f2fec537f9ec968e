"""Start a run on Kubernetes: an indexed Job, or a JobSet if its controller (0.10 or newer) is installed.

Both are a headless service that gives pod 0 a name, and pods that know their index. They differ after a loss: the Job restarts
each pod as it ends, and counts every pod against --restarts x hosts; the JobSet restarts all pods at once. In both, 1 and 2
(errors that a restart would not mend) fail the run, and 76 (saved after a signal) and evictions are not counted. The pods make
no API call.

Never run on a cluster: the manifests were checked offline, and tests execute their environment.
"""

from __future__ import annotations

import json
import re
import textwrap
from dataclasses import dataclass
from typing import Any, Literal

from jaxtrain.errors import EXIT_ERROR, EXIT_STOPPED, EXIT_USAGE, ConfigError
from jaxtrain.launch.job import Job, JobFlags, check_shared
from jaxtrain.launch.shell import comment

_LONGEST_NAME = 48  # of a host name's 63 letters; controllers append e.g. -train-0-999
_REFUSED, _SAVED = 0, 1  # indices of the rules in the pods' failure policy: the JobSet finds them in the Job's message
_EVICTED = 2
Tree = dict[str, Any]


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
    if flags.kind == "jobset":
        spec = _job_spec(job, pod, backoff=0, on_saved="FailJob", on_evicted="FailJob")
        documents = [_document("jobset.x-k8s.io/v1alpha2", "JobSet", name, flags, _jobset_spec(name, flags, spec))]
    else:
        pod = {"subdomain": name, **pod}
        spec = _job_spec(job, pod, backoff=flags.restarts * job.hosts, on_saved="Ignore", on_evicted="Ignore")
        service = _document("v1", "Service", name, flags, _service_spec(name, flags))
        documents = [service, _document("batch/v1", "Job", name, flags, spec)]
    return f"{comment(job)}\n# Never run on a cluster; checked offline only.\n" + "---\n".join(map(_yaml, documents))


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


def _pod(job: Job, flags: KubernetesFlags, environment: dict[str, str]) -> Tree:
    variables: list[Tree] = [{"name": name, "value": _literal(value)} for name, value in environment.items()]
    # Process 0 listens only on its pod's address, and must not wait until DNS resolves it.
    variables.append({"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}})
    variables.append({"name": "JAX_COORDINATOR_BIND_ADDRESS", "value": f"$(POD_IP):{flags.port}"})
    variables += [{"name": name, "valueFrom": {"secretKeyRef": {"name": flags.secret, "key": name}}} for name in job.passed_on]
    container = {
        "name": "train",
        "image": flags.image,
        **({"workingDir": flags.directory} if flags.directory else {}),
        "command": list(job.command[:3]),
        "args": [_literal(word) for word in job.command[3:]],
        "env": variables,
        "ports": [{"name": "coordinator", "containerPort": flags.port}],
        **({} if flags.cpu else {"resources": {"limits": {flags.gpu_resource: job.devices_per_host}}}),
        "volumeMounts": [{"name": "runs", "mountPath": flags.mount}, {"name": "shared-memory", "mountPath": "/dev/shm"}],
    }
    return {
        "restartPolicy": "Never",  # the Job starts pods again, by exit code
        "terminationGracePeriodSeconds": flags.save_seconds,
        "containers": [container],
        "volumes": [
            {"name": "runs", "persistentVolumeClaim": {"claimName": flags.claim}},
            {"name": "shared-memory", "emptyDir": {"medium": "Memory", "sizeLimit": f"{flags.shared_memory_gib}Gi"}},
        ],
    }


def _job_spec(job: Job, pod: Tree, backoff: int, on_saved: str, on_evicted: str) -> Tree:
    def on_exit(action: str, codes: list[int]) -> Tree:
        return {"action": action, "onExitCodes": {"containerName": "train", "operator": "In", "values": codes}}

    rules = {
        _REFUSED: on_exit("FailJob", [EXIT_ERROR, EXIT_USAGE]),
        _SAVED: on_exit(on_saved, [EXIT_STOPPED]),
        _EVICTED: {"action": on_evicted, "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    }
    return {
        "completionMode": "Indexed",
        "completions": job.hosts,
        "parallelism": job.hosts,
        "backoffLimit": backoff,
        "podFailurePolicy": {"rules": [rules[place] for place in sorted(rules)]},
        "template": {"spec": pod},
    }


def _service_spec(name: str, flags: KubernetesFlags) -> Tree:
    """Return a headless service: it only names pod 0, NAME-0.NAME."""
    return {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": {"batch.kubernetes.io/job-name": name},
        "ports": [{"name": "coordinator", "port": flags.port}],
    }


def _jobset_spec(name: str, flags: KubernetesFlags, job_spec: Tree) -> Tree:
    def rule(called: str, action: str, place: int) -> Tree:
        return {
            "name": called,
            "action": action,
            "onJobFailureReasons": ["PodFailurePolicy"],
            "onJobFailureMessagePatterns": [f"matching FailJob rule at index {place}$"],
        }

    free = "RestartJobSetAndIgnoreMaxRestarts"
    rules = [rule("refused", "FailJobSet", _REFUSED), rule("saved", free, _SAVED), rule("evicted", free, _EVICTED)]
    return {
        "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True, "subdomain": name},
        "failurePolicy": {"maxRestarts": flags.restarts, "rules": rules},
        "replicatedJobs": [{"name": "train", "replicas": 1, "template": {"spec": job_spec}}],
    }


def _document(version: str, kind: str, name: str, flags: KubernetesFlags, spec: Tree) -> Tree:
    metadata = {"name": name, "namespace": flags.namespace} if flags.namespace else {"name": name}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, "spec": spec}


def _literal(text: str) -> str:
    """Return the text with each $( escaped: Kubernetes would expand it as a variable."""
    return text.replace("$(", "$$(")


def _yaml(value: Any) -> str:
    """Return dicts and lists as block YAML, and scalars as JSON, which is valid YAML."""
    if isinstance(value, dict):
        return "".join(
            f"{key}:\n{textwrap.indent(_yaml(item), '  ')}" if isinstance(item, dict | list) else f"{key}: {_yaml(item)}"
            for key, item in value.items()
        )
    if isinstance(value, list):
        return "".join("- " + textwrap.indent(_yaml(item), "  ")[2:] for item in value)
    return json.dumps(value) + "\n"


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
