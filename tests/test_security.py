"""What .github/SECURITY.md promises: nothing that is read can run code, names stay in their folders, secrets stay where they
are, and what listens on a port listens where it was told to."""

import ast
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxtrain.checkpoint import Checkpoints
from jaxtrain.checkpoint.stored import COMMIT_MARK, METADATA_FILE, absolute, delete, digest, read_stored, step_path
from jaxtrain.config import CheckpointConfig, Config, DataConfig
from jaxtrain.config.rules import find_problems
from jaxtrain.errors import DamagedCheckpoint
from tests.launch.processes import environment, free_port

ROOT = Path(__file__).parent.parent
SOURCES = {str(path.relative_to(ROOT)): path for path in sorted((ROOT / "jaxtrain").rglob("*.py"))}

# ---------------------------------------------------------------------------------------------------------------------
# Nothing that is read can run code

# Modules that make objects of any class out of bytes, or that read such files.
BANNED_MODULES = set("pickle cPickle dill cloudpickle shelve marshal joblib jsonpickle yaml torch runpy code pty".split())
BANNED_NAMES = set("eval exec compile __import__".split())
BANNED_METHODS = set("system popen exec_module start_server".split())
BANNED_FLAGS = set("allow_pickle shell trust_remote_code create_perfetto_link".split())
# A config file is code, as is a reward function, and is named by the person who starts the run: see SECURITY.md. jax's
# installed plugin is loaded as Python itself loads it.
CODE = ("jaxtrain/config/loading.py", "jaxtrain/quiet_plugin.py", "jaxtrain/train/rewards.py")
ALLOWED = {(file, "exec_module") for file in CODE}


def dangers(tree: ast.AST) -> set[str]:
    """What a file imports or calls that could run what it reads, or open a port to the world."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.partition(".")[0] in BANNED_MODULES}
        elif isinstance(node, ast.ImportFrom):
            found |= {str(node.module)} if str(node.module).partition(".")[0] in BANNED_MODULES else set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in BANNED_NAMES:
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and node.attr in BANNED_METHODS:
            found.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg in BANNED_FLAGS and ast.unparse(node.value) != "False":
            found.add(node.arg)
    return found


def test_nothing_unpickles_or_evaluates():
    found = {(name, danger) for name, path in SOURCES.items() for danger in dangers(ast.parse(path.read_text()))}
    assert found == ALLOWED


@pytest.mark.parametrize(
    ("line", "danger"),
    [
        ("import pickle", "pickle"),
        ("from yaml import safe_load", "yaml"),
        ("def f():\n    import torch.serialization", "torch.serialization"),
        ("x = eval('1')", "eval"),
        ("f = exec", "exec"),
        ("import os\nos.system('ls')", "system"),
        ("subprocess.run('ls', shell=True)", "shell"),
        ("np.load(path, allow_pickle=flag)", "allow_pickle"),
        ("AutoModel.from_pretrained(x, trust_remote_code=True)", "trust_remote_code"),
        ("jax.profiler.start_server(9999)", "start_server"),
    ],
)
def test_the_walk_sees_dangers(line: str, danger: str):
    """The test of the test."""
    assert dangers(ast.parse(line)) == {danger}


def test_a_compiled_program_or_a_pattern_is_no_danger():
    assert dangers(ast.parse("re.compile('x'); step.lower(x).compile(); np.load(p, allow_pickle=False)")) == set()


# ---------------------------------------------------------------------------------------------------------------------
# Names stay in their folders


@pytest.mark.parametrize("name", ["..", ".", "../x", "a/b", "/etc", "", "a\x00b", "~", "a\n", "..."])
def test_a_name_cannot_leave_runs(name: str):
    _, problems = find_problems(Config(name=name), 1)
    assert len(problems) == 1
    assert problems[0].startswith("name=")


def test_names_that_stay():
    for name in ("run", "7b.v2", "a..b", "x-1+y", ".hidden"):
        assert find_problems(Config(name=name), 1)[1] == []
        assert Config(name=name).directory.resolve().parent == Path("runs").resolve()


@pytest.mark.parametrize("tokenizer", ["bpe:../../x", "bpe:300/../y", "bpe:", "bpe:-1", "bpe:²"])
def test_a_tokenizer_to_be_trained_is_a_number_and_no_path(tokenizer: str):
    _, problems = find_problems(Config(data=DataConfig(tokenizer=tokenizer)), 1)
    assert problems[0].startswith(f"data.tokenizer={tokenizer!r}")


@pytest.fixture
def saved(tmp_path):
    """The folder of a run's checkpoints, with step 3."""
    with Checkpoints(tmp_path / "checkpoints", CheckpointConfig()) as checkpoints:
        checkpoints.save(3, {"w": jnp.ones(4)}, {"config": {}})
    return tmp_path / "checkpoints"


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s["leaves"].update({"../../evil": "float32[4]"}),
        lambda s: s["leaves"].update({"/etc/passwd": "float32[4]"}),
        lambda s: s["leaves"].update({"w": "float32[4]; import os"}),
        lambda s: s["checksums"].clear(),
        lambda s: s.update(metadata=[1]),
    ],
)
def test_a_forged_checkpoint_cannot_name_files_outside_it(saved, change):
    """Its seal fits: that is no proof of where it comes from."""
    path = step_path(saved, 3)
    stored = read_stored(path)
    change(stored)
    mark = {"checksums": stored.pop("checksums")}
    (path / METADATA_FILE).write_text(json.dumps({"custom_metadata": stored}))
    (path / COMMIT_MARK).write_text(json.dumps(mark | {"digest": digest(stored | mark)}))
    with pytest.raises(DamagedCheckpoint, match="is not what a save writes"):
        read_stored(path)


