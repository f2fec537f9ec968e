"""Random and mutated input for whatever reads what others wrote: the package's own errors may come out, and nothing else.

JAXTRAIN_TEST_FUZZ=10000 runs that many random cases of each test; without it a few, always the same ones.
"""

import contextlib
import copy
import dataclasses
import functools
import io
import json
import os
import signal
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from jaxtrain.checkpoint.same_run import check_same_run
from jaxtrain.checkpoint.stored import COMMIT_MARK, FORMAT, METADATA_FILE, digest, read_stored
from jaxtrain.checkpoint.trees import check_same_leaves
from jaxtrain.command import parse_config, wanted_help
from jaxtrain.config import Config, DataConfig, DataSource, ModelConfig, TrainConfig, from_json, to_json
from jaxtrain.config.rules import validate
from jaxtrain.data.pipeline import open_data
from jaxtrain.data.token_stream import StreamWriter
from jaxtrain.data.tokenizers import ByteTokenizer
from jaxtrain.errors import CheckpointError, ConfigError, DamagedCheckpoint, DataError, ExplainedError, ProgramError
from jaxtrain.program import hlo
from jaxtrain.program.collectives import instruction_seconds, read_collectives
from jaxtrain.program.groups import group_of, layout_of
from jaxtrain.program.hlo import matmul_flops
from tests.data.streams import append
from tests.program.test_hlo import counted

CONFIGS = Path(__file__).parent.parent / "configs"
fuzz = settings(
    max_examples=int(os.environ.get("JAXTRAIN_TEST_FUZZ", "50")),
    derandomize="JAXTRAIN_TEST_FUZZ" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
LONGEST_SECONDS = 20  # of one case, on a loaded machine: no input may keep a reader busy for long

NUMBERS = [
    "0",
    "1",
    "-1",
    "2",
    "7",
    "8",
    "64",
    "1000000",
    "2147483648",
    "9" * 19,
    "9" * 400,
    "1e999",
    "-1e-9",
    "0.5",
    "nan",
    "inf",
]
WORDS = [
    "",
    "None",
    "True",
    "none",
    "null",
    "auto",
    "..",
    "../x",
    "/",
    "~",
    "\x00",
    "é☃",
    "a b",
    "{}",
    "[]",
    "bpe:300",
    "bpe:²",
    "3:1",
]


def flags() -> list[str]:
    """Every flag of a config, and some of what a default config does not have."""
    plain = dataclasses.asdict(Config())
    names = [f"--{s}.{name}" for s, fields in plain.items() if isinstance(fields, dict) for name in fields]
    return [*names, "--name", "--run_dir", *(f"--data.sources.{end}" for end in ("0.path", "0.kind", "0.weight", "1.kind"))]


@contextlib.contextmanager
def in_bounded_time():
    """A reader that is still busy after LONGEST_SECONDS fails."""

    def too_long(*_):
        raise TimeoutError(f"still reading after {LONGEST_SECONDS} s")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@st.composite
def changes(draw, pieces: tuple[bytes, ...]) -> list[tuple]:
    """One to four changes to a file: a place (0 to 1), what is done there, and with what."""
    place = st.floats(0, 1, exclude_max=True)
    what = st.one_of(
        st.tuples(st.just("flip"), place, st.integers(0, 7)),
        st.tuples(st.just("cut"), place, st.integers(1, 40)),
        st.tuples(st.just("end"), place, st.none()),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("number"), place, st.sampled_from(NUMBERS)),
        st.tuples(st.just("insert"), place, st.sampled_from(pieces)),
        st.tuples(st.just("replace"), place, st.sampled_from(pieces)),
    )
    return draw(st.lists(what, min_size=1, max_size=4))


def changed(data: bytes, todo: list[tuple]) -> bytes:
    """The file with the changes made."""
    for kind, where, value in todo:
        at = int(where * len(data))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ 1 << value]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at] + data[at + value :]
        elif kind == "end":
            data = data[:at]
        elif kind == "insert":
            data = data[:at] + value + data[at:]
        elif kind == "number":  # in place of the next number
            first = next((i for i in range(at, len(data)) if chr(data[i]).isdigit()), len(data))
            last = next((i for i in range(first, len(data)) if not chr(data[i]).isdigit()), len(data))
            data = data[:first] + value.encode() + data[last:]
        elif kind == "replace":
            data = data[:at] + value + data[at + len(value) :]
    return data


