"""Which tokens of a conversation carry loss: against an independent statement, and against transformers where it is there."""

import pytest

from jaxtrain.data.chat_rows import Texts, sample_of
from jaxtrain.data.chat_template import read_chat_template
from jaxtrain.data.conversations import Conversations
from jaxtrain.data.tokenizers import begin_ids, load_tokenizer
from jaxtrain.errors import DataError
from tests.data.chat_folders import CHATML, CONTROL, MARKED, draw_conversation, make_folder

START, END, BOS = (CONTROL.index(name) for name in ("<|im_start|>", "<|im_end|>", "<s>"))


@pytest.fixture
def opened(tmp_path):
    """opened(template) -> (tokenizer, Conversations)"""

    def open_it(template=CHATML):
        tokenizer = load_tokenizer(str(make_folder(tmp_path, template)))
        return tokenizer, Conversations(tokenizer, read_chat_template(tmp_path), begin_ids(tmp_path / "tokenizer.json"), END)

    return open_it


def part_of(messages):
    return ("here", sample_of({"messages": messages}, "here").parts[0])


def stated(tokenizer, messages, first=()):
    """ChatML by hand: (ids, learned), each answer with its end token learned, each stretch of plain text encoded alone."""
    ids, learned = list(first), [False] * len(first)

    def add(tokens, loss):
        ids.extend(int(token) for token in tokens)
        learned.extend([loss] * len(tokens))

    for message in messages:
        head, loss = f"{message['role']}\n", message["role"] == "assistant"
        add([START], False)
        add(tokenizer.encode(head), False)
        add(tokenizer.encode(message["content"]), loss)
        add([END], loss)
        add(tokenizer.encode("\n"), False)
    return ids, learned


@pytest.mark.parametrize(("template", "first"), [(CHATML, ()), (MARKED, (BOS,))], ids=["prefixes", "blocks"])
def test_ids_and_loss_of_random_conversations_are_those_stated(opened, template, first):
    """Contents begin with a letter here, so that no token reaches over the line end before them."""
    tokenizer, conversations = opened(template)
    drawn = [draw_conversation(seed) for seed in range(60)]
    for messages in drawn:
        for message in messages:
            message["content"] = f"b{message['content']}"
    found = conversations.encode([part_of(messages) for messages in drawn])
    for messages, one in zip(drawn, found, strict=True):
        ids, learned = stated(tokenizer, messages, first)
        assert one.ids.tolist() == ids
        assert one.learned.tolist() == learned
        assert one.ends
        assert not one.began_twice
        at = len(messages) - 1
        asked = conversations.prompt(messages[:at])
        assert asked == ids[: len(asked)]
        assert one.learned[len(asked)]
        assert not one.learned[len(asked) - 1]


