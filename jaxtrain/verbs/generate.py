"""`jaxtrain generate RUN_OR_DIR --prompt=TEXT`: continue prompts, or chat, with a model of ours or of HuggingFace."""

from __future__ import annotations

import dataclasses
import json
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtrain.command import Usage, parse
from jaxtrain.command.text_model import ONE_DEVICE, TextModelFlags, check_given, text_model
from jaxtrain.errors import EXIT_DONE, ExplainedError, UsageError
from jaxtrain.files import user_path
from jaxtrain.signals import Request, Watch, end_at_once, say
from jaxtrain.text import printable, readable_size

if TYPE_CHECKING:
    from jaxtrain.data.conversations import Conversations
    from jaxtrain.inference.model import Generation, Model
    from jaxtrain.inference.prompts import Prompt


@dataclass(frozen=True)
class GenerateFlags(TextModelFlags):
    """Flags of `jaxtrain generate`."""

    prompt: tuple[str, ...] = ()
    """Text to continue; may be given several times. Without it and --prompts: each line of standard input."""
    prompts: str = ""
    """File of prompts: JSON objects with prompt, text or messages where its name ends in .jsonl, else one a line."""
    chat: bool = False
    """Converse, by the chat template of the folder; each line of standard input is what the user says."""
    max_new_tokens: int = 256
    """Most tokens of an answer."""
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
    stop: tuple[str, ...] = ()
    """Text that ends an answer; may be given several times."""
    seed: int = 0
    """Of the random numbers; prompt i uses seed + i."""
    slots: int = 8
    """Most prompts that are answered at a time."""
    logprobs: bool = False
    """Also print each token's id and log-probability."""
    json: bool = False
    """Print one JSON object a line: prompt, text, tokens, logprobs, finish."""


USAGE = Usage(
    "generate",
    "Continue prompts, or chat, with a run or a HuggingFace folder; --mesh.fsdp=2, --mesh.tensor=2 and the like put it on "
    "several devices. Answers go to standard output, the rest to standard error.",
    GenerateFlags,
    ("model",),
    config="taken",
)


def main(arguments: Sequence[str]) -> int:
    """Parse, load, generate, print; return the exit code."""
    line = parse(USAGE, arguments, over=ONE_DEVICE)
    flags = line.own
    check_given(line, "generate")
    if bool(flags.prompt) + bool(flags.prompts) + flags.chat > 1:
        raise UsageError("--prompt, --prompts and --chat exclude each other")
    if flags.slots < 1:
        raise UsageError(f"--slots={flags.slots}: at least 1 prompt is answered at a time")
    from jaxtrain.inference.engine import Sampling

    Sampling(flags.max_new_tokens, **_sampling(flags))  # before the weights are read
    prompts = [] if flags.chat else _prompts(flags)
    with text_model(line) as model:
        if flags.chat:
            _chat(model, flags)
        else:
            _answer_all(model, flags, prompts)
    return EXIT_DONE


def _sampling(flags: GenerateFlags) -> dict[str, Any]:
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
    return {name: getattr(flags, name) for name in names}


def _prompts(flags: GenerateFlags) -> list[Prompt]:
    from jaxtrain.inference.prompts import Prompt, prompts_of_lines, read_prompts

    if "" in flags.prompt:
        raise UsageError("--prompt is empty: give at least one character")
    if flags.prompt:
        return [Prompt(text) for text in flags.prompt]
    if flags.prompts:
        return read_prompts(flags.prompts)
    if sys.stdin.isatty():
        raise UsageError("no prompt: give --prompt=TEXT, --prompts=FILE, --chat, or lines on standard input")
    return prompts_of_lines(_input_lines(), "standard input")


def _input_lines() -> list[str]:
    try:
        return sys.stdin.buffer.read().decode().split("\n")
    except UnicodeDecodeError as error:
        raise ExplainedError(f"standard input is not UTF-8 text ({error.reason} at byte {error.start})") from error


def _conversations(model: Model) -> Conversations:
    """Return what encodes conversations, by the chat template of the run, or that beside the model's tokenizer."""
    from jaxtrain.data.chat_source import chat_template_of
    from jaxtrain.data.chat_template import read_chat_template
    from jaxtrain.data.conversations import Conversations

    template = chat_template_of(model.config, None)
    return Conversations(model.tokenizer, template or read_chat_template(user_path(model.config.data.tokenizer).parent))


