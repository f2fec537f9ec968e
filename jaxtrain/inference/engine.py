"""Continuous batching: rows of one cache, each refilled with the next request as soon as its own has ended."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.config import Config
from jaxtrain.errors import ExplainedError
from jaxtrain.inference.cache import ROW_AXES, CacheSize
from jaxtrain.inference.forward import STEPS, Programs, Rows, apart
from jaxtrain.inference.sampling import Choice
from jaxtrain.parallel.stacking import make_stacking

PyTree = Any
LARGEST_CHUNK = 512
"""Tokens of a prompt that go through the model at a time: longer ones go in pieces."""
UNIT = 64
"""Lengths of caches are multiples of this, so that few programs are compiled."""

NEVER = 2**31  # tokens that no sequence has


@dataclass(frozen=True)
class Sampling:
    """The settings by which a request is continued."""

    max_new_tokens: int = 64
    """Most tokens that are made."""
    temperature: float = 0.0
    """Divides the logits; 0 takes the most likely token."""
    top_k: int = 0
    """Only the k most likely tokens; 0: all."""
    top_p: float = 1.0
    """Only the most likely tokens that reach this probability together."""
    min_p: float = 0.0
    """Only tokens of at least this times the highest probability."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that are there already, multiplies negative ones; 1: none."""
    seed: int = 0
    """Of the random numbers; prompt i of a call uses seed + i, so the others change nothing."""
    policy_temperature: float = 1.0
    """Divides the logits of the reported log-probabilities, not those that tokens are chosen by."""

    def __post_init__(self) -> None:
        limits = {
            "max_new_tokens": self.max_new_tokens >= 1,
            "temperature": 0 <= self.temperature < math.inf,
            "top_k": self.top_k >= 0,
            "top_p": 0 < self.top_p <= 1,
            "min_p": 0 <= self.min_p <= 1,
            "repetition_penalty": 0 < self.repetition_penalty < math.inf,
            "seed": 0 <= self.seed < 2**32,
            "policy_temperature": 0 < self.policy_temperature < math.inf,
        }
        wrong = [f"{name}={getattr(self, name)}" for name, holds in limits.items() if not holds]
        if wrong:
            raise ExplainedError(
                f"{', '.join(wrong)}: max_new_tokens is at least 1, temperature and top_k 0 or more, top_p above 0, up to 1, "
                "min_p from 0 to 1, repetition_penalty and policy_temperature above 0, seed from 0 to 2^32 - 1"
            )


class Made(NamedTuple):
    """A token made for a request."""

    request: int
    """Index of the request."""
    token: int
    log_probability: float
    is_last: bool


@dataclass
class _Request:
    """A request in a row."""

    number: int
    tokens: Sequence[int]
    """The prompt; with LongRoPE, once the answer has come to the long factors, the answer until then too."""
    sampling: Sampling
    sent: int = 0
    """Tokens of these that the cache holds."""
    made: list[int] = field(default_factory=list)
    before: int = 0
    """Tokens made that are among `tokens`."""

    @property
    def length(self) -> int:
        """Return the tokens of prompt and answer."""
        return len(self.tokens) + len(self.made) - self.before


