"""Joins the processes of a run, whatever started them, and ends each of them so that the others learn of it at once.

JAX's own runtime is the engine. What is added: the place of this process among the others is found without asking JAX, which
under SLURM and Open MPI would give every process one GPU, also where it is the only process of a node; the timeouts are short;
and a process that fails ends with `os._exit`, because JAX's exit handler otherwise waits for peers that will not come (97 to
300 s by default, measured). Before that it posts its reason, on which the watchdog of every peer ends that peer too.

| exit code | meaning | its peers end with |
|---|---|---|
| 0 | done | 0 |
| 1, 2 | an error explained in one message, wrong usage: starting again would end the same way | the same code |
| 70 | an unforeseen error, or this process hangs | 75 |
| 75 | another process was lost or hangs; nothing is wrong here | 75 |
| 76 | stopped by a signal after saving: start the same command again | 76 |
| 129, 130, 143 | ended by SIGHUP, SIGINT, SIGTERM before training began, or at the second request | 75 |

Whoever restarts a run (the supervisor, a script of `launch`) starts it again on 70, 75 and death by a signal, in whatever order
the processes end, and lets it be on 1 and 2: so the peers of a process that refuses repeat its code.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from jaxtrain import processes
from jaxtrain.config import DistributedConfig
from jaxtrain.errors import (
    EXIT_DONE,
    EXIT_ERROR,
    EXIT_FAULT,
    EXIT_PEER,
    EXIT_STOPPED,
    EXIT_USAGE,
    ConfigError,
    ExplainedError,
    PeerMissing,
)

PARENT = "JAXTRAIN_PARENT"  # process number of the supervisor, where its death is to end this process
_PORTS = 61440, 4096  # first, and how many: as JAX's own SLURM support, above what Linux hands out by itself
_JOIN_SECONDS = 60
_PEER_WORDS = re.compile(
    r"gloo|connection (reset|closed|refused)|socket closed|pollforerror|unavailable|coordination service|heartbeat|"
    r"nccl.*(remote|abort|unhandled|timed? ?out)|barrier|tasks are unhealthy",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Place:
    """This process among those of the run."""

    starter: str
    """What started it, in words."""
    coordinator: str
    """host:port at which process 0 is reached."""
    processes: int
    process: int
    local_processes: int
    """Processes of the run on this host."""
    local_process: int
    """Which of them this is."""
    bound: bool = False
    """Whether the starter shows this process its own GPUs only."""


def find_place(config: DistributedConfig, environ: Mapping[str, str]) -> Place | None:
    """This process's place as the flags say, else JAXTRAIN_* (our supervisor, Kubernetes, Ray), SLURM, or Open MPI 4 and 5.

    None for a lone process: nothing says that there are others.

    Raises:
      ConfigError: what says so is incomplete or contradicts itself.
    """
    return _explicit(config, environ) or _slurm(config, environ) or _open_mpi(config, environ)


def _explicit(config: DistributedConfig, environ: Mapping[str, str]) -> Place | None:
    """Return the flags over JAXTRAIN_COORDINATOR, JAXTRAIN_PROCESSES, JAXTRAIN_PROCESS_ID (or an indexed Kubernetes Job's
    index).
    """
    coordinator = config.coordinator or environ.get("JAXTRAIN_COORDINATOR", "")
    count = config.processes or _number(environ, "JAXTRAIN_PROCESSES", 0)
    index = config.process_id
    for name in ("JAXTRAIN_PROCESS_ID", "JOB_COMPLETION_INDEX"):
        index = _number(environ, name, -1) if index < 0 else index
    if count <= 1 and ("SLURM_PROCID" in environ or "OMPI_COMM_WORLD_RANK" in environ):
        return None
    if count <= 1:
        if config.coordinator or config.process_id >= 0:
            raise ConfigError(["distributed.processes: say how many processes there are, e.g. --distributed.processes=4"])
        return None
    missing = [] if coordinator else ["distributed.coordinator (or JAXTRAIN_COORDINATOR): host:port of process 0"]
    missing += [] if index >= 0 else ["distributed.process_id (or JAXTRAIN_PROCESS_ID): 0 for the first process"]
    if missing:
        raise ConfigError([f"{name}, is missing, but there are {count} processes" for name in missing])
    if index >= count:
        raise ConfigError([f"distributed.process_id={index} is not below distributed.processes={count}"])
    if not re.fullmatch(r"\S+:\d+", coordinator):
        raise ConfigError([f"distributed.coordinator={coordinator!r} must be host:port, e.g. node1:{_PORTS[0]}"])
    starter = environ.get("JAXTRAIN_STARTER", "Kubernetes" if "KUBERNETES_SERVICE_HOST" in environ else "flags")
    local = _number(environ, "JAXTRAIN_LOCAL_PROCESSES", 1)
    return Place(starter, coordinator, count, index, local, _number(environ, "JAXTRAIN_LOCAL_PROCESS_ID", 0))


def _slurm(config: DistributedConfig, environ: Mapping[str, str]) -> Place | None:
    """Return a task of an srun step; process 0 is on the first node of the step."""
    if "SLURM_PROCID" not in environ or _number(environ, "SLURM_NTASKS", 1) <= 1:
        return None
    job = _number(environ, "SLURM_JOB_ID", 0)
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST", "")
    per_node = expand_tasks(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "1"))
    node = _number(environ, "SLURM_NODEID", 0)
    local = per_node[node] if node < len(per_node) else 1
    visible = count_gpus(environ)
    return Place(
        f"SLURM job {job}",
        config.coordinator or environ.get("JAXTRAIN_COORDINATOR") or f"{first_node(nodes)}:{_port(job)}",
        _number(environ, "SLURM_STEP_NUM_TASKS", _number(environ, "SLURM_NTASKS", 1)),
        _number(environ, "SLURM_PROCID", 0),
        local,
        _number(environ, "SLURM_LOCALID", 0),
        bound=0 < visible < _number(environ, "SLURM_GPUS_ON_NODE", 0),
    )


def _open_mpi(config: DistributedConfig, environ: Mapping[str, str]) -> Place | None:
    """Return a rank of mpirun. On one host the coordinator is the loopback; else mpi4py tells, or Open MPI 4's own address."""
    size, rank = _number(environ, "OMPI_COMM_WORLD_SIZE", 1), _number(environ, "OMPI_COMM_WORLD_RANK", 0)
    if size <= 1:
        return None
    local = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", size)
    # One job, one port: Open MPI 4 numbers its jobs, Open MPI 5 (PMIx) names them.
    port = _port(sum(map(ord, environ.get("PMIX_NAMESPACE", environ.get("OMPI_MCA_ess_base_jobid", "")))))
    coordinator = config.coordinator or environ.get("JAXTRAIN_COORDINATOR", "")
    if not coordinator and local == size:
        coordinator = f"127.0.0.1:{port}"
    if not coordinator:
        coordinator = f"{_host_of_rank_0(environ)}:{port}"
    local_rank = _number(environ, "OMPI_COMM_WORLD_LOCAL_RANK", 0)
    return Place("Open MPI", coordinator, size, rank, local, local_rank)