# ---------------------------------------------------------------------------------------------------------------------
# Configs

flag = st.sampled_from(flags()) | st.text(max_size=12).map("--".__add__)
word = st.sampled_from(NUMBERS + WORDS) | st.text(max_size=12)
argument = st.tuples(flag, word).map("=".join) | flag | word


@fuzz
@given(st.lists(argument, max_size=4))
def test_command_line(arguments: list[str]):
    """A config, an exit with code 2, or an explained error; and what is accepted goes through JSON unchanged."""
    said = io.StringIO()
    with in_bounded_time(), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            config = parse_config([f"--config={CONFIGS / 'quickstart.py'}", *arguments])
        except SystemExit as stop:
            assert wanted_help(arguments) is not None  # noqa: PT017
            assert not stop.code  # noqa: PT017
            return
        except ExplainedError:
            return
        try:
            config = validate(config, 4)
        except ConfigError:
            return
        assert from_json(to_json(config)) == config


EVERYTHING = to_json(Config(data=DataConfig(sources=(DataSource(), DataSource(kind="text", path="*.txt"))))).encode()
JSON_PIECES = tuple(
    s.encode() for s in ('"', "{", "}", "[", "]", "null", "true", '"x"', "-", "e9", ",", ":", "\\ud800", "[" * 3000)
)


@fuzz
@given(changes(JSON_PIECES))
def test_config_json(todo):
    with in_bounded_time(), contextlib.suppress(ConfigError):
        text = changed(EVERYTHING, todo).decode(errors="replace")
        config = validate(from_json(text), 4)
        assert from_json(to_json(config)) == config


def test_a_choice_of_numbers_is_explained():
    """Found by the above, in 10,000 cases."""
    with pytest.raises(ConfigError, match="sharding.zero=0: one of: 1, 2, 3"):
        validate(from_json(EVERYTHING.decode().replace('"zero": 3', '"zero": 0')), 4)


@fuzz
@given(changes((b"None", b"()", b"[3]", b"Config(", b"'x'", b"\x00", b"\xff", b"\n", b" ", b"=", b",")))
def test_config_file(todo):
    """A config file is code; whatever is wrong with it is explained all the same."""
    config = None
    with tempfile.TemporaryDirectory() as folder, in_bounded_time(), contextlib.suppress(ExplainedError):
        path = Path(folder) / "mine.py"
        path.write_bytes(changed((CONFIGS / "quickstart.py").read_bytes(), todo))
        config = validate(parse_config([f"--config={path}"]), 4)
    assert config is None or validate(config, 4) == config


# ---------------------------------------------------------------------------------------------------------------------
# Tokenized data


@functools.cache
def token_files() -> dict[str, bytes]:
    """A .bin with its JSON file, and a .npy, of the same 900 ids."""
    ids = np.random.default_rng(0).integers(0, 256, 900)
    with tempfile.TemporaryDirectory() as folder:
        writer = StreamWriter(Path(folder) / "ids.bin", "train", ByteTokenizer(), "byte")
        append(writer, bytes(ids % 128).decode(), ids)
        writer.close()
        np.save(Path(folder) / "ids.npy", ids.astype(np.uint16))
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def batch_of(files: dict[str, bytes], name: str, tokenizer: str) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        for file, content in files.items():
            (Path(folder) / file).write_bytes(content)
        source = DataSource(kind="tokens", path=f"{folder}/{name}")
        data = DataConfig((source,), tokenizer=tokenizer, sequence_length=16, cache_dir=f"{folder}/cache")
        config = Config(model=ModelConfig(vocab_size=300), data=data, train=TrainConfig(global_batch_size=4))
        opened = open_data(config)
        batches = [opened.train_batch(0, slice(None)), opened.validation_batch(0, slice(None), 4)]
    for batch in batches:
        assert batch["tokens"].min() >= 0
        assert batch["tokens"].max() < 300
        assert batch["targets"].max() < 300
    return b"".join(batch[key].tobytes() for batch in batches for key in sorted(batch))


