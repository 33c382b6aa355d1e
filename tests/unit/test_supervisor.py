"""Worker processes: how the limits are shared out, what a death costs, and how the crew ends."""

from __future__ import annotations

import asyncio
import itertools
import random
import re
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from batchrunner.clock import SystemClock
from batchrunner.errors import WorkerLost
from batchrunner.holdings import LiveUse
from batchrunner.metrics import Tally
from batchrunner.pace import Window
from batchrunner.sampler import Sample
from batchrunner.settings import Settings
from batchrunner.supervisor import Activity, Report, Supervisor, encode_message
from batchrunner.targets import Target
from tests.hostile.peer import until
from tests.unit.crewing import (
    GREETING,
    Crew,
    last_share,
    nobody_dies,
    report,
    supervisor_of,
    told,
)
from tests.unit.fanning import VirtualClock
from tests.unit.queueing import Server, Service, constant, lognormal

LIMIT_S = 30.0


# -- shares, without processes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "window"), [*itertools.product([1, 2, 3, 8], [8, 9, 100])])
def test_window_is_split_evenly_and_wholly_among_busy_workers(count: int, window: int) -> None:
    made, children = supervisor_of(count, concurrency=window)
    for child in children:
        child.report = report(in_flight=1)
    for _ in range(3):
        made._hand_out()

    shares = [told(child).window for child in children]
    assert sum(shares) == window
    assert max(shares) - min(shares) <= 1


def test_idle_workers_keep_one_place_each() -> None:
    made, children = supervisor_of(3, concurrency=30)
    children[0].report, children[1].report, children[2].report = report(in_flight=9), report(), report()
    for _ in range(3):
        made._hand_out()

    assert [told(child).window for child in children] == [28, 1, 1]


def test_workers_leave_to_others_the_places_that_these_use() -> None:
    made, children = supervisor_of(2, concurrency=10)
    for child in children:
        child.report = report(in_flight=1)
    shares = []
    for places in (4, 12, 0):
        made.yield_to([LiveUse(places=places)])
        for _ in range(3):
            made._hand_out()
        shares.append([told(child).window for child in children])

    assert shares == [[3, 3], [0, 0], [5, 5]]


def test_window_that_was_found_keeps_a_place_for_batches() -> None:
    made, children = supervisor_of(1)
    children[0].report = report(in_flight=1)
    made.yield_to([LiveUse(places=1000)])
    for _ in range(3):
        made._hand_out()

    assert told(children[0]).window == 1


def test_rates_of_workers_are_what_others_have_left() -> None:
    made, children = supervisor_of(2, rpm=100, tpm=1000)
    for child in children:
        child.report = report(in_flight=1)
    made.yield_to([LiveUse(requests=40, tokens=5000)])
    made._hand_out()

    assert [(told(child).rpm, told(child).tpm) for child in children] == [(30.0, 0.0)] * 2
    made.yield_to(())
    made._hand_out()
    assert [(told(child).rpm, told(child).tpm) for child in children] == [(50.0, 500.0)] * 2


