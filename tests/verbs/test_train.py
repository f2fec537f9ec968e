"""The program as a person uses it: in a process of its own, on a tiny corpus, with right and wrong input."""

import fcntl
import importlib.metadata
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from jaxtrain import cli
from jaxtrain.checkpoint import committed_steps, read_metadata
from jaxtrain.config import Config, MeshConfig
from jaxtrain.config.names import field_values
from jaxtrain.config.rules import validate
from jaxtrain.errors import EXIT_DONE, EXIT_ERROR, EXIT_STOPPED, EXIT_USAGE, ExplainedError, Stopped
from jaxtrain.verbs import train
from tests import quick
from tests.lines import STAMP, unstamped

REPOSITORY = Path(__file__).parents[2]
STEPS = 120
SMALL_PIPE = 4096  # bytes: after some thirty unread lines the program waits for its reader

CONFIG = """
from jaxtrain.config import *

def get_config():
    return Config(
        name="tiny",
        model=ModelConfig(num_layers=2, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32, dtype="float32"),
        data=DataConfig(sources=(DataSource(kind="text", path="{folder}/*.txt"),), tokenizer="byte", sequence_length=32,
                        validation_fraction=0.2, cache_dir="{folder}/cache"),
        optimizer=OptimizerConfig(peak_lr=1e-2, warmup_steps=5),
        train=TrainConfig(steps={steps}, global_batch_size=8, log_every=1, validate_every=50, remat="none", sample_tokens=5,
                          compilation_cache="{folder}/compiled"),
        checkpoint=CheckpointConfig(every=50),
    )
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a tiny corpus and tiny.py, a config that trains on it."""
    folder = tmp_path_factory.mktemp("main")
    generator = random.Random(0)
    for i in range(10):
        words = generator.choices(["the cat ", "sat on ", "a mat\n", "été "], k=400)
        (folder / f"{i}.txt").write_text("".join(words), encoding="utf-8")
    (folder / "tiny.py").write_text(CONFIG.format(folder=folder, steps=STEPS))
    return folder


def command(config, *flags):
    return [sys.executable, "-m", "jaxtrain.main", f"--config={config}", *flags]


def environment(**variables):
    """One device."""
    return {**os.environ, "XLA_FLAGS": quick.FLAGS, "JAX_PLATFORMS": "cpu", **variables}


