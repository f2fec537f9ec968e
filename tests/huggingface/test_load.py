"""`jaxtrain.load`: a folder's or a run's model in Python, with the logits of transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxtrain
from jaxtrain.config import MeshConfig
from jaxtrain.errors import ExplainedError
from jaxtrain.huggingface.importing import import_folder
from tests.huggingface import tiny
from tests.huggingface.test_folders import make
from tests.huggingface.test_oracle import described


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("folder") / "gemma2"
    make(path, "gemma2")
    (path / "tokenizer.json").unlink()  # holds none
    return path


def first_documents() -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the golden batch, and where their first documents lie, which see nothing else."""
    batch = tiny.batch()
    return batch["tokens"], batch["segments"] == batch["segments"][:, :1]


@pytest.mark.parametrize("mesh", [None, MeshConfig(fsdp=2, pipe=2)], ids=["one", "pipe"])
def test_logits_of_a_folder_are_those_of_transformers(folder: Path, mesh: MeshConfig | None):
    golden, _, _ = described("gemma2")
    tokens, is_first = first_documents()
    model = jaxtrain.load(folder, mesh)
    logits = model.logits(tokens)
    assert np.abs(logits - golden["logits"])[is_first].max() < 2e-5
    answer = model.generate(tokens[0, :3].tolist(), 5)
    assert model.logits([tokens[0, :3].tolist() + answer])[0, 2:-1].argmax(-1).tolist()[: len(answer)] == answer


def test_a_run_gives_what_its_folder_gives(folder: Path, tmp_path: Path):
    import_folder(str(folder), str(tmp_path / "run"), "float32")
    tokens = first_documents()[0]
    of_run = jaxtrain.load(tmp_path / "run", dtype="float32").score(tokens)
    np.testing.assert_array_equal(of_run, jaxtrain.load(folder).score(tokens))


def test_a_model_on_a_mesh_is_written_as_the_folder_it_came_from(folder: Path, tmp_path: Path):
    jaxtrain.load(folder, MeshConfig(fsdp=2, pipe=2)).save_hf(tmp_path / "back")
    assert tensors(tmp_path / "back") == tensors(folder)
    before, after = (json.loads((path / "config.json").read_text(encoding="utf-8")) for path in (folder, tmp_path / "back"))
    assert before == after
    with pytest.raises(ExplainedError, match="back is there already"):
        jaxtrain.load(folder).save_hf(tmp_path / "back")


def test_weights_in_8_bits_give_nearly_the_same_and_are_not_written(folder: Path, tmp_path: Path):
    tokens = first_documents()[0]
    exact, held = jaxtrain.load(folder).logits(tokens), jaxtrain.load(folder, quantisation="int8", group=2)
    assert 0 < np.abs(held.logits(tokens) - exact).max() < 0.1 * np.abs(exact).max()
    with pytest.raises(ExplainedError, match="quantised; load the model without"):
        held.save_hf(tmp_path / "held")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_of_another_size_is_named(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Ids beyond the table are refused, in a folder and beside a run; a table that is mostly unused is a warning."""
    size, other = described("gemma2")[1].vocab_size, tmp_path / "other"
    shutil.copytree(folder, other)
    words = {f"word{number}": number for number in range(size + 1)}
    pieces = {"type": "WordLevel", "vocab": words | {"<|endoftext|>": size + 1}, "unk_token": "word0"}
    file = other / "tokenizer.json"
    file.write_text(json.dumps({"model": pieces}), encoding="utf-8")
    with pytest.raises(ExplainedError, match=f"has ids up to {size + 1}, .*vocab_size={size}: .*--model.vocab_size={size + 2}"):
        jaxtrain.load(other)
    file.write_text(json.dumps({"model": pieces | {"vocab": {"word0": 0, "<|endoftext|>": 1}}}), encoding="utf-8")
    import_folder(str(other), str(tmp_path / "run"), "float32")
    assert f"has 2 ids, but the embedding table of these weights {size} rows" in caplog.text
    kept = tmp_path / "run" / "huggingface" / "tokenizer.json"
    kept.write_text(json.dumps({"model": pieces}), encoding="utf-8")
    with pytest.raises(ExplainedError, match=f"has {size + 2} ids, but the model vocab_size={size}"):
        jaxtrain.load(tmp_path / "run")


def test_a_text_begins_as_the_tokenizer_says(folder: Path, tmp_path: Path):
    """With <s>, which our own encoding leaves out; token ids are taken as they are."""
    begun = tmp_path / "begun"
    shutil.copytree(folder, begun)
    vocabulary = {"<s>": 0, "</s>": 1, **{chr(97 + i): 2 + i for i in range(26)}}
    special = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    whole = [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokenizer = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": content, **special} for i, content in enumerate(("<s>", "</s>"))],
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": whole,
            "pair": whole,
            "special_tokens": {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "</s>"},
    }
    (begun / "tokenizer.json").write_text(json.dumps(tokenizer), encoding="utf-8")
    model = jaxtrain.load(begun)
    assert model.ids("ab") == [0, 2, 3]
    assert model.generate("ab", 4) == model.tokenizer.decode(model.generate([0, 2, 3], 4))


def tensors(folder: Path) -> dict[str, bytes]:
    """Return the bits of each weight."""
    return {name: array.tobytes() for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}


def test_what_cannot_be_loaded_is_said(folder: Path, tmp_path: Path):
    with pytest.raises(ExplainedError, match=str(tmp_path / "none")):
        jaxtrain.load(tmp_path / "none")
    with pytest.raises(ExplainedError, match=r"mesh\.tensor=7 does not divide"):
        jaxtrain.load(folder, MeshConfig(fsdp=1, tensor=7))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"mesh": 2}, "mesh=2: give a MeshConfig"),
        ({"mesh": {"fsdp": 2}}, "give a MeshConfig"),
        ({"quantisation": "int4"}, "quantisation='int4': did you mean 'int8'"),
        ({"group": 64}, "group=64: .* with quantisation"),
        ({"quantisation": "int8", "group": -1}, "group=-1"),
    ],
)
def test_arguments_that_say_nothing_are_refused(folder: Path, given: dict, problem: str):
    with pytest.raises(ExplainedError, match=problem):
        jaxtrain.load(folder, **given)


def test_prompts_and_tokens_are_whole_numbers_in_the_vocabulary(folder: Path):
    model = jaxtrain.load(folder)
    for tokens in ([[1.5, 2]], [[True]], [[[1, 2]]], [[10**6]], [[-1]]):
        for call in (model.logits, model.score, model.generate):
            with pytest.raises(ExplainedError, match="whole numbers|token ids are 0 to"):
                call(tokens)
    with pytest.raises(ExplainedError, match="rows of several lengths go one at a time"):
        model.logits([[1, 2], [3]])
    with pytest.raises(ExplainedError, match="slots=0"):
        model.generate([1, 2], 3, slots=0)