TOKEN_PIECES = (
    *JSON_PIECES,
    b"validation",
    b"'descr'",
    b"'<u2'",
    b"'O'",
    b"|O",
    b"PK\x03\x04",
    b"\x80\x04",
    b"(3,3)",
    b"True",
    b"\xff\xff",
)


@fuzz
@given(changes(TOKEN_PIECES), st.sampled_from(["ids.bin", "ids.json", "ids.npy"]), st.sampled_from(["byte", "none"]))
def test_token_files(todo, damaged: str, tokenizer: str):
    """Refused, or read; of a .bin the very batches that were written, of a .npy (without checksum) ids of the vocabulary."""
    files, name = dict(token_files()), "ids.npy" if damaged == "ids.npy" else "ids.bin"
    files[damaged] = changed(files[damaged], todo)
    with in_bounded_time(), contextlib.suppress(DataError):
        found = batch_of(files, name, tokenizer)
        assert damaged == "ids.npy" or found == batch_of(token_files(), name, tokenizer)


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoint metadata

NOW = {"config": dataclasses.asdict(Config()), "data_fingerprint": "abc", "versions": {"jax": "0.10.2"}}
LEAVES = {"params/embed": "float32[8,4]", "step": "int32[]"}
STORED = {
    "format": FORMAT,
    "step": 7,
    "leaves": LEAVES,
    "checksums": dict.fromkeys(LEAVES, "0123456789abcdef"),
    "metadata": NOW,
}
STORED = json.loads(json.dumps(STORED))


def as_files(stored: dict, sealed: dict | None = None) -> tuple[bytes, bytes]:
    """The two files beside the arrays, by default with a digest that fits."""
    inner = {name: value for name, value in stored.items() if name != "checksums"}
    mark = {"checksums": stored.get("checksums"), "digest": digest(stored if sealed is None else sealed)}
    return json.dumps({"custom_metadata": inner, "item_handlers": {}}).encode(), json.dumps(mark).encode()


def read_back(metadata: bytes, mark: bytes) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        from etils import epath

        step = epath.Path(folder) / "7"
        step.mkdir()
        (step / METADATA_FILE).write_bytes(metadata)
        (step / COMMIT_MARK).write_bytes(mark)
        return read_stored(step)


@fuzz
@given(changes(JSON_PIECES), st.booleans())
def test_damaged_checkpoint_metadata(todo, mark_too: bool):
    """Refused, or exactly what was saved."""
    metadata, mark = as_files(STORED)
    with in_bounded_time(), contextlib.suppress(CheckpointError):
        assert read_back(changed(metadata, todo), changed(mark, todo) if mark_too else mark) == STORED


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["../x", "a/../b", "float32[3"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@fuzz
@given(st.lists(st.tuples(st.lists(st.integers(0, 20), max_size=4), anything), min_size=1, max_size=3))
def test_hostile_checkpoint_metadata(replacements):
    """With a seal that fits: nothing in it can do more than be refused, or be the names and shapes that arrays have."""
    stored = copy.deepcopy(STORED)
    for path, value in replacements:
        node = stored
        for index in path[:-1]:
            children = list(node.values()) if isinstance(node, dict) else node
            inner = children[index % len(children)] if children else None
            node = inner if isinstance(inner, (dict, list)) and inner else node
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        node[keys[(path or [0])[-1] % len(keys)]] = value
    with in_bounded_time(), contextlib.suppress(CheckpointError):
        sealed = json.loads(json.dumps(stored))
        read = read_back(*as_files(sealed))
        assert not any(".." in name for name in read["leaves"])
        check_same_run(read["metadata"], NOW, "folder")
        check_same_leaves(Path("folder"), read["leaves"], LEAVES)


# ---------------------------------------------------------------------------------------------------------------------
# Programs


@functools.cache
def programs() -> tuple[tuple[bytes, object], ...]:
    """The text of a compiled loop with matmuls and collectives over two axes, and one by hand whose loop must be counted."""
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)

    def body(x, w):
        y = lax.psum(x @ lax.all_gather(w, "data", tiled=True), "tensor")
        return lax.pcast(lax.ppermute(jnp.tanh(y), "data", [(0, 1), (1, 0)]), ("tensor",), to="varying"), None

    def device(x, ws):
        x = lax.pcast(x, ("data", "tensor"), to="varying")
        return lax.psum_scatter(lax.scan(body, x, ws)[0], "tensor", tiled=True)

    specs = (PartitionSpec(), PartitionSpec(None, "data")), PartitionSpec(("data", "tensor"))
    step = jax.jit(jax.shard_map(device, mesh=mesh, in_specs=specs[0], out_specs=specs[1], check_vma=False))
    text = step.lower(jnp.zeros((8, 16)), jnp.zeros((5, 16, 16))).compile().as_text()
    return (text.encode(), layout_of(mesh)), (counted("constant(9)").encode(), layout_of(mesh))


