"""Whole workers on virtual time: their threads run in place, their upstream follows a script, the store is real."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor, Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from batchrunner.blobs.local import LocalBlobs
from batchrunner.fanout import Fanout
from batchrunner.journal import Journal
from batchrunner.lifecycle import BatchStatus
from batchrunner.limits import Cooldown, FirstContact, Gate, Outage
from batchrunner.models import Attempt, Batch, BatchId, NewBatch, SessionId, TenantId
from batchrunner.outlets import Outlet
from batchrunner.pipeline import Pipeline
from batchrunner.ports import AssetOwner
from batchrunner.settings import Settings
from batchrunner.store.sqlite import SqliteStore
from batchrunner.worker import Worker
from tests.unit.fanning import GOOD, SteadyRng, VirtualClock, answered, settled

STEP_S = 0.05
ANA, BEN = TenantId("ana"), TenantId("ben")
# A line's body and the moment of its sending, to what comes of it and after how long.
Script = Callable[[dict[str, Any], float], tuple[float, Attempt]]


class _InPlace(Executor):
    """Runs everything at once in the caller's thread."""

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        done: Future[Any] = Future()
        try:
            done.set_result(function(*arguments, **named))
        except Exception as error:
            done.set_exception(error)
        return done


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: which batch's line, and when."""

    batch: str
    line: int
    at_s: float


class CrewUpstream:
    """Answers by script; each body tells its batch and line."""

    def __init__(self, clock: VirtualClock, script: Script) -> None:
        self.script = script
        self.asked: list[Asked] = []
        self._clock = clock

    async def send(
        self,
        url: str,
        body: bytes,
        *,
        idempotency_key: str | None,
        is_at_most_once: bool = False,
        owner: AssetOwner | None = None,
    ) -> Attempt:
        request, at_s = json.loads(body), self._clock.monotonic_s()
        self.asked.append(Asked(request["batch"], request["n"], at_s))
        latency_s, attempt = self.script(request, at_s)
        await self._clock.sleep(latency_s)
        fields = {name: getattr(attempt, name) for name in attempt.__struct_fields__}
        return Attempt(**fields | {"started_at_s": at_s, "elapsed_s": latency_s})

    async def knock(self) -> Attempt:
        """Somebody is there when a line would be answered."""
        return self.script({"batch": "", "n": 0}, self._clock.monotonic_s())[1]

    def sweep_deadlines(self) -> None:
        """Nothing is ever late."""

    async def close(self) -> None:
        """Nothing is open."""

    def of(self, batch: str) -> list[Asked]:
        """What was asked of one batch."""
        return [asked for asked in self.asked if asked.batch == batch]


def good(latency_s: float = 1.0) -> Script:
    """Every line is answered well, after this time."""
    return lambda _request, _at_s: (latency_s, answered(200, GOOD))


