"""`jaxtrain tokenize` writes files that train like the text they came from."""

import json
import os
import re
import shlex
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxtrain.cli import explained
from jaxtrain.command import parse_config
from jaxtrain.config import DataSource
from jaxtrain.data import tokenize_parts
from jaxtrain.data.pipeline import open_data
from jaxtrain.errors import DataError
from jaxtrain.verbs.tokenize import main


@pytest.fixture
def run(tmp_path, capsys):
    """run(flags...) -> (exit code, stdout, stderr)"""

    def call(*flags):
        code = explained(lambda: main([*flags, f"--cache_dir={tmp_path}/cache"]))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:280"])
def test_the_printed_flags_train_on_the_same_batches_as_the_text(run, make_config, jsonl_file, tmp_path, tokenizer):
    output = tmp_path / "to kens"
    flags = f"--input={jsonl_file}", "--kind=jsonl", "--validation_fraction=0.2"
    code, printed, _ = run(*flags, f"--tokenizer={tokenizer}", f"--output={output}")
    assert code == 0
    (flags,) = re.findall(r"^ +(--data\.sources.*)$", printed, re.MULTILINE)
    config_file = tmp_path / "config.py"
    config_file.write_text("from jaxtrain.config import *\ndef get_config():\n    return Config()\n")
    parsed = parse_config([f"--config={config_file}", *shlex.split(flags)])
    tokens = make_config(
        *parsed.data.sources,
        tokenizer=parsed.data.tokenizer,
        vocab_size=parsed.model.vocab_size,
    )
    from_tokens = open_data(tokens)
    text = DataSource(kind="jsonl", path=str(jsonl_file))
    from_text = open_data(make_config(text, tokenizer=tokenizer))
    for step in range(3):
        a, b = from_tokens.train_batch(step, slice(None)), from_text.train_batch(step, slice(None))
        assert all(np.array_equal(a[name], b[name]) for name in a)
    assert from_tokens.validation_bytes == from_text.validation_bytes > 0
    assert from_tokens.gzip_bits_per_byte == from_text.gzip_bits_per_byte
    assert from_tokens.validation_tokens == from_text.validation_tokens


def test_damaged_token_files_are_refused_by_name(run, make_config, jsonl_file, tmp_path):
    output = tmp_path / "tokens"
    run(f"--input={jsonl_file}", "--kind=jsonl", f"--output={output}")
    config = make_config(DataSource(kind="tokens", path=str(output)))
    open_data(config)
    whole = (output / "train.bin").read_bytes()
    (output / "train.bin").write_bytes(whole[:-2])
    with pytest.raises(DataError, match=r"train.bin: \d+ bytes, but train.json says"):
        open_data(config)
    (output / "train.bin").write_bytes(whole[:-2] + b"\1\1")
    with pytest.raises(DataError, match=r"train.bin: its contents do not have the checksum"):
        open_data(config)


