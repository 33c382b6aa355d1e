"""Several upstreams behind one fan-out: who gets which line, and that trouble of one is no trouble of another."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from batchrunner.fanout import Fanout
from batchrunner.limits import Cooldown, FirstContact, Gate, Outage, TokenBucket
from batchrunner.models import AttemptError, OnUnknown, PauseReason
from batchrunner.outlets import Outlet
from batchrunner.routing import router_of
from batchrunner.settings import Settings
from batchrunner.shards import ShardRun
from batchrunner.targets import Target
from tests.unit.fanning import (
    PaperJournal,
    Script,
    ScriptedUpstream,
    SteadyRng,
    VirtualClock,
    always,
    answered,
    batch_of,
    broken,
    failures,
    finished,
    raw_line,
    records,
    running,
    shard_of,
    succeeded,
)

OK = answered()
GONE = broken(AttemptError.NOT_CONNECTED)


class Peer(ScriptedUpstream):
    """A scripted upstream that may be dead for a while."""

    def __init__(self, clock: VirtualClock, script: Script) -> None:
        super().__init__(clock, script)
        self._alive = script

    @property
    def models(self) -> list[str | None]:
        """The models that it was asked for."""
        return [each.model for each in self.sent]

    def fall(self) -> None:
        """Die with everything that is under way, and stay dead."""
        self.script, self.knock_answer = always(GONE, latency_s=0.01), GONE
        self.die()

    def rise(self) -> None:
        """Answer again."""
        self.script, self.knock_answer = self._alive, OK


@dataclass(slots=True)
class Scene:
    """A fan-out over several peers, by their names."""

    clock: VirtualClock
    fanout: Fanout
    peers: dict[str, Peer]
    changes: list[float] = field(default_factory=list)

    async def finish(self, *runs: ShardRun, within_s: float = 600.0) -> float:
        """Advance until the shards are finished; gives the seconds that it took."""
        took_s = await finished(self.clock, runs, within_s=within_s)
        for run in runs:
            assert run.in_flight_count == 0
            assert len({number for number, *_ in records(run)}) == run.shard.line_count
        return took_s

    def sent(self) -> dict[str, int]:
        """How many requests each peer got."""
        return {name: len(peer.sent) for name, peer in self.peers.items()}


@asynccontextmanager
async def scene(
    scripts: Mapping[str, Script], tables: Sequence[dict[str, Any]], *, windows: Sequence[int] = (4, 4)
) -> AsyncIterator[Scene]:
    clock = VirtualClock()
    targets = [Target(base_url="http://h/v1", **table) for table in tables]
    peers = {target.name: Peer(clock, scripts[target.name]) for target in targets}
    gates = [
        Gate(
            cooldown=Cooldown(),
            outage=Outage(),
            first_contact=FirstContact(),
            requests=TokenBucket(target.rpm) if target.rpm else None,
        )
        for target in targets
    ]
    fanout = Fanout(
        outlets=[
            Outlet(name=target.name, upstream=peers[target.name], gate=gate, aliases=target.aliases)
            for target, gate in zip(targets, gates, strict=True)
        ],
        journal=PaperJournal(),  # type: ignore[arg-type]
        clock=clock,
        rng=SteadyRng(),
        settings=Settings(),
        router=router_of(targets),
    )
    told = Scene(clock, fanout, peers)
    fanout.on_change = lambda: told.changes.append(clock.now_s)
    for pool, window in zip(fanout.pools, windows, strict=True):
        pool.window = window
    async with running(fanout, clock):
        yield told


def shard(models: Sequence[str], *, first: int = 1, **changes: Any) -> ShardRun:
    """A shard whose lines ask for these models."""
    numbers = range(first, first + len(models))
    lines = [raw_line(number, {"model": model}) for number, model in zip(numbers, models, strict=True)]
    return shard_of(numbers, buffer=b"".join(lines), **changes)


SAME = ({"name": "a"}, {"name": "b"})
APART = ({"name": "a", "models": ("ma",)}, {"name": "b", "models": ("mb",)})


# -- who gets a line -------------------------------------------------------------------------------------------------


async def test_lines_go_to_the_upstream_of_their_model() -> None:
    run = shard(["ma", "mb", "mb", "ma"] * 25)
    async with scene({"a": always(OK), "b": always(OK)}, APART) as told:
        told.fanout.add(run)
        await told.finish(run)

    assert set(told.peers["a"].models) == {"ma"}
    assert set(told.peers["b"].models) == {"mb"}
    assert told.sent() == {"a": 50, "b": 50}
    assert len(succeeded(run)) == 100


async def test_alias_is_sent_as_what_it_stands_for() -> None:
    tables = ({"name": "a", "models": ("ma",)}, {"name": "b", "models": ("mb",), "aliases": {"fast": "mb"}})
    run = shard(["fast", "ma", "mb"])
    async with scene({"a": always(OK), "b": always(OK)}, tables) as told:
        told.fanout.add(run)
        await told.finish(run)

    assert told.peers["b"].models == ["mb", "mb"]


async def test_upstreams_of_one_model_share_it_by_weight() -> None:
    run = shard(["m"] * 400)
    tables = ({"name": "a", "weight": 3}, {"name": "b"})
    async with scene({"a": always(OK), "b": always(OK)}, tables, windows=(30, 30)) as told:
        told.fanout.add(run)
        await told.clock.advance(0.05)
        begun = told.sent()
        await told.finish(run)

    # Both have room for all of a round, so the weights hold until one is full.
    assert begun["a"] == 30
    assert begun["b"] >= 10
    assert told.sent()["b"] >= 100


async def test_spare_gets_nothing_while_the_other_is_up() -> None:
    run = shard(["m"] * 200)
    tables = ({"name": "a"}, {"name": "spare", "weight": 0})
    async with scene({"a": always(OK), "spare": always(OK)}, tables) as told:
        told.fanout.add(run)
        await told.clock.advance(1.0)
        before = told.sent()["spare"]
        told.peers["a"].fall()
        await told.finish(run)

    assert before == 0
    assert told.sent()["spare"] >= 100


async def test_line_of_a_model_that_nobody_serves_fails_unsent_and_names_what_is_served() -> None:
    run = shard(["ma", "other", "mb", "other"])
    async with scene({"a": always(OK), "b": always(OK)}, APART) as told:
        told.fanout.add(run)
        await told.finish(run)

    assert sorted(succeeded(run)) == [1, 3]
    assert {line: found["error"]["code"] for line, found in failures(run).items()} == {
        2: "model_not_served",
        4: "model_not_served",
    }
    assert "served are ma (a), mb (b)" in failures(run)[2]["error"]["message"]
    assert failures(run)[2]["response"] is None
    assert told.sent() == {"a": 1, "b": 1}
    assert told.fanout.tally.failed == 2


# -- windows and limits apart ----------------------------------------------------------------------------------------


async def test_windows_are_apart_and_slow_lines_hold_up_nobody() -> None:
    run = shard(["ma"] * 300 + ["mb"] * 300)
    async with scene({"a": always(OK, latency_s=100.0), "b": always(OK)}, APART, windows=(2, 8)) as told:
        told.fanout.add(run)
        await told.clock.advance(10.0)

        assert told.sent() == {"a": 2, "b": 300}
        assert told.peers["a"].in_flight_max == 2
        assert told.peers["b"].in_flight_max == 8
        assert told.fanout.waiting_for(told.fanout.pools[0]) == 298
        told.fanout.stop(run)
        await told.clock.advance(100.0)
        assert run.in_flight_count == 0


async def test_refusals_of_one_do_not_slow_the_other() -> None:
    refused = answered(429, b"{}", retry_after_s=30.0)
    run = shard(["ma", "mb"] * 200)
    async with scene({"a": always(refused, latency_s=0.01), "b": always(OK)}, APART) as told:
        told.fanout.add(run)
        await told.clock.advance(6.0)

        assert told.sent()["b"] == 200
        assert told.sent()["a"] <= 8
        assert told.fanout.pools[0].gate.cooldown.until_s > told.clock.now_s
        assert told.fanout.pools[1].gate.cooldown.until_s < told.clock.now_s


async def test_refused_lines_go_to_another_that_serves_them() -> None:
    refused = answered(429, b"{}", retry_after_s=30.0)
    run = shard(["m"] * 100)
    async with scene({"a": always(refused, latency_s=0.01), "b": always(OK)}, SAME) as told:
        told.fanout.add(run)
        took_s = await told.finish(run)

    assert took_s < 40.0
    assert len(succeeded(run)) == 100


async def test_rate_limit_of_one_leaves_the_other_free() -> None:
    run = shard(["ma", "mb"] * 50)
    tables = ({"name": "a", "models": ("ma",), "rpm": 60}, {"name": "b", "models": ("mb",)})
    async with scene({"a": always(OK), "b": always(OK)}, tables) as told:
        told.fanout.add(run)
        await told.clock.advance(5.0)

        assert told.sent()["b"] == 50
        assert told.sent()["a"] <= 6
        await told.finish(run)


async def test_batch_of_one_upstream_does_not_wait_for_a_batch_of_another() -> None:
    slow = shard(["ma"] * 3000, batch=batch_of("slow"))
    fast = shard(["mb"] * 100, batch=batch_of("fast"))
    async with scene({"a": always(OK, latency_s=1000.0), "b": always(OK)}, APART) as told:
        told.fanout.add(slow)
        await told.clock.advance(1.0)
        told.fanout.add(fast)
        await told.finish(fast, within_s=5.0)
        told.fanout.stop(slow)
        await told.clock.advance(1000.0)

    assert told.fanout.waiting_count == 0


async def test_no_more_than_a_shard_is_read_ahead_and_less_where_a_line_goes_once() -> None:
    for on_unknown, most in ((OnUnknown.RETRY, 1000), (OnUnknown.FAIL, 16)):
        run = shard(["ma"] * 3000, batch=batch_of(on_unknown=on_unknown))
        run.intent_mark = None
        async with scene({"a": always(OK, latency_s=1000.0), "b": always(OK)}, APART) as told:
            told.fanout.add(run)
            await told.clock.advance(1.0)

            assert told.fanout.waiting_for(told.fanout.pools[0]) == most
            assert run.untouched_count == 3000 - most - 4
            told.fanout.stop(run)
            await told.clock.advance(1000.0)
            assert run.in_flight_count == 0


# -- down ------------------------------------------------------------------------------------------------------------


async def test_lines_of_an_upstream_that_dies_are_sent_by_the_other_without_using_tries() -> None:
    run = shard(["m"] * 300)
    async with scene({"a": always(OK, latency_s=0.3), "b": always(OK, latency_s=0.3)}, SAME) as told:
        told.fanout.add(run)
        await told.clock.advance(1.0)
        told.peers["a"].fall()
        await told.finish(run)

    assert len(succeeded(run)) == 300
    assert failures(run) == {}
    assert told.sent()["b"] >= 250


async def test_upstream_that_comes_back_is_used_again() -> None:
    run = shard(["m"] * 2000)
    async with scene({"a": always(OK), "b": always(OK)}, SAME) as told:
        told.fanout.add(run)
        await told.clock.advance(1.0)
        told.peers["a"].fall()
        await told.clock.advance(10.0)
        assert told.fanout.pools[0].is_down
        assert told.fanout.outage_text == "upstream_down: a: as scripted"
        dead = told.sent()["a"]
        told.peers["a"].rise()
        await told.clock.advance(6.0)
        assert not told.fanout.pools[0].is_down
        await told.finish(run)

    assert told.sent()["a"] >= dead + 200
    assert len(told.peers["a"].knocks) >= 2
    assert len(succeeded(run)) == 2000


async def test_lines_that_nobody_else_serves_wait_for_the_upstream_that_is_down() -> None:
    run = shard(["ma", "mb"] * 50)
    async with scene({"a": always(OK), "b": always(OK)}, APART) as told:
        told.fanout.pools[0].gate.first_contact.note_answer()
        told.peers["a"].fall()
        told.fanout.add(run)
        await told.clock.advance(60.0)
        assert told.sent()["b"] == 50
        assert told.fanout.lost_text is None
        assert not run.is_finished
        told.peers["a"].rise()
        await told.finish(run, within_s=30.0)

    assert len(succeeded(run)) == 100


async def test_both_down_and_one_back_finishes_on_that_one() -> None:
    run = shard(["m"] * 100)
    async with scene({"a": always(OK), "b": always(OK)}, SAME) as told:
        told.fanout.add(run)
        await told.clock.advance(0.3)
        told.peers["a"].fall()
        told.peers["b"].fall()
        await told.clock.advance(30.0)
        told.peers["b"].rise()
        await told.finish(run, within_s=60.0)

    assert len(succeeded(run)) == 100


async def test_run_is_lost_only_for_lines_that_nobody_reachable_serves() -> None:
    run = shard(["m"] * 50)
    async with scene({"a": always(GONE, latency_s=0.01), "b": always(OK)}, SAME) as told:
        told.peers["a"].knock_answer = GONE
        told.fanout.add(run)
        await told.finish(run)
        await told.clock.advance(20.0)
        assert told.fanout.lost_text is None

    lonely = shard(["ma"] * 50)
    async with scene({"a": always(GONE, latency_s=0.01), "b": always(OK)}, APART) as told:
        told.fanout.add(lonely)
        await told.clock.advance(12.0)
        assert told.fanout.lost_text == "a: as scripted"


async def test_retry_of_a_failed_line_goes_to_another_upstream() -> None:
    run = shard(["m"] * 40)
    async with scene({"a": always(answered(500, b"{}")), "b": always(OK)}, SAME) as told:
        told.fanout.add(run)
        await told.finish(run)

    assert len(succeeded(run)) == 40


# -- breakers --------------------------------------------------------------------------------------------------------


async def test_upstream_that_refuses_the_key_loses_the_lines_of_the_batch_to_another() -> None:
    run = shard(["m"] * 200)
    async with scene({"a": always(answered(401, b"{}")), "b": always(OK)}, SAME) as told:
        told.fanout.add(run)
        await told.finish(run)
        assert told.fanout.breaker_news == {}

    assert len(succeeded(run)) == 200
    assert told.sent()["a"] <= 20


async def test_batch_is_paused_when_every_upstream_that_serves_it_refuses_the_key() -> None:
    run = shard(["m"] * 200)
    refused = always(answered(401, b"{}"))
    async with scene({"a": refused, "b": refused}, SAME) as told:
        told.fanout.add(run)
        await told.clock.advance(20.0)

        assert told.fanout.breaker_news == {run.batch.id: PauseReason.AUTHENTICATION}
        assert failures(run) == {}
        assert sum(told.sent().values()) <= 40
        assert run.in_flight_count == 0


async def test_lines_that_only_the_refusing_upstream_serves_pause_the_batch() -> None:
    tables = ({"name": "a", "models": ("ma", "m")}, {"name": "b", "models": ("m",)})
    run = shard(["m"] * 30 + ["ma"] * 30)
    async with scene({"a": always(answered(401, b"{}")), "b": always(OK)}, tables) as told:
        told.fanout.add(run)
        await told.clock.advance(60.0)

        assert told.fanout.breaker_news == {run.batch.id: PauseReason.AUTHENTICATION}
        assert failures(run) == {}
        assert run.in_flight_count == 0
