import sys
import types

import pytest

from jaxtrain.config import Config, DataConfig, Stage, TrainConfig
from jaxtrain.hardware import find_chip
from jaxtrain.telemetry.clock import RunWork, StepClock, StepWork, host_memory_peak, memory_row
from jaxtrain.telemetry.flops import model_flops_per_token
from tests.tiny import tiny

WORK = StepWork(
    tokens_per_step=1000, num_devices=4, flops_per_token_full=2 * 10**9, flops_per_token_causal=10**9, peak_flops=1e12
)


class Alike(RunWork):
    """A run whose steps all do the same work."""

    def __init__(self, work: StepWork):
        self.work = work

    def at(self, step: int) -> StepWork:
        return self.work

    def tokens(self, steps: int) -> int:
        return int(steps * self.work.tokens_per_step)

    def stage(self, step: int) -> dict:
        return {}


class Hand:
    """A clock that a test moves."""

    def __init__(self):
        self.time = 100.0

    def __call__(self):
        return self.time


@pytest.fixture
def hand():
    return Hand()


def take_steps(clock, hand, seconds, first=1):
    for step, duration in enumerate(seconds, first):
        hand.time += duration
        clock.step_done(step)


def test_a_window_has_the_median_step_and_the_throughput_of_all(hand):
    clock = StepClock(Alike(WORK), total_steps=10, now=hand)
    hand.time += 50  # compilation
    clock.start()
    take_steps(clock, hand, [1.0, 1.0, 4.0])
    row = clock.window()
    assert row["step_seconds"] == 1.0
    assert row["tokens_per_second"] == 500.0
    assert row["tflops_per_second_per_device_full"] == pytest.approx(500 * 2e9 / 4 / 1e12)
    assert row["mfu_full"] == pytest.approx(0.25)
    assert row["mfu_causal"] == pytest.approx(0.125)
    assert row["tokens"] == 3000
    assert row["elapsed_seconds"] == 6.0
    assert row["eta_seconds"] == pytest.approx(7 * 2.0)
    take_steps(clock, hand, [2.0], first=4)
    assert clock.window()["step_seconds"] == 2.0


def test_waiting_for_data_counts_and_pauses_do_not(hand):
    clock = StepClock(Alike(WORK), total_steps=10, now=hand)
    for step in (1, 2):
        with clock.waiting_for_data():
            hand.time += 0.5
        hand.time += 1.0
        with clock.paused():
            hand.time += 20.0
        clock.step_done(step)
    row = clock.window()
    assert row["step_seconds"] == 1.5
    assert row["data_wait_seconds"] == 0.5
    assert row["tokens_per_second"] == pytest.approx(1000 / 1.5)
    assert row["elapsed_seconds"] == 43.0
    assert row["eta_seconds"] == pytest.approx(8 * 21.5)


def test_a_resumed_run_goes_on_counting(hand):
    clock = StepClock(Alike(WORK), total_steps=20, start_step=10, elapsed_before=100.0, now=hand)
    assert clock.eta_seconds() is None
    take_steps(clock, hand, [3.0, 3.0], first=11)
    row = clock.window()
    assert row["tokens"] == 12_000
    assert row["elapsed_seconds"] == 106.0
    assert row["eta_seconds"] == 8 * 3.0


def test_an_empty_window_is_unknown_not_zero(hand):
    row = StepClock(Alike(WORK), total_steps=5, now=hand).window()
    assert row["step_seconds"] is row["tokens_per_second"] is row["mfu_full"] is row["eta_seconds"] is None


def test_work_is_taken_from_the_config():
    config = Config(train=TrainConfig(global_batch_size=6), data=DataConfig(sequence_length=32))
    work = StepWork.of(config, num_devices=2, chip=find_chip("h100-sxm"))
    assert work.tokens_per_step == 192
    assert work.peak_flops == 989.4e12
    assert work.flops_per_token_full > work.flops_per_token_causal
    unknown = StepWork.of(config, num_devices=2, chip=find_chip("cpu")).throughput(10.0)
    assert unknown["mfu_full"] is None
    assert unknown["tflops_per_second_per_device_full"] == pytest.approx(5 * work.flops_per_token_full / 1e12)


def test_memory_is_the_devices_where_it_says_and_else_the_hosts():
    def device(stats):
        return types.SimpleNamespace(memory_stats=lambda: stats)

    assert memory_row([device({"peak_bytes_in_use": 5}), device({"peak_bytes_in_use": 7})]) == {"device_memory_bytes": 7}
    row = memory_row([device(None)])
    assert row["device_memory_bytes"] is None
    assert row["host_memory_bytes"] == host_memory_peak()
    assert 10e6 < host_memory_peak() < 1e12 or sys.platform != "linux"


def test_a_window_over_two_stages_counts_the_work_of_each():
    stages = (Stage(name="long", from_step=4, sequence_length=32),)
    config, hand = tiny(train={"stages": stages, "steps": 8}), Hand()
    clock = StepClock(RunWork(config, 1, find_chip("h100-sxm")), total_steps=8, now=hand)
    take_steps(clock, hand, [1.0] * 6)
    row = clock.window()
    assert row["stage"] == "long"
    assert row["tokens"] == 4 * 64 + 2 * 256
    assert row["tokens_per_second"] == pytest.approx(row["tokens"] / 6)
    flops = sum(n * model_flops_per_token(config.model, length, "full") for n, length in ((4 * 64, 8), (2 * 256, 32)))
    assert row["tflops_per_second_per_device_full"] == pytest.approx(flops / 6 / 1e12)
    assert row["eta_seconds"] == pytest.approx(6.0 * 2 * 256 / row["tokens"])