@dataclass(slots=True)
class Crew:
    """Workers over one folder."""

    folder: Path
    clock: VirtualClock
    upstream: CrewUpstream
    settings: Settings
    is_server: bool
    store: SqliteStore
    workers: list[Worker] = field(default_factory=list)
    fetched: list[str] = field(default_factory=list)
    _journals: list[Journal] = field(default_factory=list)
    _running: list[asyncio.Task[None]] = field(default_factory=list)
    _synced: asyncio.Event = field(default_factory=asyncio.Event)
    _marks: list[tuple[int, int]] = field(default_factory=list)

    def hire(self, *, window: int = 8) -> Worker:
        """Start a worker with a window of this size."""
        loop, name = asyncio.get_running_loop(), SessionId(f"session-{len(self.workers)}")
        store, blobs = SqliteStore.open(self.folder / "state.db", self.clock), LocalBlobs(self.folder / "blobs")
        self.store.open_session(name, host="here", pid=1)

        def tell() -> None:
            worker.durable()
            self._synced.set()

        journal = Journal(blobs, name, on_durable=lambda: _soon(loop, tell), tick_s=0.001, records_max=1 << 20)
        gate = Gate(cooldown=Cooldown(), outage=Outage(), first_contact=FirstContact())
        fanout = Fanout(
            outlets=[Outlet(name="default", upstream=self.upstream, gate=gate)],
            journal=journal,
            clock=self.clock,
            rng=SteadyRng(),
            settings=self.settings,
        )
        worker = Worker(
            session=name,
            store=store,
            pipeline=Pipeline(store=store, blobs=blobs, journal=journal, clock=self.clock, settings=self.settings),
            fanout=fanout,
            pacer=lambda each: setattr(each.pools[0], "window", window),
            reap=lambda: 0,
            clock=self.clock,
            settings=self.settings,
            is_server=self.is_server,
        )
        worker._threads = _InPlace()  # type: ignore[assignment]
        self._journals.append(journal)
        self.workers.append(worker)
        self._running.append(asyncio.create_task(worker.run()))
        return worker

    def submit(self, name: str, lines: int, *, tenant: TenantId = ANA, **changes: Any) -> None:
        """Make a batch."""
        source = self.folder / f"{name}.jsonl"
        source.write_bytes(b"".join(_line(name, number) for number in range(1, lines + 1)))
        LocalBlobs(self.folder / "blobs").adopt(name, source)
        new = NewBatch(
            id=BatchId(name),
            tenant=tenant,
            dialect="openai",
            endpoint="/v1/chat/completions",
            input_file_id=None,
            source=name,
            completion_window=None,
            deadline_at=None,
        )
        self.store.scope(tenant).create_batch(replace(new, **changes))

    def batch(self, name: str, tenant: TenantId = ANA) -> Batch:
        """The batch as it stands."""
        return self.store.scope(tenant).batch(BatchId(name))

    async def advance(self, duration_s: float) -> None:
        """Let time pass; whatever is written meanwhile is durable a moment later."""
        end_s = self.clock.now_s + duration_s
        while self.clock.now_s < end_s - 1e-9:
            await self.clock.advance(min(STEP_S, end_s - self.clock.now_s))
            for worker in self.workers:
                # The keeper's rounds are in real time.
                worker.changed()
            await self.settle()
            while any(each.waiting_records for each in self._journals):
                await self._sync()
                await self.settle()

    async def settle(self) -> None:
        """Let everything happen that needs no time to pass; marks become durable in none."""
        while True:
            await settled()
            marks = [
                (each.wanted_mark, each.durable_mark) for journal in self._journals for each in list(journal._shards)
            ]
            is_waiting = any(wanted > durable for wanted, durable in marks)
            if marks == self._marks and not is_waiting:
                return
            self._marks = marks
            if is_waiting:
                await self._sync()
            for worker in self.workers:
                # The commit thread's own word of it may still be on its way.
                worker.durable()

    async def _sync(self) -> None:
        """Wait until the commit thread has told of another group."""
        self._synced.clear()
        for journal in self._journals:
            journal.request_sync()
        await self._synced.wait()

    async def until(self, holds: Callable[[], bool], *, within_s: float = 60.0) -> float:
        """Let time pass until something holds; gives how long it took."""
        began_s = self.clock.now_s
        while not holds():
            assert self.clock.now_s - began_s < within_s, f"not within {within_s} s"
            await self.advance(STEP_S)
        return self.clock.now_s - began_s

    def is_over(self, name: str, tenant: TenantId = ANA) -> bool:
        """Whether a batch is completed."""
        return self.batch(name, tenant).status in (BatchStatus.COMPLETED, BatchStatus.CANCELLED)

    async def dismiss(self) -> None:
        """Stop everybody."""
        for worker in self.workers:
            worker.stop(grace_s=0.0)
        while not all(task.done() for task in self._running):
            await self.advance(0.2)
        for task in self._running:
            await task
        for journal in self._journals:
            journal.close()
        for worker in self.workers:
            worker._store.close()
        self.store.close()


def _soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(callback)


def _line(name: str, number: int) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "batch": name, "n": number}
    line = {"custom_id": f"{name}-{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return json.dumps(line).encode() + b"\n"


@asynccontextmanager
async def crew(folder: Path, script: Script, *, is_server: bool = True, **changes: Any) -> AsyncIterator[Crew]:
    """Prepare a folder; workers are hired by the test. Leases last for ever: their thread knows only real time."""
    clock = VirtualClock()
    settings = replace(Settings(), lease_s=1e6, **changes)
    store = SqliteStore.open(folder / "state.db", clock)
    made = Crew(folder, clock, CrewUpstream(clock, script), settings, is_server, store)
    clock.settle = made.settle
    try:
        yield made
    finally:
        await made.dismiss()
