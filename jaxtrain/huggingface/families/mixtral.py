"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from functools import partial

from jaxtrain.config import ModelConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.families import mistral
from jaxtrain.huggingface.fields import CHOSEN, WIDTH, Family, mixture, same
from jaxtrain.huggingface.table import Row


def weights(model: ModelConfig) -> list[Row]:
    """Return the rows."""
    stem, names = f"{rows.LAYER}block_sparse_moe.", ("w1", "w3", "w2")
    return rows.llama(model, partial(rows.experts, stem=stem, names=names))


# The scores of a token's experts are divided by their sum.
PARTS = (*mistral.PARTS, mixture(same("num_local_experts", "num_experts"), CHOSEN, WIDTH))
FAMILY = Family("mixtral", "MixtralForCausalLM", PARTS, weights)
