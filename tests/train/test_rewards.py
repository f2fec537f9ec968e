"""Rewards: functions from files, their time limit and failures; advantages and weights against their formulas."""

import threading

import numpy as np
import pytest

from jaxtrain.errors import ExplainedError
from jaxtrain.train.advantages import answer_weights, group_advantages, no_spread
from jaxtrain.train.rewards import AnswerGroup, load_reward, run_timed, score

GROUPS = [AnswerGroup("1+1=", ("2", "3"), {"answer": "2"}), AnswerGroup("2+2=", ("5", "4"), {"answer": "4"})]


def right(prompts, completions, rows):
    return [float(completion == row["answer"]) for completion, row in zip(completions, rows, strict=True)]


def test_each_group_is_one_call():
    seen = []

    def reward(prompts, completions, rows):
        seen.append((prompts, completions))
        return right(prompts, completions, rows)

    scores = score(reward, GROUPS, workers=1, seconds=60)
    assert scores.rewards.tolist() == [[1, 0], [0, 1]]
    assert scores.rewards.dtype == np.float32
    assert not scores.failures
    assert seen == [(["1+1="] * 2, ["2", "3"]), (["2+2="] * 2, ["5", "4"])]


def test_a_call_that_raises_or_never_ends_counts_zero_and_is_named():
    forever = threading.Event()

    def reward(prompts, completions, rows):
        if prompts[0] == "1+1=":
            raise KeyError("no such field")
        forever.wait()

    try:
        scores = score(reward, GROUPS, workers=2, seconds=0.05)
    finally:
        forever.set()
    assert not scores.rewards.any()
    assert len(scores.failures) == 2
    assert "KeyError" in scores.failures[0]
    assert "reward_seconds=0.05" in scores.failures[1]
    assert "2+2=" in scores.failures[1]


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ([1.0], "1 values for 2 answers"),
        ([0.0, float("nan")], "returned nan for answer 1 of 2"),
        ([float("inf"), 0.0], "returned inf for answer 0"),
        ([1e39, 0.0], "returned 1e\\+39"),
        (None, "returned 'None'"),
        (["good", 1.0], "not one float for each"),
    ],
)
def test_wrong_values_are_errors_with_the_numbers(returned, words):
    with pytest.raises(ExplainedError, match=words):
        score(lambda prompts, completions, rows: returned, GROUPS, workers=2, seconds=60)


def test_no_more_calls_run_at_a_time_than_there_are_workers():
    running, most, lock, turn = [0], [0], threading.Lock(), threading.Barrier(2)

    def call():
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        turn.wait()  # passes only where two run at once
        with lock:
            running[0] -= 1
        return most[0]

    outcomes = run_timed([call] * 6, workers=2, seconds=60)
    assert most == [2]
    assert all(outcome.error is None for outcome in outcomes)


def test_the_function_comes_from_a_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def reward(p, c, r): return [1.0]\ndef other(p, c, r): return [2.0]\n")
    assert load_reward(str(file))([], [], []) == [1.0]
    assert load_reward(f"{file}:other")([], [], []) == [2.0]
    (tmp_path / "beside.py").write_text("SCALE = 3.0")
    file.write_text(file.read_text() + "from beside import SCALE\ndef scaled(p, c, r): return [SCALE]\n")
    assert load_reward(f"{file}:scaled")([], [], []) == [3.0]
    with pytest.raises(ExplainedError, match="has no function third"):
        load_reward(f"{file}:third")
    with pytest.raises(ExplainedError, match="is no Python file"):
        load_reward(str(tmp_path / "none.py"))
    file.write_text("import nothing_of_this_name\n")
    with pytest.raises(ExplainedError, match="ModuleNotFoundError"):
        load_reward(str(file))


def test_advantages_are_those_of_the_formulas():
    rewards = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    rewards[1] = 0.1  # whose mean in float32 is not 0.1
    mean, std = rewards.mean(1, keepdims=True), rewards.std(1, ddof=1, keepdims=True)
    others = np.array([[np.delete(row, i).mean() for i in range(4)] for row in rewards])
    expected = {"grpo": (rewards - mean) / (std + 1e-4), "dr_grpo": rewards - mean, "rloo": rewards - others}
    for kind, values in expected.items():
        found = group_advantages(rewards, kind)
        np.testing.assert_allclose(found[[0, 2]], values[[0, 2]], atol=1e-6)
        assert not found[1].any()
        assert found.dtype == np.float32
    assert no_spread(rewards).tolist() == [False, True, False]


def test_weights_sum_to_what_they_normalise():
    lengths, counted = np.array([1, 3, 4, 2]), np.array([True, True, False, True])
    sums = lambda normaliser: answer_weights(lengths, counted, normaliser, 4) * lengths  # noqa: E731
    np.testing.assert_allclose(sums("answer"), [1 / 3, 1 / 3, 0, 1 / 3])
    np.testing.assert_allclose(sums("token"), np.array([1, 3, 0, 2]) / 6)
    np.testing.assert_allclose(sums("constant"), np.array([1, 3, 0, 2]) / 12)
    nothing = np.zeros(4, bool)
    assert not any(answer_weights(lengths, nothing, normaliser, 4).any() for normaliser in ("answer", "token", "constant"))