PROGRAM_PIECES = (
    *(b"while(%start)", b"conditional(%x, %y)", b"to_apply=%step", b"calls=%compare_them", b"body=%step", b"ENTRY ", b"ROOT "),
    *(
        b"all-reduce(",
        b"all-gather-start(",
        b"all-gather-done(",
        b"dot(",
        b"tuple()",
        b"parameter(",
        b"multiply(%j, %j)",
        b"%i",
    ),
    *(
        b"replica_groups={{0,9}}",
        b"replica_groups=[4,2]<=[8]",
        b"replica_groups=mesh['a'=8] {'a':(0)0}",
        b"\n",
        b"}",
        b"{",
        b"(",
    ),
    *(b"lhs_contracting_dims={9}", b"f32[8,16]", b"f32[]", b"index=9", b"{0,1}", b"__cublas$gemm", b"__cudnn$fmhaSoftmax"),
)


@fuzz
@given(changes(PROGRAM_PIECES), st.sampled_from([0, 1]))
def test_programs(todo, which: int):
    data, layout = programs()[which]
    text = changed(data, todo).decode(errors="replace")
    with pytest.MonkeyPatch.context() as patch, in_bounded_time():
        patch.setattr(hlo, "_LONGEST_LOOP", 1000)  # loops by hand that a change made endless; else a second each
        for read in (matmul_flops, lambda t: read_collectives(t, layout), lambda t: instruction_seconds(t, layout)):
            found: object = "an explained error"
            with contextlib.suppress(ProgramError):
                found = read(text)
            assert found is not None


@pytest.mark.parametrize(
    "groups",
    [
        "replica_groups={{0,1,2,3},{4,9999999999999999999,6,7}}",
        "source_target_pairs={{0,4},{4,9999999999999999999}}",
        "replica_groups={{0,1},{2,8}}",
        "replica_groups={{0,1},{ , }}",
    ],
)
def test_a_group_of_devices_that_are_not_there_is_explained(groups: str):
    """The first two were found by the above, in 10,000 cases."""
    with pytest.raises(ProgramError, match=r"a group of devices \[.*\], but the mesh has 8"):
        group_of(groups, programs()[0][1])


def test_the_texts_are_read_when_whole():
    """The test of the tests: what the fuzzing begins with is accepted, so that refusals come from the changes."""
    assert from_json(EVERYTHING.decode()).data.sources[1].path == "*.txt"
    assert batch_of(token_files(), "ids.bin", "byte") == batch_of(token_files(), "ids.bin", "none")
    assert batch_of(token_files(), "ids.npy", "none")
    assert read_back(*as_files(STORED)) == STORED
    with pytest.raises(DamagedCheckpoint, match="SHA-256 differs"):
        read_back(*as_files(STORED, sealed=STORED | {"step": 8}))
    kinds = {transfer.kind for transfer in read_collectives(*_first_program())}
    assert kinds == {"all-reduce", "all-gather", "collective-permute", "reduce-scatter"}
    assert matmul_flops(_first_program()[0]) == 5 * 2 * 8 * 16 * 16


def _first_program():
    text, layout = programs()[0]
    return text.decode(), layout
