"""Turn conversations into ids with a mark on each that carries loss.

Which text is the model's answer is said by the template's {% generation %} blocks. Without them it is found by rendering the
conversation up to each answer: that text must begin the whole conversation's, and its ids the whole's ids, since this is what
the model will be asked with. Where it does not, nothing is guessed: the row is refused, with the first token that differs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from jaxtrain.data.chat_rows import Conversation, Texts
from jaxtrain.data.chat_template import ChatTemplate, Message
from jaxtrain.data.documents import encodable
from jaxtrain.data.json_tokenizer import CutIds
from jaxtrain.errors import DataError, ExplainedError

REFUSED = (
    "so it cannot be told which tokens the model would have to write; give a --data.chat_template with "
    '{% generation %} around its answers, "weight": 0 to the earlier answers, or --data.sources.N.max_bad_rows to leave '
    "such rows out"
)


class Encoded(NamedTuple):
    """The ids of a part of a sample, [length] int32, and which of them carry loss."""

    ids: np.ndarray
    learned: np.ndarray
    ends: bool = True
    """Whether a control token ends the last answer."""
    began_twice: bool = False
    """Whether a second token for the beginning of a text was removed."""


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation and its answers in it. `strict` positions must lie between two tokens, as in the prefix."""

    text: str
    spans: list[tuple[int, int]]
    strict: tuple[int, ...] = ()

    @property
    def cuts(self) -> list[int]:
        return [place for span in self.spans for place in span]


