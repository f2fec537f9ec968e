"""What is said of a plan follows from its figures."""

import dataclasses
import re

import pytest

from jaxtrain.config import Config
from jaxtrain.planner.answer import make_bill, plan_json
from jaxtrain.planner.estimates import Cluster, Estimate, SearchResult
from jaxtrain.planner.words import (
    bill_words,
    explain_plan,
    what_limits,
    what_would_change,
    why_first,
    why_nothing_fits,
)
from tests.planner.plans import CLUSTER, SEVENTY, make_estimate, make_layout, make_plan, make_search

FLAT = make_layout(fsdp=16, tensor=8)
PIPED = make_layout(pipe=4, fsdp=4, tensor=8)


def result(*ranked: Estimate) -> SearchResult:
    return dataclasses.replace(make_search(), ranked=ranked, points=(), candidates=len(ranked))


def test_the_runner_up_is_compared_part_by_part():
    first, second = make_estimate(FLAT, matmul=4.0, exposed=0.5), make_estimate(FLAT, matmul=4.0, exposed=1.0)
    said = why_first((first, second), result(first, second))
    worse = second.time.total / first.time.total - 1
    assert f"takes {worse:.1%} more time: 500 ms more on waiting for transfers" in said
    assert "matmuls" not in said


def test_the_nearest_of_another_kind_is_named_by_what_it_lacks_or_adds():
    first, second, other = make_estimate(FLAT), make_estimate(FLAT, matmul=6.0), make_estimate(PIPED, bubble=3.0)
    said = why_first((first, second), result(first, second, other))
    assert re.search(r"The best with pipe, pipe=4 × fsdp=4 × tensor=8 .* more on waiting for other stages", said)
    assert "The best without pipe" in why_first((other, other, first), result(other))


def test_energy_is_ranked_by_energy():
    first, second = make_estimate(FLAT), dataclasses.replace(make_estimate(FLAT), joules=2 * (make_estimate(FLAT).joules or 0))
    assert "takes 100.0% more energy" in why_first((first, second), result(first, second), "energy")
    assert "is as good within 0.1%" in why_first((first, second), result(first, second), "time")


def test_what_was_compiled_is_held_against_what_was_compiled():
    """The winner's program waits more than was estimated; another layout, not compiled, is no better for that."""
    first, other = make_estimate(FLAT, matmul=4.0), make_estimate(PIPED, matmul=4.0, bubble=1.0)
    worse = other.time.total / first.time.total - 1
    program = dataclasses.replace(make_estimate(FLAT, matmul=9.0), origin="compiled", memory=first.memory)
    said = why_first((program, other), result(first, other))
    assert f"takes {worse:.1%} more time" in said
    off = 1 - first.time.total / program.time.total
    assert f"One of them was compiled for the chip: estimates of memory were up to 0% off, of time {off:.0%}." in said


@pytest.mark.parametrize(
    ("time", "words"),
    [
        ({"matmul": 9.0}, "Compute limits it"),
        ({"exposed": 9.0}, "Transfers limit it"),
        ({"bubble": 9.0}, "The pipeline's bubble limits it"),
        ({"memory_bound": 9.0}, "Memory bandwidth limits it"),
        ({"overhead": 9.0}, "Launching kernels limits it"),
    ],
)
def test_what_limits(time: dict[str, float], words: str):
    estimate = make_estimate(FLAT, **time)
    said = what_limits(estimate, result(estimate))
    assert said.startswith(words)
    assert "is for all-gather along fsdp, over the network between hosts" in said  # 0.16 s against 0.08 s in a host
    assert "memory does not limit it" in said


def test_memory_limits_where_a_faster_layout_does_not_fit():
    found = make_search()
    faster = min((p for p in found.points if not p.fits), key=lambda p: p.seconds)
    assert faster.seconds < found.ranked[0].time.total
    assert "memory limits it too" in what_limits(found.ranked[0], found)


def test_what_would_change_asks_again():
    asked: list[tuple[Config, Cluster]] = []

    def search(config: Config, cluster: Cluster) -> SearchResult:
        asked.append((config, cluster))
        return result(make_estimate(PIPED, matmul=1.0)) if cluster.chip.memory_bytes == 160e9 else result(make_estimate(FLAT))

    said = what_would_change(SEVENTY, CLUSTER, make_estimate(FLAT), search)
    assert [config.train.global_batch_size for config, _ in asked] == [128, 256, 128]
    assert [cluster.chip.nic_bandwidth for _, cluster in asked] == [50e9, 50e9, 100e9]
    assert re.search(r"With twice the memory \(160 GB a chip\) the best is pipe=4 .* more tokens/s", said)
    assert said.count("the same layout: nothing gained") == 2


def test_no_search_is_begun_when_searches_take_long(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 1000, 15))
    monkeypatch.setattr("time.process_time", lambda: float(next(clock)))
    said = what_would_change(SEVENTY, CLUSTER, make_estimate(FLAT), lambda config, cluster: result(make_estimate(FLAT)))
    assert said.count("the same layout") == 1
    assert said.endswith("twice the batch (256 sequences a step) and a network twice as fast (100 GB/s a chip).")


def test_nothing_fits():
    small = Cluster(CLUSTER.chip, hosts=1)
    found = make_search(cluster=small)
    found = dataclasses.replace(found, ranked=(), smallest=Cluster(CLUSTER.chip, hosts=3))
    (said,) = explain_plan(SEVENTY, small, "time", found, (), make_search)
    assert said == why_nothing_fits(SEVENTY, small, found)
    assert said.startswith(f"70b does not fit on 8 × h100-sxm (1 host of 8): none of {found.candidates} layouts does.")
    assert said.endswith("The smallest cluster that would do is 24 × h100-sxm (3 hosts of 8): --hosts=3.")
    assert "\n" not in said


def test_bill():
    layout = make_estimate(FLAT)
    layout = dataclasses.replace(
        layout, time=dataclasses.replace(layout.time, matmul=layout.time.matmul + 10 - layout.time.total)
    )
    bill = make_bill(layout, tokens=100 * layout.tokens, days=0, price_per_gpu_hour=3.0)
    assert bill is not None
    assert (bill.steps, bill.seconds) == (100, pytest.approx(1000))
    assert bill.gpu_hours == pytest.approx(128 * 1000 / 3600)
    assert bill.money == pytest.approx(3 * bill.gpu_hours)
    assert bill.kilowatt_hours == pytest.approx((layout.joules or 0) * 100 / 3.6e6)
    days = make_bill(layout, tokens=0, days=1, price_per_gpu_hour=0)
    assert days is not None
    assert days.tokens == pytest.approx(8640 * layout.tokens)
    assert days.money is None
    both = make_bill(layout, tokens=100 * layout.tokens, days=1 / 86.4 / 2, price_per_gpu_hour=0)
    assert both is not None
    assert "that is 2 times as long as asked" in bill_words(both)
    assert make_bill(layout, 0, 0, 1.0) is None


def test_json_is_plain():
    import json

    said = json.loads(json.dumps(plan_json(make_plan(tokens=1e12)), allow_nan=False))
    assert said["ranked"][0]["mesh"] == {"fsdp": 16, "tensor": 8}
    assert said["best_config"]["mesh"]["tensor"] == 8
    assert said["cluster"]["devices"] == 128
    assert len(said["words"]) == 3