def test_window_is_measured_as_if_lines_were_in_the_places_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise each request that passes by would look like an upstream that has become slower."""
    made, children = supervisor_of(1)
    seen: list[Sample] = []
    monkeypatch.setattr(Window, "observe", lambda _, sample: seen.append(sample))
    made.yield_to([LiveUse(places=4, refused=2)])
    sample = Sample(at_s=1.0, span_s=0.1, answered=12, latency_sum_s=1.2, in_flight_mean=12.0, window=20.0)
    idle = Sample(at_s=1.1, span_s=0.1)
    for each in (sample, sample, idle):
        made.yield_to([LiveUse(places=4)])
        children[0].hear(encode_message(report(sample=each)))
        made._observe()

    assert [(each.in_flight_mean, each.window, each.refused) for each in seen] == [
        (16.0, 24.0, 2),
        (16.0, 24.0, 0),
        (0.0, 0.0, 0),
    ]


def test_share_grows_only_by_what_others_have_let_go_of() -> None:
    made, children = supervisor_of(2, concurrency=20)
    children[0].report, children[1].report = report(in_flight=19), report()
    for _ in range(3):
        made._hand_out()
    assert [told(child).window for child in children] == [19, 1]

    children[1].report = report(in_flight=1, waiting=50)
    made._hand_out()
    assert told(children[0]).window == 10
    assert told(children[1]).window == 1

    children[0].report = report(in_flight=14, waiting=1)
    made._hand_out()
    made._hand_out()
    assert told(children[1]).window == 6
    children[0].report = report(in_flight=10, waiting=1)
    made._hand_out()
    assert [told(child).window for child in children] == [10, 10]


@pytest.mark.parametrize("seed", range(20))
def test_all_together_never_exceed_the_window_whatever_they_report(seed: int) -> None:
    """Each child holds between none and all of the larger of its last two shares, as one that is slow to listen may."""
    draw = random.Random(seed)
    made, children = supervisor_of(3, concurrency=24)
    for _ in range(60):
        made._hand_out()
        limits = [max(*child.grants[0]) for child in children]
        for child, limit in zip(children, limits, strict=True):
            held = child.report.in_flight if child.report else 0
            in_flight = draw.randint(0, max(limit, min(held, limit)))
            child.report = report(in_flight=in_flight, waiting=draw.choice([0, 5]))
        assert sum(told(child).window for child in children) <= 24


def test_a_share_that_shrinks_falls_no_lower_than_it_must() -> None:
    """What the others may still have under way is no reason to leave own places empty that stay one's own."""
    made, children = supervisor_of(2)
    made.windows[0].size = 64
    for child in children:
        child.report = report(in_flight=32, waiting=50)
    for _ in range(3):
        made._hand_out()
    assert [told(child).window for child in children] == [32, 32]

    made.windows[0].size = 40
    made._hand_out()

    assert [told(child).window for child in children] == [20, 20]


@pytest.mark.parametrize("slots", [4, 8, 64])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("service", [constant, lognormal])
def test_a_crew_fills_an_upstream_without_a_queue_and_is_rarely_refused(
    slots: int, count: int, service: Callable[[float], Service]
) -> None:
    """Pauses of single workers, words under way and stragglers are not taken for what the upstream does."""
    crew = Crew(Server(slots, service(0.2), queue=0), count, seed=slots + count)

    crew.run_until(90.0)

    assert crew.rate(30.0, 90.0) >= 0.95 * slots / 0.2
    assert crew.refused_share(30.0, 90.0) < 0.01


def in_rounds(made: Supervisor, children: list[Any], clock: VirtualClock, *, over_s: float) -> list[list[int]]:
    """Pace for a time, in which each child ends at once what it began; gives the shares of each round."""
    rounds = []
    for _ in range(round(over_s * 10)):
        for child in children:
            child.report = report(waiting=50)
        made._hand_out()
        rounds.append([told(child).window for child in children])
        clock.now_s += 0.1
    return rounds


@pytest.mark.parametrize(("count", "window"), [(2, 1), (3, 2), (18, 16), (5, 1)])
def test_busy_workers_take_turns_at_a_window_smaller_than_the_crew(count: int, window: int) -> None:
    clock = VirtualClock()
    made, children = supervisor_of(count, clock=clock, concurrency=window)

    rounds = in_rounds(made, children, clock, over_s=6.0 * count)

    assert {sum(shares) for shares in rounds} <= set(range(window + 1))
    # The place that changes hands is empty for the rounds in which its last holder may not have heard of it.
    assert sum(sum(shares) for shares in rounds) >= 0.9 * window * len(rounds)
    used = [sum(shares) for shares in zip(*rounds, strict=True)]
    assert min(used) >= 40
    assert len({tuple(shares) for shares in rounds if sum(shares) == window}) >= count // window