def run(config, *flags, **variables):
    """The finished process: its returncode, stdout and stderr."""
    return subprocess.run(
        command(config, *flags), env=environment(**variables), cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def training_losses(run_dir):
    return [(row["step"], row["loss"]) for row in rows_of(run_dir) if "loss" in row]


# ---------------------------------------------------------------------------------------------------------------------
# A whole run


@pytest.fixture(scope="module")
def whole(folder):
    """(the finished process, its run_dir)"""
    return run(folder / "tiny.py", f"--run_dir={folder}/whole"), folder / "whole"


def test_a_run_ends_well(whole):
    process, run_dir = whole
    assert process.returncode == EXIT_DONE, process.stderr
    assert process.stderr == ""
    assert {"checkpoints", "config.json", "loss.png", "metrics.jsonl", "tensorboard"} <= {p.name for p in run_dir.iterdir()}


def test_plain_lines_where_there_is_no_terminal(whole):
    output = whole[0].stdout
    assert "\x1b" not in output
    assert "\r" not in output
    assert all(STAMP.match(line) for line in output.splitlines() if re.search(r"step \d+/", line))
    lines = unstamped(output).splitlines()
    for step in (1, 50, STEPS):
        assert len([line for line in lines if line.startswith(f"step {step}/{STEPS} | loss ")]) == 1
    assert len([line for line in lines if re.match(rf"step {STEPS}/{STEPS} \| validation loss .* bits/byte", line)]) == 1
    for head in ("run ", "model ", "mesh ", "attention ", "data ", "compiled ", "baseline ", "picture ", "done "):
        assert len([line for line in lines if line.startswith(head)]) == 1, head


def test_the_folder_says_which_program_ran_and_what_it_said(whole):
    process, run_dir = whole
    log = (run_dir / "log.txt").read_text()
    said = unstamped(process.stdout).partition("--- held-out")[0].splitlines()
    assert said.pop(0).startswith("memory ")  # asked for before run_dir is touched
    assert [line for line in unstamped(log).splitlines() if line in said] == said
    (start,) = map(json.loads, (run_dir / "starts.jsonl").read_text().splitlines())
    assert start["jaxtrain"] == importlib.metadata.version("jaxtrain")
    assert start["command"].endswith(f"--run_dir={run_dir}")
    assert start["host"] == socket.gethostname()
    assert start == read_metadata(run_dir / "checkpoints", STEPS)["program"]


def test_training_rows_have_the_promised_names(whole):
    rows = [row for row in rows_of(whole[1]) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    promised = {
        "step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "step_seconds", "data_wait_seconds",
        "device_memory_bytes", "tflops_per_second_per_device_full", "tflops_per_second_per_device_causal", "mfu_full",
        "mfu_causal", "eta_seconds",
    }  # fmt: skip
    for row in rows:
        assert promised <= set(row)
        assert row["tokens_per_second"] > 0
        assert row["step_seconds"] > 0
    assert rows[0]["learning_rate"] == pytest.approx(1e-2 / 5)
    assert rows[4]["learning_rate"] == pytest.approx(1e-2)
    assert [row["tokens"] for row in rows] == [8 * 32 * step for step in range(1, STEPS + 1)]


def test_validation_rows_have_the_promised_names(whole):
    rows = [row for row in rows_of(whole[1]) if "validation_loss" in row]
    assert [row["step"] for row in rows] == [50, 100, STEPS]
    assert all(row["validation_bits_per_byte"] > 0 for row in rows)


def test_the_loss_falls(whole):
    losses = [loss for _, loss in training_losses(whole[1])]
    assert losses[0] == pytest.approx(np.log(257), rel=0.02)  # nothing learnt: all ids alike
    assert losses[-1] < 2.0
    validation = [row["validation_loss"] for row in rows_of(whole[1]) if "validation_loss" in row]
    assert validation == sorted(validation, reverse=True)
    assert validation[-1] == pytest.approx(losses[-1], rel=0.2)


def test_config_json_is_fully_resolved(whole):
    written = json.loads((whole[1] / "config.json").read_text())
    assert written["mesh"] == dict.fromkeys(["replica", "pipe", "data", "fsdp", "expert", "context", "tensor"], 1)
    assert written["train"]["steps"] == STEPS
    assert written["run_dir"] == str(whole[1])


def test_checkpoints_pictures_and_events(whole):
    run_dir = whole[1]
    assert committed_steps(run_dir / "checkpoints") == [50, 100, STEPS]
    picture = matplotlib.image.imread(run_dir / "loss.png")
    assert min(picture.shape[:2]) > 300
    assert picture.std() > 0.01
    (events,) = (run_dir / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in (b"train/loss", b"train/loss_mean", b"train/grad_norm", b"validation/bits_per_byte"):
        assert name in content


def test_a_finished_run_started_again_says_that_nothing_is_left(whole, folder, capsys):
    """It compiles nothing and samples nothing; also on another mesh. A picture that is missing is drawn."""
    (whole[1] / "loss.png").unlink()
    code = cli.explained(lambda: train.main([f"--config={folder}/tiny.py", f"--run_dir={whole[1]}", "--mesh.fsdp=8"]))
    said = capsys.readouterr().out
    assert code == EXIT_DONE
    assert f"done       all {STEPS} steps were done before; a larger --train.steps trains on" in said
    assert "compiled" not in said
    assert "---" not in said
    assert (whole[1] / "loss.png").exists()


def test_a_sample_ends_the_run(whole):
    assert "--- held-out text:\n" in whole[0].stdout
    assert whole[0].stdout.index("--- the model goes on:\n") > whole[0].stdout.index("done ")


# ---------------------------------------------------------------------------------------------------------------------
# Stopped by signals, and resumed


def run_until_signalled(arguments, first_step, number):
    """Starts the program, signals it when it has logged `first_step`, and gives (exit code, output).

    It cannot get far beyond that step meanwhile, since its output goes into a small pipe.
    """
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, SMALL_PIPE)
    process = subprocess.Popen(arguments, env=environment(), cwd=REPOSITORY, stdout=writing, stderr=subprocess.STDOUT)
    os.close(writing)
    lines = []
    with open(reading, encoding="utf-8") as output:
        for line in output:
            lines.append(line)
            if unstamped(line).startswith(f"step {first_step}/"):
                process.send_signal(number)
    return process.wait(60), "".join(lines)


@pytest.fixture(scope="module")
def parts(folder, whole):
    """The same run in three: stopped by SIGINT, resumed, stopped by SIGTERM, resumed. [(exit code, output, last saved step)]"""
    run_dir = folder / "parts"
    arguments, outcomes = command(folder / "tiny.py", f"--run_dir={run_dir}"), []
    for number in (signal.SIGINT, signal.SIGTERM):
        first = 3 if not outcomes else outcomes[-1][2] + 3
        code, output = run_until_signalled(arguments, first, number)
        outcomes.append((code, output, committed_steps(run_dir / "checkpoints")[-1]))
    process = run(folder / "tiny.py", f"--run_dir={run_dir}")
    outcomes.append((process.returncode, process.stdout + process.stderr, committed_steps(run_dir / "checkpoints")[-1]))
    return outcomes


@pytest.mark.parametrize(("part", "name"), [(0, "SIGINT"), (1, "SIGTERM")])
def test_a_signal_stops_after_saving(parts, part, name):
    code, output, saved = parts[part]
    output = unstamped(output)
    assert code == EXIT_STOPPED, output
    assert "Traceback" not in output
    (heard,) = re.findall(rf"^{name} received: .*$", output, re.MULTILINE)
    (stopped,) = re.findall(r"^stopped .*$", output, re.MULTILINE)
    assert stopped == f"stopped    after saving step {saved}; the same command goes on from there"
    logged = [int(step) for step in re.findall(rf"^step (\d+)/{STEPS} \| loss", output, re.MULTILINE)]
    assert logged[-1] == saved  # the last step that was taken is the one that was saved


def test_the_same_command_resumes_to_the_end(parts):
    code, output, saved = parts[2]
    assert code == EXIT_DONE, output
    assert saved == STEPS
    assert f"resume     from step {parts[1][2]}\n" in output
    assert "changed" not in output
    assert STEPS - parts[1][2] >= 20


def test_losses_are_those_of_an_uninterrupted_run_bit_for_bit(parts, whole, folder):
    assert training_losses(folder / "parts") == training_losses(whole[1])
    names = ("step", "loss", "grad_norm", "learning_rate", "tokens", "validation_loss", "validation_bits_per_byte")
    exact = [[{name: row.get(name) for name in names} for row in rows_of(d)] for d in (folder / "parts", whole[1])]
    assert exact[0] == exact[1]


def test_a_signal_before_the_loop_loses_nothing(capsys):
    def stopped():
        raise Stopped("SIGTERM received outside the training loop")

    assert cli.explained(stopped) == EXIT_STOPPED
    assert capsys.readouterr().err.startswith("stopped: SIGTERM received")


def test_a_closed_pipe_does_not_end_the_run(folder, whole):
    """As `| head -1` does; and Ctrl-C ends a `| tee` before the run has said its last words."""
    run_dir = folder / "unheard"
    arguments = command(folder / "tiny.py", f"--run_dir={run_dir}")
    process = subprocess.Popen(
        arguments, env=environment(), cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(120) == EXIT_DONE, errors
    assert errors == ""
    assert training_losses(run_dir) == training_losses(whole[1])


# ---------------------------------------------------------------------------------------------------------------------
# Another layout


def test_ten_parts_on_five_nodes(folder):
    process = run(
        "configs/ten_parts_on_five_nodes.py",
        f"--run_dir={folder}/parts_of_ten",
        "--model.num_layers=12",
        "--model.embed_dim=20",
        "--model.num_heads=2",
        "--model.num_kv_heads=2",
        "--model.head_dim=10",
        "--model.mlp_dim=20",
        "--data.sources.0.kind=text",
        f"--data.sources.0.path={folder}/*.txt",
        f"--data.cache_dir={folder}/cache",
        "--train.compilation_cache=",
        "--train.steps=20",
        "--optimizer.peak_lr=1",
        JAX_NUM_CPU_DEVICES="5",
    )
    assert process.returncode == EXIT_DONE, process.stderr
    assert "pipe=5 (5 x cpu)" in process.stdout
    losses = training_losses(folder / "parts_of_ten")
    assert [step for step, _ in losses] == list(range(1, 21))
    assert losses[-1][1] < losses[0][1] - 0.5
    assert not (folder / "parts_of_ten" / "checkpoints").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Wrong input: in this process, which has eight devices; whatever the program would print and exit with


@pytest.fixture
def complain(folder, tmp_path, capsys):
    """complain(flag, ...) -> (exit code, what is printed), for the tiny config and a fresh run_dir."""

    def complain(*flags, config=folder / "tiny.py", run_dir=tmp_path / "run"):
        arguments = [*([f"--config={config}"] if config else []), *([f"--run_dir={run_dir}"] if run_dir else []), *flags]
        try:
            code = cli.explained(lambda: train.main(arguments))
        except SystemExit as ended:  # the flags' parser
            code = ended.code
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, err

    return complain


USAGE = {
    "unknown flag": (["--train.stepz=3"], ["--train.stepz", "--train.steps"]),
    "ill-typed flag": (["--train.steps=many"], ["--train.steps", "many"]),
    "unknown choice": (["--pipeline.schedule=zigzag"], ["zigzag", "gpipe", "1f1b", "interleaved"]),
    "mesh beyond the devices": (["--mesh.fsdp=16"], ["fsdp=16", "16 devices", "8 are present"]),
    "mesh that does not divide": (["--mesh.pipe=3"], ["pipe=3", "3 devices", "1, 2, 4 or 8"]),
    "heads over tensor": (["--mesh.tensor=8"], ["mesh.tensor=8", "model.num_heads=2", "1 or 2"]),
    "batch over the mesh": (["--train.global_batch_size=12"], ["global_batch_size=12", "8 or 16"]),
    "vocabulary too small": (["--model.vocab_size=100"], ["model.vocab_size=100", "257"]),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage(case, complain):
    flags, words = USAGE[case]
    code, message = complain(*flags)
    assert code == EXIT_USAGE
    for word in words:
        assert word in message


def test_all_problems_at_once(complain):
    code, message = complain("--mesh.pipe=4", "--train.log_every=0", "--optimizer.peak_lr=-1", "--mesh.tensor=3")
    assert code == EXIT_USAGE
    for word in ("train.log_every=0", "optimizer.peak_lr=-1", "12 devices"):
        assert word in message


def test_a_config_must_be_named(complain):
    assert complain(config=None) == (
        EXIT_USAGE,
        "error: 1 problem in the configuration:\n"
        "  - --config is missing; give a config file, e.g. --config=configs/quickstart.py\n",
    )


def is_one_line(code_and_message, *words):
    """Whether it is an explained error: exit code 1, one line that begins with "error: " and has all the words."""
    code, message = code_and_message
    is_error = code == EXIT_ERROR and message.startswith("error: ") and message.count("\n") == 1
    return is_error and all(word in message for word in words)


def test_a_config_that_is_not_there(complain):
    assert is_one_line(complain(config="configs/quickstrat.py"), "configs/quickstrat.py", "did you mean 'quickstart.py'?")


def test_a_config_that_is_broken(complain, tmp_path):
    (tmp_path / "broken.py").write_text("def get_config():\n    return 1 / 0\n")
    assert is_one_line(complain(config=tmp_path / "broken.py"), "broken.py", "ZeroDivisionError")


def test_weights_and_biases_is_looked_for_before_the_data(complain, folder, monkeypatch):
    missing = f"--data.sources.0.path={folder}/none.txt"
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert is_one_line(complain("--telemetry.wandb_project=p", missing), "telemetry.wandb_project", "pip install")


def test_files_that_are_not_there(complain, folder):
    assert is_one_line(complain(f"--data.sources.0.path={folder}/*.md"), "data.sources.0.path", "*.md", "*.txt")


def test_an_empty_corpus(complain, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    assert is_one_line(complain(f"--data.sources.0.path={tmp_path}/empty.txt"), "data.sources.0", "empty")


def test_a_corpus_too_short_for_a_sequence(complain, tmp_path):
    (tmp_path / "short.txt").write_text("one\ntwo\nthree\nfour\n")
    assert is_one_line(complain(f"--data.sources.0.path={tmp_path}/short.txt"), "too short", "--data.sequence_length=")


def test_text_that_is_not_utf8(complain, tmp_path):
    (tmp_path / "latin.txt").write_bytes("ein schöner Tag".encode("latin-1"))
    assert is_one_line(complain(f"--data.sources.0.path={tmp_path}/latin.txt"), "latin.txt", "byte 7 (0xf6)", "iconv")


def test_a_token_out_of_range(complain, tmp_path):
    np.save(tmp_path / "ids.npy", np.array([1, 2, 3, 400] * 100, np.uint16))
    flags = ("--data.sources.0.kind=tokens", f"--data.sources.0.path={tmp_path}/ids.npy", "--data.tokenizer=none")
    assert is_one_line(complain(*flags), "ids.npy", "token id 400 at position 3", "--model.vocab_size=401")


def test_a_tokenizer_that_is_not_there(complain):
    assert is_one_line(complain("--data.tokenizer=nowhere.json"), "data.tokenizer=nowhere.json", "no such file", "byte")


def test_a_run_dir_that_cannot_be_written(complain, tmp_path):
    (tmp_path / "file").write_text("")
    assert is_one_line(complain(run_dir=tmp_path / "file"), f"--run_dir={tmp_path}/file", "it is a file")
    assert is_one_line(complain(run_dir=tmp_path / "file" / "below"), "Not a directory", "give another --run_dir")


def test_attention_that_the_device_does_not_have(complain):
    assert is_one_line(complain("--model.attention=cudnn"), "model.attention=cudnn", "NVIDIA GPU", "auto")


def test_another_run_in_the_folder(complain, whole):
    """A finished run, and a command with other flags: each difference in a line of its own, and nothing is touched."""
    before = (whole[1] / "config.json").read_bytes()
    code, message = complain("--model.mlp_dim=48", "--train.seed=5", run_dir=whole[1])
    assert code == EXIT_ERROR
    assert message.splitlines()[1:3] == ["  - model.mlp_dim: 32 -> 48", "  - train.seed: 0 -> 5"]
    assert (whole[1] / "config.json").read_bytes() == before
    assert is_one_line(complain("--checkpoint.resume=never", run_dir=whole[1]), "--checkpoint.resume=never", f"step {STEPS}")
    assert is_one_line(complain("--checkpoint.resume=required"), "--checkpoint.resume=required", "no checkpoint")


def test_an_explained_error_in_a_process_of_its_own(folder):
    process = run(folder / "tiny.py", f"--run_dir={folder}/backend", JAX_PLATFORMS="nonsense")
    assert process.returncode == EXIT_ERROR
    assert process.stderr.startswith("error: no device can be used with JAX_PLATFORMS='nonsense'")
    assert process.stderr.count("\n") == 1
    assert process.stdout == ""


def test_out_of_memory_is_explained(capsys):
    def work():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 10 bytes\nand more")

    assert cli.explained(work) == EXIT_ERROR
    message = capsys.readouterr().err
    assert message.startswith("error: out of device memory: RESOURCE_EXHAUSTED: Out of memory while trying")
    assert "mesh.fsdp" in message


def test_out_of_memory_in_a_run_says_what_holds_how_much(capsys):
    """As `train` calls it: an ExplainedError, which a checkpoint's full disk is already, passes as it is."""
    config = validate(Config(mesh=MeshConfig(fsdp=1, data=-1)), 8)

    def work(error):
        with cli.memory_explained(config, "reference"):
            raise error

    asked = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nmore")
    assert cli.explained(lambda: work(asked)) == EXIT_ERROR
    message = capsys.readouterr().err
    assert message.startswith(
        "error: out of device memory: RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.\nBy estimate"
    )
    for words in ("parameters\n", "optimizer state\n", "--mesh.fsdp=2 --mesh.data=4", "jaxtrain plan"):
        assert words in message
    assert cli.explained(lambda: work(ExplainedError("RESOURCE_EXHAUSTED: disk"))) == EXIT_ERROR
    assert capsys.readouterr().err == "error: RESOURCE_EXHAUSTED: disk\n"


def test_a_fault_of_ours_keeps_its_traceback():
    def work():
        raise ValueError("ours")

    with pytest.raises(ValueError, match="ours"):
        cli.explained(work)


def test_a_dry_run_says_what_would_be_and_does_nothing(folder, tmp_path, monkeypatch, capsys):
    """Every field with where it comes from, the mesh, the memory and the programs."""
    monkeypatch.chdir(tmp_path)
    flags = ["--dry-run", "--train.steps=7", "--model.moe.num_experts=4", "--data.sources.1.kind=stdlib"]
    assert train.main([f"--config={folder}/tiny.py", *flags]) == EXIT_DONE
    said = capsys.readouterr().out.splitlines()
    origin = dict(line.split() for line in said if re.fullmatch(r"[\w.]+=\S* +(default|file|flag|devices)", line))
    expected = {
        "name=tiny": "file",
        "run_dir=''": "default",
        "train.steps=7": "flag",
        "train.seed=0": "default",
        "model.moe.num_experts=4": "flag",
        "model.moe.router=softmax": "default",
        "model.rope_scaling=None": "default",
        "data.sources.0.kind=text": "file",
        "data.sources.1.kind=stdlib": "flag",
        "mesh.fsdp=8": "devices",
        "train.xla_options=()": "default",
    }
    assert {name: origin.get(name) for name in expected} == expected
    config = train.parse(train.USAGE, [f"--config={folder}/tiny.py", *flags]).config
    assert [name.partition("=")[0] for name in origin] == list(field_values(config))
    heads = {line.split()[0] for line in said[len(origin) :]}
    assert {"model", "mesh", "step", "attention", "programs", "memory"} <= heads
    assert "programs   initial state, train step, validation step, next token" in said
    assert list(tmp_path.iterdir()) == []


def test_rows_of_the_data_are_shown_instead_of_training(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sums.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n' * 12)
    flags = ["--data.sources.0.kind=chat", "--data.sources.0.path=sums.jsonl", "--data.validation_fraction=0", "--show_data=2"]
    assert train.main([f"--config={folder}/tiny.py", "--objective.kind=sft", *flags]) == EXIT_DONE
    heads, documents = [], []
    for line in capsys.readouterr().out.splitlines():
        (heads if line.startswith("batch") else documents).append(line)
    sizes = "30 tokens in 6 documents, 12 with loss"
    assert [re.sub("row . of data", "row N of data", head) for head in heads] == [
        f"batch 0, row {place}: row N of data.sources.0, {sizes}" for place in (0, 1)
    ]
    assert documents.count("1+1=[2<|endoftext|>]") == 12
    assert [path.name for path in tmp_path.iterdir()] == ["sums.jsonl"]


def test_a_dry_run_refuses_what_a_run_would(complain, tmp_path):
    assert complain("--dry_run", "--mesh.fsdp=16")[0] == EXIT_USAGE
    assert is_one_line(complain("--dry_run", "--model.attention=cudnn"), "model.attention=cudnn")
    assert not (tmp_path / "run").exists()


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    text = capsys.readouterr().out
    assert ended.value.code == 0
    text = " ".join(text.split())
    for word in ("--config=FILE", "--mesh.tensor INT", "--train.steps INT", "(default: 1000)", "Steps between two checkpoints"):
        assert word in text


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = cli.MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, cli.MOST_FILES)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
        for _ in range(2):
            cli.raise_file_limit()
            assert resource.getrlimit(resource.RLIMIT_NOFILE) == (most, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
