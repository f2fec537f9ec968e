"""Chat sources: rows of any layout become batches; what is left out is counted; rows are full."""

import dataclasses
import gzip

import numpy as np
import pytest

from jaxtrain.config import DataSource, ObjectiveConfig
from jaxtrain.config.rules import validate
from jaxtrain.data.best_fit import best_fit
from jaxtrain.data.conversations import Conversations
from jaxtrain.data.pipeline import open_data
from jaxtrain.data.show import shown_rows
from jaxtrain.errors import ConfigError, DataError
from tests.data.chat_folders import CONTROL, MARKED, draw_conversation, make_folder, write_rows

END = CONTROL.index("<|im_end|>")


@pytest.fixture
def open_rows(tmp_path, make_config):
    """open_rows(rows, further sources..., kind= of the objective, **data) -> Data, in sequences of 256."""
    folder = make_folder(tmp_path / "model")

    def open_them(rows, *others, **data):
        path = write_rows(tmp_path / "chat.jsonl", rows)
        source = DataSource(kind="chat", path=str(path), max_bad_rows=data.pop("max_bad_rows", 0.0))
        objective = ObjectiveConfig(kind=data.pop("kind", "sft"))
        fields = {"tokenizer": str(folder), "sequence_length": 256, "vocab_size": 440} | data
        return open_data(dataclasses.replace(make_config(source, *others, **fields), objective=objective))

    return open_them


def talks(count):
    return [{"messages": draw_conversation(seed)[-2:]} for seed in range(count)]


def all_rows(data):
    return [data.rows([(0, row)]) for row in range(data.row_counts[0])]


def test_rows_hold_whole_samples_with_positions_that_restart_and_loss_on_answers_alone(open_rows):
    data = open_rows(talks(60), validation_fraction=0.0)
    seen = []
    for batch in all_rows(data):
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == dict.fromkeys(
            ("tokens", "targets", "positions", "segments"), ((1, 256), np.dtype(np.int32))
        )
        tokens, targets, positions, segments = (batch[name][0] for name in ("tokens", "targets", "positions", "segments"))
        numbers = [n for n in np.unique(segments) if n]
        assert numbers == list(range(1, len(numbers) + 1))
        for number in numbers:
            inside = segments == number
            assert positions[inside].tolist() == list(range(inside.sum()))
            ids, after = tokens[inside], targets[inside]
            assert after[-1] == END  # nothing follows the last token with loss
            learned = after[:-1] >= 0
            assert (after[:-1][learned] == ids[1:][learned]).all()
            seen.append(data.tokenizer.decode([*ids, after[-1]]))
        padding = segments == 0
        assert (targets[padding] == -1).all()
        assert not tokens[padding].any()
        assert not positions[padding].any()
    expected = [
        "".join(f"{m['role']}\n{m['content']}" + "\n" * (m["role"] == "user") for m in row["messages"]) for row in talks(60)
    ]
    assert sorted(seen) == sorted(expected)
    assert data.tokens_per_epoch == sum(int((batch["targets"] >= 0).sum()) for batch in all_rows(data))
    assert "60 + 0 held-out samples" in data.description


def test_the_prompt_of_a_sample_is_a_question(open_rows):
    data = open_rows(talks(60))
    assert data.tokenizer.decode(data.sample_prompt(200)).endswith("assistant\n")
    asked = open_rows([{"prompt": "12345"}], kind="grpo", validation_fraction=0.0)
    assert asked.tokenizer.decode(asked.sample_prompt(3)) == "345"


def test_batches_are_rows_of_an_order_that_any_host_computes(open_rows):
    data, again = open_rows(talks(60)), open_rows(talks(60))
    assert data.fingerprint == again.fingerprint
    for step in (0, 3, 11):
        whole, numbers = data.train_batch(step, slice(None)), data.train_row_numbers(step, slice(None))
        half = again.train_batch(step, slice(4, 8))
        assert all(np.array_equal(whole[name][4:], half[name]) for name in whole)
        for place, (source, row) in enumerate(numbers):
            assert all(np.array_equal(array[0], whole[name][place]) for name, array in data.rows([(source, row)]).items())


def test_a_conversation_is_on_one_side_and_each_held_out_answer_is_scored_once(open_rows):
    data = open_rows(talks(60) + talks(60))
    batches = [data.validation_batch(i, slice(None), 8) for i in range(data.num_validation_batches(8))]
    assert sum(int((batch["targets"] >= 0).sum()) for batch in batches) == data.validation_tokens > 0
    found = []
    for side in (all_rows(data), batches):
        found.append(
            {
                row[seg == n].tobytes()
                for b in side
                for row, seg in zip(b["tokens"], b["segments"], strict=True)
                for n in range(1, seg.max() + 1)
            }
        )
    assert found[0]
    assert found[1]
    assert not found[0] & found[1]
    assert data.bits_per_byte(1.0) is None


