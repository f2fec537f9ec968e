"""Folders: in and out bit for bit, and every corruption refused with its name before anything is written."""

from __future__ import annotations

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtrain.checkpoint.stored import read_metadata
from jaxtrain.cli import module_of
from jaxtrain.errors import ExplainedError
from jaxtrain.huggingface import exporting
from jaxtrain.huggingface.exporting import export
from jaxtrain.huggingface.files import WeightsFolder
from jaxtrain.huggingface.importing import import_folder
from tests.huggingface import goldens, tiny

INDEX = "model.safetensors.index.json"


def make(folder: Path, family: str, dtype: type = np.float32, shards: int = 1) -> dict[str, np.ndarray]:
    """A folder of the family's tiny model; return its tensors."""
    golden = goldens.load(family)
    config = golden["config"] | {"dtype": np.dtype(dtype).name}
    tensors = {name: tiny.weight(name, shape, family).astype(dtype) for name, shape in golden["shapes"].items()}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return tensors
    names = list(tensors)
    files = {name: f"model-{i * shards // len(names) + 1:05}-of-{shards:05}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in names if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    return tensors


def weights_of(folder: Path) -> dict[str, np.ndarray]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("family", ["phi3", "deepseek_v3"])
def test_in_and_out(family: str, tmp_path: Path):
    tensors = make(tmp_path / "in", family, ml_dtypes.bfloat16)
    config = import_folder(str(tmp_path / "in"), str(tmp_path / "run"), "float32")
    assert config.data.tokenizer == str(tmp_path / "run" / "huggingface" / "tokenizer.json")
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    found = weights_of(tmp_path / "out")
    assert found.keys() == tensors.keys()
    scores = [name for name in tensors if name.endswith("e_score_correction_bias")]
    for name, tensor in tensors.items():
        assert found[name].tobytes() == (tensor.astype(np.float32) if name in scores else tensor).tobytes(), name
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (tmp_path / "in" / "config.json").read_text()
    )
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "{{ messages }}"
    origin = read_metadata(tmp_path / "run" / "checkpoints", 0)["origin"]
    assert origin == {
        "from": str(tmp_path / "in"),
        "kind": config_kind(family),
        "sha256": WeightsFolder(tmp_path / "in").sha256,
    }


def config_kind(family: str) -> str:
    return goldens.load(family)["config"]["model_type"]


def test_shards_both_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensors = make(tmp_path / "in", "mixtral", shards=3)
    import_folder(str(tmp_path / "in"), str(tmp_path / "run"), "float32")
    monkeypatch.setattr(exporting, "SHARD_BYTES", 100_000)
    export(f"{tmp_path / 'run'}@0", str(tmp_path / "out"))
    files = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    assert files.keys() == tensors.keys()
    assert len(set(files.values())) > 3
    found = weights_of(tmp_path / "out")
    assert all(found[name].tobytes() == tensor.tobytes() for name, tensor in tensors.items())
    WeightsFolder(tmp_path / "out")


def test_verbs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    make(tmp_path / "in", "llama3_2")
    verbs = {name: importlib.import_module(module_of(name)) for name in ("import", "export")}
    assert verbs["import"].main([str(tmp_path / "in"), f"--run_dir={tmp_path / 'run'}"]) == 0
    assert verbs["export"].main([str(tmp_path / "run"), str(tmp_path / "out"), "--dtype=bfloat16"]) == 0
    assert "exported a LlamaForCausalLM in bfloat16" in capsys.readouterr().out
    edit(architectures="gone")(tmp_path / "run" / "huggingface")
    assert verbs["export"].main([str(tmp_path / "run"), str(tmp_path / "unnamed")]) == 0
    assert "exported a llama in float32" in capsys.readouterr().out
    with pytest.raises(ExplainedError, match="there already"):
        verbs["export"].main([str(tmp_path / "run"), str(tmp_path / "out")])
    with pytest.raises(ExplainedError, match="holds checkpoints already"):
        verbs["import"].main([str(tmp_path / "in"), f"--run_dir={tmp_path / 'run'}"])