def test_a_place_that_one_worker_needs_is_not_kept_for_idle_ones() -> None:
    made, children = supervisor_of(3, concurrency=1)
    children[0].report, children[1].report, children[2].report = report(), report(waiting=5), report()
    for _ in range(3):
        made._hand_out()

    assert [told(child).window for child in children] == [0, 1, 0]


def test_crew_that_was_found_no_work_for_yet_shares_a_small_window() -> None:
    made, children = supervisor_of(4, concurrency=2)
    for _ in range(3):
        made._hand_out()

    assert sorted(told(child).window for child in children) == [0, 0, 1, 1]


def test_a_turn_begins_when_the_last_exchange_of_the_one_before_has_ended() -> None:
    """Or exchanges as long as a round of turns would keep the place with the same worker for good."""
    clock = VirtualClock()
    made, (first, second) = supervisor_of(2, clock=clock, concurrency=1)
    first.report, second.report = report(in_flight=1, waiting=5), report(waiting=5)
    for _ in range(120):
        made._hand_out()
        clock.now_s += 0.1
    assert (told(first).window, told(second).window) == (0, 0)

    first.report = report(waiting=5)
    for _ in range(45):
        made._hand_out()
        clock.now_s += 0.1

    assert (told(first).window, told(second).window) == (0, 1)


def test_rate_goes_to_those_whose_turn_it_is() -> None:
    made, children = supervisor_of(3, concurrency=1, rpm=60)
    for child in children:
        child.report = report(waiting=5)
    for _ in range(3):
        made._hand_out()

    assert sorted(told(child).rpm or 0.0 for child in children) == [0.0, 0.0, 60.0]
    assert [bool(told(child).window) for child in children] == [bool(told(child).rpm) for child in children]


def test_rates_are_shared_out_and_never_more_than_the_limit() -> None:
    made, children = supervisor_of(3, rpm=600, tpm=90_000)
    children[0].report = report(in_flight=5)
    for busy in range(3):
        children[busy].report = report(in_flight=5)
        for _ in range(2):
            made._hand_out()

        assert sum(told(child).rpm or 0.0 for child in children) <= 600.001
        assert sum(told(child).tpm or 0.0 for child in children) <= 90_000.001
        assert told(children[busy]).rpm == pytest.approx(600 / (busy + 1))


def test_each_upstream_is_shared_out_apart_among_those_that_are_busy_with_it() -> None:
    tables = (
        Target(name="a", base_url="http://a", window=10, rpm=600),
        Target(name="b", base_url="http://b", window=20, rpm=60),
    )
    made, children = supervisor_of(2, upstream=tables)
    sample = Sample(at_s=0.0, span_s=0.1)
    busy, idle = Activity(sample=sample, in_flight=3), Activity(sample=sample, in_flight=0)
    children[0].report = Report(activities=(busy, idle), waiting=50, tally=Tally().to_wire())
    children[1].report = Report(activities=(busy, busy), waiting=0, tally=Tally().to_wire())
    for _ in range(3):
        made._hand_out()

    assert [told(child, 0).window for child in children] == [5, 5]
    assert [told(child, 1).window for child in children] == [1, 19]
    assert [told(child, 0).rpm for child in children] == [300, 300]
    assert [told(child, 1).rpm for child in children] == [0, 60]
    live = made.live()
    assert (live.window, live.in_flight) == (30, 9)
    assert [(each.name, each.window, each.in_flight) for each in live.upstreams] == [("a", 10, 6), ("b", 20, 3)]


