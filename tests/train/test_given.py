"""What a caller gives to `Trainer` is refused where it would train on something else, or fail far from its cause."""

import jax
import numpy as np
import optax
import pytest

from jaxtrain import Hook, Objective, Trainer
from jaxtrain.config.rules import validate
from jaxtrain.errors import ExplainedError
from jaxtrain.train.given import checked_batch
from jaxtrain.train.prepared import Prepared
from tests.tiny import tiny

PREPARED = Prepared(validate(tiny(mesh={"fsdp": 8}, data={"mask_documents": False}), 8))
TOKENS = np.arange(64, dtype=np.int32).reshape(8, 8)
BATCH = {"tokens": TOKENS, "targets": TOKENS + 1, "positions": np.broadcast_to(np.arange(8), (8, 8)), "unread": 3}


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model", "llama"),
        ("objective", "sft"),
        ("optimizer", "adam"),
        ("optimizer", optax.adam),
        ("hooks", Hook()),
        ("hooks", [Hook]),
        ("hooks", "abc"),
        ("schedule", "1f1b"),
        ("documents", ["a", "b"]),
    ],
)
def test_a_part_of_another_kind_is_named(name, part):
    with pytest.raises(ExplainedError, match=f"Trainer: {name} is no "):
        Trainer(tiny(), **{name: part})


def test_parts_of_their_kinds_are_taken():
    def loss(log_probs, inputs):
        return -log_probs

    Trainer(tiny(), optimizer=optax.adam(1e-3), hooks=(Hook(),), documents=list, objective=loss)
    Trainer(tiny(), objective=Objective(loss), hooks=[])
    with pytest.raises(ExplainedError, match="config is no Config"):
        Trainer("quickstart")


@pytest.mark.parametrize("cast", [np.int64, np.uint8, jax.numpy.asarray, np.ndarray.tolist])
def test_a_batch_in_any_whole_numbers_is_the_same(cast):
    found = checked_batch(BATCH | {"tokens": cast(TOKENS)}, PREPARED)
    assert list(found) == ["tokens", "targets", "positions"]
    assert all(array.dtype == np.int32 for array in found.values())
    np.testing.assert_array_equal(found["tokens"], TOKENS)


@pytest.mark.parametrize(
    ("name", "array", "problem"),
    [
        ("tokens", TOKENS + 37, r"tokens are from 37 to 100; .* up to 99"),
        ("tokens", TOKENS - 1, "tokens are from -1 to 62"),
        ("targets", TOKENS + 40, "targets are from 40 to 103"),
        ("targets", TOKENS - 2, "targets are from -2 to 61"),
        ("tokens", TOKENS[:7], r"tokens has shape \[7, 8\]; this process gives \[8, 8\]"),
        ("targets", np.concatenate([TOKENS, TOKENS]), r"targets has shape \[16, 8\]"),
        ("positions", TOKENS[:, :4], r"positions has shape \[8, 4\]"),
        ("positions", TOKENS * 1.5, "positions is float64; give int32"),
        ("tokens", TOKENS > 3, "tokens is bool; give int32"),
    ],
)
def test_a_batch_that_would_train_on_something_else_is_refused(name, array, problem):
    with pytest.raises(ExplainedError, match=problem):
        checked_batch(BATCH | {name: array}, PREPARED)