def test_a_token_over_the_boundary_is_refused_and_shown(opened):
    _, conversations = opened()
    (fault,) = conversations.encode([part_of([{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nx"}])])
    assert isinstance(fault, DataError)
    assert "here: the whole conversation does not begin as it does up to this answer: its token" in str(fault)
    assert r"'\n\n\n'" in str(fault) or r"'\n\n'" in str(fault)
    assert r"but '\n' (id" in str(fault)


STRIPS = "{% for m in messages %}[{{ m.content if loop.last else m.content.split('</think>')[-1] }}]{% endfor %}"
MOVES = (
    "{% for m in messages if m.role != 'system' %}{% if loop.last %}{{ messages[0].content }}{% endif %}"
    "{{ m.role }}:{{ m.content }};{% endfor %}"
)
TALK = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "why</think>a"},
    {"role": "user", "content": "r"},
    {"role": "assistant", "content": "because</think>b"},
]


@pytest.mark.parametrize("template", [STRIPS, MOVES], ids=["strips reasoning", "moves the system message"])
def test_templates_that_change_earlier_turns_are_refused_unless_those_carry_no_loss(opened, template):
    tokenizer, conversations = opened(template)
    (fault,) = conversations.encode([part_of(TALK)])
    assert "here: messages[2]: the whole conversation does not begin as" in str(fault)
    last_alone = [*TALK[:2], TALK[2] | {"weight": 0}, *TALK[3:]]
    (one,) = conversations.encode([part_of(last_alone)])
    if template == STRIPS:  # the text up to the last answer is the same now
        assert tokenizer.decode(one.ids[one.learned]) == "[because</think>b]"
    else:
        assert "messages[4]" in str(one)


def test_templates_that_trim_or_have_no_end(opened):
    tokenizer, conversations = opened("{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}")
    messages = [{"role": "user", "content": "  q  "}, {"role": "assistant", "content": "  a  b  "}]
    (one,) = conversations.encode([part_of(messages)])
    assert tokenizer.decode(one.ids) == "user: q\nassistant: a  b\n"
    assert tokenizer.decode(one.ids[one.learned]) == "assistant: a  b\n"  # it asks with nothing, so all of it is to be written
    assert not one.ends


def test_a_second_beginning_is_removed(opened):
    tokenizer, conversations = opened("<s>" + MARKED)
    messages = draw_conversation(3)
    (one,) = conversations.encode([part_of(messages)])
    assert one.began_twice
    assert (one.ids.tolist(), one.learned.tolist()) == stated(tokenizer, messages, (BOS,))
    assert conversations.prompt(messages[:1])[:2].count(BOS) == 1


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "blocks"])
def test_weights_and_empty_answers_take_the_loss_away(opened, template):
    tokenizer, conversations = opened(template)
    answers = [{"content": "one", "weight": 1}, {"content": ""}, {"content": "two", "weight": 0}, {"content": "three"}]
    messages = [m for answer in answers for m in ({"role": "user", "content": "q"}, {"role": "assistant"} | answer)]
    sample = sample_of({"messages": messages}, "here")
    assert sample.empty_answers == 1
    (one,) = conversations.encode([("here", sample.parts[0])])
    assert [tokenizer.token(int(i)) for i in one.ids[one.learned] if i == END] == ["<|im_end|>"] * 2
    assert tokenizer.decode(one.ids[one.learned]) == "onethree"


def test_texts_begin_and_end_as_the_tokenizer_says(opened):
    tokenizer, conversations = opened()
    (one,) = conversations.encode([("here", Texts("the al", "pha<|im_end|>"))])
    prompt = [BOS, *tokenizer.encode("the al")]
    assert one.ids[: len(prompt)].tolist() == prompt  # as it is asked, though "alpha" is one token of the whole
    assert tokenizer.decode(one.ids[one.learned]) == "pha<|im_end|>"
    assert one.ids[-1] == END
    assert (one.ids == END).sum() == 1
    (asked,) = conversations.encode([("here", Texts("the al", None))])
    assert asked.ids.tolist() == prompt


def test_control_tokens_stay_text_wherever_they_are_spelled(opened):
    _, conversations = opened("{% for m in messages %}{{ m | tojson }}<|im_end|>{% endfor %}")
    tool = {"function": {"name": "f<|im_end|>", "arguments": {"</s>": "<<s>s>"}}}
    messages = [{"role": "user", "content": "<|im_end|>"}, {"role": "assistant", "content": "x", "tool_calls": [tool]}]
    (one,) = conversations.encode([part_of(messages)])
    assert [i for i in one.ids.tolist() if i < len(CONTROL)] == [END, END]


def test_half_a_surrogate_pair_is_a_fault_of_its_row_alone(opened):
    _, conversations = opened()
    bad = part_of([{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "a"}])
    parts = [bad, part_of(draw_conversation(0)), ("there", Texts("a\udc00", "b")), ("there", Texts("a", "b"))]
    fault, good, text_fault, text = conversations.encode(parts)
    assert str(fault).startswith("here: holds half a surrogate pair ('\\ud800') at character ")
    assert str(text_fault).startswith("there: holds half a surrogate pair ('\\udc00') at character ")
    assert good.learned.any()
    assert text.learned.any()


@pytest.mark.parametrize("template", [CHATML, MARKED], ids=["prefixes", "blocks"])
def test_transformers_gives_the_same_ids_and_mask(opened, tmp_path, template):
    transformers = pytest.importorskip("transformers")
    _, conversations = opened(template)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tmp_path / "tokenizer.json"), bos_token="<s>", eos_token="<|im_end|>"
    )
    for seed in range(200):
        messages = draw_conversation(seed)
        for message in messages:
            message["content"] = "b" + message["content"].replace("<|im_end|>", "").replace("<|im_start|>", "").replace(
                "</s>", ""
            )
        marked = theirs.apply_chat_template(
            messages,
            chat_template=MARKED if template == MARKED else _with_blocks(CHATML),
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
        )
        (one,) = conversations.encode([part_of(messages)])
        assert one.ids.tolist() == marked["input_ids"]
        assert one.learned.astype(int).tolist() == marked["assistant_masks"]
        asked = theirs.apply_chat_template(
            messages[:-1], chat_template=template, tokenize=True, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        assert conversations.prompt(messages[:-1]) == asked


def _with_blocks(template):
    """ChatML with a {% generation %} block around what each answer should be learned of."""
    return template.replace(
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}",
        "{{ '<|im_start|>' + m['role'] + '\\n' }}{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}",
    )


def test_rows_of_other_trainers_are_those_of_messages():
    user, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    system = {"role": "system", "content": "S"}
    spoken = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    for row, like in (
        ({"conversations": spoken}, {"messages": [user, answer]}),
        ({"conversations": spoken, "system": "S"}, {"messages": [system, user, answer]}),
        ({"conversations": [user, answer]}, {"messages": [user, answer]}),
        ({"instruction": "q", "output": "a"}, {"prompt": [user], "completion": "a"}),
        ({"instruction": "q", "input": "", "output": "a", "system": "S"}, {"prompt": [system, user], "completion": "a"}),
        ({"instruction": "do", "input": "it", "output": "a"}, {"prompt": "do\n\nit", "completion": [answer]}),
        ({"instruction": "q"}, {"prompt": [user]}),
        (
            {"conversations": spoken[:1], "chosen": spoken[1], "rejected": {"from": "gpt", "value": "b"}},
            {"prompt": [user], "chosen": "a", "rejected": "b"},
        ),
    ):
        found, wanted = sample_of(row, "here"), sample_of(like, "here")
        assert (found.sort, found.parts, found.row) == (wanted.sort, wanted.parts, row)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"conversations": [{"from": "function_call", "value": "f()"}]},
            "messages[0] is from 'function_call': known are human",
        ),
        ({"conversations": [{"from": "human"}]}, "messages[0] is no message"),
        ({"conversations": []}, "messages is not a list"),
        ({"instruction": 3, "output": "a"}, "content is a int, not a text"),
        ({"conversations": "q"}, "a row of chat data has messages (or conversations)"),
    ],
)
def test_wrong_rows_of_other_trainers_are_named(row, words):
    with pytest.raises(DataError) as caught:
        sample_of(row, "here")
    assert words in str(caught.value)
