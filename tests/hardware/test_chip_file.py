import dataclasses
import json

import pytest

from jaxtrain.errors import ExplainedError
from jaxtrain.hardware import Calibration, CollectiveRate, Rate, find_chip, load_chip, resolve_chip, write_chip


def test_a_file_says_what_differs_from_a_known_chip(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('name = "mine"\nbased_on = "h100-sxm"\nnic_bandwidth = 12.5e9\npeak_flops = {fp8 = 1.5e15}\n')
    mine, h100 = load_chip(str(path)), find_chip("h100-sxm")
    assert (mine.name, mine.nic_bandwidth, mine.peak("float8")) == ("mine", 12.5e9, 1.5e15)
    assert (mine.peak("bfloat16"), mine.memory_bytes, mine.watts) == (h100.peak("bfloat16"), h100.memory_bytes, h100.watts)
    assert (mine.target, h100.target) == ("h100-sxm", "h100-sxm")
    assert resolve_chip(str(path), "anything").peak("fp8") == 1.5e15


def test_a_new_chip_needs_no_known_one(tmp_path):
    path = tmp_path / "new.json"
    path.write_text(json.dumps({"name": "new", "peak_flops": {"bf16": 1e15}, "memory_bytes": 96e9}))
    new = load_chip(str(path))
    assert (new.peak("bfloat16"), new.memory_bytes, new.watts) == (1e15, 96_000_000_000, None)
    assert isinstance(new.memory_bytes, int)


def test_what_is_written_is_read_again(tmp_path):
    calibration = Calibration(
        matmul=(Rate("bfloat16", 4096, 0.7, 0.01),),
        memory=0.9,
        collectives=(CollectiveRate("link", "all-gather", 8, 3e11, 2e-5),),
        simulated=True,
    )
    chip = dataclasses.replace(find_chip("h200"), name="measured", based_on="h200", calibration=calibration, idle_watts=120.0)
    write_chip(tmp_path / "deep" / "measured.json", chip)
    assert load_chip(str(tmp_path / "deep" / "measured.json")) == chip


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"name": "x", "peak_flops": {"bfloat16": 989}}', ["peak_flops.bfloat16=989", "FLOP/s", "989e12"]),
        ('{"name": "x", "memory_bytes": 80}', ["memory_bytes=80", "80e9"]),
        ('{"name": "x", "memory_byte": 8e10}', ["memory_byte", "did you mean 'memory_bytes'"]),
        ('{"name": "x", "memory_bandwidth": "fast"}', ["memory_bandwidth='fast'", "bytes/s"]),
        ('{"name": "x", "watts": NaN}', ["watts=nan"]),
        ('{"name": "x", "devices_per_host": 0.5}', ["devices_per_host=0.5", "whole number"]),
        ('{"name": "x", "peak_flops": {"int4": 1e15}}', ["peak_flops.int4", "bfloat16"]),
        ('{"name": "x", "based_on": "h100"}', ["based_on='h100'", "h100-sxm"]),
        ('{"watts": 700}', ["name", "based on"]),
        (
            '{"name": "x", "calibration": {"matmul": [{"dtype": "bfloat16", "size": 64}]}}',
            ["calibration", "matmul[0]", "fraction"],
        ),
        ('{"name": "x", "calibration": {"matmul": [{"dtype": "half", "size": 64, "fraction": 0.5}]}}', ["'half'", "float16"]),
        ('{"name": "x", "calibration": {"memory": 3000e9}}', ["calibration: memory", "share"]),
        ("[1]", ["list", "one chip"]),
        ("{", ["JSON"]),
    ],
)
def test_a_wrong_file_is_explained(tmp_path, text, words):
    path = tmp_path / "chip.json"
    path.write_text(text)
    with pytest.raises(ExplainedError) as caught:
        load_chip(str(path))
    assert all(word in str(caught.value) for word in ["--hardware", "chip.json", *words]), caught.value


def test_a_missing_file_names_the_verb_that_writes_one(tmp_path):
    with pytest.raises(ExplainedError, match=r"--hardware=.*none.toml.*jaxtrain calibrate"):
        load_chip(str(tmp_path / "none.toml"))


def test_measured_fractions_are_interpolated_over_sizes():
    rates = (Rate("bfloat16", 1024, 0.4), Rate("bfloat16", 4096, 0.8), Rate("float32", 1024, 0.1))
    chip = dataclasses.replace(find_chip("h100-sxm"), calibration=Calibration(matmul=rates))
    assert chip.matmul_fraction("bf16", 2048, 2048, 2048) == pytest.approx(0.6)
    assert chip.matmul_fraction("bf16", 1024, 1024, 8192) == pytest.approx(0.6)  # as many FLOPs as the cube above
    assert chip.matmul_fraction("bf16", 16, 16, 16) == pytest.approx(0.4)
    assert chip.matmul_fraction("bf16", 9999, 9999, 9999) == pytest.approx(0.8)
    assert chip.matmul_fraction("float8", 64, 64, 64) is None
    assert find_chip("h100-sxm").matmul_fraction("bf16", 64, 64, 64) is None