class Engine:
    """Generates with a model's parameters on its mesh."""

    def __init__(self, config: Config, mesh: Mesh, ends: Sequence[int] = ()):
        """Prepare generation.

        Args:
          config: resolved, of the model on this mesh.
          ends: token ids that end an answer; the answer holds the one that ended it.
        """
        self._config, self._mesh, self._ends = config, mesh, tuple(ends)
        self._programs: dict[CacheSize, Programs] = {}
        self._unit = math.prod(mesh.shape[axis] for axis in (*ROW_AXES, "tensor"))
        scaling = config.model.rope_scaling
        self._turn = scaling.original_length if scaling and scaling.kind == "longrope" else NEVER
        """Tokens of a sequence up to which LongRoPE has short factors: a row that outgrows them is put into the cache anew."""

    @property
    def rooms(self) -> tuple[CacheSize, ...]:
        """Return the sizes of the caches that there were so far."""
        return tuple(self._programs)

    def run(
        self,
        params: PyTree,
        prompts: Sequence[Sequence[int]],
        samplings: Sequence[Sampling],
        *,
        slots: int = 8,
        wants_more: Callable[[int, list[int]], bool] = lambda request, made: True,
        ends_before: Callable[[int], bool] = lambda part: False,
        take_experts: Callable[[int, np.ndarray], None] | None = None,
    ) -> Iterator[Made]:
        """Yield the tokens of all requests as they are made.

        Args:
          params: stacked, as training holds them; float32 or in the model's dtype.
          prompts: token ids, one or more each.
          samplings: of each prompt.
          slots: most requests at a time.
          wants_more: (request, tokens made) -> False ends it; asked after every look at the host.
          ends_before: asked before each call of a program, by its number; True leaves all that is unfinished. All processes say
            the same.
          take_experts: given (request, int16 [tokens, stacked layers, K]) once the request is done: the experts of all its
            tokens but the last, which no layer has seen. For a mixture of experts.

        Raises:
          ExplainedError: a prompt is empty, or longer than a learned table of positions.
        """
        requests = deque(_Request(i, list(p), s) for i, (p, s) in enumerate(zip(prompts, samplings, strict=True)))
        if not requests:
            return
        programs = self._programs_for(requests, slots, take_experts is not None)
        (cache, rows), decoding = programs.empty(), apart(params, self._mesh, in_few_bits=bool(self._config.lora.base))
        held: list[_Request | None] = [None] * programs.room.rows
        done, part = dict[int, _Request](), itertools.count()
        while (requests or any(held)) and not ends_before(next(part)):
            new = [i for i, request in enumerate(held) if request is None][: max(0, len(requests))]
            if new:
                self._hand_out_experts(done, cache, take_experts)
                rows = self._admit(programs, rows, held, new, requests)
            rows = self._begin_anew(programs, rows, held)
            chunk = self._next_chunk(programs, held)
            if chunk is not None:
                cache, rows, made = programs.begin(params, cache, rows, *self._place(*chunk))
                tokens, log_ps = (self._fetch(array)[None] for array in made)
            else:
                cache, rows, made = programs.decode(decoding, cache, rows, np.int32(self._steps(held)))
                tokens, log_ps = map(self._fetch, made)
            before = list(held)
            yield from self._hand_out(held, tokens, log_ps, wants_more)
            done |= {row: request for row, request in enumerate(before) if request and held[row] is None}
        self._hand_out_experts(done, cache, take_experts)

    def _hand_out_experts(
        self, done: dict[int, _Request], cache: PyTree, take_experts: Callable[[int, np.ndarray], None] | None
    ) -> None:
        """Give away the experts of the requests that are done, by their rows, and forget these requests."""
        if take_experts and done:
            of_places = [self._fetch(entries.experts) for entries in cache["stack"]]
            stacked = np.stack(of_places, axis=3)  # [chunk, stage, group, place, B, 1, length, K]
            layers = stacked.reshape(-1, *stacked.shape[4:])[make_stacking(self._config).layer_slots(), :, 0]
            for row, request in done.items():
                take_experts(request.number, layers[:, row, : request.length - 1].swapaxes(0, 1))
        done.clear()

    def _programs_for(self, requests: Sequence[_Request], slots: int, keeps_experts: bool) -> Programs:
        longest = max(len(request.tokens) + request.sampling.max_new_tokens for request in requests)
        prompt, table = max(map(self._longest_prefill, requests)), self._config.model.learned_positions
        if min(len(request.tokens) for request in requests) == 0:
            raise ExplainedError("a prompt is empty: give at least one token, e.g. the one that begins documents")
        if table and longest > table:
            raise ExplainedError(
                f"prompt and answer of {longest} tokens are longer than the model's table of {table} positions; "
                "give a shorter prompt or a smaller max_new_tokens"
            )
        tensor = self._mesh.shape["tensor"]
        chunk = math.ceil(min(LARGEST_CHUNK, 2 ** math.ceil(math.log2(prompt))) / tensor) * tensor
        rows = math.ceil(min(slots, len(requests)) / self._unit) * self._unit
        room = CacheSize(rows, math.ceil(longest / UNIT) * UNIT, chunk, keeps_experts)
        if room not in self._programs:
            self._programs[room] = Programs(self._config, self._mesh, room, max(1, len(self._ends)))
        return self._programs[room]

    def _admit(
        self, programs: Programs, rows: Rows, held: list[_Request | None], new: Sequence[int], requests: deque[_Request]
    ) -> Rows:
        """Put the next requests into free rows."""
        count = len(held)
        zeros: Any = np.zeros(count, np.int32)
        which, left = np.zeros(count, bool), zeros.copy()
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed", "policy_temperature")
        dtypes = (np.float32, np.int32, np.float32, np.float32, np.float32, np.uint32, np.float32)
        choice: list[Any] = [np.ones(count, dtype) for dtype in dtypes]
        for row in new:
            held[row] = request = requests.popleft()
            which[row], left[row] = True, request.sampling.max_new_tokens
            for array, name in zip(choice, names, strict=True):
                array[row] = getattr(request.sampling, name)
        ends: Any = np.full((count, max(1, len(self._ends))), -1, np.int32)
        ends[:, : len(self._ends)] = self._ends
        seen: Any = np.zeros((count, self._config.model.vocab_size), bool)
        placed = self._place(Rows(zeros, zeros, zeros, left, seen, ends, Choice(*choice)), which)
        return programs.admit(rows, *placed)

    def _longest_prefill(self, request: _Request) -> int:
        """Return the most tokens that a request puts into the cache before the next one is made."""
        count = len(request.tokens)
        return self._turn + 1 if count <= self._turn < count + request.sampling.max_new_tokens - 1 else count

    def _begin_anew(self, programs: Programs, rows: Rows, held: list[_Request | None]) -> Rows:
        """Take the rows that have outgrown LongRoPE's short factors back to the first token, as `transformers` does."""
        which = np.zeros(len(held), bool)
        for row, request in enumerate(held):
            if request is not None and len(request.tokens) <= self._turn < request.length:
                request.tokens, request.before, request.sent = [*request.tokens, *request.made], len(request.made), 0
                which[row] = True
        return programs.rewind(rows, *self._place(which)) if which.any() else rows

    def _next_chunk(self, programs: Programs, held: list[_Request | None]) -> tuple[np.ndarray, ...] | None:
        """Return the next tokens of all prompts that the cache does not hold whole; None if there are none."""
        waiting = [(row, r) for row, r in enumerate(held) if r is not None and r.sent < len(r.tokens)]
        if not waiting:
            return None
        tensor, most = self._mesh.shape["tensor"], max(len(r.tokens) - r.sent for _, r in waiting)
        length = min(programs.room.chunk, math.ceil(2 ** math.ceil(math.log2(most)) / tensor) * tensor)
        tokens, count = np.zeros((len(held), length), np.int32), np.zeros(len(held), np.int32)
        prompt = np.zeros(len(held), np.int32)
        for row, request in waiting:
            piece = request.tokens[request.sent : request.sent + length]
            tokens[row, : len(piece)], count[row] = piece, len(piece)
            request.sent += len(piece)
            prompt[row] = len(request.tokens)
        return tokens, count, prompt

    def _steps(self, held: list[_Request | None]) -> int:
        """Return how many steps to decode: none that no row needs."""
        running = [r for r in held if r is not None]
        most = max(r.sampling.max_new_tokens - len(r.made) for r in running)
        most = min([most, *(self._turn + 1 - r.length for r in running if r.length <= self._turn)])
        return min(STEPS, most)

    def _hand_out(
        self, held: list[_Request | None], tokens: np.ndarray, log_ps: np.ndarray, wants_more: Callable[[int, list[int]], bool]
    ) -> Iterator[Made]:
        """Yield the new tokens of each request, and free the rows of those that have ended."""
        for row, request in enumerate(held):
            if request is None:
                continue
            for token, log_p in zip(tokens[:, row].tolist(), log_ps[:, row].tolist(), strict=True):
                if token < 0 or held[row] is None:
                    continue
                request.made.append(token)
                ended = token in self._ends or len(request.made) == request.sampling.max_new_tokens
                ended = ended or not wants_more(request.number, request.made)
                if ended:
                    held[row] = None
                yield Made(request.number, token, log_p, ended)

    def _place(self, *trees: PyTree) -> tuple[PyTree, ...]:
        sharding = NamedSharding(self._mesh, PartitionSpec(ROW_AXES))
        return jax.tree.map(lambda array: jax.device_put(array, sharding), trees)

    def _fetch(self, array: jax.Array) -> np.ndarray:
        if array.is_fully_addressable:
            return np.asarray(array)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
