"""Preflight: what is right passes, and of each check one fault is named, with the process and the device."""

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import fsspec
import jax
import numpy as np
import pytest

from jaxtrain.checkpoint.fast import _own_shards
from jaxtrain.command import parse_config
from jaxtrain.config import MeshConfig, MoEConfig
from jaxtrain.config.rules import validate
from jaxtrain.errors import ConfigError, ExplainedError
from jaxtrain.mesh import make_mesh
from jaxtrain.models.decoder import parameter_dims
from jaxtrain.ops import attention_packed, expert_dispatch
from jaxtrain.ops.expert_dispatch import ExpertBackend
from jaxtrain.preflight import attention, copies, devices, experts, float8, folders, hosts, links
from jaxtrain.preflight.checks import Check, Site, carry_out, limited, odd_ones
from jaxtrain.train.optimizer import make_optimizer
from jaxtrain.train.state import create_state
from jaxtrain.verbs.preflight import main
from tests.launch.processes import ROOT, environment, started
from tests.ops.packed_kernel import instead_of_cudnn

FLAGS = (
    "--config=configs/quickstart.py --model.num_layers=2 --model.embed_dim=32 --model.num_heads=2 --model.num_kv_heads=2 "
    "--model.head_dim=16 --model.mlp_dim=64 --model.vocab_size=257 --data.tokenizer=byte --data.sources.0.kind=synthetic "
    "--data.sequence_length=32 --train.global_batch_size=8"
).split()


@pytest.fixture
def site(tmp_path):
    """Eight devices, data=2 x fsdp=2 x tensor=2, in a folder that is not there yet."""
    flags = [*FLAGS, "--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2", f"--run_dir={tmp_path / 'runs' / 'one'}"]
    config = validate(parse_config(flags), 8)
    made = Site(config, ["here"], make_mesh(config.mesh))
    with made.closing:
        yield made


def found(checks, site):
    """[(check, state, words)] of checks that are carried out one after the other."""
    return [(f.check, f.state, f.words) for check in checks for f in carry_out(check, site, 30.0)]


def optimizer_of(config):
    return make_optimizer(config.optimizer, config.train.steps, parameter_dims(config.model))


def states(checks, site):
    return {check: state for check, state, _ in found(checks, site)}


# ---------------------------------------------------------------------------------------------------------------------
# One process


def test_what_is_right_passes_and_leaves_nothing_behind(tmp_path, tmp_path_factory, capsys):
    memory = tmp_path_factory.mktemp("memory")
    flags = [*FLAGS, "--mesh.fsdp=8", f"--run_dir={tmp_path / 'runs' / 'one'}", "--checkpoint.fast_every=5"]
    flags += [f"--checkpoint.fast_dir={memory}", "--checkpoint.mirror=memory://preflight"]
    started = time.monotonic()
    assert main([*flags, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    names = [
        "software",
        "config",
        "clocks",
        "folders",
        "folders",
        "shared folder",
        "disk",
        "snapshots",
        "mirror",
        "matmul",
        "memory",
        "axis fsdp",
        "data",
    ]
    assert [finding["check"] for finding in said["findings"]] == names
    assert {finding["state"] for finding in said["findings"]} <= {"ok", "warning"}  # slow, on a busy machine
    assert said["good"]
    assert 0 < said["seconds"] < time.monotonic() - started
    rates = said["findings"][11]["values"]["gigabytes_per_second"]
    assert set(rates) == {"all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"}
    assert all(0 < rate < 1e3 for rate in rates.values())
    assert list(tmp_path.iterdir()) == list(memory.iterdir()) == fsspec.filesystem("memory").find("preflight") == []


def test_a_failure_is_a_table_for_a_person_and_exit_code_1(tmp_path, capsys):
    """A folder that cannot be written, and data that is not there; what follows a failure of its kind is skipped."""
    (tmp_path / "file").write_text("")
    flags = [f"--run_dir={tmp_path / 'file' / 'run'}", "--data.sources.0.kind=text", "--data.sources.0.path=none/*.txt"]
    assert main([*FLAGS, "--mesh.data=8", *flags]) == 1
    printed = capsys.readouterr()
    table = " ".join(printed.out.replace("│", " ").split())  # how its lines break depends on the folder's name
    assert "Not a directory" in table
    assert "give another --run_dir" in table
    assert "skipped" in table
    assert "none/*.txt" in table
    assert "this run would fail: data, folders" in table
    assert "error: this run would fail: data, folders" in printed.err


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--patience=0"], "--patience=0"),
        (["--patience=nan"], "--patience=nan"),
        (["--mesh.tensor=3"], "tensor=3"),
        (["--config=configs/none.py"], "no such file"),
    ],
)
def test_wrong_usage_is_explained(flags, words, tmp_path):
    with pytest.raises(ExplainedError, match=words):
        main([*(FLAGS if "config" not in flags[0] else []), *flags, f"--run_dir={tmp_path}"])