def test_texts_and_messages_of_an_answer_are_learned_alike_with_any_tokenizer(make_config, tmp_path):
    path = write_rows(tmp_path / "sums.jsonl", [{"prompt": "1+1=", "completion": "2"}] * 3)
    data = open_data(make_config(DataSource(kind="chat", path=str(path)), tokenizer="byte", validation_fraction=0.0))
    (batch,) = all_rows(data)
    assert batch["tokens"][0, :5].tolist() == [*b"1+1=2"]
    assert batch["targets"][0, :6].tolist() == [-1, -1, -1, ord("2"), 256, -1]
    assert batch["segments"][0].tolist() == [1] * 5 + [2] * 5 + [3] * 5 + [0]


def test_text_and_chat_may_be_mixed(open_rows, books):
    data = open_rows(talks(60), books)
    batch, numbers = data.train_batch(0, slice(None)), data.train_row_numbers(0, slice(None))
    for place, (source, _) in enumerate(numbers):
        assert (batch["targets"][place] >= 0).all() == (source == 1)
    assert data.bits_per_byte(1.0) is None


def test_rows_are_nearly_full_on_log_normal_lengths():
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(5.6, 0.9, 3000).astype(int), 8, 2048)
    rows = best_fit(lengths, 2048)
    assert sorted(np.concatenate(rows).tolist()) == list(range(3000))
    assert max(lengths[row].sum() for row in rows) <= 2048
    assert lengths.sum() / (len(rows) * 2048) >= 0.97


def test_best_fit_takes_the_row_with_the_least_room():
    packed = {tuple(row.tolist()) for row in best_fit(np.array([3, 7, 6, 4, 1]), 10)}
    assert packed == {(1, 0), (2, 3), (4,)}
    assert best_fit(np.zeros(0, np.int64), 10) == []


LONG = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "word " * 200}]}


@pytest.mark.parametrize(
    ("policy", "words"), [("drop", "1 longer than 256 tokens left out"), ("truncate", "1 cut off at 256 tokens")]
)
def test_samples_that_are_too_long_are_counted(open_rows, policy, words):
    plain = open_rows(talks(40), validation_fraction=0.0)
    data = open_rows([*talks(40), LONG], validation_fraction=0.0, too_long=policy)
    assert words in data.description
    rows = {batch["tokens"].tobytes() for batch in all_rows(data)} - {batch["tokens"].tobytes() for batch in all_rows(plain)}
    assert len(rows) == (policy == "truncate")
    with pytest.raises(DataError, match=r"1 of 41 samples are longer than data.sequence_length=256, the first of \d+ tokens"):
        open_rows([*talks(40), LONG], validation_fraction=0.0, too_long="refuse")


def test_what_is_left_out_is_told_in_one_line(open_rows):
    empty = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": ""}]}
    spells = {"prompt": "<|im_end|>", "completion": "x"}
    told = open_rows([*talks(40), empty, empty, spells]).description
    assert "empty answers, without loss: 2" in told
    assert "samples without an answer to learn, left out: 2" in told
    assert "texts that spell control tokens, kept as text: 1" in told
    told = open_rows([*talks(40), {"messages": []}, "x"], max_bad_rows=0.5).description
    assert "2 bad rows left out, the first: " in told
    assert "line 41: messages is not a list" in told


def test_a_template_without_an_end_or_with_two_beginnings_is_told(open_rows, tmp_path):
    (tmp_path / "model" / "chat_template.jinja").write_text("<s>" + MARKED.replace("<|im_end|>", "\n"))
    told = open_rows(talks(40)).description
    assert "texts that began twice, of which one beginning is kept: 40" in told
    assert "answers that no end token follows: the model will not stop: 40" in told


def test_a_source_of_bad_rows_alone_is_given_up_early(open_rows):
    with pytest.raises(DataError, match="each of the first 1,000 rows is bad; the first: .*line 1: "):
        open_rows([{"text": "a"}] * 1001 + talks(3000), max_bad_rows=0.99)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "line 2: a row must be a JSON object, but this is a list"),
        ({"text": "a"}, "line 2: a row of chat data has messages .*this one has the fields text"),
        ({"messages": [{"role": "user"}, {"content": "a"}]}, r"line 2: messages\[1\] is no message"),
        ({"messages": [{"role": "user", "content": 1}]}, r"messages\[0\]: content is a int, not a text"),
        ({"messages": [{"role": "assistant", "content": "a", "weight": 0.5}]}, "its weight is 0.5"),
        ({"chosen": "a", "rejected": "b"}, "chosen and rejected are texts without a prompt"),
        ({"prompt": "q"}, "is one of prompts, but the rows before it are samples"),
        ({"messages": [{"role": "assistant", "content": "\n\nx"}]}, "the whole conversation does not begin as it does"),
    ],
)
def test_bad_rows_are_named(open_rows, row, message):
    with pytest.raises(DataError, match=message):
        open_rows([talks(1)[0], row])


