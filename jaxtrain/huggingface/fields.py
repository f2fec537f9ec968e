"""A config.json's fields: taken by name, and refused by name where they are left over and may change the computation."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtrain.config import ModelConfig
from jaxtrain.errors import ExplainedError
from jaxtrain.huggingface.table import Row

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
OF_ACTIVATION = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}

HARMLESS = frozenset(
    # What a file is and where it is from; ids of tokens; what generation, dropout, losses and initial values use.
    "architectures model_type torch_dtype dtype transformers_version name_or_path auto_map use_cache attn_implementation "
    "gradient_checkpointing is_decoder bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id "
    "unk_token_id max_position_embeddings n_positions n_ctx max_length model_max_length initializer_range init_std "
    "embd_pdrop resid_pdrop attn_pdrop attention_dropout hidden_dropout classifier_dropout output_router_logits "
    "router_aux_loss_coef aux_loss_alpha seq_aux router_jitter_noise pretraining_tp use_bfloat16 summary_activation "
    "summary_first_dropout summary_proj_to_labels summary_type summary_use_proj task_specific_params ep_size "
    "num_nextn_predict_layers num_mtp_layers max_window_layers no_rope_layer_interval sliding_window_pattern "
    "cache_implementation qk_head_dim initial_context_length experts_per_token swiglu_alpha "
    "num_return_sequences output_attentions output_hidden_states return_dict id2label label2id problem_type "
    "chunk_size_feed_forward finetuning_task hidden_dropout_prob layer_norm_eps_ tokenizer_class prefix vocab_file "
    "cross_attention_hidden_size tie_encoder_decoder torchscript "
    "tf_legacy_loss bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping "
    "encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty "
    "min_length no_repeat_ngram_size num_beam_groups num_beams remove_invalid_values repetition_penalty "
    "return_dict_in_generate suppress_tokens temperature top_k top_p typical_p is_llama_config transformers.js_config "
    "unsloth_fixed unsloth_version base_model_tp_plan".split()
)
OFF = frozenset(
    "use_mrope rope_interleaved pruned_heads add_cross_attention is_encoder_decoder use_bidirectional_attention "
    "alibi use_alibi attention_bias mlp_bias".split()
)
"""Fields that leave the computation alone where they are false or empty."""


class Fields:
    """The fields of a config.json that are not yet translated."""

    def __init__(self, config: Mapping[str, Any], where: str):
        self._all, self._left, self._where = dict(config), dict(config), where

    def take(self, name: str, *default: Any) -> Any:
        """Return a field; the default where it is absent or null.

        Raises:
          ExplainedError: it is absent, and has no default.
        """
        value = self._left.pop(name, None)
        if value is not None:
            return value
        if not default:
            raise ExplainedError(f"{self._where} has no {name}, which a {self._all.get('model_type')} needs")
        return default[0]

    def peek(self, name: str, default: Any = None) -> Any:
        """Return a field, which stays to be taken."""
        return self._all.get(name, default)

    def expect(self, name: str, *allowed: Any) -> None:
        """Take a field that has one of these values, if it is there.

        Raises:
          ExplainedError: it has another.
        """
        value = self._left.pop(name, None)
        if value is not None and value not in allowed:
            words = " or ".join(json.dumps(known) for known in allowed) or "null"
            raise ExplainedError(f"{self._where}: {name}={json.dumps(value)} is not supported, only {words}")

    def one_of(self, name: str, values: Mapping[str, Any], *default: str) -> Any:
        """Return what a field's value stands for.

        Raises:
          ExplainedError: the value is not known.
        """
        value = self.take(name, *default)
        if value not in values:
            raise ExplainedError(f"{self._where}: {name}={json.dumps(value)} is not supported, only {', '.join(values)}")
        return values[value]

    def refuse_rest(self) -> None:
        """Refuse fields that nothing has taken and that are not known to leave the computation alone; null ones are ignored.

        Raises:
          ExplainedError: names them all.
        """
        left = {name: value for name, value in self._left.items() if value is not None and not is_harmless(name, value)}
        if left:
            listed = "; ".join(f"{name}={json.dumps(value)[:80]}" for name, value in left.items())
            kind = self._all.get("model_type")
            raise ExplainedError(
                f"{self._where} has fields that jaxtrain's {kind} does not know, and that may change the result: {listed}. "
                "If they do not, remove them from a copy of the file"
            )


def is_harmless(name: str, value: Any) -> bool:
    """Return whether a field leaves the computation alone; those with an underscore are transformers' notes to itself."""
    return name in HARMLESS or name.startswith("_") or (name in OFF and not value)