def test_window_of_one_upstream_does_not_move_with_the_other() -> None:
    made, children = supervisor_of(1, upstream=tuple(Target(name=name, base_url="http://h") for name in "ab"))
    for tick in range(100):
        at_s = tick / 10
        fine = Sample(at_s=at_s, span_s=0.1, answered=16, latency_sum_s=1.6, in_flight_mean=16.0)
        bad = Sample(at_s=at_s, span_s=0.1, refused=50, in_flight_mean=16.0)
        activities = (Activity(sample=fine, in_flight=16), Activity(sample=bad, in_flight=16))
        children[0].hear(encode_message(Report(activities=activities, waiting=9, tally=Tally().to_wire())))
        made._observe()

    assert made.windows[1].size < made.windows[0].size
    assert "a refusals" not in made.live().bound_by
    assert "b refusals" in made.live().bound_by


def test_without_limits_no_rate_is_told() -> None:
    made, children = supervisor_of(2)
    made._hand_out()

    assert {told(child).rpm for child in children} == {told(child).tpm for child in children} == {None}


def test_stop_is_told_to_all_and_again_with_a_shorter_grace() -> None:
    made, children = supervisor_of(2)
    made.stop(grace_s=30.0)
    assert [last_share(child).stop_grace_s for child in children] == [30.0, 30.0]

    made.stop(grace_s=0.0)
    assert [last_share(child).stop_grace_s for child in children] == [0.0, 0.0]
    made.stop(grace_s=60.0)
    assert [last_share(child).stop_grace_s for child in children] == [0.0, 0.0]


async def test_a_worker_at_work_is_told_what_it_may_use_in_every_round() -> None:
    made, (child,) = supervisor_of(1, concurrency=9)
    child.report = report(in_flight=1)
    for _ in range(30):
        made._hand_out()
    assert len(child.process.stdin.shares) == 30


async def test_an_idle_worker_is_told_what_has_not_changed_once_a_second() -> None:
    clock = VirtualClock()
    made, (child,) = supervisor_of(1, clock=clock, concurrency=9)
    child.report = report(in_flight=0)
    for _ in range(30):
        made._hand_out()
        await clock.advance(0.1)
    assert len(child.process.stdin.shares) == 3

    # A change goes out at once, and to a new process everything does.
    made.stop(grace_s=30.0)
    assert len(child.process.stdin.shares) == 4
    await child.mourn()
    made._hand_out()
    assert len(child.process.stdin.shares) == 5


def test_live_sums_up_all_workers_and_names_the_first_trouble() -> None:
    made, children = supervisor_of(3, concurrency=9)
    children[0].report = report(in_flight=2, waiting=3, tally=Tally(attempts=5, succeeded=4))
    children[1].report = report(in_flight=1, trouble="disk_full: no space", lost="cannot connect")
    children[1].past.add(Tally(attempts=7, failed=7))

    live = made.live()

    assert (live.window, live.worker_count, live.in_flight, live.waiting) == (9, 3, 3, 3)
    assert (live.tally.attempts, live.tally.succeeded, live.tally.failed) == (12, 4, 7)
    assert (live.trouble, live.lost) == ("disk_full: no space", "cannot connect")


def test_ticking_are_those_that_reported_a_moment_ago() -> None:
    clock = VirtualClock()
    made, children = supervisor_of(3, clock=clock)
    children[0].hear(encode_message(report()))
    clock.now_s += 4.0
    children[1].hear(encode_message(report()))
    assert made.ticking_count(within_s=5.0) == 2

    clock.now_s += 2.0

    assert made.ticking_count(within_s=5.0) == 1


# -- real processes --------------------------------------------------------------------------------------------------

OBEDIENT = """
import sys, json
print(sys.stdin.readline().strip(), file=sys.stderr)
for line in sys.stdin:
    share = json.loads(line)
    sys.stdout.write(REPORT + "\\n")
    sys.stdout.flush()
    if share["stop_grace_s"] is not None:
        break
"""


def script(text: str, **fields: Any) -> list[str]:
    told_report = encode_message(report(**fields)).decode().strip()
    return [sys.executable, "-c", f"REPORT = {told_report!r}\n{text}"]


