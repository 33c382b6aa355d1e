"""A fan-out on virtual time: a clock that tests advance, an upstream that follows a script, shards without a disk."""

from __future__ import annotations

import asyncio
import heapq
import json
import zlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from batchrunner.fanout import Fanout
from batchrunner.lifecycle import BatchStatus
from batchrunner.limits import Cooldown, FirstContact, Gate, Outage, TokenBucket
from batchrunner.lines import LineRules
from batchrunner.models import (
    Attempt,
    AttemptError,
    Batch,
    BatchId,
    Claim,
    OnUnknown,
    RecordKind,
    SessionId,
    Shard,
    TaskId,
    TaskKind,
    TaskRef,
    TaskState,
    TenantId,
    Usage,
)
from batchrunner.outlets import Outlet
from batchrunner.ports import AssetOwner
from batchrunner.settings import Settings
from batchrunner.shards import ShardRun

GOOD = b'{"choices":[]}'
CHAT = "/v1/chat/completions"


class VirtualClock:
    """Stands still until `advance`, which wakes sleepers one by one at their own times."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        # Awaited before each step of time.
        self.settle: Callable[[], Awaitable[None]] = settled
        self._sleepers: list[tuple[float, int, asyncio.Future[Attempt | None]]] = []
        self._serial = 0

    def monotonic_s(self) -> float:
        return self.now_s

    def boot_s(self) -> float:
        return self.now_s

    def boot_id(self) -> str:
        return "boot"

    def now(self) -> datetime:
        return datetime(2030, 1, 1, tzinfo=UTC) + timedelta(seconds=self.now_s - 1000.0)

    async def sleep(self, duration_s: float) -> None:
        await self.timer(duration_s)

    def timer(self, duration_s: float) -> asyncio.Future[Attempt | None]:
        """A future that is done after this time, unless somebody else gives it a result before."""
        timer: asyncio.Future[Attempt | None] = asyncio.get_running_loop().create_future()
        self._serial += 1
        heapq.heappush(self._sleepers, (self.now_s + duration_s, self._serial, timer))
        return timer

    async def advance(self, duration_s: float) -> None:
        """Let this much time pass, and everything happen that it brings."""
        end_s = self.now_s + duration_s
        await self.settle()
        while self._sleepers and self._sleepers[0][0] <= end_s + 1e-9:
            self.now_s, _, sleeper = heapq.heappop(self._sleepers)
            if not sleeper.done():
                sleeper.set_result(None)
            await self.settle()
        self.now_s = end_s


async def settled() -> None:
    """Let everything happen that needs no time to pass."""
    loop: Any = asyncio.get_running_loop()
    await asyncio.sleep(0)
    while loop._ready:  # noqa: ASYNC110 - the loop itself is what is waited for
        await asyncio.sleep(0)


class SteadyRng:
    """Draws the same number each time."""

    def __init__(self, drawn: float = 0.0) -> None:
        self.drawn = drawn

    def uniform(self) -> float:
        return self.drawn

    def token_hex(self, size_bytes: int) -> str:
        return "0" * 2 * size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One request as the upstream saw it; `line` is the number that its body carries."""

    line: int
    at_s: float
    in_flight: int
    key: str | None
    is_at_most_once: bool
    model: str | None


# What a line's n-th request (from 1) comes to, and after how long.
Script = Callable[[int, int], tuple[float, Attempt]]


def answered(status: int = 200, body: bytes = GOOD, **fields: Any) -> Attempt:
    return Attempt(status=status, body=body, **fields)


def broken(error: AttemptError = AttemptError.RESET) -> Attempt:
    return Attempt(error=error, message="as scripted")


def always(attempt: Attempt, *, latency_s: float = 0.1) -> Script:
    return lambda _line, _nth: (latency_s, attempt)