@dataclass(frozen=True)
class Family:
    """A family of models: how its config and its weights are ours."""

    model_type: str
    """As config.json has it."""
    architecture: str
    """Class of `transformers`."""
    read: Callable[[Fields], dict[str, Any]]
    """Fields of config.json -> arguments of `ModelConfig`."""
    write: Callable[[ModelConfig], dict[str, Any]]
    """The inverse of `read`."""
    rows: Callable[[ModelConfig], list[Row]]
    """The weights."""
    unneeded: Sequence[str] = ()
    """Regular expressions of tensors that folders may hold and the model does not use."""


def standard(fields: Fields, *, tied: bool = False, activation: str = "hidden_act") -> dict[str, Any]:
    """Translate the fields that most families share.

    Args:
      tied: whether embeddings are tied where the file does not say so.
      activation: name of the activation's field.
    """
    width, heads = fields.take("hidden_size"), fields.take("num_attention_heads")
    return {
        "num_layers": fields.take("num_hidden_layers"),
        "embed_dim": width,
        "num_heads": heads,
        "num_kv_heads": fields.take("num_key_value_heads", heads),
        "head_dim": fields.take("head_dim", width // heads),
        "mlp_dim": fields.take("intermediate_size"),
        "vocab_size": fields.take("vocab_size"),
        "norm_epsilon": fields.take("rms_norm_eps", 1e-6),
        "tie_embeddings": fields.take("tie_word_embeddings", tied),
        "activation": fields.one_of(activation, ACTIVATIONS, "silu"),
    }


def standard_back(model: ModelConfig, activation: str = "hidden_act") -> dict[str, Any]:
    """Return the fields that `standard` translates."""
    return {
        "num_hidden_layers": model.num_layers,
        "hidden_size": model.embed_dim,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.mlp_dim,
        "vocab_size": model.vocab_size,
        "rms_norm_eps": model.norm_epsilon,
        "tie_word_embeddings": model.tie_embeddings,
        activation: OF_ACTIVATION.get(model.activation, model.activation),
    }


def biases(fields: Fields, kind: str = "all") -> dict[str, Any]:
    """Translate `attention_bias`, which in this family adds these biases."""
    return {"attention_bias": kind if fields.take("attention_bias", False) else "none"}


def pattern(kinds: Sequence[str], window: int | None) -> dict[str, Any]:
    """Return the shortest pattern that gives these kinds of layers, and the window of the local ones."""
    period = next(n for n in range(1, len(kinds) + 1) if all(kind == kinds[i % n] for i, kind in enumerate(kinds)))
    shortest, has_local = tuple(kinds[:period]), "local" in kinds
    plain = shortest in (("global",), ("local",))
    return {"pattern": () if plain else shortest, "sliding_window": window if has_local else 0}


LAYER_TYPES = {"sliding_attention": "local", "full_attention": "global"}
OF_LAYER = {"local": "sliding_attention", "global": "full_attention", "nope": "full_attention"}


def layer_types(fields: Fields, default: Callable[[int], str]) -> list[str]:
    """Return the kind of each layer; `default` gives that of layer i where the file does not say."""
    count = fields.peek("num_hidden_layers")
    found = fields.take("layer_types", None) or [default(i) for i in range(count)]
    unknown = sorted(set(found) - set(LAYER_TYPES))
    if unknown or len(found) != count:
        raise ExplainedError(
            f"layer_types: {', '.join(unknown) or f'{len(found)} for num_hidden_layers={count}'}: not supported"
        )
    return [LAYER_TYPES[kind] for kind in found]


def layer_types_back(model: ModelConfig) -> dict[str, Any]:
    """Return `layer_types` and `sliding_window`."""
    kinds = [model.kinds[i % len(model.kinds)] for i in range(model.num_layers)]
    return {"layer_types": [OF_LAYER[kind] for kind in kinds], "sliding_window": model.sliding_window or None}
