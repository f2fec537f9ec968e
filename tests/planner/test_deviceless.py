"""Compiling for GPUs that are not there: what is refused with one message, and one compile in a process of its own."""

import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import types
from dataclasses import replace
from pathlib import Path

import pytest

from jaxtrain.config import (
    Config,
    DataConfig,
    LatentAttentionConfig,
    MeshConfig,
    ModelConfig,
    TrainConfig,
    to_json,
)
from jaxtrain.config.rules import validate
from jaxtrain.errors import ExplainedError
from jaxtrain.hardware import CHIPS
from jaxtrain.planner import deviceless
from jaxtrain.planner.deviceless import CompilerDied
from jaxtrain.planner.formulas import step_flops
from jaxtrain.planner.targets import TARGETS, find_target
from jaxtrain.program.hlo import matmul_flops

TINY = ModelConfig(num_layers=1, embed_dim=128, num_heads=2, num_kv_heads=2, head_dim=64, mlp_dim=256, vocab_size=256)


def tiny(devices: int = 2) -> Config:
    config = Config(
        model=TINY,
        data=DataConfig(sequence_length=128, mask_documents=False),
        train=TrainConfig(global_batch_size=devices),
        mesh=MeshConfig(fsdp=devices),
    )
    return validate(config, devices)


def test_targets_are_chips_of_their_memory():
    """Each target is a chip whose links are known, with its maker's memory: 80 GB is a bit more to the driver."""
    for name, target in TARGETS.items():
        assert CHIPS[name].link_bandwidth
        assert target.memory_bytes == pytest.approx(CHIPS[name].memory_bytes, rel=0.1)
        assert target.memory_bandwidth == pytest.approx(CHIPS[name].memory_bandwidth, rel=0.02)
        assert f"device_memory_size: {target.memory_bytes}\n" in target.text()
        assert "device_memory_size: 7\n" in target.text(7)


def test_a_chip_that_nothing_can_be_compiled_for():
    with pytest.raises(ExplainedError, match="--hardware=tpu-v5p: no program .* without having one; one of: a100-40"):
        find_target("tpu-v5p")


def test_without_the_plugin_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(deviceless, "PLUGINS", ("jax_plugins.not_installed",))
    for call in (deviceless.report, deviceless.report_in_subprocess):
        with pytest.raises(ExplainedError, match=r'not installed .* pip install "jaxtrain\[plan\]"'):
            call(tiny())


@pytest.mark.plan
def test_devices_fill_hosts():
    devices = deviceless.make_devices("h200", 16)
    assert [device.process_index for device in devices] == [0] * 8 + [1] * 8
    assert devices[0].device_kind == "NVIDIA H200"
    assert len(deviceless.make_devices("b200", 4)) == 4
    with pytest.raises(ExplainedError, match="12 devices do not fill hosts of 8; use a multiple of 8"):
        deviceless.make_devices("h100-sxm", 12)