class Conversations:
    """Encodes conversations by a chat template, the same way for training and for answering."""

    def __init__(self, tokenizer: Any, template: ChatTemplate | None, begins: Sequence[int] = (), end: int = -1):
        """Take a tokenizer, and the template; None refuses messages.

        Args:
          begins: ids before a prompt that is a text.
          end: the id after a completion that is a text; -1: none.
        """
        self._tokenizer, self._template = tokenizer, template
        self._begins, self._end = np.array(begins, np.int32), end
        self._known: dict[str, np.ndarray] = {}
        self._first = -1 if template is None else self._id_of(template.tokens.get("bos_token", ""))

    def _id_of(self, name: str) -> int:
        """Return the id of a control token; -1 where the name is none."""
        ids = self._marked_ids(name) if name and self._tokenizer.control else ()
        return int(ids[0]) if len(ids) == 1 else -1

    def prompt(self, messages: Sequence[Message], tools: Any = None) -> list[int]:
        """Return the ids of a conversation up to where the model's answer begins; control tokens it spells are plain text."""
        found = self.encode([("the conversation", Conversation(messages, [False] * len(messages), tools, asks=True))])[0]
        if isinstance(found, DataError):
            raise found
        return found.ids.tolist()

    def encode(self, parts: Sequence[tuple[str, Conversation | Texts]]) -> list[Encoded | DataError]:
        """Return the ids of each part, or its fault, in order; each comes with its place, for messages."""
        found: dict[int, Encoded | DataError] = {}
        rendered: dict[int, Rendered] = {}
        texts: dict[int, Texts] = {}
        for i, (where, part) in enumerate(parts):
            try:
                if isinstance(part, Conversation):
                    encodable((one := self._render(part, where)).text, f"{where}:")
                    rendered[i] = one
                else:
                    encodable(part.text, f"{where}:")
                    texts[i] = part
            except DataError as fault:
                found[i] = fault
        cuts = self._cut(list(rendered.values()))
        for (i, one), cut in zip(rendered.items(), cuts, strict=True):
            try:
                found[i] = self._with_marks(one, cut, parts[i][0])
            except DataError as fault:
                found[i] = fault
        found |= zip(texts, self._encode_texts(list(texts.values())), strict=True)
        return [found[i] for i in range(len(parts))]

    # ------------------------------------------------------------------------------------------------------------------
    # Conversations

    def _render(self, part: Conversation, where: str) -> Rendered:
        template = self._template
        if template is None:
            raise DataError(
                f"{where}: messages need a chat template, and there is none beside data.tokenizer; give --data.chat_template=, "
                "a .jinja file or a folder that has one"
            )
        if not self._tokenizer.control:
            raise DataError(f"{where}: messages need a tokenizer.json, which names its control tokens; data.tokenizer has none")
        apart = self._tokenizer.control.spell_apart
        safe = replace(part, messages=apart(list(part.messages)), tools=apart(part.tools))
        try:
            if part.asks:
                rendered = Rendered(template.render(safe.messages, tools=safe.tools), [])
            elif template.marks_answers:
                rendered = self._by_blocks(template, safe, where)
            else:
                rendered = self._by_prefixes(template, safe, where)
        except DataError:
            raise
        except ExplainedError as error:
            raise DataError(f"{where}: {error}") from error
        return rendered

    def _cut(self, rendered: Sequence[Rendered]) -> list[CutIds]:
        if not rendered:
            return []
        return self._tokenizer.encode_marked_batch([one.text for one in rendered], [one.cuts for one in rendered])

    def _by_blocks(self, template: ChatTemplate, part: Conversation, where: str) -> Rendered:
        """Return the spans of {% generation %}, without those of answers that carry no loss."""
        text, spans = template.render_spans(part.messages, tools=part.tools)
        answers = [i for i, message in enumerate(part.messages) if message["role"] == "assistant"]
        if all(part.learned[i] for i in answers):
            return Rendered(text, spans)
        if len(spans) != len(answers):
            raise DataError(
                f"{where}: {len(answers)} answers, some without loss, but {len(spans)} {{% generation %}} blocks of "
                f"{template.where}: which is which is not known; leave the others out of the row"
            )
        return Rendered(text, [span for i, span in zip(answers, spans, strict=True) if part.learned[i]])

    def _by_prefixes(self, template: ChatTemplate, part: Conversation, where: str) -> Rendered:
        """Return as spans what each answer adds to the text before it, up to its end token where it has one."""
        whole, spans, strict = template.render(part.messages, False, part.tools), [], []
        for i, learns in enumerate(part.learned):
            if learns:
                asked = template.render(part.messages[:i], True, part.tools)
                answered = whole if i + 1 == len(part.messages) else template.render(part.messages[: i + 1], False, part.tools)
                for text in (asked, answered):
                    if not whole.startswith(text):
                        raise self._mismatch(text, whole, f"{where}: messages[{i}]")
                end, has_token = self._end_of_answer(answered, len(asked))
                spans.append((len(asked), end))
                strict += [len(asked)] if has_token else [len(asked), end]
        return Rendered(whole, spans, tuple(strict))

    def _end_of_answer(self, text: str, start: int) -> tuple[int, bool]:
        """Return where an answer at the end of `text` ends, and whether a control token ends it.

        White space after its last control token is not the answer's: the model has stopped by then.
        """
        controls = [end for _, end in self._tokenizer.control.found(text[start:])]
        if controls and not text[start + controls[-1] :].strip():
            return start + controls[-1], True
        return len(text), False

    def _with_marks(self, rendered: Rendered, cut: CutIds, where: str) -> Encoded:
        """Return the ids with a mark on those that begin or end inside a span."""
        for place in rendered.strict:
            self._check_prefix(rendered.text, place, cut, where)
        learned = np.zeros(len(cut.ids), bool)
        for start, end in rendered.spans:
            learned[cut.ended[start] : cut.begun[end]] = True
        ends = not rendered.spans or self._end_of_answer(rendered.text[: rendered.spans[-1][1]], rendered.spans[-1][0])[1]
        twice = len(cut.ids) > 1 and self._first >= 0 and bool((cut.ids[:2] == self._first).all())
        return Encoded(cut.ids[int(twice) :], learned[int(twice) :], ends, twice)

    def _check_prefix(self, text: str, place: int, cut: CutIds, where: str) -> None:
        """Raise DataError where the ids of text[:place] do not begin those of the text.

        Only what follows the last control token before `place` can differ: no token reaches over one.
        """
        start = max((begin for begin, end in self._tokenizer.control.found(text[:place]) if end <= place), default=0)
        ids, last = self._marked_ids(text[start:place]), cut.ended[place]
        same = cut.begun[place] == last and (start or last == len(ids))
        if not (same and np.array_equal(cut.ids[max(0, last - len(ids)) : last], ids)):
            raise self._mismatch(text[:place], text, where)

    def _marked_ids(self, text: str) -> np.ndarray:
        """Return the ids of a rendered text; those of short ones are kept: most turns end in the same few tokens."""
        if text not in self._known:
            if len(self._known) > 1000 or len(text) > 1000:
                return self._tokenizer.encode_marked_batch([text], [[]])[0].ids
            self._known[text] = self._tokenizer.encode_marked_batch([text], [[]])[0].ids
        return self._known[text]

    def _mismatch(self, prefix: str, whole: str, where: str) -> DataError:
        """Return the error for a text up to an answer that is not how the whole begins, with the first token that differs."""
        ids, wholes = self._marked_ids(prefix), self._marked_ids(whole)
        same = next(
            (i for i, (one, other) in enumerate(zip(ids, wholes, strict=False)) if one != other), min(len(ids), len(wholes))
        )
        tokens = [
            f"{self._tokenizer.token(int(of[same]))!r} (id {of[same]})" if same < len(of) else "at its end"
            for of in (wholes, ids)
        ]
        return DataError(
            f"{where}: the whole conversation does not begin as it does up to this answer: its token {same} is {tokens[0]}, "
            f"but {tokens[1]} without what follows, {REFUSED}"
        )

    # ------------------------------------------------------------------------------------------------------------------
    # Texts

    def _encode_texts(self, texts: Sequence[Texts]) -> list[Encoded]:
        """Return the ids of prompts and completions; where a token would join the two, each is encoded by itself."""
        prompts = self._tokenizer.encode_batch([text.prompt for text in texts]) if texts else []
        joined = self._tokenizer.encode_batch([text.text for text in texts]) if texts else []
        found = []
        for text, prompt, whole in zip(texts, prompts, joined, strict=True):
            rest = whole[len(prompt) :]
            if text.completion and not np.array_equal(whole[: len(prompt)], prompt):
                rest = self._tokenizer.encode(text.completion)
            end = [self._end] if text.completion and self._end >= 0 else []
            ids = np.concatenate([self._begins, prompt, rest, np.array(end, np.int32)]).astype(np.int32)
            learned = np.arange(len(ids)) >= len(self._begins) + len(prompt)
            found.append(Encoded(ids, learned, bool(end) or not text.completion))
        return found
