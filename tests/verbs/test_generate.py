"""`jaxtrain generate`: the answers of `jaxtrain.load(...).generate`, from every source of prompts, in every form."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

import jaxtrain
from jaxtrain.data.chat_template import ChatTemplate, read_chat_template
from jaxtrain.errors import ExplainedError
from jaxtrain.inference.model import Model
from jaxtrain.train import loading
from jaxtrain.verbs import generate
from tests.huggingface.test_folders import make

CONTROL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}:{{ m.content }}<|im_end|>{% endfor %}<|im_start|>assistant:"
PROMPTS = ["one two", "three", "four five six"]
Call = Callable[..., tuple[list[str], str]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose tokens are the printable ASCII characters."""
    path = tmp_path_factory.mktemp("folder") / "llama"
    make(path, "llama2")
    vocabulary = {name: i for i, name in enumerate([*CONTROL, *map(chr, range(32, 127))])}
    added = [{"id": i, "content": name, "special": True} for i, name in enumerate(CONTROL)]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer = {"version": "1.0", "added_tokens": [token | flags for token in added], "decoder": {"type": "Fuse"}}
    tokenizer["model"] = {"type": "BPE", "vocab": vocabulary, "merges": [], "unk_token": "<unk>"}
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return jaxtrain.load(folder)


@pytest.fixture
def call(folder: Path, model: Model, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """(lines of the answers, standard error) of the verb, with the model that is loaded once."""

    def run(*flags: str, said: str = "", model: Model = model) -> tuple[list[str], str]:
        monkeypatch.setattr(loading, "load", lambda *_: model)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said.encode())))
        assert generate.main([str(folder), "--max_new_tokens=6", *flags]) == 0
        out, error = capsys.readouterr()
        return out.splitlines(), error

    return run


def test_answers_are_those_of_python_in_the_order_of_the_prompts(call: Call, model: Model, tmp_path: Path):
    expected = model.generate(PROMPTS, 6)
    assert len(set(expected)) == 3
    lines, error = call(*(f"--prompt={prompt}" for prompt in PROMPTS), "--slots=2")
    assert lines == expected
    assert error.startswith("3 prompts, 18 tokens, ")
    (tmp_path / "prompts.txt").write_text("\n\n".join(PROMPTS))
    assert call(f"--prompts={tmp_path}/prompts.txt")[0] == call(said="\n".join(PROMPTS))[0] == expected
    assert [line for prompt in PROMPTS for line in call(f"--prompt={prompt}")[0]] == expected  # streamed


def test_what_is_compiled_is_kept_in_the_users_own_cache(folder: Path, call: Call, home: Path):
    compiled, before = home / ".cache/jaxtrain/compilation", jax.config.jax_compilation_cache_dir

    def programs(model: Model) -> set[str]:
        call("--prompt=one", model=model)
        return {path.name for path in compiled.glob("jit_program-*")}

    first = programs(jaxtrain.load(folder))
    assert len(first) >= 2  # a prompt's and a step's
    assert programs(jaxtrain.load(folder)) == first
    assert jax.config.jax_compilation_cache_dir == before


def test_json_holds_tokens_and_log_probabilities(call: Call, model: Model, tmp_path: Path):
    objects = [{"prompt": PROMPTS[0]}, {"text": PROMPTS[1]}, {"messages": [{"role": "user", "content": "hi"}]}]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, objects)))
    found = [json.loads(line) for line in call(f"--prompts={tmp_path}/in.jsonl", "--json")[0]]
    plain = model.generate(PROMPTS[:2], 6, details=True)
    assert [(one["tokens"], one["text"], one["finish"]) for one in found[:2]] == [(p.ids, p.text, p.finish) for p in plain]
    assert found[0]["logprobs"] == pytest.approx(plain[0].log_probabilities, abs=3e-6)
    assert found[0]["prompt"] == PROMPTS[0]
    assert found[2]["messages"] == objects[2]["messages"]
    stop = plain[0].text[2:4]
    (line,) = call(f"--prompt={PROMPTS[0]}", f"--stop={stop}", "--json")[0]
    assert (json.loads(line)["text"], json.loads(line)["finish"]) == (plain[0].text[:2], "stop")
    lines = call(f"--prompt={PROMPTS[0]}", "--logprobs")[0]
    assert [int(line.split()[0]) for line in lines[1:]] == plain[0].ids