def test_a_device_that_multiplies_wrongly_is_named(site, monkeypatch):
    right, wrong = devices.product_on, np.zeros((128, 128), np.float32)
    wrong[3, 4] = 1
    check = devices.checks()[0]
    assert "failed" not in states([check], site).values()
    monkeypatch.setattr(devices, "product_on", lambda device, a, b: right(device, a, b) + (device.id == 5) * wrong)
    (line,) = [words for _, state, words in found([check], site) if state == "failed"]
    assert line.startswith("device 5 of this process computes wrongly: 1 of 16384 numbers in bfloat16, [3, 4] is ")


def test_devices_whose_long_runs_differ_or_are_slow_are_named(site):
    row = {"kind": "chip", "platform": "gpu", "edge": 4096, "wrong": "", "seconds": 1e-3, "sums": [5] * 3}
    seen = [[row | {"device": i} for i in range(8)]]
    assert [f.state for f in devices.judge_devices(site, seen)] == ["ok"]
    seen[0][2] |= {"sums": [5, 5, 6]}
    seen[0][3] |= {"sums": [9, 9, 9]}
    seen[0][4] |= {"seconds": 1.3e-3}
    seen[0][6] |= {"kind": "other chip"}
    words = [(f.state, f.words) for f in devices.judge_devices(site, seen)]
    assert words == [
        (
            "failed",
            "device 2 of this process computes wrongly: 3 runs of the same 8 matmuls of edge 4096 came to 2 different results",
        ),
        (
            "failed",
            "device 3 of this process computes wrongly: 8 matmuls of edge 4096 in a row come to 00000009, elsewhere 00000005",
        ),
        ("warning", "device 6 of this process is a other chip, most are chip"),
        ("warning", "device 4 of this process is slow: 1.3 ms a matmul, 1.3 times the median"),
    ]


@pytest.mark.parametrize("kind", ["all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute"])
def test_a_collective_that_comes_out_wrong_is_named(site, monkeypatch, kind):
    """On the second device of each group along tensor, and nowhere else."""
    real = links.collectives

    def operations(size):
        operation = real(size)[kind]
        return {kind: lambda x: operation(x) + (jax.lax.axis_index("group") == 1)}

    check = links.checks(site)[2]
    assert check.name == "axis tensor"
    monkeypatch.setattr(links, "collectives", lambda size: {kind: real(size)[kind]})
    assert states([check], site) == {"axis tensor": "ok"}
    monkeypatch.setattr(links, "collectives", operations)
    lines = [words for _, state, words in found([check], site) if state == "failed"]
    assert [line.partition(":")[0] for line in lines] == [
        f"device {i} of this process got wrong numbers of {kind} over devices {i - 1}, {i}" for i in (1, 3, 5, 7)
    ]


def test_a_link_that_is_far_below_its_figure_is_a_warning(site, monkeypatch):
    monkeypatch.setattr(links, "_link", lambda site, axis: (450e9, "link"))
    seen = [
        {"all-reduce": {"sent_bytes": 1e9, "seconds": 1e-2, "wrong": {}}},
        {"all-reduce": {"sent_bytes": 1e9, "seconds": 1 / 3, "wrong": {}}},
    ]
    (one,) = links.judge_along("data", site, seen[:1])
    assert one.state == "warning"
    (one,) = links.judge_along("data", site, [seen[0] | {"all-reduce": {"sent_bytes": 1e9, "seconds": 1 / 300, "wrong": {}}}])
    assert (one.state, one.words) == ("ok", "right; all-reduce 300 GB/s a device (the link: 450)")
    (one,) = links.judge_along("data", site, seen)
    assert "slow: all-reduce 3 GB/s" in one.words