class ScriptedUpstream:
    """Answers as its script says and remembers what it was asked."""

    def __init__(self, clock: VirtualClock, script: Script) -> None:
        self.script = script
        self.sent: list[Sent] = []
        self.in_flight: list[int] = []
        self.in_flight_max = 0
        self.sweeps = 0
        self.knock_answer = answered()
        self.knocks: list[float] = []
        self._clock = clock
        self._counts: Counter[int] = Counter()
        self._timers: set[asyncio.Future[Attempt | None]] = set()

    async def send(
        self,
        url: str,
        body: bytes,
        *,
        idempotency_key: str | None,
        is_at_most_once: bool = False,
        owner: AssetOwner | None = None,
    ) -> Attempt:
        said = json.loads(body)
        line = int(said["n"])
        started_at_s = self._clock.monotonic_s()
        self.in_flight.append(line)
        self.in_flight_max = max(self.in_flight_max, len(self.in_flight))
        self.sent.append(
            Sent(
                line=line,
                at_s=started_at_s,
                in_flight=len(self.in_flight),
                key=idempotency_key,
                is_at_most_once=is_at_most_once,
                model=said.get("model"),
            )
        )
        self._counts[line] += 1
        latency_s, attempt = self.script(line, self._counts[line])
        timer = self._clock.timer(latency_s)
        self._timers.add(timer)
        try:
            attempt = await timer or attempt
        finally:
            self._timers.discard(timer)
            self.in_flight.remove(line)
        return replaced(attempt, started_at_s=started_at_s, elapsed_s=self._clock.monotonic_s() - started_at_s)

    async def knock(self) -> Attempt:
        self.knocks.append(self._clock.monotonic_s())
        return replaced(self.knock_answer, started_at_s=self._clock.monotonic_s())

    def sweep_deadlines(self) -> None:
        self.sweeps += 1

    async def close(self) -> None:
        """Nothing is open."""

    def die(self) -> None:
        """Reset everything that is under way."""
        for timer in self._timers:
            if not timer.done():
                timer.set_result(broken())

    def count(self, line: int) -> int:
        """How often a line was sent so far."""
        return self._counts[line]

    def lines(self) -> list[int]:
        """The lines in the order of their sending."""
        return [sent.line for sent in self.sent]


def replaced(attempt: Attempt, **changes: Any) -> Attempt:
    values = {name: getattr(attempt, name) for name in attempt.__struct_fields__}
    return Attempt(**values | changes)


class PaperJournal:
    """The journal of a process whose disk is never slow."""

    def __init__(self) -> None:
        self.is_full = False
        self.waiting_bytes = 0


class PaperShardJournal:
    """Keeps the records of a shard in memory; every mark is durable at once."""

    def __init__(self) -> None:
        self.durable_mark = 1 << 60
        self.wanted_mark = 0
        self.keeps_marks = True
        self.group_count = 0
        self.records: list[tuple[int, RecordKind, bytes, Usage]] = []

    def add(self, line_number: int, kind: RecordKind, usage: Usage, payload: bytes) -> None:
        assert line_number not in [number for number, *_ in self.records], f"line {line_number} has two records"
        self.records.append((line_number, kind, payload, usage))

    def reserve(self, line_number: int, *, is_early: bool = False) -> None:
        self.durable_mark = max(self.durable_mark, line_number)


def batch_of(name: str = "batch_1", **changes: Any) -> Batch:
    unset: dict[str, Any] = {each.name: None for each in fields(Batch)}
    known = {
        "id": BatchId(name),
        "tenant": TenantId("ana"),
        "on_unknown": OnUnknown.RETRY,
        "status": BatchStatus.IN_PROGRESS,
        "priority": 0,
        "created_at": datetime(2030, 1, 1, tzinfo=UTC),
    }
    return Batch(**unset | known | changes)


def raw_line(number: int, body: dict[str, Any] | None = None) -> bytes:
    request = {"custom_id": f"id-{number}", "method": "POST", "url": CHAT, "body": {"n": number} | (body or {})}
    return json.dumps(request).encode() + b"\n"