@asynccontextmanager
async def crew(command: list[str], *, count: int = 2) -> AsyncIterator[tuple[Supervisor, list[int]]]:
    buried: list[int] = []

    async def bury() -> None:
        buried.append(len(buried))

    made = Supervisor(
        command=command,
        greeting=GREETING,
        worker_count=count,
        settings=Settings(),
        clock=SystemClock(),
        bury=bury,
    )
    async with asyncio.timeout(LIMIT_S):
        yield made, buried


async def until_reported(made: Supervisor, count: int, running: asyncio.Task[None]) -> None:
    await until(lambda: running.done() or sum(child.report is not None for child in made._children) >= count)
    assert not running.done(), running


async def test_crew_works_until_it_is_told_to_stop(caplog: pytest.LogCaptureFixture) -> None:
    command = script(OBEDIENT, in_flight=3, tally=Tally(attempts=2, succeeded=2))
    async with crew(command) as (made, buried):
        running = asyncio.create_task(made.run())
        await until_reported(made, 2, running)
        assert len(made.pids) == 2
        assert made.live().in_flight == 6

        made.stop(grace_s=1.0)
        await running

    assert made.pids == []
    assert len(buried) == 2
    assert made.live().tally.succeeded == 4
    assert caplog.text.count('{"hello":1}') == 2


async def test_a_worker_never_hears_ctrl_c_which_is_its_parents_to_obey(caplog: pytest.LogCaptureFixture) -> None:
    """Not even before it could say so itself: what is here is the first that it runs."""
    deaf = "import signal, sys\nprint('deaf:', signal.getsignal(signal.SIGINT) is signal.SIG_IGN, file=sys.stderr)\n"
    async with crew(script(deaf + OBEDIENT), count=1) as (made, _):
        running = asyncio.create_task(made.run())
        await until_reported(made, 1, running)
        made.stop(grace_s=1.0)
        await running

    assert "deaf: True" in caplog.text


async def test_what_a_worker_does_not_read_is_not_kept_without_end() -> None:
    deaf = script("import signal, sys\nsys.stdout.write(REPORT + '\\n')\nsys.stdout.flush()\nsignal.pause()")
    async with crew(deaf, count=1) as (made, _):
        running = asyncio.create_task(made.run())
        await until_reported(made, 1, running)
        (child,) = made._children
        for _ in range(100):
            child.send(b"x" * 20_000 + b"\n")

        assert child.process is not None
        assert child.process.stdin is not None
        held = child.process.stdin.transport.get_write_buffer_size()

        made.stop(grace_s=0.0)
        child.kill()
        await running

    assert 0 < held < 300_000


