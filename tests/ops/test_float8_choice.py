"""Where auto takes float8: the break-even against the planner's roofline, and who is refused with what words."""

from dataclasses import replace

import pytest

from jaxtrain.config import Config, LoraConfig, ModelConfig, MoEConfig
from jaxtrain.hardware import find_chip
from jaxtrain.ops.float8_choice import QUANTISED_BYTES, REACHED, choose_matmuls, smallest_width, width_of
from jaxtrain.planner.roofline import CEILING, STREAM

WIDE = ModelConfig(embed_dim=4096, mlp_dim=14336, matmul_dtype="auto")
NARROW = replace(WIDE, embed_dim=512, mlp_dim=2048)
MIXTURE = MoEConfig(mlp_dim=14336)


def test_the_break_even_is_that_of_the_roofline():
    chip, m = find_chip("h100-sxm"), 10_000
    width = smallest_width(chip)
    assert width
    assert pytest.approx(CEILING / STREAM) == REACHED
    flops = 6 * m * width**2
    saved = flops / (CEILING * chip.peak_flops["bfloat16"]) - flops / (CEILING * chip.peak_flops["float8"])
    moved = sum(of_x + of_g for of_x, of_g in QUANTISED_BYTES.values()) * m * width
    assert saved == pytest.approx(moved / (STREAM * chip.memory_bandwidth))
    assert width_of(replace(WIDE, embed_dim=1000, mlp_dim=1000)) == 1000


@pytest.mark.parametrize(
    ("model", "chip", "chosen", "why"),
    [
        (WIDE, "h100-sxm", "float8", "float8 (matrices 6,372 wide in the mean, and h100-sxm gains from 1,592 on)"),
        (NARROW, "h100-sxm", "default", "bfloat16 (matrices 819 wide in the mean; h100-sxm gains from 1,592 on)"),
        (WIDE, "a100-80", "default", "bfloat16 (a100-80 has no float8 matmuls)"),
        (WIDE, "cpu", "default", "bfloat16 (cpu has no float8 matmuls)"),
        (replace(WIDE, dtype="float32"), "h200", "default", "float32 (model.dtype=float32)"),
        (replace(WIDE, moe=MIXTURE), "h200", "default", "bfloat16 (dropless experts gain nothing)"),
        (replace(WIDE, moe=replace(MIXTURE, dispatch="capacity")), "h200", "float8", "h200 gains from 1,111 on)"),
        (replace(NARROW, matmul_dtype="float8"), "h100-sxm", "float8", "float8"),
        (replace(NARROW, matmul_dtype="float8"), "cpu", "float8", "float8 (cpu has none: emulated)"),
        (replace(WIDE, matmul_dtype="default"), "h100-sxm", "default", ""),
    ],
)
def test_who_gets_float8(model: ModelConfig, chip: str, chosen: str, why: str):
    config, said = choose_matmuls(replace(Config(), model=model), find_chip(chip))
    assert config.model.matmul_dtype == chosen
    assert said.endswith(why)
    assert bool(said) == bool(why)


def test_auto_leaves_adapters_alone():
    config = replace(Config(), model=WIDE, lora=LoraConfig(rank=8))
    assert choose_matmuls(config, find_chip("h100-sxm"))[1] == "bfloat16 (with adapters)"
