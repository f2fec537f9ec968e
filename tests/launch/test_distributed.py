"""Who am I among the processes: one table of environments, as SLURM, Open MPI, Kubernetes and our supervisor make them."""

from dataclasses import astuple

import pytest

from jaxtrain.config import DistributedConfig
from jaxtrain.errors import ConfigError
from jaxtrain.launch.distributed import count_gpus, expand_tasks, find_place, first_node, local_device_ids

SLURM = {
    "SLURM_JOB_ID": "4097",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2)",
}
EIGHT = {"CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7"}
MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
OURS = {
    "JAXTRAIN_COORDINATOR": "a:1",
    "JAXTRAIN_PROCESSES": "2",
    "JAXTRAIN_PROCESS_ID": "1",
    "JAXTRAIN_STARTER": "the supervisor",
}


def place(environ, **flags):
    return find_place(DistributedConfig(**flags), environ)


def test_a_lone_process():
    assert place({}) is None
    assert place({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"}) is None
    assert place({"OMPI_COMM_WORLD_SIZE": "1"}) is None
    assert place({"JOB_COMPLETION_INDEX": "0"}) is None


@pytest.mark.parametrize(
    ("environ", "flags", "expected"),
    [
        (OURS, {}, ("the supervisor", "a:1", 2, 1, 1, 0, False)),
        ({}, {"coordinator": "b:2", "processes": 3, "process_id": 2}, ("flags", "b:2", 3, 2, 1, 0, False)),
        (OURS, {"coordinator": "b:2"}, ("the supervisor", "b:2", 2, 1, 1, 0, False)),
        (SLURM, {}, ("SLURM job 4097", "n1:61441", 4, 3, 2, 1, False)),
        (
            SLURM | {"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "4,5,6,7"},
            {},
            ("SLURM job 4097", "n1:61441", 4, 3, 2, 1, True),
        ),
        (SLURM, {"coordinator": "c:3"}, ("SLURM job 4097", "c:3", 4, 3, 2, 1, False)),
        (MPI, {}, ("Open MPI", "127.0.0.1:61440", 2, 1, 2, 1, False)),
        (
            MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.7,10.1.0.7:5;ud://1"},
            {},
            ("Open MPI", "10.0.0.7:61440", 2, 1, 1, 1, False),
        ),
        (
            {"JAXTRAIN_COORDINATOR": "job-0.svc:8476", "JAXTRAIN_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}
            | {"KUBERNETES_SERVICE_HOST": "x"},
            {},
            ("Kubernetes", "job-0.svc:8476", 4, 2, 1, 0, False),
        ),
    ],
)
def test_place(environ, flags, expected, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)  # as where it is not installed
    assert astuple(place(environ, **flags)) == expected


@pytest.mark.parametrize(
    ("environ", "flags", "words"),
    [
        ({}, {"coordinator": "a:1"}, "distributed.processes"),
        ({"JAXTRAIN_PROCESSES": "2"}, {}, "distributed.process_id"),
        (OURS | {"JAXTRAIN_PROCESS_ID": "2"}, {}, "process_id=2 is not below distributed.processes=2"),
        (OURS, {"coordinator": "nowhere"}, "must be host:port"),
        (OURS | {"JAXTRAIN_PROCESSES": "two"}, {}, "JAXTRAIN_PROCESSES='two'"),
        (MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, {}, "mpi4py"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "2x2"}, {}, "2(x3),1"),
    ],
)
def test_what_contradicts_itself_is_refused(environ, flags, words, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "mpi4py", None)
    with pytest.raises(ConfigError) as caught:
        place(environ, **flags)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("n[1-3,7],m2", "n1"), ("gpu[001-004]-ib,x", "gpu001-ib"), ("r[2-3]n[05,07]", "r2n05"), ("a,b", "a")],
)
def test_first_node(nodes, first):
    assert first_node(nodes) == first


def test_expand_tasks():
    assert expand_tasks("2(x3),1") == [2, 2, 2, 1]
    assert expand_tasks("8") == [8]


@pytest.mark.parametrize(
    ("changes", "gpus", "expected"),
    [
        ({}, 8, [4, 5, 6, 7]),  # two tasks on a node that both see eight GPUs
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_LOCALID": "0"}, 8, list(range(8))),  # one process drives the node
        ({"SLURM_GPUS_ON_NODE": "8", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, 4, [0, 1, 2, 3]),  # --gpus-per-task=4
        ({}, 1, [0]),
        ({}, 0, None),
        ({"JAXTRAIN_LOCAL_DEVICE_IDS": "2,5"}, 8, [2, 5]),
    ],
)
def test_every_process_gets_its_share_of_the_gpus(changes, gpus, expected):
    environ = SLURM | changes
    assert local_device_ids(place(environ), gpus, environ) == expected


def test_gpus_that_cannot_be_shared():
    with pytest.raises(ConfigError, match="3 GPUs cannot be shared by the 2 processes"):
        local_device_ids(place(SLURM), 3, SLURM)


def test_count_gpus():
    assert count_gpus(EIGHT) == 8
    assert count_gpus({"CUDA_VISIBLE_DEVICES": ""}) == 0
    assert count_gpus(EIGHT | {"JAX_PLATFORMS": "cpu"}) == 0
