"""A model in hand: logits, log-probabilities, generation, and export, from Python."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from jaxtrain.config import Config
from jaxtrain.errors import ExplainedError
from jaxtrain.inference.engine import Engine, Sampling
from jaxtrain.inference.whole import make_logits, make_scores

PyTree = Any
Ids = Sequence[int]
UNIT = 64
"""Sequences are padded to multiples of this, so that few programs are compiled."""
MOST_UNFINISHED = 16
"""Tokens that may be parts of one character; text after more of them is not valid UTF-8 at all."""


@dataclass(frozen=True)
class Generation:
    """The answer to a prompt."""

    ids: list[int]
    """The tokens that were made, with the one that ended the answer."""
    log_probabilities: list[float]
    """Of each, under softmax(logits)."""
    text: str | None
    """The answer as text, without what ended it; None for a model without a tokenizer."""
    finish: Literal["stop", "length"] = "length"
    """Whether a token or a text ended it, or `max_new_tokens`."""


@dataclass
class Model:
    """A model on a mesh."""

    config: Config
    """Resolved: `config.model` is the model, `config.mesh` the mesh."""
    mesh: Mesh
    params: PyTree
    """Stacked, as training holds them."""
    tokenizer: Any = None
    """Has `encode(text) -> ids` and `decode(ids) -> text`; None if there is none."""
    ends: tuple[int, ...] = ()
    """Token ids that end an answer."""
    begins: tuple[int, ...] = ()
    """Token ids that go before a prompt of text."""
    write: Callable[[Model, str], Any] | None = field(default=None, repr=False)
    """Writes the weights as a HuggingFace folder, for `save_hf`."""
    _programs: dict[tuple, Any] = field(default_factory=dict, repr=False)

    def logits(self, tokens: Any) -> np.ndarray:
        """Return the logits after each token, float32 [B, L, vocab_size], for int [B, L]."""
        tokens = self._checked(tokens)
        batch, config = self._batch(tokens)
        program = self._program("logits", make_logits, config)
        return np.asarray(program(self.params, batch))[: tokens.shape[0], : tokens.shape[1], : config.model.vocab_size]

    def score(self, tokens: Any, *, details: bool = False) -> Any:
        """Return log p of each token after those before it, float32 [B, L - 1], for int [B, L].

        Args:
          details: return (log p, whether each token is the likeliest, bool [B, L - 1]).
        """
        tokens = self._checked(tokens)
        batch, config = self._batch(tokens)
        program = self._program("score", make_scores, config)
        log_p, is_best = (np.asarray(a)[: tokens.shape[0], : tokens.shape[1] - 1] for a in program(self.params, batch))
        return (log_p, is_best) if details else log_p

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Ids],
        max_new_tokens: int = 64,
        *,
        stop: str | Sequence[str] = (),
        slots: int = 8,
        on_text: Callable[[int, str], None] | None = None,
        on_done: Callable[[int, Generation], None] | None = None,
        details: bool = False,
        **sampling: Any,
    ) -> Any:
        """Continue prompts: texts are answered by texts, token ids by token ids.

        Args:
          prompts: one or several; ids are given as a list (or a list of lists) of int.
          stop: a text that ends an answer, or several; the answer holds what stands before the first of them.
          slots: most prompts that are answered at a time; the others wait for a free place.
          on_text: called with (index of the prompt, new text) as it is made.
          on_done: called with (index of the prompt, its answer) as soon as that is whole.
          details: return `Generation`s.
          sampling: temperature, top_k, top_p, min_p, repetition_penalty and seed, as in `Sampling`.

        Returns:
          One answer for one prompt, else a list of them.

        Raises:
          ExplainedError: a setting or a prompt cannot be used.
        """
        is_text, is_one, asked = _prompts(prompts)
        if (is_text or stop or on_text) and self.tokenizer is None:
            raise ExplainedError("this model has no tokenizer: give prompts as token ids, without stop and on_text")
        ids = [self.ids(p) if is_text else p for p in asked]
        ids = [self._checked([prompt])[0].tolist() if len(prompt) else [] for prompt in ids]
        stop = (stop,) if isinstance(stop, str) else tuple(stop)
        if "" in stop or slots < 1:
            raise ExplainedError(f"stop={stop}, slots={slots}: a text that ends an answer is not empty, and there is a slot")
        given = Sampling(max_new_tokens, **sampling)
        settings = [replace(given, seed=(given.seed + i) % 2**32) for i in range(len(ids))]
        answers = [_Answer(self, stop) for _ in ids]
        runs = self.engine.run(
            self.params, ids, settings, slots=slots, wants_more=lambda i, made: not answers[i].has_stop(made)
        )
        for made in runs:
            answers[made.request].add(made.token, made.log_probability)
            if on_text and (new := answers[made.request].new_text(made.is_last)):
                on_text(made.request, new)
            if on_done and made.is_last:
                on_done(made.request, answers[made.request].generation())
        done = [answer.generation() for answer in answers]
        results: list[Any] = done if details else [one.text if is_text else one.ids for one in done]
        return results[0] if is_one else results

    def save_hf(self, directory: str | os.PathLike) -> None:
        """Write the model as a HuggingFace folder, with the tokenizer and the other files that came with it.

        Raises:
          ExplainedError: no family of HuggingFace models has its settings, or the folder is there already.
        """
        if self.write is None:
            raise ExplainedError("only models of jaxtrain.load and Trainer.model() can be written")
        self.write(self, os.fspath(directory))

    def ids(self, text: str) -> list[int]:
        """Return the token ids of a prompt."""
        return [*self.begins, *(int(i) for i in self.tokenizer.encode(text))]

    @property
    def engine(self) -> Engine:
        """Return the engine that generates, with the programs it has compiled."""
        return self._program("engine", Engine, self.config)

    def _program(self, name: str, make: Callable[..., Any], config: Config) -> Any:
        key = (name, config)
        if key not in self._programs:
            ends = {"ends": self.ends} if make is Engine else {}
            self._programs[key] = make(config, self.mesh, **ends)
        return self._programs[key]

    def _checked(self, tokens: Any) -> np.ndarray:
        """Return int32 [B, L] ids.

        Raises:
          ExplainedError: they are no such array, or out of the vocabulary.
        """
        size = self.config.model.vocab_size
        try:
            tokens = np.asarray(tokens)
        except ValueError as error:
            raise ExplainedError("tokens are whole numbers [B, L]; rows of several lengths go one at a time") from error
        if tokens.ndim != 2 or not tokens.size or not np.issubdtype(tokens.dtype, np.integer):
            raise ExplainedError(f"tokens are whole numbers [B, L], not {tokens.dtype} {list(tokens.shape)}")
        if tokens.min() < 0 or tokens.max() >= size:
            raise ExplainedError(f"token ids are 0 to {size - 1}; there are ids from {tokens.min()} to {tokens.max()}")
        table = self.config.model.learned_positions
        if table and tokens.shape[1] > table:
            raise ExplainedError(f"{tokens.shape[1]} tokens are longer than the model's table of {table} positions")
        return tokens.astype(np.int32)

    def _batch(self, tokens: np.ndarray) -> tuple[dict[str, np.ndarray], Config]:
        """Return a batch padded to what the mesh can cut, and the config of its shape."""
        mesh, (rows, length) = self.config.mesh, tokens.shape
        unit = 2 * mesh.context * mesh.tensor
        wanted = math.ceil(math.ceil(length / unit) * unit / UNIT) * UNIT if length > UNIT // 2 else length
        padded = (math.ceil(rows / mesh.batch_shards) * mesh.batch_shards, math.ceil(wanted / unit) * unit)
        if self.config.model.learned_positions:
            padded = (padded[0], min(padded[1], self.config.model.learned_positions))
        whole = np.zeros(padded, np.int32)
        whole[:rows, :length] = tokens
        positions = np.broadcast_to(np.arange(padded[1], dtype=np.int32), padded)
        config = replace(
            self.config,
            data=replace(self.config.data, sequence_length=padded[1], mask_documents=False),
            train=replace(self.config.train, global_batch_size=padded[0], microbatches=1),
        )
        return {"tokens": whole, "positions": positions}, config


def _prompts(prompts: Any) -> tuple[bool, bool, list[Any]]:
    """Return (whether they are texts, whether there is one, all of them)."""
    if isinstance(prompts, str):
        return True, True, [prompts]
    prompts = list(prompts)
    if prompts and all(isinstance(p, str) for p in prompts):
        return True, False, prompts
    if prompts and all(isinstance(p, int | np.integer) for p in prompts):
        return False, True, [prompts]
    if not all(isinstance(p, Sequence | np.ndarray) and not isinstance(p, str) for p in prompts):
        raise ExplainedError("prompts are texts, or lists of token ids; not both at once")
    return False, False, prompts


class _Answer:
    """The tokens of one answer, and their text as far as it is certain.

    A piece of text is what the newest tokens add to that of the piece before. Decoded alone they could lose what depends on
    their left, as a blank; decoded with all tokens the time would grow with the square of the answer.
    """

    def __init__(self, model: Model, stop: tuple[str, ...]):
        self._model, self._stop = model, stop
        self._ids: list[int] = []
        self._log_ps: list[float] = []
        self._text, self._told = "", 0
        self._before, self._read = 0, 0  # tokens until the piece before begins, and until it ends

    def add(self, token: int, log_probability: float) -> None:
        """Take the next token."""
        self._ids.append(token)
        self._log_ps.append(log_probability)

    def has_stop(self, ids: list[int]) -> bool:
        """Return whether the text of these ids holds a text that ends the answer; asked after each token."""
        if not self._stop:
            return False
        looked_at = max(0, len(self._text) - max(map(len, self._stop)) + 1)
        return _has(self._text[looked_at:] + self._piece(ids), self._stop)

    def _piece(self, ids: list[int], is_last: bool = False) -> str:
        """Return the text that new tokens add, and take it if it holds no unfinished character."""
        end = len(ids) - (ids[-1] in self._model.ends)
        before, now = (self._model.tokenizer.decode(ids[self._before : end]) for end in (self._read, end))
        new = now[len(before) :]
        if is_last or (new and not new.endswith("\ufffd")) or end - self._read > MOST_UNFINISHED:
            self._text += new
            self._before, self._read = self._read, end
        return new

    def new_text(self, is_last: bool) -> str:
        """Return what can be told now: not an unfinished character, nor what may become a text that ends the answer."""
        self._piece(self._ids, is_last)
        ends = [at for stop in self._stop if (at := self._text.find(stop, self._told)) >= 0]
        certain = min(ends, default=len(self._text))
        if not is_last and not ends:
            starts = [n for stop in self._stop for n in range(1, len(stop)) if self._text.endswith(stop[:n], self._told)]
            certain -= max(starts, default=0)
        new, self._told = self._text[self._told : certain], certain
        return new

    def generation(self) -> Generation:
        """Return the whole answer."""
        ended, text = self._ids[-1] in self._model.ends, None
        if self._model.tokenizer is not None:
            text = self._model.tokenizer.decode(self._ids[: len(self._ids) - ended])
            ended = ended or _has(text, self._stop)
            text = text[: min((text.find(stop) for stop in self._stop if stop in text), default=len(text))]
        return Generation(self._ids, self._log_ps, text, "stop" if ended else "length")


def _has(text: str, stop: tuple[str, ...]) -> bool:
    return any(one in text for one in stop)
