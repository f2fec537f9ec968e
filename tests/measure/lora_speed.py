"""Time a step with adapters beside full fine-tuning, ours and that of torch with peft, in turns on one CPU.

    python -m tests.measure.lora_speed [WIDTH LAYERS LENGTH ROWS VOCABULARY]

Needs torch, transformers and peft. A kind's time is the least of its rounds, since other processes only ever add to it.
"""

from __future__ import annotations

import sys
from dataclasses import replace

import peft

from jaxtrain.config import LoraConfig
from tests.measure.rivals import Sizes, Step, least_seconds, llama, our_config, torch_step
from tests.measure.steps import stepper

RANK = 16


def ours(sizes: Sizes, rank: int) -> Step:
    """Return a function that takes one train step and waits for it."""
    return stepper(replace(our_config(sizes), lora=LoraConfig(rank=rank)), "reference")


def theirs(sizes: Sizes, rank: int) -> Step:
    """Return the same for torch."""
    model = llama(sizes)
    if rank:
        model = peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
    return torch_step(model, sizes)


def main() -> None:
    """Time the four kinds in turns, and print seconds a step and ratios."""
    sizes = Sizes(*map(int, sys.argv[1:6])) if sys.argv[1:] else Sizes(layers=6, length=256, vocabulary=4096)
    best = least_seconds(
        {f"{who.__name__}, {what}": who(sizes, rank) for who in (ours, theirs) for what, rank in (("full", 0), ("lora", RANK))}
    )
    for kind, seconds in best.items():
        print(f"{kind}: {seconds:.3f} s a step")
    for one, other in (("ours, lora", "ours, full"), ("theirs, lora", "theirs, full"), ("ours, lora", "theirs, lora")):
        print(f"{one} / {other}: {best[one] / best[other]:.2f}")


if __name__ == "__main__":
    main()