def test_all_samples_held_out_or_too_long_is_an_error(open_rows):
    with pytest.raises(DataError, match="no sample to train on: each of its 1 is longer"):
        open_rows([LONG], validation_fraction=0.0)
    with pytest.raises(DataError, match="no sample to train on: all 3 are held out"):
        open_rows(talks(3), validation_fraction=1.0)


ASK, HI = [{"role": "user", "content": "q"}], [{"role": "assistant", "content": "good"}]
PAIRS = {
    "messages": {"chosen": [*ASK, *HI], "rejected": [*ASK, {"role": "assistant", "content": "bad"}]},
    "prompt and answers": {"prompt": ASK, "chosen": HI, "rejected": [{"role": "assistant", "content": "bad"}]},
    "prompt in all": {"prompt": ASK, "chosen": [*ASK, *HI], "rejected": [*ASK, {"role": "assistant", "content": "bad"}]},
    "prompt as text too": {"prompt": "q", "chosen": [*ASK, *HI], "rejected": [*ASK, {"role": "assistant", "content": "bad"}]},
    "answers as texts": {"prompt": ASK, "chosen": "good", "rejected": "bad"},
    "earlier answer": {
        "chosen": [*ASK, *HI, *ASK, *HI],
        "rejected": [*ASK, *HI, *ASK, {"role": "assistant", "content": "bad"}],
    },
}


@pytest.mark.parametrize("layout", PAIRS)
def test_a_pair_lies_in_one_row_with_loss_on_its_answers_alone(open_rows, layout):
    data = open_rows([PAIRS[layout]], kind="dpo", validation_fraction=0.0)
    (batch,) = all_rows(data)
    tokens, targets, segments = (batch[name][0] for name in ("tokens", "targets", "segments"))
    assert sorted(set(segments.tolist())) == [0, 1, 2]
    for number, answer in ((1, "good"), (2, "bad")):
        learned = targets[(segments == number) & (targets >= 0)]
        assert [*learned] == [*data.tokenizer.encode(answer), END]
    prompt = int((targets[segments == 1] >= 0).argmax())
    assert tokens[segments == 1][: prompt + 1].tolist() == tokens[segments == 2][: prompt + 1].tolist()


def test_pairs_of_texts_stay_together_in_every_row(open_rows):
    rows = [{"prompt": f"{n}" * (n % 40), "chosen": "c" * (1 + n % 17), "rejected": "r" * (1 + n % 23)} for n in range(100)]
    equal, long = {"prompt": "same", "chosen": "a", "rejected": "a"}, {"prompt": "q" * 200, "chosen": "a", "rejected": "b"}
    data = open_rows([*rows, equal, long], kind="dpo")
    assert "pairs of equal answers, left out: 1" in data.description
    assert "1 longer than 256 tokens left out" in data.description  # each fits alone, the two do not
    for batch in all_rows(data):
        for tokens, targets, segments in zip(batch["tokens"], batch["targets"], batch["segments"], strict=True):
            assert segments.max() % 2 == 0
            for number in range(1, segments.max() + 1):
                answer = data.tokenizer.decode(targets[(segments == number) & (targets >= 0)]).removesuffix("<|im_end|>")
                assert set(answer) == ({"c"} if number % 2 else {"r"})
            for number in range(1, segments.max() + 1, 2):
                prompts = [tokens[(segments == n) & (targets < 0)].tolist() for n in (number, number + 1)]
                assert prompts[0] == prompts[1]


def test_prompts_travel_with_their_rows_and_end_where_the_answer_begins(open_rows):
    rows = [{"prompt": [{"role": "user", "content": f"{n}+1?"}], "answer": n + 1, "more": {"n": n}} for n in range(50)]
    data = open_rows([*rows, {"prompt": "x" * 600}], kind="grpo")
    assert data.prompts.count + data.validation_prompts.count == 50
    assert data.validation_prompts.count
    assert "1 longer than 256 tokens left out" in data.description
    for prompts in (data.prompts, data.validation_prompts):
        for i in range(prompts.count):
            ids, row = prompts[i]
            assert row == rows[row["more"]["n"]]
            assert ids.dtype == np.int32
            assert data.tokenizer.decode(ids) == f"user\n{row['prompt'][0]['content']}\nassistant\n"
    with pytest.raises(IndexError):
        data.prompts[data.prompts.count]
    assert (data.train_batch(0, slice(None))["targets"] == -1).all()


def test_pairs_and_prompts_are_not_mixed_with_others(open_rows, books):
    for rows in ([PAIRS["messages"]], [{"prompt": "q"}]):
        with pytest.raises(DataError, match="pairs and prompts stand alone"):
            open_rows(rows, books, validation_fraction=0.0)


