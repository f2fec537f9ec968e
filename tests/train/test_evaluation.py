"""What a validation tells of sources, sets and ranges of positions: the sums of a score, token by token, on any mesh."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from jaxtrain.config import DataSource, MeshConfig
from jaxtrain.config.rules import validate
from jaxtrain.data.pipeline import open_data
from jaxtrain.errors import ConfigError, DataError
from jaxtrain.telemetry.progress import describe
from jaxtrain.train.evaluation import Evaluation, position_edges
from jaxtrain.train.gradients import make_score
from jaxtrain.train.prepared import Prepared
from tests.tiny import MODEL, tiny

LENGTH, EDGES = 16, (0, 4, 8)


def texts(folder, name, count, words):
    folder = folder / name
    folder.mkdir()
    random = np.random.default_rng(len(name))
    written = ["".join(random.choice(words, random.integers(2, 12))) for _ in range(count)]
    for i, text in enumerate(written):
        (folder / f"{i}.txt").write_text(text)
    return DataSource(kind="text", path=f"{folder}/*.txt", name=name), sum(len(text.encode()) + 1 for text in written)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Two sources that hold out text, of unlike weights, and one set; documents are short, so positions restart in a row."""
    folder = tmp_path_factory.mktemp("sets")
    (code, _), (prose, _) = texts(folder, "code", 40, ["if ", "x = 1\n"]), texts(folder, "prose", 60, ["été ", "the "])
    books, size = texts(folder, "books", 9, ["alpha ", "the "])
    config = tiny(
        model=replace(MODEL, num_layers=1, vocab_size=257),
        mesh=MeshConfig(data=2, context=2, tensor=2),
        data={
            "sources": (code, replace(prose, weight=3.0)),
            "validation": (books,),
            "sequence_length": LENGTH,
            "validation_fraction": 0.3,
            "cache_dir": str(folder / "cache"),
        },
        train={"position_ranges": 3, "remat": "none"},
    )
    return config, size


def scored(config, mesh):
    prepared = Prepared(validate(replace(config, mesh=mesh), 8))
    return prepared, open_data(prepared.config), prepared.create_state()["params"]


@pytest.fixture(scope="module")
def told(config):
    prepared, data, params = scored(config[0], config[0].mesh)
    evaluation, compiled = Evaluation(prepared, data), []
    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append("backend_compile" in event))
    (program,) = evaluation.compile({"params": params})
    assert program.memory_analysis().temp_size_in_bytes > 0
    assert any(compiled)
    compiled.clear()
    row = evaluation.row(params)
    assert not any(compiled), "compiled before the run, and again"
    return prepared, data, params, evaluation, row


def by_hand(prepared, data, params):
    """(loss, source, position) of every held-out token, one row after the other."""
    score, found = make_score(prepared.config, prepared.mesh, prepared.backend), []
    for number in range(data.num_validation_batches(8)):
        batch, picks = data.validation_batch(number, slice(0, 8), 8), data.validation_row_numbers(number, slice(0, 8), 8)
        log_probs = np.asarray(score(params, prepared.place(batch)))
        for row, pick in enumerate(picks):
            kept = np.flatnonzero(batch["targets"][row] >= 0)
            found += [(-log_probs[row, t], pick[0], batch["positions"][row, t]) for t in kept]
    return np.array(found, np.float64)


