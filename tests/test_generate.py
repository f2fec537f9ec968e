"""Sampling: deterministic, from the right distribution, and never beyond the length that the model knows."""

from dataclasses import replace

import numpy as np
import pytest

from jaxtrain.config import Config, DataConfig, ModelConfig, TrainConfig
from jaxtrain.generate import draw, sample

VOCAB, PADDED = 11, 128


def config(length=8, seed=0):
    return Config(model=ModelConfig(vocab_size=VOCAB), data=DataConfig(sequence_length=length), train=TrainConfig(seed=seed))


class FakeModel:
    """Likes the id after the last one best; checks what it is asked, and remembers the contexts."""

    def __init__(self, length):
        self.length, self.contexts = length, []

    def __call__(self, batch, position):
        assert {name: array.shape for name, array in batch.items()} == dict.fromkeys(batch, (1, self.length))
        assert set(batch) == {"tokens", "targets", "positions", "segments"}
        assert batch["positions"].tolist() == [list(range(self.length))]
        assert 0 <= position < self.length
        self.contexts.append(batch["tokens"][0, : position + 1].tolist())
        logits = np.zeros(PADDED, np.float32)
        logits[(batch["tokens"][0, position] + 1) % VOCAB] = 3.0
        logits[VOCAB:] = 100.0  # padding of the vocabulary must never be drawn
        return logits


@pytest.mark.parametrize("length", [1, 2, 7, 8])
@pytest.mark.parametrize("prompt_length", [1, 3, 20])
def test_the_context_is_the_newest_ids_and_never_too_long(length, prompt_length):
    model, prompt = FakeModel(length), np.arange(prompt_length) % VOCAB
    made = sample(model, config(length), prompt, 12)
    everything = [*prompt.tolist(), *made.tolist()]
    assert made.shape == (12,)
    assert made.dtype == np.int32
    assert model.contexts == [everything[max(0, prompt_length + i - length) : prompt_length + i] for i in range(12)]


def test_the_seed_decides_and_nothing_else():
    prompt = np.array([1, 2])
    first, again = (sample(FakeModel(8), config(), prompt, 40).tolist() for _ in range(2))
    other = sample(FakeModel(8), config(seed=1), prompt, 40).tolist()
    assert first == again
    assert first != other


def test_padding_ids_are_never_drawn():
    assert sample(FakeModel(8), config(), np.array([0]), 200, temperature=5.0).max() < VOCAB


def test_temperature_zero_takes_the_likeliest():
    made = sample(FakeModel(8), replace(config()), np.array([4]), 9, temperature=0)
    assert made.tolist() == [(5 + i) % VOCAB for i in range(9)]


def test_draw_follows_the_softmax():
    random = np.random.default_rng(0)
    logits, temperature = np.array([1.0, 0.0, 2.0, -50.0], np.float32), 0.5
    counts = np.bincount([draw(logits, temperature, random) for _ in range(20_000)], minlength=4)
    expected = np.exp(logits / temperature) / np.exp(logits / temperature).sum()
    np.testing.assert_allclose(counts / 20_000, expected, atol=0.01)