def test_too_little_disk_fails(site, monkeypatch):
    size = folders.checkpoint_bytes(site)
    monkeypatch.setattr(folders.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2 * size}))
    check = folders.checks()[2]
    ((_, state, words),) = found([check], site)  # of two steps of the quickstart
    assert state == "ok", words
    monkeypatch.setattr(site, "config", parse_config([*FLAGS, "--checkpoint.every=10", f"--run_dir={site.config.run_dir}"]))
    site.config = validate(site.config, 8)
    ((_, state, words),) = found([check], site)
    assert state == "failed"
    assert "4 more checkpoints of" in words
    assert "--checkpoint.keep" in words


@pytest.mark.parametrize(
    ("flags", "present", "more"),
    [
        (["--train.steps=100", "--checkpoint.every=10", "--checkpoint.keep=3"], 0, 4),
        (["--train.steps=100", "--checkpoint.every=10", "--checkpoint.keep=3"], 3, 1),
        (["--train.steps=100", "--checkpoint.every=60", "--checkpoint.keep=3"], 0, 2),
        (["--train.steps=100", "--checkpoint.every=10", "--checkpoint.keep=2", "--checkpoint.keep_every=25"], 0, 7),
    ],
)
def test_how_many_checkpoints_are_still_to_come(flags, present, more):
    assert folders.checkpoints_to_come(parse_config([*FLAGS, *flags]), present) == more


def with_checkpoint(site, **fields):
    site.config = replace(site.config, checkpoint=replace(site.config.checkpoint, **fields))
    return copies.checks(site.config)


def test_snapshots_without_a_place_or_room_are_a_warning(site, tmp_path, monkeypatch):
    one = copies.snapshot_bytes(site)
    assert one == sum(
        shard.data.nbytes for shard in _own_shards(create_state(site.config, site.mesh, optimizer_of(site.config)))
    )
    ((_, state, words),) = found(with_checkpoint(site, fast_every=5, fast_dir=str(tmp_path / "none")), site)
    assert (state, "none: No such file or directory; give another --checkpoint.fast_dir" in words) == ("warning", True)
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda path: SimpleNamespace(free=3 * one - 1))
    ((_, state, words),) = found(with_checkpoint(site, fast_every=5, fast_dir=str(tmp_path)), site)
    assert (state, "on here" in words) == ("warning", True)
    site.hosts = ["a", "a", "b"]
    seen = [{"problem": "", "free": 100, "needed": need} for need in (60, 30, 101)]
    assert [finding.state for finding in copies.judge_snapshots(site, seen)] == ["ok", "warning"]


def test_a_mirror_that_cannot_be_written_fails(site, monkeypatch):
    ((_, state, words),) = found(with_checkpoint(site, mirror="file:///proc/nothing"), site)
    assert (state, "mirror='file:///proc/nothing' cannot be written" in words) == ("failed", True)
    monkeypatch.setattr(copies.Mirror, "probe", lambda *_: None)
    ((_, state, words),) = found(with_checkpoint(site, mirror="memory://x"), site)
    assert (state, words.startswith("memory://x: 1.00 MiB written")) == ("ok", True)