async def test_worker_that_dies_is_buried_and_started_again_and_its_counts_stay(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dying = script(
        """
import os, pathlib, sys
sys.stdin.readline()
sys.stdout.write(REPORT + "\\n")
sys.stdout.flush()
sys.stdin.readline()
os._exit(7)
""",
        tally=Tally(attempts=1, succeeded=1),
    )
    async with crew(dying, count=1) as (made, buried):
        running = asyncio.create_task(made.run())
        await until(lambda: running.done() or len(buried) >= 8)
        made.stop(grace_s=0.0)
        await running

    assert made.live().tally.succeeded == len(buried)
    assert "worker 0 ended with code 7" in caplog.text


async def test_worker_that_dies_as_soon_as_it_starts_ends_the_run_with_its_name_and_code() -> None:
    async with crew([sys.executable, "-c", "raise SystemExit(9)"]) as (made, buried):
        with pytest.raises(WorkerLost) as lost:
            await made.run()

    assert all(child.process is None or child.process.returncode is not None for child in made._children)
    assert "5 times" in lost.value.message
    assert "code 9" in lost.value.message
    assert len(buried) >= 5


async def test_last_words_of_a_dying_worker_are_whole_and_come_before_its_death(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dying = "def fall(depth):\n    fall(depth - 1) if depth else 1 / 0\nfall(100)"
    async with crew([sys.executable, "-c", dying], count=1) as (made, _):
        with pytest.raises(WorkerLost):
            await made.run()

    told_in_order = "\n".join(caplog.messages)
    assert told_in_order.count("Traceback (most recent call last):") == 5
    assert told_in_order.count("in fall") >= 5
    pattern = r"Traceback(?:(?!ended with).)*ZeroDivisionError: division by zero\nworker 0 ended with code 1"
    assert len(re.findall(pattern, told_in_order, re.DOTALL)) == 5


async def test_words_without_an_end_of_line_and_control_characters_are_told(caplog: pytest.LogCaptureFixture) -> None:
    odd = r"import sys; sys.stderr.buffer.write(b'\x1b[2Jhalf a \xff line'); sys.stderr.flush(); sys.exit(3)"
    async with crew([sys.executable, "-c", odd], count=1) as (made, _):
        with pytest.raises(WorkerLost):
            await made.run()

    assert caplog.messages.count(r"\x1b[2Jhalf a \xff line") == 5


async def test_flood_of_words_is_told_in_bounded_pieces(caplog: pytest.LogCaptureFixture) -> None:
    flooding = "import sys; sys.stderr.write('x' * 1_000_000 + chr(10) + 'end'); sys.exit(3)"
    async with crew([sys.executable, "-c", flooding], count=1) as (made, _):
        with pytest.raises(WorkerLost):
            await made.run()

    assert sum(message.count("x") for message in caplog.messages if message.startswith("x")) == 5_000_000
    assert max(map(len, caplog.messages)) <= 2 * 64 * 1024
    assert caplog.messages.count("end") == 5


async def test_words_of_a_worker_that_is_dismissed_are_told(caplog: pytest.LogCaptureFixture) -> None:
    parting = script(
        """
import sys
sys.stdin.readline()
sys.stdout.write(REPORT + "\\n")
sys.stdout.flush()
sys.stdin.read()
print("farewell", file=sys.stderr)
"""
    )
    async with crew(parting, count=1) as (made, _):
        running = asyncio.create_task(made.run())
        await until_reported(made, 1, running)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    assert "farewell" in caplog.messages


async def test_worker_of_a_server_that_dies_at_its_start_is_started_again_after_a_wait() -> None:
    clock = VirtualClock()
    made = Supervisor(
        command=[sys.executable, "-c", "raise SystemExit(9)"],
        greeting=GREETING,
        worker_count=1,
        settings=Settings(),
        clock=clock,
        bury=nobody_dies,
        waits_s=30.0,
    )
    child: Any = made._children[0]

    async with asyncio.timeout(LIMIT_S):
        keeping = asyncio.create_task(child.keep())
        await until(lambda: len(clock._sleepers) == 1)
        assert len(child._deaths_s) == 5
        await clock.advance(30.0)
        await until(lambda: len(child._deaths_s) == 6)
        made.stop(grace_s=0.0)
        await keeping


async def test_what_is_no_report_is_not_the_end(caplog: pytest.LogCaptureFixture) -> None:
    """A library that prints to stdout must not end a run of a million lines."""
    command = script('print("loading the tokenizer...")\n' + OBEDIENT, in_flight=1)
    async with crew(command, count=1) as (made, _):
        running = asyncio.create_task(made.run())
        await until_reported(made, 1, running)
        made.stop(grace_s=0.0)
        await running

    assert "no report" in caplog.text


async def test_worker_that_does_not_drain_is_killed_after_its_grace() -> None:
    deaf = script(
        """
import sys, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
sys.stdin.readline()
sys.stdout.write(REPORT + "\\n")
sys.stdout.flush()
signal.pause()
"""
    )
    async with crew(deaf, count=1) as (made, buried):
        running = asyncio.create_task(made.run())
        await until_reported(made, 1, running)
        # As if a minute had passed since.
        made.stop(grace_s=-60.0)
        await running

    assert made.pids == []
    assert len(buried) == 1
