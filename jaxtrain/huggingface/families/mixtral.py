"""Mixtral: Mistral with a mixture of experts in every layer."""

from __future__ import annotations

from functools import partial
from typing import Any

from jaxtrain.config import ModelConfig, MoEConfig
from jaxtrain.huggingface import rows
from jaxtrain.huggingface.families.mistral import read as read_mistral
from jaxtrain.huggingface.families.mistral import write as write_mistral
from jaxtrain.huggingface.fields import Family, Fields
from jaxtrain.huggingface.table import Row


def read(fields: Fields) -> dict[str, Any]:
    """Translate config.json; the scores of a token's experts are divided by their sum."""
    model = read_mistral(fields)
    count, chosen = fields.take("num_local_experts"), fields.take("num_experts_per_tok")
    return model | {"moe": MoEConfig(num_experts=count, experts_per_token=chosen, mlp_dim=model["mlp_dim"])}


def write(model: ModelConfig) -> dict[str, Any]:
    """Return config.json's fields."""
    assert model.moe is not None
    own = {"num_local_experts": model.moe.num_experts, "num_experts_per_tok": model.moe.experts_per_token}
    return write_mistral(model) | own | {"intermediate_size": model.moe.mlp_dim}


def weights(model: ModelConfig) -> list[Row]:
    """Return the rows."""
    stem, names = f"{rows.LAYER}block_sparse_moe.", ("w1", "w3", "w2")
    return rows.llama(model, partial(rows.experts, stem=stem, names=names))


FAMILY = Family("mixtral", "MixtralForCausalLM", read, write, weights)