@pytest.mark.plan
def test_a_report_from_a_process_of_its_own():
    """Arguments are the shards of the state and of the batch, to the byte; nothing needs cuDNN to be installed."""
    report = deviceless.report_in_subprocess(tiny())
    assert report.attention.startswith("cudnn: ")
    layer = 4 * 128 * 128 + 3 * 128 * 256
    # Scalars: the step, two counts of the optimizer, eight numbers of the rates.
    matrices, norms, scalars = layer + 2 * 256 * 128, 3 * 128, 11
    assert report.argument_bytes == 12 * (matrices // 2 + norms) + 4 * scalars + 3 * 4 * 128
    assert {(row.axes, row.kind, row.dtype) for row in report.rows} == {
        ("fsdp", "all-gather", "bf16"),
        ("fsdp", "reduce-scatter", "f32"),
        ("fsdp", "all-reduce", "f32"),
    }
    assert report.memory_bytes > report.argument_bytes > 0


@pytest.mark.plan
def test_further_microbatches_have_the_memory_of_the_first():
    """XLA unrolls loops of layers by two; of the loop over microbatches it would keep the activations of two."""
    config = replace(tiny(), model=replace(TINY, num_layers=4))
    rows = [replace(config.train, remat="dots", global_batch_size=64 * n, microbatches=n) for n in (1, 4)]
    one, four = (deviceless.report(validate(replace(config, train=train), 2)).temp_bytes for train in rows)
    assert four < 1.15 * one


@pytest.mark.plan
def test_attention_within_documents_is_fused_as_without_them():
    """Two heads of queries to one of keys, rows of 1024 tokens: calls for documents up to 1024 and 256, and the last again."""
    model = replace(TINY, num_kv_heads=1, num_layers=2)  # of one layer jaxlib 0.12 would compute nothing again
    config = replace(tiny(1), model=model, data=DataConfig(sequence_length=1024))
    compiled, _, attention = deviceless.compile_for(validate(config, 1))
    text = compiled.as_text()
    assert attention.startswith("cudnn: ")
    assert text.count('custom_call_target="__cudnn$fmhaSoftmaxBackward"') == 3 * model.num_layers
    assert set(re.findall(r'"max_seg_per_batch": ?(\d+)', text)) == {"4"}
    assert not re.search(r"\[(\d+,)*1024,1024\]", text)
    assert matmul_flops(text) == pytest.approx(step_flops(config, "cudnn"), rel=1e-6)  # of the first calls alone


@pytest.mark.plan
def test_matmuls_in_float8_are_those_of_cublas():
    """All products of the layers' matrices, with float8 operands; others only for the head. As many FLOPs as in bfloat16.

    XLA joins what reads one input. Of each layer: 4 products forward (queries to values, output, gate and up, down), 3 of them
    again in the backward pass, 4 for dW and 7 for dx. dW of down, of the widest input, comes before what follows it backward.
    """
    model = replace(TINY, num_layers=2, matmul_dtype="float8")  # of one layer jaxlib 0.12 would compute nothing again
    config = replace(tiny(1), model=model)
    text = deviceless.compile_for(validate(config, 1))[0].as_text()
    calls = re.findall(r' = \(?(\w+)\[.*custom_call_target="(__cublas[^"]*)".*op_name="([^"]*)"', text)
    in_float8 = [name for _, target, name in calls if target.endswith("$f8")]
    assert len(in_float8) == 18 * model.num_layers
    first = [
        next(i for i, name in enumerate(in_float8) if f"/{equation}/" in name) for equation in ("BLF,BLD->FD", "BLF,DF->BLD")
    ]
    assert first == sorted(first)
    assert all("jvp(loss)" in name for _, target, name in calls if not target.endswith("$f8"))
    assert not re.search(r" dot\(", text)
    assert matmul_flops(text) == pytest.approx(step_flops(config, "cudnn"), rel=1e-6)


@pytest.mark.plan
@pytest.mark.slow
def test_latent_attention_is_compiled_for_cudnn():
    """Heads of 192 (128 and 64 for RoPE) with values of 128, as in DeepSeek-V3: on Hopper, no GPU or libcudnn being here."""
    latent = LatentAttentionConfig(query_rank=64, kv_rank=64, rope_dim=64, value_dim=128)
    config = replace(tiny(), model=replace(TINY, embed_dim=256, head_dim=128, latent_attention=latent))
    compiled, _, attention = deviceless.compile_for(validate(config, 2))
    assert attention.startswith("cudnn: ")
    assert "head_dim 192" in attention
    assert "__cudnn$fmhaSoftmaxBackward" in compiled.as_text()


NO_LIBDEVICE = (
    "I0001 hello\nW1128 17:23:30.316900 2903 x.cc:41] Can't find libdevice\nSearched for CUDA in:\n  /usr\nYou can choose"
)


@pytest.mark.parametrize(
    ("said", "cause"),
    [
        ("first\nFloating point exception\n", "Floating point exception"),
        (NO_LIBDEVICE, "Can't find libdevice"),
        (f"{NO_LIBDEVICE}\nF1128 fatal", "F1128 fatal"),
    ],
)
def test_the_process_may_die(monkeypatch: pytest.MonkeyPatch, said: str, cause: str):
    """As XLA does where a target is described wrongly; the cause is its first complaint, or its last line."""
    died = subprocess.CompletedProcess([], -8, stdout="", stderr=said)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: died)
    with pytest.raises(CompilerDied, match=f"^compiling for h200 ended with SIGFPE: (.* )?{cause}$"):
        deviceless.ask("", "compiling for h200")


@pytest.mark.parametrize(("jaxlib", "works"), [("0.10.2", True), ("0.11.1", False), ("0.12.0.1", False), ("1.0", False)])
def test_a_jaxlib_that_needs_ptxas_is_not_started_without(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, jaxlib: str, works: bool
):
    """It would end by SIGSEGV. Once ptxas is on the PATH, in a toolkit or in a package, it may start."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: jaxlib)
    find = importlib.util.find_spec
    packages = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "nvidia")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: packages if name == "nvidia" else find("json"))
    monkeypatch.setattr(deviceless, "CUDA_TOOLKITS", (str(tmp_path / "cuda"),))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    obstacle = deviceless.find_obstacle()
    assert (obstacle is None) == works
    assert works or f"(jaxlib {jaxlib}) needs ptxas and libdevice: pip install nvidia-cuda-nvcc-cu12" in str(obstacle)
    for place in ("nvidia/cuda_nvcc/bin", "cuda/bin", "path"):
        ptxas = tmp_path / place / "ptxas"
        ptxas.parent.mkdir(parents=True)
        ptxas.touch(0o755)
        assert deviceless.find_obstacle() is None
        ptxas.unlink()


def test_what_the_process_explains_is_passed_on():
    """The process answers in JSON whatever goes wrong that has an explanation: no plugin, or no such target."""
    request = json.dumps([to_json(tiny()), "tpu-v5p"])
    done = subprocess.run(
        [sys.executable, "-m", "jaxtrain.planner.deviceless"], input=request, capture_output=True, text=True, check=True
    )
    said = json.loads(done.stdout.strip().removeprefix("jaxtrain-answer:"))
    assert list(said) == ["error"]
    assert ("--hardware=tpu-v5p" if deviceless.has_plugin() else "not installed") in said["error"]