def test_chat_sends_the_whole_conversation_with_control_tokens_that_no_message_can_spell(call: Call, model: Model):
    tokenizer, start, end = model.tokenizer, CONTROL.index("<|im_start|>"), CONTROL.index("<|im_end|>")

    def text(words: str) -> list[int]:
        return tokenizer.encode(words).tolist()

    conversation = [start, *text("user:a<|im_end|>b"), end, start, *text("assistant:")]
    first = model.generate([conversation], 6, details=True)[0].text
    conversation += [*text(first), end, start, *text("user:more"), end, start, *text("assistant:")]
    second = model.generate([conversation], 6, details=True)[0].text
    lines, error = call("--chat", said="a<|im_end|>b\nmore\n")
    assert lines == [first, second]
    assert error.startswith("2 prompts, 12 tokens, ")


def test_templates_run_in_a_sandbox(tmp_path: Path):
    with pytest.raises(ExplainedError, match="SecurityError"):
        ChatTemplate("{{ ''.__class__.__mro__ }}", {}, "here").render([])
    with pytest.raises(ExplainedError, match="SecurityError"):
        ChatTemplate("{{ messages.append(1) }}", {}, "here").render([])
    with pytest.raises(ExplainedError, match="refuses the conversation: no system"):
        ChatTemplate("{{ raise_exception('no system') }}", {}, "here").render([])
    with pytest.raises(ExplainedError, match="not Jinja"):
        ChatTemplate("{% for %}", {}, "here")
    with pytest.raises(ExplainedError, match="has no chat template"):
        read_chat_template(tmp_path)
    settings = {"chat_template": "{{ bos_token }}{{ messages | tojson }}", "bos_token": {"content": "<s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert read_chat_template(tmp_path).render([{"role": "<é>"}]) == '<s>[{"role": "<é>"}]'


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": ', r"in.jsonl, line 2: is not JSON"),
        ('\n["a"]', r"line 2: is a JSON list"),
        ('{"query": "a"}', r"line 1: has none of prompt, text and messages"),
        ('{"prompt": "a", "text": "b"}', r"line 1: has prompt and text of"),
        ('{"prompt": ""}', r'line 1: prompt is "", not a text'),
        ('{"messages": [{"role": "user"}]}', r"line 1: messages is not a list"),
        ("\n", "holds no prompt"),
    ],
)
def test_wrong_lines_are_named(lines: str, message: str, call: Call, tmp_path: Path):
    (tmp_path / "in.jsonl").write_text(lines)
    with pytest.raises(ExplainedError, match=message):
        call(f"--prompts={tmp_path}/in.jsonl")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompts=nowhere"], "--prompts=nowhere: No such file"),
        (["--prompt="], "--prompt is empty"),
        (["--prompt=a", "--chat"], "exclude each other"),
        (["--prompt=a", "--top_p=2"], "top_p=2"),
        (["--prompt=a", "--slots=0"], "at least 1 prompt"),
        (["--prompt=a", "--temprature=1"], "did you mean --temperature"),
        (["--prompt=a", "--optimizer.weight_decay=1"], "generate takes its own flags and --mesh"),
        ([], "standard input: holds no prompt"),
    ],
)
def test_wrong_flags_are_explained_before_weights_are_read(flags: list[str], message: str, call: Call):
    with pytest.raises(ExplainedError, match=message):
        call(*flags)


def test_what_cannot_be_loaded(tmp_path: Path):
    make(tmp_path / "bare", "llama2")
    (tmp_path / "bare" / "tokenizer.json").unlink()
    with pytest.raises(ExplainedError, match="has no tokenizer.json"):
        generate.main([str(tmp_path / "bare"), "--prompt=a"])
    with pytest.raises(ExplainedError, match="nowhere"):
        generate.main([str(tmp_path / "nowhere"), "--prompt=a"])
    with pytest.raises(ExplainedError, match="the mesh wants 1024 devices"):
        generate.main([str(tmp_path / "bare"), "--prompt=a", "--mesh.data=1024"])