def test_another_tokenizer_is_refused(run, make_config, jsonl_file, tmp_path):
    output = tmp_path / "tokens"
    run(f"--input={jsonl_file}", "--kind=jsonl", "--tokenizer=bpe:280", f"--output={output}")
    source = DataSource(kind="tokens", path=f"{output}/*.bin")
    with pytest.raises(DataError, match=r"made by another tokenizer \(bpe:280, .*data.tokenizer=byte"):
        open_data(make_config(source))
    data = open_data(make_config(source, tokenizer="none"))
    segments = [data.train_batch(step, slice(None))["segments"].max() for step in range(data.tokens_per_epoch // 16 // 8)]
    assert max(segments) > 1  # the separator is known all the same


def test_a_training_file_alone_is_split_by_document(run, make_config, jsonl_file, tmp_path):
    output = tmp_path / "tokens"
    run(f"--input={jsonl_file}", "--kind=jsonl", f"--output={output}", "--validation_fraction=0")
    data = open_data(make_config(DataSource(kind="tokens", path=f"{output}/train.bin")))
    assert data.validation_tokens > 0
    assert data.validation_bytes == 0
    with pytest.raises(DataError, match="every file is held-out text"):
        open_data(make_config(DataSource(kind="tokens", path=f"{output}/validation.bin")))


def test_errors_are_one_line_and_exit_codes_are_right(run, jsonl_file, tmp_path):
    code, _, printed = run(f"--input={tmp_path}/none*.jsonl", "--kind=jsonl", f"--output={tmp_path}/out")
    assert code == 1
    assert printed.count("\n") == 1
    assert "--input" in printed
    code, _, printed = run(f"--output={tmp_path}/out")
    assert code == 2
    assert "--input is empty" in printed
    code, _, printed = run(f"--input={jsonl_file}", "--kind=jsonl", "--tokenizer=bpe:10", f"--output={tmp_path}/out")
    assert code == 2
    code, _, printed = run(f"--input={jsonl_file}", "--kind=jsonl", f"--output={tmp_path}")
    assert code == 1
    assert "name a new folder" in printed
    code, _, printed = run(f"--input={jsonl_file}", "--kind=jsonl", f"--output={jsonl_file}/below")
    assert code == 1
    assert "cannot be written" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--inptu=x", "--kind=csv", "--validation_fraction=much"])
def test_wrong_flags_exit_with_2(run, flag):
    code, _, printed = run("--output=x", flag)
    assert code == 2
    assert flag in printed


@pytest.mark.parametrize("form", ["bin", "npy"])
def test_training_files_use_the_held_out_files_beside_them(run, make_config, jsonl_file, tmp_path, form):
    """However the files or their folder are named; what is held out is never trained on."""
    output = tmp_path / "tokens"
    run(f"--input={jsonl_file}", "--kind=jsonl", "--validation_fraction=0.3", f"--output={output}")
    whole = open_data(make_config(DataSource("tokens", str(output))))
    if form == "npy":
        for path in output.glob("*.bin"):
            np.save(path.with_suffix(".npy"), np.fromfile(path, np.uint16))
            path.unlink()
    (output / f"other.{form}").write_bytes((output / f"train.{form}").read_bytes())
    (output / "other.json").write_bytes((output / "train.json").read_bytes())
    names = "train", "*", "tr*n", "train,other", "validation,train"
    spellings = [",".join(f"{output}/{name}.{form}" for name in each.split(",")) for each in names]
    for path in (*spellings, str(output), f"{output}/"):
        data = open_data(make_config(DataSource("tokens", path)))
        assert data.validation_tokens == whole.validation_tokens > 0
        assert data.tokens_per_epoch in (whole.tokens_per_epoch, 2 * whole.tokens_per_epoch)
        assert (data.validation_bytes, data.gzip_bits_per_byte) == (
            (whole.validation_bytes, whole.gzip_bits_per_byte) if form == "bin" else (0, None)
        )
    two = open_data(make_config(*(DataSource("tokens", f"{output}/{name}.{form}") for name in ("train", "other"))))
    assert two.validation_tokens == 2 * whole.validation_tokens


def outputs(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture
def small_parts(monkeypatch):
    """Several groups, and several parts in a group."""
    monkeypatch.setattr(tokenize_parts, "GROUP_BYTES", 2000)
    monkeypatch.setattr(tokenize_parts, "PART_CHARACTERS", 500)


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:280"])
def test_the_files_do_not_depend_on_the_processes_or_the_parts(run, text_folder, tmp_path, monkeypatch, tokenizer):
    flags = f"--input={text_folder}/*.txt", f"--tokenizer={tokenizer}", "--validation_fraction=0.3"
    assert run(*flags, "--processes=1", f"--output={tmp_path}/whole")[0] == 0
    monkeypatch.setattr(tokenize_parts, "GROUP_BYTES", 2000)
    monkeypatch.setattr(tokenize_parts, "PART_CHARACTERS", 500)
    for processes in (1, 2):
        output = tmp_path / f"by{processes}"
        assert run(*flags, f"--processes={processes}", f"--output={output}")[0] == 0
        assert outputs(output) == outputs(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir() if "whole" in path.name or "by" in path.name) == [
        "by1",
        "by2",
        "whole",
    ]


def test_a_killed_run_goes_on_with_the_parts_that_are_missing(run, text_folder, tmp_path, small_parts, monkeypatch):
    flags = f"--input={text_folder}/*.txt", "--processes=1", "--validation_fraction=0.3"
    assert run(*flags, f"--output={tmp_path}/whole")[0] == 0
    encode, done = tokenize_parts.encode_part, []

    def killed(documents, tokenizer, name, target):
        if len(done) == 4:
            raise DataError("killed")
        done.append(target.name)
        encode(documents, tokenizer, name, target)

    monkeypatch.setattr(tokenize_parts, "encode_part", killed)
    assert run(*flags, f"--output={tmp_path}/out")[0] == 1
    assert not (tmp_path / "out").exists()
    first = list(done)
    done.clear()
    (tmp_path / "out.parts" / f"{first[-1]}.json").unlink()  # the last one had not come to its end
    monkeypatch.setattr(tokenize_parts, "encode_part", lambda *given: done.append(given[3].name) or encode(*given))
    assert run(*flags, f"--output={tmp_path}/out")[0] == 0
    assert not set(first[:-1]) & set(done)
    assert first[-1] in done
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert not (tmp_path / "out.parts").exists()


def test_parts_of_other_text_are_not_used(run, text_folder, tmp_path, small_parts, monkeypatch):
    flags = f"--input={text_folder}/*.txt", "--processes=1", f"--output={tmp_path}/out"
    with monkeypatch.context() as patched:
        patched.setattr("jaxtrain.data.token_cache.join_parts", lambda *_: (_ for _ in ()).throw(DataError("full")))
        assert run(*flags)[0] == 1
    (text_folder / "00.txt").write_text("another text")
    assert run(*flags)[0] == 0
    assert run(*flags[:2], f"--output={tmp_path}/anew")[0] == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "anew")


def test_a_process_that_dies_is_told(run, text_folder, tmp_path, small_parts, monkeypatch):
    monkeypatch.setattr(tokenize_parts, "_begin_worker", os._exit)
    code, _, printed = run(f"--input={text_folder}/*.txt", "--processes=2", f"--output={tmp_path}/out")
    assert code == 1
    assert "a tokenizing process ended; give the same command again: what is done is kept" in printed


@pytest.mark.slow
def test_a_run_killed_with_its_processes_at_work_goes_on(run, tmp_path):
    """Those processes end by themselves, after their last part; what they leave does not disturb the next run."""
    rows = (json.dumps({"text": f"{i} words and more words " * 2000}) + "\n" for i in range(900))
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    flags = [f"--input={tmp_path}/rows.jsonl", "--kind=jsonl", "--processes=2"]
    command = [sys.executable, "-m", "jaxtrain", "tokenize", *flags, f"--output={tmp_path}/out"]
    process = subprocess.Popen([*command, f"--cache_dir={tmp_path}/cache"])
    while process.poll() is None and not list((tmp_path / "out.parts").glob("0-*.json")):
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not (tmp_path / "out").exists()
    assert run(*flags, f"--output={tmp_path}/out")[0] == 0
    assert run(*flags[:2], "--processes=1", f"--output={tmp_path}/whole")[0] == 0
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