def claim_of(
    numbers: Iterable[int], *, batch: Batch | None = None, buffer: bytes | None = None, **changes: Any
) -> tuple[Claim, bytes]:
    """A claim over consecutive lines, and their bytes."""
    numbers = list(numbers)
    buffer = b"".join(raw_line(number) for number in numbers) if buffer is None else buffer
    batch = batch or batch_of()
    shard = Shard(
        task_id=TaskId(numbers[0]),
        batch_id=batch.id,
        byte_start=0,
        byte_end=len(buffer),
        first_line=numbers[0],
        first_index=numbers[0] - 1,
        line_count=len(numbers),
        checksum=zlib.crc32(buffer),
        skipped=(),
        intent_mark=0,
        deaths=0,
        is_quarantined=False,
        state=TaskState.LEASED,
        epoch=1,
    )
    claim = Claim(
        ref=TaskRef(task_id=shard.task_id, epoch=1),
        kind=TaskKind.SHARD,
        session=SessionId("session"),
        batch=batch,
        shard=replace(shard, **changes),
        earlier=(),
        extents=(),
        attempts=1,
        orphaned_by_death=False,
    )
    return claim, buffer


def shard_of(numbers: Iterable[int], **changes: Any) -> ShardRun:
    """A loaded shard; its journal is a PaperShardJournal."""
    claim, buffer = claim_of(numbers, **changes)
    return ShardRun(claim, buffer, LineRules(), PaperShardJournal(), set())  # type: ignore[arg-type]


def records(run: ShardRun) -> list[tuple[int, RecordKind, bytes, Usage]]:
    paper: Any = run.journal
    assert isinstance(paper, PaperShardJournal)
    return paper.records


def succeeded(run: ShardRun) -> list[int]:
    """The lines that were answered, in the order of their records."""
    return [number for number, kind, *_ in records(run) if kind is RecordKind.SUCCEEDED]


def failures(run: ShardRun) -> dict[int, dict[str, Any]]:
    """The error lines by line number."""
    return {number: json.loads(payload) for number, kind, payload, _ in records(run) if kind is RecordKind.FAILED}


@dataclass(slots=True)
class Scene:
    """A fan-out that runs, and everything around it."""

    clock: VirtualClock
    rng: SteadyRng
    upstream: ScriptedUpstream
    journal: PaperJournal
    fanout: Fanout
    changes: list[float] = field(default_factory=list)

    def add(self, *runs: ShardRun) -> None:
        for run in runs:
            self.fanout.add(run)

    async def finish(self, *runs: ShardRun, within_s: float = 600.0) -> float:
        """Advance until the shards are finished; gives the seconds that it took."""
        return await finished(self.clock, runs, within_s=within_s)


async def finished(clock: VirtualClock, runs: Sequence[ShardRun], *, within_s: float) -> float:
    """Advance until the shards are finished; gives the seconds that it took."""
    began_s = clock.now_s
    while not all(run.is_finished for run in runs):
        assert clock.now_s - began_s < within_s, f"not finished within {within_s} s"
        await clock.advance(0.05)
    return clock.now_s - began_s


@asynccontextmanager
async def running(fanout: Fanout, clock: VirtualClock) -> AsyncIterator[None]:
    """Have a fan-out at work until the block ends."""
    fanout.stop_sends_at(float("inf"))
    task = asyncio.create_task(fanout.run())
    try:
        yield
    finally:
        fanout.close()
        while not task.done():
            await clock.advance(1.0)
        await task


@asynccontextmanager
async def scene(
    script: Script,
    *,
    window: int = 4,
    settings: Settings | None = None,
    rpm: float | None = None,
    tpm: float | None = None,
    uniform: float = 0.0,
) -> AsyncIterator[Scene]:
    clock, rng, journal = VirtualClock(), SteadyRng(uniform), PaperJournal()
    upstream = ScriptedUpstream(clock, script)
    gate = Gate(
        cooldown=Cooldown(),
        outage=Outage(),
        first_contact=FirstContact(),
        requests=TokenBucket(rpm) if rpm else None,
        tokens=TokenBucket(tpm) if tpm else None,
    )
    fanout = Fanout(
        outlets=[Outlet(name="default", upstream=upstream, gate=gate)],
        journal=journal,  # type: ignore[arg-type]
        clock=clock,
        rng=rng,
        settings=settings or Settings(),
    )
    told = Scene(clock, rng, upstream, journal, fanout)
    fanout.on_change = lambda: told.changes.append(clock.now_s)
    fanout.pools[0].window = window
    async with running(fanout, clock):
        yield told