def test_deleting_a_step_that_is_a_link_leaves_what_it_leads_to(saved):
    elsewhere = saved.parent / "elsewhere"
    (saved / "3").rename(elsewhere)
    (saved / "3").symlink_to(elsewhere)
    inside = saved / "4"
    inside.mkdir()
    (inside / "link").symlink_to(elsewhere)
    before = sorted(elsewhere.rglob("*"))
    delete(step_path(saved, 3))
    delete(absolute(inside))
    assert list(saved.iterdir()) == []
    assert sorted(elsewhere.rglob("*")) == before


# ---------------------------------------------------------------------------------------------------------------------
# Secrets stay where they are

CANARY = "canary-5f1d9c0e7b"
SECRETS = ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "GOOGLE_API_KEY", "MY_PASSWORD")
CONFIG = """
from jaxtrain.config import *

def get_config():
    return Config(
        name="tiny",
        model=ModelConfig(num_layers=1, embed_dim=16, num_heads=2, num_kv_heads=2, head_dim=8, mlp_dim=32, dtype="float32"),
        data=DataConfig(sources=(DataSource(kind="synthetic"),), tokenizer="byte", sequence_length=16, cache_dir="cache"),
        train=TrainConfig(steps=4, global_batch_size=2, log_every=1, validate_every=0, compilation_cache="compiled"),
        telemetry=TelemetryConfig(profile="2:3"),
        checkpoint=CheckpointConfig(every=2),
    )
"""


def test_secrets_of_the_environment_are_written_nowhere(tmp_path):
    """Under the supervisor, with a trace: not into config.json, metrics, events, checkpoints, logs, traces or programs."""
    (tmp_path / "tiny.py").write_text(CONFIG)
    command = [sys.executable, "-m", "jaxtrain", "launch", "--processes=1", "--devices-per-process=1", "--", "--config=tiny.py"]
    secrets = dict.fromkeys(SECRETS, CANARY) | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment(1, **secrets), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    names = {path.name for path in written}
    assert {"config.json", "metrics.jsonl", "_CHECKPOINT_METADATA", "process-0.log"} <= names
    assert any(name.endswith(".xplane.pb") for name in names)
    assert [path for path in written if CANARY.encode() in path.read_bytes()] == []
    assert CANARY not in done.stdout + done.stderr


def test_no_field_of_a_config_is_for_a_secret():
    """Configs are saved and shown, so there is nowhere to put one."""
    words = ("token", "password", "secret", "api_key", "credential")
    innocent = {"tokenizer", "experts_per_token", "sample_tokens", "max_new_tokens"}

    def names(value):
        for field in dataclasses.fields(value):
            yield field.name
            if dataclasses.is_dataclass(getattr(value, field.name)):
                yield from names(getattr(value, field.name))

    assert [name for name in names(Config()) if any(word in name for word in words) and name not in innocent] == []


# ---------------------------------------------------------------------------------------------------------------------
# What listens, listens where it was told to

LISTEN = """
import os, sys
from jaxtrain.config import DistributedConfig
from jaxtrain.launch import distributed

def listening():
    "Local addresses of this process's listening sockets, as /proc writes them: address in hexadecimal, then the port."
    links, found = [f"/proc/self/fd/{fd}" for fd in os.listdir("/proc/self/fd")], set()
    own = {os.readlink(link)[8:-1] for link in links if os.path.islink(link)}
    for table in ("tcp", "tcp6"):
        for line in open(f"/proc/net/{table}").readlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in own:
                found.add(fields[1])
    return sorted(found)

port = int(sys.argv[1])
distributed.find_place = lambda *_: distributed.Place("a test", f"127.0.0.1:{port}", 1, 0, 1, 0)
distributed.start(DistributedConfig(), dict(os.environ))
print(*listening(), flush=True)
os._exit(0)
"""


def listening(port: int, **more: str) -> list[tuple[str, int]]:
    """(address, port) of all that a process listens on that has joined a run of one, as the kernel says."""
    done = subprocess.run(
        [sys.executable, "-c", LISTEN, str(port)], cwd=ROOT, env=environment(1, **more), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return [(entry.split(":")[0], int(entry.split(":")[1], 16)) for entry in done.stdout.split()]


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux's /proc/net/tcp")
def test_a_coordinator_on_the_loopback_listens_there_and_nowhere_else():
    port = free_port()
    found = listening(port)
    assert port in [number for _, number in found]
    assert {address for address, _ in found} <= {"0100007F", "0000000000000000FFFF00000100007F"}
    # The test of the test, and the way out for networks where the coordinator's own address cannot be bound.
    wide = listening(other := free_port(), JAX_COORDINATOR_BIND_ADDRESS=f"0.0.0.0:{other}")
    assert {address.strip("0") for address, number in wide if number == other} <= {"", "FFFF"}
    assert other in [number for _, number in wide]
