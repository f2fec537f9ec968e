"""Join the processes of a run, whatever started them, and end each such that its peers learn of it at once.

JAX's distributed runtime does the work. Added here: this process's place among the others is found without JAX, which under
SLURM and Open MPI would give every process one GPU even if it is the only process of a node; timeouts are short; and a process
that fails ends with `os._exit`, because JAX's exit handler would wait 97 to 300 s (measured) for peers that will not come.
Before that it posts its reason to the key-value store, on which every peer's watchdog ends that peer too.

| exit code | meaning | its peers end with | |---|---|---| | 0 | done | 0 | | 1, 2 | an error explained in one message, wrong
usage: a restart would end the same way | the same code | | 70 | an unforeseen error, or this process hangs | 75 | | 75 |
another process was lost or hangs; no fault of this one | 75 | | 76 | stopped by a signal after saving: start the same command
again | 76 | | 129, 130, 143 | ended by SIGHUP, SIGINT, SIGTERM before training began, or at the second request | 75 |

Whatever restarts a run (the supervisor, a script of `launch`) does so on 70, 75 and death by a signal, in whatever order the
processes end, and not on 1 and 2: therefore the peers of a process that refuses repeat its code.
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

PARENT = "JAXTRAIN_PARENT"  # the supervisor's process id, set if its death is to end this process
_PORTS = 61440, 4096  # first, and how many: as JAX's own SLURM support, above what Linux hands out by itself
_JOIN_SECONDS = 60
_PEER_WORDS = re.compile(
    r"gloo|connection (reset|closed|refused)|socket closed|pollforerror|unavailable|coordination service|heartbeat|"
    r"nccl.*(remote|abort|unhandled|timed? ?out)|barrier|tasks are unhealthy",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Place:
    """This process's place among the processes of the run."""

    starter: str
    """Name of what started it."""
    coordinator: str
    """host:port of process 0."""
    processes: int
    process: int
    local_processes: int
    """Number of the run's processes on this host."""
    local_process: int
    """This process's index among them."""
    bound: bool = False
    """Whether only this process's own GPUs are visible to it."""


def find_place(config: DistributedConfig, environ: Mapping[str, str]) -> Place | None:
    """Return this process's place from the flags, JAXTRAIN_* (our supervisor, Kubernetes, Ray), SLURM, or Open MPI 4 and 5.

    None for a single process.

    Raises:
      ConfigError: the source is incomplete or contradicts itself.
    """
    return _explicit(config, environ) or _slurm(config, environ) or _open_mpi(config, environ)


def _explicit(config: DistributedConfig, environ: Mapping[str, str]) -> Place | None:
    """Return the place given by flags, else by JAXTRAIN_* variables or the index of an indexed Kubernetes Job."""
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
    """Return the place of a task in an srun step; process 0 is on the first node of the step."""
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
    """Return the place of an mpirun rank. On one host the coordinator is the loopback; else mpi4py or Open MPI 4 gives it."""
    size, rank = _number(environ, "OMPI_COMM_WORLD_SIZE", 1), _number(environ, "OMPI_COMM_WORLD_RANK", 0)
    if size <= 1:
        return None
    local = _number(environ, "OMPI_COMM_WORLD_LOCAL_SIZE", size)
    # One port per job: Open MPI 4 numbers its jobs, Open MPI 5 (PMIx) names them.
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
                "Open MPI does not give rank 0's address: pip install mpi4py, or pass it, "
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
    """Expand SLURM's short form of the tasks per node: "2(x3),1" -> [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in tasks.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if match is None:
            raise ConfigError([f"SLURM_TASKS_PER_NODE={tasks!r} is not of the form 2(x3),1"])
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def count_gpus(environ: Mapping[str, str]) -> int:
    """Count the NVIDIA GPUs that this process may use, without loading a driver."""
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
    """Join the other processes before jax looks at any device. Return None for a single process.

    Raises:
      PeerMissing: the others did not join.
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
            shutdown_timeout_seconds=300,  # for an orderly end only: process 0 may still be drawing and sampling
            coordinator_bind_address=environ.get("JAX_COORDINATOR_BIND_ADDRESS")
            or place.coordinator,  # else it listens on every network interface, unauthenticated
        )
    except Exception as error:
        raise PeerMissing(
            f"process {place.process} of {place.processes} ({place.starter}) found no coordinator at {place.coordinator} "
            f"within {config.start_timeout_seconds} s: {str(error).splitlines()[0]}; do all processes run, and can they reach "
            "that port?"
        ) from error
    return place


def _stop_without_parent(parent: int) -> None:
    """Make the run save and stop when the supervisor dies, instead of going on unwatched.

    A thread polls, because Linux's own signal for this (PR_SET_PDEATHSIG) comes once for each thread that the supervisor had.
    It sends SIGHUP, which never forces an immediate exit: the supervisor may have passed a signal on before it died.
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
    """Run `work` and end the process with its exit code; on an error at once, together with its peers.

    Args:
      joins: whether `work` is one of several processes if the environment says so.
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
    """End one of several processes, from any thread, such that jax's runtime aborts no peer."""
    code = _for_starter(code)
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    processes.leave()
    os._exit(code)


def blame(failure: processes.Failure) -> str:
    """Return the line that names the process that ended the run, and its reason."""
    return f"process {failure.process} of {processes.count()} ended the run (exit code {failure.code}): {failure.reason}"


def _end_together(code: int) -> int:
    """Wait for all processes at the end of a run without error; return the exit code.

    Process 0 may still upload to a mirror, which takes long; the watchdog checks that it is alive.
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
    """Join the peers just to tell them that this process refuses its command line or config."""
    with contextlib.suppress(Exception):  # the reason is printed; a peer that cannot be reached ends at its own time limit
        config = DistributedConfig(start_timeout_seconds=_JOIN_SECONDS)
        if find_place(config, os.environ) is not None:
            start(config)
            own = processes.announced()
            processes.announce(code, own.reason if own else "wrong usage of the command line; see its log")


def _for_starter(code: int) -> int:
    """Return the exit code for srun and mpirun, which end the other processes on any code but 0.

    The true code goes into JAXTRAIN_EXIT_CODES for their scripts; a stop then ends with 0, as peers may still be saving.
    """
    return EXIT_DONE if _leave_word(code) and code == EXIT_STOPPED else code


def _leave_word(code: object) -> bool:
    """Write this process's exit code into JAXTRAIN_EXIT_CODES, if set (srun and mpirun report only one); return whether it
    is.
    """
    folder = os.environ.get("JAXTRAIN_EXIT_CODES")
    if folder:
        with contextlib.suppress(OSError):
            return Path(folder, f"{socket.gethostname()}-{os.getpid()}").write_text(f"{code}\n", encoding="utf-8") > 0
    return False


def _blame(error: BaseException) -> int:
    """Print in one line which process failed, and tell the peers; a traceback precedes it if the error is unforeseen."""
    who, first = f"process {processes.own_index()} of {processes.count()}", (str(error).strip() or "no message").splitlines()[0]
    if type(error).__name__ in ("JaxRuntimeError", "XlaRuntimeError") and _PEER_WORDS.search(str(error)):
        failure = _reported()
        if failure is not None:  # the peer posted it before it ended
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
    with contextlib.suppress(Exception):  # the key-value store is gone
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
