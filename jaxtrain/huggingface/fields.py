"""A config.json's fields: taken by name, and refused by name where they are left over and may change the computation."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtrain.config import ModelConfig, MoEConfig
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
class Part:
    """A translation of some fields of config.json, both ways."""

    read: Callable[[Fields], dict[str, Any]]
    """Fields of config.json -> arguments of `ModelConfig`."""
    write: Callable[[Any], dict[str, Any]] = lambda model: {}
    """The inverse of `read`."""


@dataclass(frozen=True)
class Family:
    """A family of models: how its config and its weights are ours."""

    model_type: str
    """As config.json has it."""
    architecture: str
    """Class of `transformers`."""
    parts: Sequence[Part]
    """The translation of its fields; of two parts with the same one the later counts."""
    rows: Callable[[ModelConfig], list[Row]]
    """The weights."""
    unneeded: Sequence[str] = ()
    """Regular expressions of tensors that folders may hold and the model does not use."""
    left_out: Sequence[str] = ()
    """Fields that `parts` write, and this family does not have."""

    def read(self, fields: Fields) -> dict[str, Any]:
        """Return the arguments of `ModelConfig`."""
        return _joined(part.read(fields) for part in self.parts)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the fields of config.json."""
        found = _joined(part.write(model) for part in self.parts)
        return {name: value for name, value in found.items() if name not in self.left_out}


def _joined(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Parts


def same(theirs: str, ours: str, *default: Any, or_null: bool = False) -> Part:
    """Return the part of a field that has the same values in both.

    Args:
      default: for a file without it; a function of the fields gives it, too.
      or_null: write null for 0.
    """

    def read(fields: Fields) -> dict[str, Any]:
        return {ours: fields.take(theirs, *(value(fields) if callable(value) else value for value in default))}

    return Part(read, lambda model: {theirs: (getattr(model, ours) or None) if or_null else getattr(model, ours)})


def flag(theirs: str, ours: str, on: str, off: str = "none", default: bool = False) -> Part:
    """Return the part of a boolean that chooses one of two settings of ours."""
    return Part(
        lambda fields: {ours: on if fields.take(theirs, default) else off}, lambda model: {theirs: getattr(model, ours) == on}
    )


def biases(kind: str = "all", default: bool = False) -> Part:
    """Return the part of `attention_bias`, which in this family adds these biases."""
    return flag("attention_bias", "attention_bias", kind, default=default)


def fixed(**ours: Any) -> Part:
    """Return the part of settings that all models of a family have."""
    return Part(lambda fields: ours)


def written(**theirs: Any) -> Part:
    """Return the part of fields that are the same in all files that we write."""
    return Part(lambda fields: {}, lambda model: theirs)


def expects(name: str, *allowed: Any) -> Part:
    """Return the part of a field that must have one of these values, if it is there."""
    return Part(lambda fields: fields.expect(name, *allowed) or {})


def ignored(name: str) -> Part:
    """Return the part of a field that has no effect in this family."""
    return Part(lambda fields: {} if fields.take(name, None) else {})


def standard(
    tied: bool = False, activation: str = "hidden_act", activations: Mapping[str, str] = ACTIVATIONS
) -> tuple[Part, ...]:
    """Return the parts that most families share.

    Args:
      tied: whether embeddings are tied where the file does not say so.
      activation: name of the activation's field, of which `activations` gives ours.
    """
    return (
        same("num_hidden_layers", "num_layers"),
        same("hidden_size", "embed_dim"),
        same("num_attention_heads", "num_heads"),
        same("num_key_value_heads", "num_kv_heads", lambda fields: fields.peek("num_attention_heads")),
        same("head_dim", "head_dim", lambda fields: fields.peek("hidden_size") // fields.peek("num_attention_heads")),
        same("intermediate_size", "mlp_dim"),
        same("vocab_size", "vocab_size"),
        same("rms_norm_eps", "norm_epsilon", 1e-6),
        same("tie_word_embeddings", "tie_embeddings", tied),
        Part(
            lambda fields: {"activation": fields.one_of(activation, activations, "silu")},
            lambda model: {activation: OF_ACTIVATION.get(model.activation, model.activation)},
        ),
    )


def mixture(*parts: Part, **fixed: Any) -> Part:
    """Return the part of a mixture of experts, from parts of `MoEConfig` and settings that all models of a family have."""

    def read(fields: Fields) -> dict[str, Any]:
        return {"moe": MoEConfig(**_joined(part.read(fields) for part in parts), **fixed)}

    def write(model: ModelConfig) -> dict[str, Any]:
        assert model.moe is not None
        return _joined(part.write(model.moe) for part in parts)

    return Part(read, write)


CHOSEN = same("num_experts_per_tok", "experts_per_token")
WIDTH = Part(lambda fields: {"mlp_dim": fields.peek("intermediate_size")}, lambda moe: {"intermediate_size": moe.mlp_dim})
"""The width of an expert, where the file has no field of its own for it."""


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


def layers(is_local: Callable[[Fields, int], bool], window: int = 0) -> Part:
    """Return the part of `layer_types` and `sliding_window`.

    Args:
      is_local: whether layer i is local where the file does not say.
      window: of a file that does not say.
    """

    def read(fields: Fields) -> dict[str, Any]:
        kinds = layer_types(fields, lambda i: "sliding_attention" if is_local(fields, i) else "full_attention")
        return pattern(kinds, fields.take("sliding_window", window))

    return Part(read, layer_types_back)
