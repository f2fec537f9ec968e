"""Calibration: that each program does what it is timed for, and that times become shares of the right peaks."""

import dataclasses
import math
import time

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxtrain.errors import ExplainedError
from jaxtrain.hardware import CHIPS, Chip, CollectiveRate, load_chip
from jaxtrain.measure import calibration, operations
from jaxtrain.measure.operations import Findings, Sample, Stopwatch
from jaxtrain.verbs import calibrate

RATES = [
    CollectiveRate("link", "all-gather", 2, 200e9, 13e-6, 0.1),
    CollectiveRate("link", "all-gather", 8, 300e9, 31e-6, 0.1),
    CollectiveRate("link", "reduce-scatter", 8, 360e9, 31e-6, 0.1),
    CollectiveRate("nic", "all-gather", 2, 40e9, 20e-6, 0.1),
]
FOUND = Findings(
    matmul={"bfloat16": [(4096, Sample(2 * 4096**3 / 700e12, 0.02))], "float32": [(4096, Sample(2 * 4096**3 / 400e12, 0.02))]},
    copy=(2**31, Sample(2**31 / 4e12, 0.01)),
    attention=[(4096, "cudnn", Sample(operations.attention_flops(4096) / 450e12, 0.03))],
    collectives=RATES,
    watts=(110.0, 690.0),
)


@pytest.mark.parametrize("kind", operations.KINDS)
def test_the_timed_program_holds_the_collective(kind: str):
    """XLA sees no way to leave it out, and every device takes part."""
    mesh = operations.groups_of(jax.devices(), 4, "link")
    spec = PartitionSpec(("other", "group"))
    operation = operations.chain(operations.collective(kind, 4))
    program = jax.jit(jax.shard_map(operation, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jax.ShapeDtypeStruct((64,), "float32", sharding=NamedSharding(mesh, spec))
    text = program.lower(x).compile({"xla_backend_optimization_level": 0}).as_text()
    assert text.count(f" {kind}(") == operations.CHAINED


def test_the_timed_program_holds_every_matmul():
    program = jax.jit(operations.chain(lambda x: x @ x))
    text = program.lower(jax.ShapeDtypeStruct((64, 64), "float32")).compile().as_text()
    assert text.count(" dot(") == operations.CHAINED


def test_groups_are_neighbours_of_a_host_or_one_device_of_each():
    class Device:
        def __init__(self, host: int, number: int):
            self.where = host, number

    devices = [Device(host, number) for host in range(2) for number in range(4)]
    wheres = lambda mesh: [[device.where for device in group] for group in mesh]  # noqa: E731
    link = operations.groups_of(devices, 4, "link").devices
    nic = operations.groups_of(devices, 2, "nic").devices
    assert wheres(link) == [[(host, number) for number in range(4)] for host in range(2)]
    assert wheres(nic) == [[(host, number) for host in range(2)] for number in range(4)]


def test_tiny_measurements():
    started, watch = time.monotonic(), Stopwatch(0.001)
    [(edge, matmul)] = operations.measure_matmul(watch, "float32", largest=32)
    moved, copy = operations.measure_copy(watch, largest=2**12)
    mesh = operations.groups_of(jax.devices()[:2], 2, "link")
    rate = operations.measure_collective(watch, mesh, "link", "all-gather", largest=2**12)
    assert (edge, moved) == (32, 2**13)
    took = time.monotonic() - started  # of which one call is a part
    assert 0 < matmul.seconds < took
    assert 0 < copy.seconds < took
    assert rate.devices == 2
    assert 0 < rate.latency < took
    assert 0 < rate.bandwidth < 1e12


def test_latency_is_split_into_beginning_and_steps():
    assert operations.latencies(RATES, "link") == (pytest.approx(10e-6), pytest.approx(3e-6))
    assert operations.latencies(RATES, "nic") == (0.0, pytest.approx(20e-6))  # one size alone cannot tell
    assert operations.latencies(RATES[:1], "nic") is None


def test_a_known_chip_keeps_its_figures_and_gets_shares():
    chip = calibration.as_chip(CHIPS["h200"], FOUND)
    assert (chip.name, chip.target, chip.memory_bytes) == ("h200-measured", "h200", CHIPS["h200"].memory_bytes)
    assert chip.matmul_fraction("bfloat16", 4096, 4096, 4096) == pytest.approx(700 / 989.4)
    assert chip.matmul_fraction("float32", 4096, 4096, 4096) == pytest.approx(400 / 494.7)  # it runs in TF32
    assert chip.attention_fraction("bfloat16", 4096) == pytest.approx(450 / 989.4)
    assert chip.calibration is not None
    assert chip.calibration.memory == pytest.approx(4 / 4.8)
    assert chip.calibration.link == pytest.approx(330 / 450)
    assert chip.calibration.nic == pytest.approx(40 / 50)
    assert (chip.link_latency, chip.nic_latency) == (pytest.approx(3e-6), pytest.approx(20e-6))
    assert (chip.idle_watts, chip.watts) == (110.0, 700)


def test_an_unknown_device_takes_the_best_for_its_peak():
    unknown = Chip("abacus", ("abacus",), {}, memory_bytes=2**33)
    chip = calibration.as_chip(unknown, dataclasses.replace(FOUND, collectives=[], watts=None))
    assert chip.matmul_peak("bfloat16") == pytest.approx(700e12)
    assert chip.memory_bandwidth == pytest.approx(4e12)
    assert (chip.link_bandwidth, chip.link_latency, chip.idle_watts, chip.based_on) == (None, None, None, "")
    assert chip.calibration is not None
    assert (chip.calibration.memory, chip.calibration.link) == (pytest.approx(1.0), None)


def test_the_verb_writes_what_hardware_reads(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(operations, "measure_all", lambda watch, say: FOUND)
    output = tmp_path / "chip.json"
    assert calibrate.main(["--output", str(output), "--chip", "h200"]) == 0
    chip = load_chip(str(output))
    assert chip.calibration is not None
    assert chip.calibration.simulated  # 8 fake devices
    assert chip.calibration.collectives == tuple(RATES)
    assert math.isclose(chip.calibration.noise, 0.065)
    printed = capsys.readouterr().out
    assert "700 TFLOP/s" in printed
    assert "simulated" in printed
    assert f"--hardware={output}" in printed
    with pytest.raises(ExplainedError, match="there is a file already; give --overwrite to replace it"):
        calibrate.main(["--output", str(output), "--chip", "h200"])
    output.write_text("replaced")
    assert calibrate.main(["--output", str(output), "--chip", "h200", "--overwrite"]) == 0
    assert load_chip(str(output)) == chip


@pytest.mark.parametrize("flag", ["--output=chip.toml", "--output=no/folder/chip.json", "--seconds=0", "--chip=h201"])
def test_wrong_flags_are_explained_before_anything_is_measured(flag: str):
    with pytest.raises(ExplainedError, match=flag.partition("=")[0]):
        calibrate.main([flag])


@pytest.mark.slow
def test_everything_on_fake_devices(tmp_path):
    output = tmp_path / "chip.json"
    assert calibrate.main(["--output", str(output), "--seconds", "0.01"]) == 0
    chip = load_chip(str(output))
    assert chip.calibration is not None
    assert {rate.kind for rate in chip.calibration.collectives} == set(operations.KINDS)
    assert {rate.devices for rate in chip.calibration.collectives} == {2, 4, 8}
    assert chip.matmul_fraction("bfloat16", 256, 256, 256)