@dataclass
class _Speed:
    """Counts and times for the last line."""

    begun: float = field(default_factory=time.monotonic)
    first: float = 0.0
    prompts: int = 0
    tokens: int = 0

    def text(self) -> None:
        """Record when the first text comes."""
        self.first = self.first or time.monotonic() - self.begun

    def done(self, answer: Generation) -> None:
        """Count an answer."""
        self.prompts, self.tokens = self.prompts + 1, self.tokens + len(answer.ids)

    def tell(self, model: Model) -> None:
        """Print the line, and another of what a device held."""
        from jaxtrain.planner.generation_memory import cache_bytes

        seconds = time.monotonic() - self.begun
        first = f", first text after {self.first:.2f} s" if self.first else ""
        plural = "" if self.prompts == 1 else "s"
        line = f"{self.prompts} prompt{plural}, {self.tokens} tokens, {self.tokens / seconds:.1f} tokens/s{first}"
        print(f"{line} (with compilation)", file=sys.stderr)
        if rooms := model.engine.rooms:
            import jax

            cache = max(cache_bytes(model.config, room) for room in rooms)
            weights = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(model.params))  # 8 bits or not
            held = f"{readable_size(weights)} of weights and {readable_size(cache)} of cache"
            print(f"a device held {held}", file=sys.stderr)


def _answer_all(model: Model, flags: GenerateFlags, prompts: Sequence[Prompt]) -> None:
    """Print the answers in the order of the prompts, each as soon as those before it are whole; a single one as it is made."""
    conversations = _conversations(model) if any(prompt.messages for prompt in prompts) else None
    ids = [conversations.prompt(p.messages) if conversations and p.messages else model.ids(p.text) for p in prompts]
    speed, waiting, shown = _Speed(), dict[int, Any](), 0
    streams = len(prompts) == 1 and not flags.json and not flags.logprobs

    def on_text(_: int, text: str) -> None:
        speed.text()
        if streams:
            print(printable(text), end="", flush=True)

    def on_done(index: int, answer: Generation) -> None:
        nonlocal shown
        speed.done(answer)
        waiting[index] = answer
        while shown in waiting:
            _print(model, flags, prompts[shown], waiting.pop(shown), streams)
            shown += 1

    _generate(model, flags, ids, on_text=on_text, on_done=on_done)
    speed.tell(model)


def _generate(model: Model, flags: GenerateFlags, ids: Sequence[Sequence[int]], **calls: Any) -> None:
    model.generate(ids, flags.max_new_tokens, stop=flags.stop, slots=flags.slots, **calls, **_sampling(flags))


def _print(model: Model, flags: GenerateFlags, prompt: Prompt, answer: Generation, is_streamed: bool) -> None:
    if flags.json:
        asked = {"messages": list(prompt.messages)} if prompt.messages else {"prompt": prompt.text}
        log_ps = [round(p, 6) for p in answer.log_probabilities]
        found = {"text": answer.text, "tokens": answer.ids, "logprobs": log_ps, "finish": answer.finish}
        print(json.dumps(asked | found, ensure_ascii=False), flush=True)
        return
    print("" if is_streamed else printable(answer.text or ""), flush=True)
    if flags.logprobs:
        for token, log_p in zip(answer.ids, answer.log_probabilities, strict=True):
            print(f"{token:>8} {log_p:10.4f}  {model.tokenizer.decode([token])!r}", flush=True)


class _Broken(Exception):
    """Ctrl-C has ended an answer."""


def _chat(model: Model, flags: GenerateFlags) -> None:
    """Run a conversation until the input ends."""
    conversations, messages, speed = _conversations(model), list[dict[str, str]](), _Speed()
    if sys.stdin.isatty():
        print("Ctrl-C ends an answer, a second one or Ctrl-D the conversation.", file=sys.stderr)
    while (said := _said(speed)) is not None:
        if said.strip():
            messages.append({"role": "user", "content": said})
            messages.append({"role": "assistant", "content": _turn(model, flags, conversations.prompt(messages), speed)})
            flags = dataclasses.replace(flags, seed=(flags.seed + 1) % 2**32)
    speed.tell(model)


def _said(speed: _Speed) -> str | None:
    """Return the user's next line; None where there is no more."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    asked = time.monotonic()
    line = sys.stdin.readline()
    speed.begun += time.monotonic() - asked  # the user's time is not the model's
    return line.rstrip("\r\n") if line else None


def _turn(model: Model, flags: GenerateFlags, ids: Sequence[int], speed: _Speed) -> str:
    """Print an answer as it is made, and return it, or what there is of it at Ctrl-C."""
    told, is_broken = list[str](), False

    def hear(number: int, request: Request) -> None:
        nonlocal is_broken
        is_broken = True
        if request == "at once":
            end_at_once(128 + number, lambda: say("interrupted by SIGINT"))

    def on_text(_: int, text: str) -> None:
        speed.text()
        if is_broken:
            raise _Broken
        told.append(text)
        print(printable(text), end="", flush=True)

    try:
        with Watch(hear, numbers=(signal.SIGINT,)):
            _generate(model, flags, [ids], on_text=on_text, on_done=lambda _, answer: speed.done(answer))
    except _Broken:
        print(" [ended]", end="", file=sys.stderr)
    print(flush=True)
    return "".join(told)