def test_every_number_is_the_mean_of_its_tokens(told, config):
    prepared, data, params, _, row = told
    tokens, books = by_hand(prepared, data, params), by_hand(prepared, data.sets["books"], params)
    assert len(tokens) == data.validation_tokens
    assert len(books) == row["validation_tokens/books"] == config[1]  # the whole set, once: bytes and one separator a text
    parts = {"": tokens, "/books": books} | {f"/{name}": tokens[tokens[:, 1] == i] for i, name in enumerate(["code", "prose"])}
    for suffix, of in parts.items():
        assert row[f"validation_loss{suffix}"] == pytest.approx(of[:, 0].mean(), rel=1e-6), suffix
    for suffix in ("", "/books"):
        for first, end in zip(EDGES, (*EDGES[1:], LENGTH), strict=True):
            inside = parts[suffix][(parts[suffix][:, 2] >= first) & (parts[suffix][:, 2] < end), 0]
            assert row[f"validation_loss{suffix}/from_{first}"] == pytest.approx(inside.mean(), rel=1e-6)
    assert row["validation_tokens/code"] + row["validation_tokens/prose"] == data.validation_tokens
    bits = row["validation_loss/books"] * config[1] / (config[1] - 9) / np.log(2)
    assert row["validation_bits_per_byte/books"] == pytest.approx(bits)
    assert position_edges(LENGTH, 3) == EDGES
    assert position_edges(LENGTH, 0) == (0,)


def test_another_mesh_tells_the_same(told, config):
    *_, row = told
    piped = replace(config[0], train=replace(config[0].train, microbatches=2))
    prepared, data, params = scored(piped, MeshConfig(data=2, fsdp=2, tensor=2))
    assert {name: pytest.approx(value, rel=1e-5) for name, value in row.items()} == Evaluation(prepared, data).row(params)


def test_a_line_is_short_and_a_signal_ends_all_sets(told):
    _, _, params, evaluation, row = told
    words = describe({"step": 1, **row}, 9)
    assert f"code {row['validation_loss/code']:.4f} | prose" in words
    assert "from_8" in words
    asked = []
    assert evaluation.row(params, lambda number: asked.append(number) or number == evaluation.batches - 1) is None
    assert asked == list(range(evaluation.batches))


def test_a_few_batches_are_spread_over_all_sources(told):
    """Three batches of more: rows at even distances, from both sources, the same however they are split over processes."""
    prepared, data, params, evaluation, _ = told
    whole = [pick for n in range(data.num_validation_batches(8)) for pick in data.validation_row_numbers(n, slice(0, 8), 8)]
    whole = [pick for pick in whole if pick is not None]
    assert len(whole) > 24
    picks = [pick for n in range(3) for half in (0, 4) for pick in data.validation_row_numbers(n, slice(half, half + 4), 8, 3)]
    assert picks == [whole[i * len(whole) // 24] for i in range(24)]
    few, row = Evaluation(prepared, data, 3), evaluation.row(params)
    found = few.row(params)
    assert found.keys() == row.keys()
    assert 0 < found["validation_tokens/code"] < row["validation_tokens/code"]


def test_without_held_out_text_the_sets_are_what_counts(told, config):
    prepared, _, params, _, row = told
    only = replace(config[0], data=replace(config[0].data, validation_fraction=0.0))
    found = Evaluation(prepared, open_data(only)).row(jax.tree.map(lambda leaf: leaf, params))
    assert found["validation_loss"] == pytest.approx(row["validation_loss/books"])
    assert found["validation_loss/books"] == pytest.approx(row["validation_loss/books"])


def test_wrong_sets_are_refused(config):
    config, _ = config
    data, train = config.data, config.train
    for fields, words in (
        ({"data": replace(data, validation=(replace(data.validation[0], name="code"),))}, "2 sources or sets have this name"),
        ({"data": replace(data, validation=(DataSource(kind="synthetic"),))}, "random tokens"),
        ({"train": replace(train, validation_metric="validation_loss/book")}, "did you mean 'validation_loss/books'"),
        ({"train": replace(train, validation_metric="validation_ema_loss")}, "with train.ema_decay"),
        ({"train": replace(train, position_ranges=6)}, "use 5 or fewer"),
        ({"train": replace(train, validate_every=0)}, "need validations"),
    ):
        with pytest.raises(ConfigError, match=words):
            validate(replace(config, **fields), 8)
    trained = replace(data, validation=(replace(data.sources[0], name="again"),))
    with pytest.raises(DataError, match=r"set again has a file that data\.sources\.0 trains on"):
        open_data(replace(config, data=trained))