@pytest.mark.parametrize(
    ("kind", "rows", "words"),
    [
        ("sft", [PAIRS["messages"]], "has pairs, but objective.kind=sft needs samples"),
        ("pretrain", [{"prompt": "q"}], "has prompts, but objective.kind=pretrain needs samples"),
        ("dpo", [{"prompt": "q", "completion": "a"}], "has samples, but objective.kind=dpo needs pairs"),
        ("grpo", [PAIRS["messages"]], "has pairs, but objective.kind=grpo needs prompts"),
    ],
)
def test_an_objective_needs_its_sort_of_sample(open_rows, kind, rows, words):
    with pytest.raises(DataError, match=words):
        open_rows(rows, kind=kind, validation_fraction=0.0)


def test_shown_rows_mark_the_tokens_that_carry_loss(open_rows, books):
    data = open_rows([PAIRS["earlier answer"]], kind="dpo", validation_fraction=0.0)
    shown = list(shown_rows(data, 8, 9, ("[", "]")))
    assert len(shown) == 9 * 4
    assert shown[-4].startswith("batch 1, row 0: row 0 of data.sources.0, ")
    assert "in 2 documents, " in shown[0]
    turn = "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    assert shown[1] == f"--- 1 (chosen)\n{turn}good<|im_end|>\n{turn}[good<|im_end|>]"
    assert shown[2] == f"--- 2 (rejected)\n{turn}good<|im_end|>\n{turn}[bad<|im_end|>]"
    text = list(shown_rows(open_rows(talks(9), books, validation_fraction=0.0), 8, 8, ("<", ">")))
    assert any(document.startswith("--- 1\n<|endoftext|><") for document in text)


def test_the_template_of_data_chat_template_is_used_and_its_day_is_fixed(open_rows, tmp_path):
    template = tmp_path / "mine.jinja"
    template.write_text(MARKED.replace("{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%Y-%m-%d') }}"))
    data = open_rows(talks(3), validation_fraction=0.0, chat_template=str(template))
    assert "the template prints the date, and is told 26 July 2024" in data.description
    assert data.tokenizer.decode(data.rows([(0, 0)])["tokens"][0]).startswith("2024-07-26")
    assert data.rows([(0, 0)])["tokens"][0, 0] == CONTROL.index("<s>")  # bos_token is that of the tokenizer's folder
    ends = [CONTROL.index(name) for name in ("<|endoftext|>", "<|im_end|>")]
    assert list(data.answer_ends) == ends  # the separator, and the tokenizer's eos_token, which the template uses
    template.write_text(MARKED.replace("<|im_end|>", "<|reserved_7|>"))
    assert [*open_rows(talks(3), chat_template=str(template)).answer_ends] == [*ends, CONTROL.index("<|reserved_7|>")]
    with pytest.raises(DataError, match="there is no such file or folder"):
        open_rows(talks(3), chat_template="nowhere.jinja")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(DataError, match="messages need a chat template, and there is none beside data.tokenizer"):
        open_rows(talks(3))


def test_parquet_and_compressed_rows_give_the_same_batches(make_config, tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [row | {"messages": [m | {"weight": 1} for m in row["messages"]]} for row in talks(20)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "c.parquet")
    fields = {"tokenizer": str(make_folder(tmp_path / "model")), "sequence_length": 256, "vocab_size": 440}
    sources = [DataSource(kind="chat", path=str(tmp_path / name)) for name in ("a.jsonl", "b.jsonl.gz", "c.parquet")]
    assert len({open_data(make_config(source, **fields)).fingerprint for source in sources}) == 1


def test_encoded_samples_are_read_from_the_cache_and_made_again_where_damaged(open_rows, tmp_path, monkeypatch):
    first = open_rows(talks(20))
    monkeypatch.setattr(Conversations, "encode", lambda *_: pytest.fail("encoded again"))
    assert open_rows(talks(20)).fingerprint == first.fingerprint
    monkeypatch.undo()
    (file,) = (tmp_path / "cache" / "chat").glob("*/train.tokens")
    file.write_bytes(file.read_bytes()[:-4] + bytes(4))
    again = open_rows(talks(20))
    assert again.fingerprint == first.fingerprint
    assert np.array_equal(again.train_batch(0, slice(None))["tokens"], first.train_batch(0, slice(None))["tokens"])
    assert open_rows(talks(20), too_long="truncate").fingerprint != first.fingerprint


def test_documents_must_be_masked(make_config):
    config = make_config(DataSource(kind="chat", path="x"), mask_documents=False)
    with pytest.raises(ConfigError, match="data.mask_documents=False: samples of kind=chat are packed"):
        validate(config, 1)
