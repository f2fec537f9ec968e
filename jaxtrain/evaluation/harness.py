"""A model of ours for EleutherAI's lm-eval (extra `eval`), which has hundreds of tasks.

    import jaxtrain, lm_eval
    from jaxtrain.evaluation.harness import Harness
    lm_eval.simple_evaluate(model=Harness(jaxtrain.load("DIR")), tasks=["arc_easy"])

Log-probabilities and answers are those of lm-eval's own backend for transformers (`tests/evaluation/test_harness.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtrain.errors import ExplainedError
from jaxtrain.evaluation.likelihoods import Asked, encode, likelihoods, prefix_of, windows

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance  # pyright: ignore[reportMissingImports]

try:
    from lm_eval.api.model import TemplateLM  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError:
    TemplateLM: Any = object


class Harness(TemplateLM):
    """A `Model` as lm-eval asks it.

    Args:
      model: of `jaxtrain.load`, or `Trainer.model()`.
      length: most tokens that the model is given.
      prefix: id before a text without a context; by default one of those that begin a text, or that separates documents.
        lm-eval's backend for transformers takes the tokenizer's bos_token.
      max_new_tokens: of an answer, where the task does not say.

    Raises:
      ExplainedError: lm-eval is not installed.
    """

    def __init__(self, model: Any, length: int = 2048, prefix: int | None = None, max_new_tokens: int = 256):
        if TemplateLM is object:
            raise ExplainedError('lm-eval is not installed: pip install "jaxtrain[eval]"')
        super().__init__()
        self.model, self.length, self.max_new_tokens = model, length, max_new_tokens
        self._prefix = prefix_of(model)[-1] if prefix is None else prefix

    @property
    def eot_token_id(self) -> int:
        """The id that stands before a text without a context."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """A name for lm-eval's cache of requests."""
        return str(getattr(self.model.tokenizer, "fingerprint", "jaxtrain"))

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text, with those that begin one unless told otherwise."""
        begins = [] if add_special_tokens is False else [*self.model.begins]
        return [*begins, *encode(self.model, string)]

    def _loglikelihood_tokens(self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any) -> list[tuple[float, bool]]:
        asked = [Asked(before, ids) for _, before, ids in requests]
        return [(one.log_probability, one.is_greedy) for one in likelihoods(self.model, asked, self.length + 1)]

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts, each token after as many as `length` allows."""
        del disable_tqdm
        parts = [windows([self._prefix], self.tok_encode(one.args[0]), self.length + 1) for one in requests]
        found = iter(likelihoods(self.model, [part for own in parts for part in own], self.length + 1))
        return [sum(next(found).log_probability for _ in own) for own in parts]

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return the answers, each up to the first text that ends it."""
        del disable_tqdm
        answers = dict[int, str]()
        groups: dict[tuple[Any, ...], list[int]] = {}
        for i, one in enumerate(requests):
            groups.setdefault(self._settings(one.args[1]), []).append(i)
        for (stop, tokens, temperature, top_p), members in groups.items():
            room = self.length - tokens
            prompts = [self.tok_encode(requests[i].args[0])[-room:] for i in members]
            more = {"temperature": temperature, "top_p": top_p, "details": True}
            made = self.model.generate(prompts, tokens, stop=stop, **more)
            answers |= {i: one.text for i, one in zip(members, made, strict=True)}
        return [answers[i] for i in range(len(requests))]

    def _settings(self, given: Mapping[str, Any]) -> tuple[tuple[str, ...], int, float, float]:
        stop = given.get("until") or ()
        temperature = given.get("temperature", 1.0) if given.get("do_sample") else 0.0
        tokens = given.get("max_gen_toks", given.get("max_new_tokens", self.max_new_tokens))
        return (
            (stop,) if isinstance(stop, str) else tuple(stop),
            int(tokens),
            float(temperature),
            float(given.get("top_p", 1.0)),
        )
