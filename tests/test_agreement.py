"""What processes compare before the first step, and what they say of a difference; tests/launch has real processes."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest

from jaxtrain import agreement, processes
from jaxtrain.agreement import compare, compare_program, differences, first_difference, software_facts, xla_flags
from jaxtrain.config import Config
from jaxtrain.errors import EXIT_USAGE, PeerMissing, PeersDiffer
from tests.fake_store import run_as


def test_all_processes_name_the_one_that_differs(monkeypatch):
    facts = {"data fingerprint": "aa", "validation batches": 3, "sources": [1, 2]}
    odd = facts | {"data fingerprint": "bb", "validation batches": 4}
    errors = run_as(monkeypatch, 4, lambda p: compare("data", odd if p == 2 else facts, "share the files", 20.0))
    assert all(isinstance(error, PeersDiffer) and error.exit_code == EXIT_USAGE for error in errors)
    assert {str(error) for error in errors} == {
        "data fingerprint='bb' in process 2, but 'aa' in process 0; validation batches=4 in process 2, but 3 in process 0: "
        "share the files"
    }


def test_the_same_facts_pass(monkeypatch):
    assert run_as(monkeypatch, 3, lambda p: compare("config", agreement.config_facts(Config()), "", 20.0)) == [None] * 3


def test_who_does_not_come_is_named(monkeypatch):
    errors = run_as(monkeypatch, 4, lambda p: compare("data", {}, "", 0.05), absent=(1, 3))
    assert isinstance(errors[0], PeerMissing)
    assert "processes 1 and 3 of 4 did not come to 'same data' within 0 s" in str(errors[0])


def test_only_the_number_of_the_process_may_differ_in_the_config():
    mine = Config(distributed=dataclasses.replace(Config().distributed, process_id=1))
    assert agreement.config_facts(mine) == agreement.config_facts(Config())
    mine = dataclasses.replace(Config(), train=dataclasses.replace(Config().train, steps=7))
    lines = differences(agreement.config_facts(Config()), agreement.config_facts(mine), 3)
    assert lines == [f"train.steps=7 in process 3, but {Config().train.steps} in process 0"]


CHANGES = {
    "jax_enable_x64": lambda m: jax.enable_x64(True),
    "jax_threefry_partitionable": lambda m: jax.threefry_partitionable(False),
    "jax_default_matmul_precision": lambda m: jax.default_matmul_precision("bfloat16"),
    "jax_default_prng_impl": lambda m: jax.default_prng_impl("rbg"),
    "jax_numpy_rank_promotion": lambda m: jax.numpy_rank_promotion("warn"),
    "jax_numpy_dtype_promotion": lambda m: jax.numpy_dtype_promotion("strict"),
    "jax_debug_nans": lambda m: jax.debug_nans(True),
    "XLA_FLAGS": lambda m: m.setenv("XLA_FLAGS", "--xla_allow_excess_precision=false"),
    "NVIDIA_TF32_OVERRIDE": lambda m: m.setenv("NVIDIA_TF32_OVERRIDE", "0"),
    "NCCL_ALGO": lambda m: m.setenv("NCCL_ALGO", "ring"),
    "optax": lambda m: m.setattr(agreement, "version_of", lambda name: "9.9" if name == "optax" else real_version(name)),
    "python": lambda m: m.setattr(agreement.platform, "python_version_tuple", lambda: ("3", "9", "1")),
    agreement.CODE: lambda m: m.setattr(agreement, "code_digest", lambda: "0123abcd"),
}
real_version = agreement.version_of


@pytest.mark.parametrize("name", CHANGES)
def test_whatever_may_change_numbers_is_a_fact(monkeypatch, name):
    before = software_facts()
    context = CHANGES[name](monkeypatch)
    if context is None:
        after = software_facts()
    else:
        with context:
            after = software_facts()
    (line,) = differences(before, after, 1)
    assert line.startswith(f"{name}=")


@pytest.mark.parametrize("package", ["jax", "jaxlib", "flax", "optax", "numpy", "ml_dtypes", "orbax-checkpoint"])
def test_versions_are_facts(package):
    assert software_facts()[package] == real_version(package) != "not installed"


def test_flags_that_may_differ_are_no_facts():
    environ = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_b=1 --xla_dump_to=/a --xla_a=2 --xla_gpu_cache_dir=/b"
    }
    assert xla_flags(environ) == "--xla_a=2 --xla_b=1"
    assert xla_flags({}) == ""
    local = {"jax_num_cpu_devices", "jax_cuda_visible_devices", "jax_compilation_cache_dir", "jax_dump_ir_to"}
    assert not local & set(software_facts())


def test_another_program_is_named_by_its_first_line(monkeypatch):
    texts = [
        "func {\n  %c = constant 1\n  add\n}",
        "func {\n  %c_1 = constant 1\n  add\n}",
        "func {\n  %0 = constant 1\n  mul\n}",
    ]
    lowered = [SimpleNamespace(as_text=lambda text=text: text) for text in (texts[0], texts[0], texts[2])]
    errors = run_as(monkeypatch, 3, lambda p: compare_program("train step", lowered[p]))
    assert {str(error).partition(":")[0] for error in errors} == {
        "the lowered train step of process 2 of 3 is not that of process 0, first in line 3"
    }
    assert "'mul', but 'add' in process 0" in str(errors[0])
    assert run_as(monkeypatch, 3, lambda p: compare_program("train step", lowered[0])) == [None] * 3
    assert first_difference(texts[0], texts[2]).startswith("line 3:")  # not line 2, where only a name differs


def test_collectives_leave_no_keys_behind(monkeypatch):
    def work(process):
        for number in range(20):
            assert processes.from_first(number + process) == number
            assert processes.exchange_next(process) == [0, 1, 2]
        return len(processes._client().values)

    left = run_as(monkeypatch, 3, work)
    assert max(left) <= 10
