import dataclasses
import subprocess
import sys

import pytest

from jaxtrain.errors import ExplainedError
from jaxtrain.hardware import CHIPS, IDLE_SHARE, chip_of_device_kind, find_chip, predicted_watts, resolve_chip


@pytest.mark.parametrize(
    ("device_kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-sxm"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80"),
        ("TPU v5 lite", "tpu-v5e"),
        ("TPU v5p", "tpu-v5p"),
        ("TPU v6 lite", "tpu-v6e"),
        ("cpu", "cpu"),
    ],
)
def test_the_device_says_which_chip_it_is(device_kind, name):
    chip = chip_of_device_kind(device_kind)
    assert chip is not None
    assert chip.name == name


@pytest.mark.parametrize("device_kind", ["NVIDIA H200 MIG 1g.18gb", "NVIDIA GeForce RTX 4090 D", "Radeon"])
def test_a_slice_or_a_variant_is_not_the_whole_chip(device_kind):
    assert chip_of_device_kind(device_kind) is None
    unknown = resolve_chip("auto", device_kind)
    assert unknown.name == device_kind
    assert unknown.matmul_peak("bfloat16") is None


def test_device_kinds_are_unambiguous():
    kinds = [kind for chip in CHIPS.values() for kind in chip.device_kinds]
    assert len(kinds) == len(set(kinds))


@pytest.mark.parametrize("name", ["rtx-4090", "RTX 4090", "rtx_4090"])
def test_names_are_found_however_they_are_written(name):
    assert find_chip(name).name == "rtx-4090"


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ExplainedError, match="h100-smx.*did you mean 'h100-sxm'"):
        find_chip("h100-smx")
    with pytest.raises(ExplainedError, match="telemetry.hardware"):
        resolve_chip("abacus", "cpu")


def test_peaks_are_dense_and_per_dtype():
    h200 = find_chip("h200")
    assert h200.peak("bf16") == h200.peak("bfloat16") == 989.4e12
    assert h200.peak("float8") == 1978.9e12
    assert h200.peak("int4") is None
    assert h200.memory_bandwidth == 4.8e12


def test_float32_matmuls_are_held_to_the_unit_that_runs_them():
    assert find_chip("h100-sxm").matmul_peak("float32") == 494.7e12
    assert find_chip("tpu-v5e").matmul_peak("float32") == 197e12
    assert find_chip("cpu").matmul_peak("float32") is None


def test_figures_are_plausible():
    for chip in CHIPS.values():
        if chip.name == "cpu":
            continue
        peak = chip.peak("bfloat16")
        assert peak is not None
        assert 1e14 < peak < 5e15
        assert chip.memory_bytes is not None
        assert 16e9 <= chip.memory_bytes <= 200e9
        assert chip.memory_bandwidth is not None
        assert 50 < peak / chip.memory_bandwidth < 1000, f"{chip.name}: FLOPs per byte"
        assert chip.link_bandwidth is not None
        assert (chip.nic_bandwidth or 0) < chip.link_bandwidth < chip.memory_bandwidth


def test_reading_the_table_needs_no_jax():
    code = "import sys, jaxtrain.hardware; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_power_is_linear_between_waiting_and_working():
    h100 = find_chip("h100-sxm")
    assert predicted_watts(h100, 1.0) == 700
    assert predicted_watts(h100, 0.0) == pytest.approx(700 * IDLE_SHARE)
    assert predicted_watts(dataclasses.replace(h100, idle_watts=100.0), 0.5) == pytest.approx(400)
    assert predicted_watts(h100, 1.2) == 700
    assert predicted_watts(find_chip("tpu-v5p"), 1.0) is None


def test_every_chip_says_where_its_figures_are_from():
    for chip in CHIPS.values():
        assert chip.source
        assert chip.devices_per_host >= 1
        if chip.link_latency is not None:  # a step over the network is slower than one over the links of a host
            assert chip.nic_latency is not None
            assert 1e-6 < chip.link_latency < chip.nic_latency < 1e-4