def _host_of_rank_0(environ: Mapping[str, str]) -> str:
    try:
        from mpi4py import MPI  # type: ignore[import-not-found]
    except ImportError:
        address = re.search(r"tcp://([\d.]+)", environ.get("OMPI_MCA_orte_hnp_uri", ""))
        if address:
            return address.group(1)
        raise ConfigError(
            [
                "Open MPI does not say where rank 0 is: pip install mpi4py, or pass it on, "
                f"e.g. mpirun -x JAXTRAIN_COORDINATOR=$(hostname):{_PORTS[0]} ..."
            ]
        ) from None
    return MPI.COMM_WORLD.bcast(socket.gethostname(), root=0)


def first_node(nodes: str) -> str:
    """Return the first node of a SLURM node list: "n1" of "n[1-3,7],m2", "gpu001-ib" of "gpu[001-004]-ib"."""
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])*", nodes)
    assert first is not None
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def expand_tasks(tasks: str) -> list[int]:
    """Return the tasks of each node, of SLURM's short form: [2, 2, 2, 1] of "2(x3),1"."""
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigError([f"SLURM_TASKS_PER_NODE={tasks!r} is not of the form 2(x3),1"])
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def count_gpus(environ: Mapping[str, str]) -> int:
    """NVIDIA GPUs that this process may use, without waking a driver."""
    if environ.get("JAX_PLATFORMS", "").split(",")[0] == "cpu":
        return 0
    if "CUDA_VISIBLE_DEVICES" in environ:
        return len([device for device in environ["CUDA_VISIBLE_DEVICES"].split(",") if device.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def local_device_ids(place: Place, gpus: int, environ: Mapping[str, str]) -> list[int] | None:
    """Return the ids of this process's GPUs: all visible ones if it is alone on its host or sees only its own, else a share.

    None without GPUs.

    Raises:
      ConfigError: the GPUs of the host cannot be shared out evenly.
    """
    if environ.get("JAXTRAIN_LOCAL_DEVICE_IDS"):
        return [int(index) for index in environ["JAXTRAIN_LOCAL_DEVICE_IDS"].split(",")]
    if not gpus:
        return None
    if place.bound or place.local_processes == 1 or gpus == 1:
        return list(range(gpus))
    if gpus % place.local_processes:
        raise ConfigError(
            [
                f"{gpus} GPUs cannot be shared by the {place.local_processes} processes of this host; start 1, or a number "
                f"that divides {gpus}, or give each its own with JAXTRAIN_LOCAL_DEVICE_IDS"
            ]
        )
    own = gpus // place.local_processes
    return list(range(own * place.local_process, own * (place.local_process + 1)))


def start(config: DistributedConfig, environ: Mapping[str, str] | None = None) -> Place | None:
    """Join the other processes, before jax looks at any device. None for a lone process.

    Raises:
      PeerMissing: the others did not.
      ConfigError: as `find_place` and `local_device_ids`.
    """
    import jax

    environ = os.environ if environ is None else environ
    _stop_without_parent(_number(environ, PARENT, 0))
    devices = _number(environ, "JAXTRAIN_CPU_DEVICES", 0)
    if devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", devices)
    place = find_place(config, environ)
    processes.limit_seconds = config.phase_seconds or processes.LONG_SECONDS
    if place is None:
        return None
    jax.config.update("jax_enable_preemption_service", False)  # signals are ours, see train.stop.StopOnSignal
    try:
        jax.distributed.initialize(
            place.coordinator,
            place.processes,
            place.process,
            local_device_ids(place, count_gpus(environ), environ),
            cluster_detection_method="deactivate",
            initialization_timeout=config.start_timeout_seconds,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            shutdown_timeout_seconds=300,  # of an orderly end only: process 0 may still be drawing and sampling
            coordinator_bind_address=environ.get("JAX_COORDINATOR_BIND_ADDRESS")
            or place.coordinator,  # else it listens on every network of the host, and asks nobody who he is
        )
    except Exception as error:
        raise PeerMissing(
            f"process {place.process} of {place.processes} ({place.starter}) found no coordinator at {place.coordinator} "
            f"within {config.start_timeout_seconds} s: {str(error).splitlines()[0]}; do all processes run, and can they reach "
            "that port?"
        ) from error
    return place


def _stop_without_parent(parent: int) -> None:
    """When the supervisor dies the run saves and stops, instead of going on unwatched.

    A thread looks, because Linux's own signal for this (PR_SET_PDEATHSIG) comes once for each thread that the supervisor had.
    The signal is SIGHUP, which never insists: the supervisor may have passed a signal on before it died.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGHUP)

    if parent:
        if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # the supervisor was started under nohup
            signal.signal(signal.SIGHUP, signal.SIG_DFL)
        threading.Thread(target=watch, name="parent", daemon=True).start()


def describe(place: Place) -> str:
    """Return one line for the log."""
    import jax

    return (
        f"process {place.process} of {place.processes}, from {place.starter}, with {jax.local_device_count()} of "
        f"{jax.device_count()} devices; process 0 is at {place.coordinator}"
    )


def run_and_exit(work: Callable[[], int], joins: bool = True) -> NoReturn:
    """End the process with the exit code of `work`; with an error at once, and its peers with it.

    Args:
      joins: whether `work` is one of several processes where the environment says so.
    """
    try:
        code = work()
    except SystemExit as usage:
        if usage.code not in (EXIT_ERROR, EXIT_USAGE):
            _leave_word(usage.code)
            raise
        code = int(usage.code)
    except BaseException as error:
        if not processes.are_several():
            raise
        code = _blame(error)
    if joins and code in (EXIT_ERROR, EXIT_USAGE) and not processes.are_several():
        _join_to_refuse(code)
    if not processes.are_several():
        sys.exit(_for_starter(code))
    if processes.announced() is None and code not in (EXIT_FAULT, EXIT_PEER):
        code = _end_together(code)
    if code in (EXIT_DONE, EXIT_STOPPED):
        sys.exit(_for_starter(code))
    end_at_once(code)


def end_at_once(code: int) -> NoReturn:
    """End a process of several, from any thread, so that no peer is aborted by jax's runtime on its account."""
    code = _for_starter(code)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    processes.leave()
    os._exit(code)


def blame(failure: processes.Failure) -> str:
    """Return the line that says which process has ended the run, and why."""
    return f"process {failure.process} of {processes.count()} ended the run (exit code {failure.code}): {failure.reason}"


def _end_together(code: int) -> int:
    """Wait for all processes at the end of the run, which no error ends: the exit code.

    Process 0 may still copy to a mirror, which takes long; the watchdog sees whether it lives.
    """
    try:
        processes.barrier("end", processes.LONG_SECONDS)
    except ExplainedError as missing:
        print(f"error: {missing}", file=sys.stderr)
        return missing.exit_code
    except Exception as error:
        return _blame(error)
    return code


def _join_to_refuse(code: int) -> None:
    """Join the peers of a process that refuses its command line or config before it knows them, so that they learn of it."""
    with contextlib.suppress(Exception):  # the reason is on the screen; a peer that cannot be told ends by its own limit
        config = DistributedConfig(start_timeout_seconds=_JOIN_SECONDS)
        if find_place(config, os.environ) is not None:
            start(config)
            own = processes.announced()
            processes.announce(code, own.reason if own else "wrong usage of the command line; see its log")


def _for_starter(code: int) -> int:
    """Return the code to end with, once this process's own is where scripts of srun and mpirun look for it.

    Both end the others on any code but 0, perhaps while they still save: so a stop ends with 0 there.
    """
    return EXIT_DONE if _leave_word(code) and code == EXIT_STOPPED else code


def _leave_word(code: object) -> bool:
    """Write this process's exit code into JAXTRAIN_EXIT_CODES: srun and mpirun tell only one of all. True if it is there."""
    folder = os.environ.get("JAXTRAIN_EXIT_CODES")
    if folder:
        with contextlib.suppress(OSError):
            return Path(folder, f"{socket.gethostname()}-{os.getpid()}").write_text(f"{code}\n", encoding="utf-8") > 0
    return False


def _blame(error: BaseException) -> int:
    """Say in one line whose fault it was, and tell the peers; the traceback of a fault of our own comes first."""
    who, first = f"process {processes.own_index()} of {processes.count()}", (str(error).strip() or "no message").splitlines()[0]
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and _PEER_WORDS.search(str(error)):
        failure = _reported()
        if failure is not None:  # what the peer said before it ended
            print(f"error: {blame(failure)}", file=sys.stderr)
            return failure.code if failure.code in (EXIT_ERROR, EXIT_USAGE) else EXIT_PEER
        print(f"error: {who} lost another process: {first}", file=sys.stderr)
        processes.announce(EXIT_PEER, f"it lost another process: {first}")
        return EXIT_PEER
    traceback.print_exception(error)
    print(f"error: {who} failed: {type(error).__name__}: {first}", file=sys.stderr)
    processes.announce(EXIT_FAULT, f"{type(error).__name__}: {first}")
    return EXIT_FAULT


def _reported() -> processes.Failure | None:
    with contextlib.suppress(Exception):  # the store is gone
        return processes.reported()
    return None


def _port(number: int) -> int:
    return _PORTS[0] + number % _PORTS[1]


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, "")
    if not text:
        return default
    if not re.fullmatch(r"\d+", text):
        raise ConfigError([f"{name}={text!r} is not a whole number"])
    return int(text)
