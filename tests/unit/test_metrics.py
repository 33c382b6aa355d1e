"""Counts add up over processes, survive the pipe, and quantiles are right within their promise."""

from __future__ import annotations

import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrunner.metrics import METRICS, Latencies, Tally, tally_from_wire


def tally(seed: int) -> Tally:
    draw = random.Random(seed)
    made = Tally(
        attempts=draw.randrange(100),
        succeeded=draw.randrange(100),
        failed=draw.randrange(100),
        retries=draw.randrange(100),
        tokens_in=draw.randrange(10**12),
        tokens_out=draw.randrange(10**12),
    )
    for _ in range(draw.randrange(50)):
        made.failures[draw.choice(["429", "500", "reset"])] += 1
        made.latencies.add(draw.expovariate(2.0))
    return made


@pytest.mark.parametrize("seed", range(5))
def test_tally_survives_the_pipe(seed: int) -> None:
    made = tally(seed)

    copied = tally_from_wire(json.loads(json.dumps(made.to_wire())))

    assert copied.to_wire() == made.to_wire()
    assert type(copied.failures) is type(made.failures)


def test_tallies_add_up_in_any_order() -> None:
    forward, backward = Tally(), Tally()
    for seed in range(6):
        forward.add(tally(seed))
    for seed in reversed(range(6)):
        backward.add(tally(seed))

    assert forward.to_wire() == backward.to_wire()
    assert forward.attempts == sum(tally(seed).attempts for seed in range(6))
    assert sum(forward.latencies.counts) == sum(sum(tally(seed).latencies.counts) for seed in range(6))


def test_adding_does_not_change_what_is_added() -> None:
    other = tally(1)
    before = other.to_wire() | {"latencies": list(other.latencies.counts)}

    total = Tally()
    total.add(other)
    total.latencies.add(1.0)
    total.failures["500"] += 1

    assert other.to_wire() == before


def test_quantile_of_nothing_is_none() -> None:
    assert Latencies().quantile(0.5) is None


@given(
    st.lists(st.floats(min_value=0.002, max_value=3000.0), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99])
)
def test_quantile_is_right_within_nine_percent(elapsed_s: list[float], share: float) -> None:
    latencies = Latencies()
    for each in elapsed_s:
        latencies.add(each)

    found = latencies.quantile(share)

    ordered = sorted(elapsed_s)
    true = next(each for rank, each in enumerate(ordered, 1) if rank >= share * len(ordered))
    assert found == pytest.approx(true, rel=0.09)


@pytest.mark.parametrize("elapsed_s", [0.0, 1e-9, 0.001, 1e9, 1e18])
def test_latency_beyond_the_buckets_is_counted_at_their_ends(elapsed_s: float) -> None:
    latencies = Latencies()

    latencies.add(elapsed_s)

    assert sum(latencies.counts) == 1
    assert latencies.quantile(0.5) is not None


def test_names_of_metrics_tell_unit_and_kind() -> None:
    names = [metric.name for metric in METRICS]

    assert len(set(names)) == len(names)
    for metric in METRICS:
        assert re.fullmatch(r"batchrunner_[a-z_]+", metric.name)
        assert (metric.kind == "counter") == metric.name.endswith("_total")
        assert metric.label is None or "id" not in metric.label.split("_")