def test_older_names_and_buffers(tmp_path: Path):
    """The first GPT-2 files lack the names' first part, and hold masks."""
    tensors = make(tmp_path / "in", "gpt2")
    older = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    older["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    save_file(older, tmp_path / "in" / "model.safetensors")
    folder = WeightsFolder(tmp_path / "in")
    everything = (slice(None), slice(None))
    assert folder.fetch("transformer.wte.weight", everything).tobytes() == tensors["transformer.wte.weight"].tobytes()


def test_mxfp4_files_are_expanded(tmp_path: Path):
    tensors = make(tmp_path / "in", "gpt_oss")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    config |= {"hidden_size": 64, "intermediate_size": 32, "quantization_config": {"quant_method": "mxfp4"}}
    (tmp_path / "in" / "config.json").write_text(json.dumps(config))
    random, wide = np.random.default_rng(0), {}
    sizes = {48: 64, 40: 32, 80: 64}
    for name, tensor in tensors.items():
        shape = tuple(sizes.get(n, n) for n in tensor.shape)
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = shape
            wide[f"{name}_blocks"] = random.integers(0, 256, (experts, outputs, inputs // 32, 16)).astype(np.uint8)
            wide[f"{name}_scales"] = random.integers(120, 130, (experts, outputs, inputs // 32)).astype(np.uint8)
        else:
            wide[name] = np.zeros(shape, np.float32)
    save_file(wide, tmp_path / "in" / "model.safetensors")
    name = "model.layers.1.mlp.experts.gate_up_proj"
    got = WeightsFolder(tmp_path / "in").fetch(name, (slice(2, 4), slice(0, 64), slice(0, 64)))
    numbers = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    for expert, i, o in ((0, 0, 0), (1, 33, 7), (1, 62, 63), (0, 31, 1)):
        byte = wide[f"{name}_blocks"][2 + expert, o, i // 32, i % 32 // 2]
        code = byte >> 4 if i % 2 else byte & 15
        value = numbers[code & 7] * (-1 if code & 8 else 1) * 2.0 ** (int(wide[f"{name}_scales"][2 + expert, o, i // 32]) - 127)
        assert got[expert, i, o] == value


# ---------------------------------------------------------------------------------------------------------------------
# Corruptions


def edit(**fields: object) -> Callable[[Path], None]:
    """Change config.json; None removes a field."""

    def corrupt(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | fields
        (folder / "config.json").write_text(json.dumps({name: value for name, value in config.items() if value != "gone"}))

    return corrupt


def tensors(change: Callable[[dict], dict | None]) -> Callable[[Path], None]:
    """Change the tensors of the first shard."""

    def corrupt(folder: Path) -> None:
        file = sorted(folder.glob("*.safetensors"))[0]
        held = load_file(file)
        save_file(change(held) or held, file)

    return corrupt


def index(change: Callable[[dict], object]) -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        found = json.loads((folder / INDEX).read_text())
        change(found["weight_map"])
        (folder / INDEX).write_text(json.dumps(found))

    return corrupt


def bytes_of(change: Callable[[bytes], bytes], name: str = "*.safetensors") -> Callable[[Path], None]:
    def corrupt(folder: Path) -> None:
        file = sorted(folder.glob(name))[0]
        file.write_bytes(change(file.read_bytes()))

    return corrupt


def swap_shards(folder: Path) -> None:
    one, other = sorted(folder.glob("*.safetensors"))[:2]
    one.rename(folder / "third")
    other.rename(one)
    (folder / "third").rename(other)


def as_pickle(folder: Path) -> None:
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")


def copy_tensor(folder: Path) -> None:
    one, other = sorted(folder.glob("*.safetensors"))[:2]
    held = load_file(other)
    name, value = next(iter(load_file(one).items()))
    save_file(held | {name: value}, other)


def without(folder: Path, name: str) -> None:
    sorted(folder.glob(name))[0].unlink()


def poison(value: float) -> Callable[[dict], None]:
    def change(held: dict) -> None:
        name = next(name for name in held if "mlp.down_proj.weight" in name)
        held[name][1, 2] = value

    return change


FIRST = "model.embed_tokens.weight"
CORRUPTIONS = {
    "no config": (lambda folder: without(folder, "config.json"), "has no config.json"),
    "config is no JSON": (bytes_of(lambda data: data[:-5], "config.json"), "cannot be read"),
    "config is a list": (lambda folder: (folder / "config.json").write_text("[]"), "holds a list"),
    "unknown family": (edit(model_type="mamba"), "model_type='mamba' is not a family"),
    "no family": (edit(model_type="gone"), "model_type=None"),
    "unknown field": (edit(rotary_twist=2), "rotary_twist=2"),
    "unknown activation": (edit(hidden_act="relu6"), 'hidden_act="relu6" is not supported'),
    "unknown rope": (edit(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4}), "type dynamic is not supported"),
    "unknown rope field": (
        edit(rope_parameters={"rope_type": "linear", "factor": 2.0, "bend": 3}),
        "type linear has unknown fields: bend",
    ),
    "other width": (edit(hidden_size=64), "config.json gives"),
    "more layers": (edit(num_hidden_layers=6), r"model.layers.5.*missing"),
    "fewer layers": (edit(num_hidden_layers=4), r"model.layers.4.*not part of the model"),
    "heads that do not divide": (edit(num_key_value_heads=3), "must divide num_attention_heads=4"),
    "no heads": (edit(num_attention_heads=0), "num_heads=0|cannot be translated"),
    "a size in words": (edit(hidden_size="wide"), "cannot be translated|must be a whole number"),
    "a missing size": (edit(vocab_size="gone"), "has no vocab_size"),
    "larger vocabulary": (edit(vocab_size=128), r"embed_tokens.weight is \[101, 48\], but config.json gives \[128, 48\]"),
    "quantised": (edit(quantization_config={"quant_method": "gptq"}), "quantised"),
    "untied": (edit(tie_word_embeddings=False), "lm_head.weight: missing"),
    "truncated header": (bytes_of(lambda data: data[:100]), "no whole safetensors file"),
    "truncated data": (bytes_of(lambda data: data[:-7]), "no whole safetensors file"),
    "empty file": (bytes_of(lambda data: b""), "no whole safetensors file"),
    "header of garbage": (bytes_of(lambda data: data[:8] + b"x" * 64 + data[72:]), "no whole safetensors file"),
    "header longer than the file": (bytes_of(lambda data: b"\xff" * 7 + data[7:]), "no whole safetensors file"),
    "trailing bytes": (bytes_of(lambda data: data + b"more"), "no whole safetensors file"),
    "swapped shards": (swap_shards, "says in model-0000"),
    "missing shard": (lambda folder: without(folder, "model-00002*"), "is missing"),
    "missing index entry": (index(lambda files: files.pop(next(iter(files)))), "says nowhere"),
    "index names a missing tensor": (index(lambda files: files.update(ghost=next(iter(files.values())))), "ghost is not in"),
    "index names a path": (index(lambda files: files.update({FIRST: "../other.safetensors"})), "outside the folder"),
    "index without a map": (lambda folder: (folder / INDEX).write_text("{}"), "no weight_map"),
    "doubled tensor": (copy_tensor, " and in model-0000"),
    "extra tensor": (
        lambda folder: (
            tensors(lambda held: held | {"model.extra.weight": np.ones((2, 2), np.float32)})(folder),
            index(lambda files: files.update({"model.extra.weight": sorted(files.values())[0]}))(folder),
        ),
        "model.extra.weight: not part",
    ),
    "transposed tensor": (tensors(lambda held: held | {FIRST: held[FIRST].T.copy()}), r"\[48, 101\]"),
    "integers": (tensors(lambda held: held | {FIRST: held[FIRST].astype(np.int32)}), "is I32"),
    "NaN": (tensors(poison(np.nan)), "mlp.down_proj.weight holds numbers that are not finite"),
    "infinity": (tensors(poison(-np.inf)), "not finite"),
    "a tokenizer of more tokens": (
        lambda folder: (folder / "tokenizer.json").write_text('{"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 101}]}'),
        "has ids up to 101, but config.json has vocab_size=101: .*vocab_size=102",
    ),
    "a truncated tokenizer": (bytes_of(lambda data: data[:-1], "tokenizer.json"), "is no tokenizer.json"),
    "a pickle": (as_pickle, "run code of whoever made them"),
    "no weights": (lambda folder: [file.unlink() for file in folder.glob("model*")], "neither model.safetensors nor"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("folders") / "whole"
    make(folder, "llama3_2", shards=3)
    return folder


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_corruptions(name: str, whole: Path, tmp_path: Path):
    corrupt, words = CORRUPTIONS[name]
    shutil.copytree(whole, tmp_path / "in")
    corrupt(tmp_path / "in")
    with pytest.raises(ExplainedError, match=words):
        import_folder(str(tmp_path / "in"), str(tmp_path / "run"), "float32")
    left = [path.name for path in (tmp_path / "run").rglob("*")] if (tmp_path / "run").exists() else []
    assert left in ([], ["checkpoints"])


def test_tied_head_of_its_own(tmp_path: Path):
    held = make(tmp_path / "in", "llama3_2")
    head = held[FIRST].copy()
    save_file(held | {"lm_head.weight": head}, tmp_path / "in" / "model.safetensors")
    WeightsFolder(tmp_path / "in")
    head[100, 3] += 1
    save_file(held | {"lm_head.weight": head}, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ExplainedError, match="lm_head.weight is not model.embed_tokens.weight"):
        WeightsFolder(tmp_path / "in")


def test_export_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path / "in", "llama3_2")
    import_folder(str(tmp_path / "in"), str(tmp_path / "run"), "float32")

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "save_file", fail)
    with pytest.raises(OSError, match="No space"):
        export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "run"]
