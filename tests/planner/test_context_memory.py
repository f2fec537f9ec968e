"""What a long sequence costs in memory, and that `context` shares it out: the program of configs/8b.py compiled for H100s.

    JAX_PLATFORMS=cpu python tests/planner/test_context_memory.py

prints working memory a device at 131,072 and at 65,536 tokens, eight sequences over fsdp=8.
"""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jaxtrain.config import MeshConfig, ShardingConfig
from jaxtrain.config.loading import load_config
from jaxtrain.config.rules import validate
from jaxtrain.planner import deviceless

LONG, SHORT = 131_072, 65_536
EIGHT_B = load_config(Path(__file__).parents[2] / "configs" / "8b.py")


def temp_bytes(context: int, length: int, kind: str) -> int:
    """Working memory of a train step: all but parameters, optimizer state and batch."""
    config = replace(
        EIGHT_B,
        mesh=MeshConfig(fsdp=8, context=context),
        sharding=ShardingConfig(context_attention=kind),
        data=replace(EIGHT_B.data, sequence_length=length),
        train=replace(EIGHT_B.train, global_batch_size=8),
    )
    return deviceless.report(validate(config, 8 * context)).temp_bytes


@pytest.mark.plan
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_what_the_tokens_cost_is_shared_out(kind: str):
    """Gradients, gathered weights and a chunk of logits cost the same at any length: what further tokens cost is compared."""
    tokens = {context: temp_bytes(context, LONG, kind) - temp_bytes(context, SHORT, kind) for context in (1, 4)}
    assert tokens[4] * 4 / tokens[1] == pytest.approx(1, abs=0.2)


def main() -> None:
    """A table of GiB a device."""
    print(
        "| context | kind | 131,072 tokens, GiB | 65,536 tokens, GiB | the difference x context / one |\n|---|---|---|---|---|"
    )
    alone = 0
    for context, kind in [(1, "ring"), *((c, kind) for kind in ("ring", "ulysses", "gather") for c in (2, 4, 8))]:
        long, short = (temp_bytes(context, length, kind) / 2**30 for length in (LONG, SHORT))
        alone = alone or long - short
        print(f"| {context} | {kind} | {long:.1f} | {short:.1f} | {(long - short) * context / alone:.2f} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