def test_fused_attention_that_computes_wrongly_is_named(site, monkeypatch):
    """By the kernels of packed_kernel.py, right and with keys' offsets counted in heads of queries, as JAX once did."""
    monkeypatch.setattr(attention, "choose_attention", lambda *_: ("cudnn", ""))
    monkeypatch.setattr(attention, "LENGTH", 64)
    model = replace(site.config.model, num_heads=4, num_kv_heads=2, head_dim=8, dtype="float32")
    site.config = replace(site.config, model=model)
    instead_of_cudnn(monkeypatch)
    assert attention.checks(site)
    ((_, state, words),) = found(attention.checks(site), site)
    assert (state, words) == ("ok", "cudnn is within 0.00% of the formula, gradients too")
    packed = attention_packed._packed
    wrong = lambda runs, x: packed(runs, jax.numpy.concatenate([x] * (4 // x.shape[2]), axis=2))  # noqa: E731
    monkeypatch.setattr(attention_packed, "_packed", wrong)
    ((_, state, words),) = found(attention.checks(site), site)
    assert state == "failed"
    assert words.startswith("attention by cudnn computes wrongly on this process: dK is not finite; use --model")


def test_a_float8_matmul_that_computes_wrongly_is_named(site, monkeypatch):
    """By the products that a CPU emulates, right, and with the scale of one gradient left out."""
    assert float8.checks(site) == []
    site.config = replace(site.config, model=replace(site.config.model, matmul_dtype="float8", dtype="bfloat16"))
    ((_, state, words),) = found(float8.checks(site), site)
    assert state == "ok"
    assert words.startswith("a matmul is within 0.")
    multiply = float8.multiply
    wrong = lambda e, x, w: multiply(e, x, replace(w, scale=2 * w.scale))  # noqa: E731
    monkeypatch.setattr(float8, "multiply", wrong)
    ((_, state, words),) = found(float8.checks(site), site)
    assert state == "failed"
    assert "a float8 matmul computes wrongly on this process: the output is off by 100%; use --model.matmul" in words


def test_an_exchange_that_computes_wrongly_is_named(site, monkeypatch):
    """Of a mixture on expert=2: as if devices had `ragged_all_to_all`, right, and with a row of NaN on the way back."""
    mesh = MeshConfig(fsdp=2, expert=2, tensor=2)
    moe = MoEConfig(num_experts=4, mlp_dim=16)
    site.config = replace(site.config, mesh=mesh, model=replace(site.config.model, moe=moe, dtype="float32"))
    site.mesh = make_mesh(mesh)
    assert experts.checks(site) == []  # a CPU has but the padded exchange
    monkeypatch.setattr(experts, "choose_expert_backend", lambda _: ExpertBackend(ragged=True, tile=1))
    given, rooms = expert_dispatch._exchange, set()

    def right(length, room, ragged, rows, plan):
        rooms.add(length)
        return given(length, room, False, rows, plan)

    monkeypatch.setattr(expert_dispatch, "_exchange", right)
    ((_, state, words),) = found(experts.checks(site), site)
    assert (state, words) == ("ok", "the exchange is within 0.00% of a padded one, gradients too")

    def wrong(length, room, ragged, rows, plan):
        made = given(length, room, False, rows, plan)
        return made.at[0].set(jax.numpy.nan) if ragged and length == min(rooms) else made

    monkeypatch.setattr(expert_dispatch, "_exchange", wrong)
    ((_, state, words),) = found(experts.checks(site), site)
    assert state == "failed"
    assert re.search(r"the gradient of [\w ]+ is not finite", words)


def test_memory_that_does_not_suffice_fails(site, monkeypatch):
    check = devices.checks()[1]
    assert states([check], site) == {"memory": "ok"}
    monkeypatch.setattr(devices, "available_bytes", lambda: 800_000)
    ((_, state, words),) = found([check], site)
    assert state == "failed"
    assert "of 97.7 KiB" in words
    assert "mesh.fsdp" in words


def test_host_memory_is_shared_by_the_processes_of_a_host(site):
    site.hosts = ["a", "a", "b"]
    facts = [{"bytes": 10e9, "devices": 2, "of_host": True}] * 3
    (one,) = devices.judge_memory(site, facts)
    assert one.values["device_bytes"] == [5e9, 5e9, 10e9]


def test_a_clock_that_is_off_is_named(site):
    site.hosts = ["a", "b", "c"]
    late = [[0.0, 1.0, 2.0], [0.01, 1.02, 2.0], [97.0, 98.0, 102.0]]
    (one,) = hosts.judge_clocks(site, late)
    assert (one.state, one.words) == ("warning", "process 2 on c is 97.0 s ahead of the median; let NTP or chrony set it")
    (one,) = hosts.judge_clocks(site, [late[0], late[1], [0.0, 5.0, 2.0]])  # one word that came late is no late clock
    assert one.state == "ok"


def test_what_raises_or_hangs_is_a_finding(site, capsys, monkeypatch):
    def look(site):
        raise ConfigError(["no"])

    ((_, state, words),) = found([Check("it", look, lambda site, seen: [])], site)
    assert (state, "no" in words) == ("failed", True)
    ended = []
    monkeypatch.setattr("jaxtrain.preflight.checks.os._exit", ended.append)
    with limited("a look", -14.9):
        until = time.monotonic() + 60
        while not ended and time.monotonic() < until:
            time.sleep(0.01)
    assert ended == [70]
    assert "'a look'" in capsys.readouterr().err


def test_the_odd_ones_are_those_that_say_what_fewer_say():
    assert odd_ones(["a", "b", "b"]) == ("b", {0: "a"})
    assert odd_ones(["a", "b"]) == ("a", {1: "b"})
    assert odd_ones([[1]]) == ([1], {})


def test_the_driver_is_read_from_the_kernel(tmp_path):
    file = tmp_path / "version"
    assert hosts.nvidia_driver(file) == "none"
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n")
    assert hosts.nvidia_driver(file) == "550.54.15"
    file.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n")
    assert hosts.nvidia_driver(file) == "570.86.10"


# ---------------------------------------------------------------------------------------------------------------------
# Two processes


def run_two(tmp_path: Path, faults: str, own=((), ())) -> tuple[list[int], dict]:
    """(exit codes, what process 0 said as JSON) of two processes, of which the second has these faults."""
    flags = [*FLAGS, "--mesh.data=2", "--mesh.fsdp=2", f"--run_dir={tmp_path / 'run'}", "--json"]
    more = {"PREFLIGHT_FAULTS": faults}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in more.items():
            patch.setenv(name, value)
        with started(2, 2, flags, tmp_path, own, module="tests.preflight.faulty") as both:
            codes = [process.wait(200) for process in both]
    lines = [line for line in (tmp_path / "0.log").read_text().splitlines() if line.startswith("{")]
    assert lines, (tmp_path / "0.log").read_text()[-2000:] + (tmp_path / "1.log").read_text()[-2000:]
    return codes, json.loads(lines[0])


def test_every_fault_of_the_second_process_is_named(tmp_path):
    codes, said = run_two(tmp_path, "clock,folder,multiplier,slow,link,tokens")
    assert codes == [1, 1]
    words = {f["check"]: [] for f in said["findings"]}
    for finding in said["findings"]:
        words[finding["check"]] += [f"{finding['state']}: {finding['words']}"]
    assert "s apart" in words["clocks"][0]
    assert words["shared folder"][0].startswith("failed: process 0 on ")
    assert "what process 1 on" in words["shared folder"][0]
    assert words["matmul"][0].startswith("failed: device 2049 of process 1 on ")
    assert any("of process 1" in line and "slow" in line for line in words["matmul"])
    assert not any("device 0 " in line or "device 1 " in line for line in words["matmul"] + words["axis fsdp"])
    assert words["axis fsdp"][0].startswith("failed: device 2048 of process 1 on")
    assert "all-reduce over devices 2048, 2049" in words["axis fsdp"][0]
    assert words["data"][0].startswith("failed: process 1 on ")
    assert list((tmp_path).glob("run/**/.preflight*")) == []


def test_other_software_and_another_config_are_named_and_end_the_checks(tmp_path):
    codes, said = run_two(tmp_path, "version", ([], ["--train.steps=7"]))
    assert codes == [1, 1]
    first, second, third = said["findings"]
    assert "flax '0.1.2' in process 1 on" in first["words"]
    assert second["words"] == "train.steps=7 in process 1, but 500 in process 0"
    assert (third["check"], third["state"]) == ("all else", "skipped")


def test_the_launcher_runs_it(tmp_path):
    flags = [*FLAGS, "--mesh.data=2", f"--run_dir={tmp_path / 'run'}", "--json"]
    launch = ["launch", "--processes=2", "--devices_per_process=1", "--preflight", "--"]
    command = [sys.executable, "-m", "jaxtrain", *launch, *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment(1), capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["good"]
    assert "supervisor done" in done.stderr
    assert not (tmp_path / "run").exists()
