"""Whether matmuls gain by float8 on a chip (`model.matmul_dtype=auto`)."""

from __future__ import annotations

from dataclasses import replace

from jaxtrain.config import Config, ModelConfig
from jaxtrain.hardware import Chip
from jaxtrain.parts import plugged

REACHED = 0.73 / 0.88
"""Share of its peak that a large matmul reaches, over the share of its bandwidth that a stream reaches (`planner.roofline`)."""
MARGIN = 1.5
"""How much wider than `smallest_width` matrices must be for auto: kernels take time to start, and no GPU has been measured."""
QUANTISED_BYTES = {"forward": (5, 0), "backward": (2, 6)}
"""Bytes for each number of a matmul's input, and of its result's gradient, to take the maximum (read 2), to quantise (read 2,
write 1), and in the backward to write both layouts that Hopper's kernels want (2; the input is made again and not read)."""


def width_of(model: ModelConfig) -> float:
    """Return the harmonic mean of the two widths of the MLP's matrices, or an expert's: 2 D F / (D + F)."""
    wide = model.moe.mlp_dim if model.moe else model.mlp_dim
    return 2 * model.embed_dim * wide / (model.embed_dim + wide)


def smallest_width(chip: Chip) -> float | None:
    """Return the width above which matmuls are faster in float8; None where the chip has none, or a figure is not known.

    Of m rows, the three products of a matrix [k, n] take 6 m k n / (R P) s at the peak P, and 6 m k n / (R P8) in float8. To
    quantise moves (7 k + 6 n) m bytes, about 6.5 (k + n) m, at bandwidth S W. So float8 gains where
    2 k n / (k + n) > 6.5 REACHED / (3 W (1 / P - 1 / P8)), whatever m. R / S is REACHED.
    """
    peak, in_float8, bandwidth = chip.peak("bfloat16"), chip.peak("float8"), chip.memory_bandwidth
    if not peak or not in_float8 or not bandwidth or in_float8 <= peak:
        return None
    moved = sum(map(sum, QUANTISED_BYTES.values())) / 2
    return moved * REACHED / (3 * bandwidth * (1 / peak - 1 / in_float8))


def choose_matmuls(config: Config, chip: Chip) -> tuple[Config, str]:
    """Return the config with `auto` decided for a chip, and in words the dtype of its matmuls and why; "" by default.

    The model's widths decide, not a device's share of them, so that no mesh changes what is computed.
    """
    model, smallest, width = config.model, smallest_width(chip), width_of(config.model)
    if model.matmul_dtype == "default":
        return config, ""
    if model.matmul_dtype == "float8":
        return config, "float8" if smallest else f"float8 ({chip.name} has none: emulated)"
    wanted = MARGIN * (smallest or 0)
    obstacle = {
        f"{chip.name} has no float8 matmuls": smallest is None,
        f"model.dtype={model.dtype}": model.dtype != "bfloat16",
        "with adapters": config.lora.rank > 0,
        "with layers plugged in": bool(plugged(model.parts)),
        "dropless experts gain nothing": model.moe is not None and model.moe.dispatch == "dropless",
        f"matrices {width:,.0f} wide in the mean; {chip.name} gains from {wanted:,.0f} on": width < wanted,
    }
    why = next((words for words, is_there in obstacle.items() if is_there), "")
    chosen = "default" if why else "float8"
    why = why or f"matrices {width:,.0f} wide in the mean, and {chip.name} gains from {wanted:,.0f} on"
    return replace(
        config, model=replace(model, matmul_dtype=chosen)
    ), f"{'float8' if chosen == 'float8' else model.dtype} ({why})"
