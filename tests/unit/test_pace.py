"""The window against simulated upstreams, in virtual time: how close to the best fixed one, and how soon."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from batchrunner.pace import WINDOW_START, Window
from batchrunner.sampler import Bound, Sample, merged
from batchrunner.trouble import Advice, Trouble
from tests.unit.queueing import Loop, Server, Service, batching, constant, lognormal, uniform

LATENCY_S = 0.2
SERVICES: dict[str, Callable[[float], Service]] = {"constant": constant, "lognormal": lognormal, "uniform": uniform}


def assert_near_best(loop: Loop, slots: int, from_s: float, to_s: float) -> None:
    """95 % of what `slots` can give, at no more than twice the slots and twice the latency of one request alone.

    What the upstream happened to draw moves the rate of a few slots by some percent, in either direction.
    """
    draw = 0.03 if slots <= 8 else 0.0
    sizes = sorted(loop.sizes(from_s, to_s))

    assert loop.rate(from_s, to_s) >= (0.95 - draw) * slots / LATENCY_S
    assert loop.p50_s(from_s, to_s) <= 2.0 * LATENCY_S
    assert sizes[len(sizes) * 9 // 10] <= max(2 * slots, WINDOW_START)


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("slots", [8, 64, 512])
def test_the_window_finds_the_slots_and_follows_them(slots: int, service: str) -> None:
    """Within 30 s of the start, 10 s of capacity halved, and 30 s of capacity doubled."""
    loop = Loop(Server(slots, SERVICES[service](LATENCY_S)), Window())

    loop.run_until(40)
    assert_near_best(loop, slots, 30, 40)

    loop.resize(slots // 2)
    loop.run_until(65)
    assert_near_best(loop, slots // 2, 50, 65)

    loop.resize(slots)
    loop.run_until(105)
    assert_near_best(loop, slots, 95, 105)


@pytest.mark.parametrize("seed", range(8))
def test_the_window_finds_few_slots_whatever_the_draw(seed: int) -> None:
    loop = Loop(Server(8, lognormal(LATENCY_S)), Window(), seed=seed)

    loop.run_until(60)

    assert_near_best(loop, 8, 30, 60)


def test_few_slots_that_become_half_as_many_are_kept_busy() -> None:
    """In forty draws no place stays empty for long: a window that cannot hold the throughput is not tried."""
    shares = []
    for seed in range(20, 60):
        loop = Loop(Server(8, uniform(LATENCY_S)), Window(), seed=seed)
        loop.run_until(50)
        loop.resize(4)
        loop.run_until(80)
        shares.append(loop.rate(60, 80) / (4 / LATENCY_S))

    assert min(shares) >= 0.95


def test_a_large_upstream_is_filled_within_ten_seconds() -> None:
    loop = Loop(Server(512, lognormal(LATENCY_S)), Window())

    loop.run_until(12)

    assert loop.rate(10, 12) >= 0.95 * 512 / LATENCY_S


@pytest.mark.parametrize("service", SERVICES)
def test_an_upstream_without_a_queue_is_filled_and_rarely_refuses(service: str) -> None:
    loop = Loop(Server(64, SERVICES[service](LATENCY_S), queue=0), Window())

    loop.run_until(90)

    assert loop.rate(30, 90) >= 0.9 * 64 / LATENCY_S
    assert loop.refused_share(30, 90) < 0.01
    assert loop.window.bound_by is Bound.REFUSALS


def test_a_refusing_upstream_that_changes_is_followed() -> None:
    loop = Loop(Server(64, lognormal(LATENCY_S), queue=0), Window())
    loop.run_until(40)

    loop.resize(32)
    loop.run_until(70)
    loop.resize(64)
    loop.run_until(120)

    assert loop.rate(50, 70) >= 0.9 * 32 / LATENCY_S
    assert loop.refused_share(50, 70) < 0.01
    assert loop.rate(100, 120) >= 0.9 * 64 / LATENCY_S


def test_a_full_queue_is_not_what_stops_the_growth() -> None:
    loop = Loop(Server(64, lognormal(LATENCY_S), queue=64), Window())

    loop.run_until(40)

    assert_near_best(loop, 64, 30, 40)
    assert loop.refused_share(30, 40) == 0.0


@pytest.mark.parametrize("share", [0.005, 0.02, 0.05])
@pytest.mark.parametrize("seed", range(2))
def test_refusals_that_no_window_cures_do_not_keep_it_small(share: float, seed: int) -> None:
    loop = Loop(Server(64, lognormal(LATENCY_S), refused_share=share), Window(), seed=seed)

    loop.run_until(60)

    assert loop.rate(40, 60) >= 0.9 * 64 / LATENCY_S


@pytest.mark.parametrize("share", [0.0003, 0.001])
@pytest.mark.parametrize("slots", [8, 64, 512])
def test_a_stray_refusal_in_a_thousand_costs_nothing(slots: int, share: float) -> None:
    loop = Loop(Server(slots, lognormal(LATENCY_S), refused_share=share), Window())

    loop.run_until(30)

    assert loop.rate(12, 30) >= 0.93 * slots / LATENCY_S


@pytest.mark.parametrize("slots", [4, 8, 64, 512])
def test_what_one_place_too_many_brings_is_no_habit(slots: int) -> None:
    """The window looks for more now and then, and each time as much is refused: that is no share to live with."""
    loop = Loop(Server(slots, constant(LATENCY_S), queue=0), Window())

    loop.run_until(150)

    assert loop.refused_share(30, 150) < 0.01
    assert loop.rate(30, 150) >= 0.9 * slots / LATENCY_S


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_stray_resets_do_not_shrink_the_window(share: float) -> None:
    loop = Loop(Server(64, lognormal(LATENCY_S), broken_share=share), Window())

    loop.run_until(60)

    assert loop.rate(30, 60) >= 0.95 * (1 - share) * 64 / LATENCY_S


@pytest.mark.parametrize("seed", range(2))
def test_latency_that_grows_does_not_stop_growth_that_pays(seed: int) -> None:
    """A batching server: every request slows the others, and 16 in flight give a quarter of what is to be had."""
    loop = Loop(Server(4096, batching(0.5)), Window(), seed=seed)

    loop.run_until(90)

    most = 48 / 0.5
    assert loop.rate(60, 90) >= 0.75 * most
    assert max(loop.sizes(60, 90)) <= 768


def test_a_batching_server_with_a_limit_is_filled() -> None:
    loop = Loop(Server(200, batching(0.5)), Window())

    loop.run_until(90)

    assert loop.rate(60, 90) >= 0.9 * 200 / (0.5 * (1 + 200 / 48))


def test_where_our_own_processor_is_the_limit_the_window_stays_sane() -> None:
    """3 ms away, and 3,333 answers a second at most: more than 11 in flight only queue, at no cost to anybody."""
    loop = Loop(Server(1, constant(0.0003), delay_s=0.003), Window())

    loop.run_until(30)

    assert loop.rate(10, 30) >= 0.97 / 0.0003
    assert min(loop.sizes(10, 30)) >= 32
    assert max(loop.sizes(10, 30)) <= 128


def test_one_slot_is_not_buried_for_long() -> None:
    loop = Loop(Server(1, lognormal(1.0)), Window())

    loop.run_until(200)

    assert max(loop.sizes(100, 200)) <= 8
    assert loop.rate(100, 200) >= 0.85


def test_slow_answers_are_given_time() -> None:
    loop = Loop(Server(200, lognormal(20.0)), Window())

    loop.run_until(900)

    assert loop.rate(400, 900) >= 0.9 * 200 / 20.0
    assert loop.p50_s(400, 900) <= 2.0 * 20.0


def test_input_that_runs_short_says_nothing_of_the_upstream() -> None:
    loop = Loop(Server(64, lognormal(LATENCY_S)), Window(), supply=lambda now_s: 5 if 30 < now_s < 50 else 10_000)

    loop.run_until(45)
    starved_by, size = loop.window.bound_by, loop.window.size
    loop.run_until(65)

    assert starved_by is Bound.INPUT
    assert 48 <= size <= 128
    assert_near_best(loop, 64, 55, 65)


def test_the_window_never_exceeds_its_maximum() -> None:
    loop = Loop(Server(512, constant(LATENCY_S)), Window(size_max=100))

    loop.run_until(20)

    assert max(loop.sizes(0, 20)) == 100
    assert loop.window.bound_by is Bound.MAXIMUM


def test_a_pinned_window_stays_whatever_happens() -> None:
    loop = Loop(Server(8, constant(LATENCY_S), queue=0, broken_share=0.2), Window(pinned=30))

    loop.run_until(10)

    assert set(loop.sizes(0, 10)) == {30}
    assert loop.window.bound_by is Bound.PINNED


def test_an_upstream_that_refuses_everything_leaves_a_window_of_one() -> None:
    window = Window()

    for tick in range(600):
        window.observe(Sample(at_s=tick / 10, span_s=0.1, refused=window.size, window=window.size))

    assert window.size <= 2
    assert window.bound_by is Bound.REFUSALS


def test_after_a_spell_of_refusals_the_window_recovers() -> None:
    loop = Loop(Server(64, lognormal(LATENCY_S), refused_share=1.0), Window())
    loop.run_until(20)
    assert loop.window.size <= 2

    loop.server.refused_share = 0.0
    loop.run_until(80)

    assert loop.rate(70, 80) >= 0.9 * 64 / LATENCY_S


def test_what_the_window_lost_while_its_upstream_went_down_comes_back() -> None:
    window = Window(start=64)
    window.observe(Sample(at_s=0.1, span_s=0.1, answered=30, latency_sum_s=6.0, in_flight_mean=64.0))
    for tick in range(2, 20):
        window.observe(Sample(at_s=tick / 10, span_s=0.1, refused=window.size, window=window.size))
    assert window.size <= 4

    for tick in range(20, 100):
        window.observe(Sample(at_s=tick / 10, span_s=0.1, refused=1, is_down=True))
    window.observe(Sample(at_s=10.0, span_s=0.1, answered=30, latency_sum_s=6.0, in_flight_mean=64.0))

    assert window.size == 64
    assert window.bound_by is not Bound.REFUSALS


def test_upstream_is_down_for_all_when_one_process_finds_it_so_and_none_gets_an_answer() -> None:
    idle = Sample(at_s=1.0, span_s=0.1)
    down = Sample(at_s=1.0, span_s=0.1, refused=1, is_down=True)
    answered = Sample(at_s=1.0, span_s=0.1, answered=1)

    assert merged([idle, down]).is_down
    assert not merged([answered, down]).is_down
    assert not merged([idle, idle]).is_down


def test_timeouts_by_the_score_shrink_the_window() -> None:
    window = Window(start=256)

    for tick in range(10):
        window.observe(Sample(at_s=tick / 10, span_s=0.1, answered=5, broken=30, latency_sum_s=1.0, in_flight_mean=256))

    assert window.size < 256
    assert window.bound_by is Bound.FAILURES


def test_samples_of_several_processes_make_one() -> None:
    one = Sample(at_s=1.0, span_s=0.1, answered=4, refused=1, latency_sum_s=0.8, in_flight_mean=16.0, window=16)
    other = Sample(
        at_s=1.02, span_s=0.1, answered=2, broken=1, latency_sum_s=0.4, in_flight_mean=8.0, window=16,
        short_of=Bound.MEMORY,
    )  # fmt: skip

    both = merged([one, other])

    assert (both.at_s, both.span_s) == (1.02, 0.1)
    assert (both.answered, both.refused, both.broken) == (6, 1, 1)
    assert both.latency_sum_s == pytest.approx(1.2)
    assert both.in_flight_mean == pytest.approx(24.0)
    assert both.was_full == pytest.approx(24.0 / 32.0)
    assert both.short_of is Bound.MEMORY


def test_what_is_allowed_to_a_process_without_lines_is_no_part_of_the_window_but_to_one_that_pauses_it_is() -> None:
    busy = Sample(at_s=1.0, span_s=0.1, answered=8, latency_sum_s=1.6, in_flight_mean=16.0, window=16)
    idle = Sample(at_s=1.0, span_s=0.1, window=16)
    paused = Sample(at_s=1.0, span_s=0.1, window=16, short_of=Bound.REFUSALS)

    assert merged([busy, idle]).was_full == 1.0
    assert merged([busy, paused]).was_full == 0.5
    assert merged([busy, paused]).short_of is Bound.REFUSALS


def test_samples_that_overlap_in_part_lose_nothing() -> None:
    """Two in a row from one process: what was in flight counts twice here, and not at all in the next round."""
    pair = [
        Sample(at_s=1.0, span_s=0.1, answered=4, latency_sum_s=0.8, in_flight_mean=16.0),
        Sample(at_s=1.1, span_s=0.1, answered=4, latency_sum_s=0.8, in_flight_mean=16.0),
    ]

    both = merged(pair)

    assert both.answered == 8
    assert both.in_flight_mean * both.span_s == pytest.approx(3.2)


def refusals() -> Trouble:
    return Trouble(tolerated=0.0, habit_max=0.2, shrinks_max=3, block=50)


def noted(trouble: Trouble, failed: int, succeeded: int, *, size: int = 64, at_s: float = 0.0) -> Advice:
    return trouble.note(failed, succeeded, size=size, held=size, at_s=at_s, is_patient=False)


def test_many_failures_at_once_shrink_even_while_patient() -> None:
    trouble = refusals()

    assert trouble.note(1, 30, size=64, held=64, at_s=0.0, is_patient=True) is Advice.NOTHING
    assert trouble.note(20, 10, size=64, held=64, at_s=0.1, is_patient=True) is Advice.SHRINK


def test_what_shrinking_does_not_cure_is_a_habit_until_forgotten() -> None:
    trouble = refusals()

    advice = [noted(trouble, 3, 97, size=64 - step, at_s=float(step)) for step in range(4)]
    later = [noted(trouble, 3, 97, at_s=5.0 + step) for step in range(50)]
    much_later = [noted(trouble, 3, 97, at_s=5000.0 + step) for step in range(5)]

    assert advice == [Advice.SHRINK] * 3 + [Advice.RESTORE]
    assert trouble.size_before == 64
    assert set(later) == {Advice.NOTHING}
    assert Advice.SHRINK in much_later


def test_failures_of_larger_sizes_only_are_never_a_habit() -> None:
    trouble = refusals()

    advice = []
    for _ in range(10):
        advice.append(noted(trouble, 2, 30, size=66))
        noted(trouble, 0, 300, size=64)

    assert set(advice) == {Advice.SHRINK}


def test_a_failure_now_and_then_shrinks_nothing() -> None:
    trouble = refusals()

    advice = {noted(trouble, 1, 600) for _ in range(100)}

    assert advice == {Advice.NOTHING}
    assert noted(trouble, 5, 30) is Advice.SHRINK
    assert noted(refusals(), 2, 30) is Advice.SHRINK


def test_what_failed_before_an_outage_is_not_held_against_what_comes_after() -> None:
    trouble = refusals()
    noted(trouble, 20, 40, size=64)
    noted(trouble, 0, 200, size=44)

    trouble.forget()
    advice = [noted(trouble, 2, 30, size=64 - step) for step in range(4)]

    assert advice == [Advice.SHRINK] * 3 + [Advice.RESTORE]


def test_a_cured_spell_is_not_held_against_the_next() -> None:
    trouble = refusals()

    advice = []
    for _ in range(10):
        advice.append(noted(trouble, 2, 30))
        for _ in range(11):
            noted(trouble, 0, 500)

    assert set(advice) == {Advice.SHRINK}
