"""Worker processes: spawn them, hand each its share of the window and the limits, restart what dies, drain at the end.

Parent and child talk in JSON lines over the child's stdin and stdout. A child exits when its stdin closes, so no worker
outlives its supervisor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from batchrunner.errors import WorkerLost
from batchrunner.metrics import Tally, tally_from_wire
from batchrunner.pace import Sample, Window, joined, merged
from batchrunner.ports import Clock
from batchrunner.settings import Settings

logger = logging.getLogger(__name__)

_LINE_BYTES_MAX = 1 << 20
_PACE_S = 0.1
# A worker that is slow to report is waited for so many rounds.
_ROUNDS_MAX = 3
# A worker that dies this often within the time below, without a line done in between, is not started again.
_DEATHS_MAX = 5
_DEATHS_WITHIN_S = 60.0
_EXTRA_GRACE_S = 10.0


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """Parent to child: how much of the limits it may use. Rates are per minute, None where there is no limit."""

    window: int
    rpm: float | None = None
    tpm: float | None = None
    stop_grace_s: float | None = None


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Child to parent, every 100 ms: what happened since, how it stands, and why it stands still if it does."""

    sample: Sample
    in_flight: int
    waiting: int
    tally: dict[str, object]
    trouble: str | None = None
    lost: str | None = None
    pause_reason: str | None = None


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """How the work stands at this moment, summed over all workers."""

    window: int
    bound_by: str
    in_flight: int
    waiting: int
    tally: Tally
    trouble: str | None = None
    lost: str | None = None
    worker_count: int = 1


_ENCODER = msgspec.json.Encoder()
_REPORT = msgspec.json.Decoder(Report)


def encode_message(message: Share | Report) -> bytes:
    """Give a message as one line."""
    return _ENCODER.encode(message) + b"\n"


class _Child:
    """One worker process and what it last reported."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: asyncio.subprocess.Process | None = None
        self.report: Report | None = None
        self.fresh: list[Sample] = []
        self.deaths: list[float] = []
        self.past = Tally()
        self.grants = (0, 0)

    @property
    def is_active(self) -> bool:
        """Whether it had anything to send lately."""
        return self.report is not None and (self.report.in_flight > 0 or self.report.waiting > 0)

    @property
    def may_use(self) -> int:
        """The most that it may have in flight now: its last two shares, since the last may not have reached it yet."""
        in_flight = self.report.in_flight if self.report is not None else 0
        return max(*self.grants, in_flight)


class Supervisor:
    """A crew of worker processes. `run` returns when all have ended after `stop`.

    `command` starts a worker, `greeting` is the first line that it reads. `bury` is awaited after each death: it must
    end the dead session's leases.

    Raises (from run):
        WorkerLost: a worker dies again and again as soon as it starts.
    """

    def __init__(
        self,
        *,
        command: Sequence[str],
        greeting: bytes,
        worker_count: int,
        settings: Settings,
        clock: Clock,
        bury: Callable[[], Awaitable[None]],
    ) -> None:
        self.window = Window(pinned=settings.concurrency, size_max=settings.window_max)
        self._command = command
        self._greeting = greeting
        self._settings = settings
        self._clock = clock
        self._bury = bury
        self._children = [_Child(number) for number in range(worker_count)]
        self._stop_grace_s: float | None = None
        self._stop_by_s = 0.0

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [child.process.pid for child in self._children if child.process is not None]

    def live(self) -> Live:
        """Sum up what the workers last reported."""
        tally = Tally()
        reports = [child.report for child in self._children if child.report is not None]
        for child in self._children:
            tally.add(child.past)
            if child.report is not None:
                tally.add(tally_from_wire(child.report.tally))
        return Live(
            window=self.window.size,
            bound_by=str(self.window.bound_by),
            in_flight=sum(report.in_flight for report in reports),
            waiting=sum(report.waiting for report in reports),
            tally=tally,
            trouble=next((report.trouble for report in reports if report.trouble), None),
            lost=next((report.lost for report in reports if report.lost), None),
            worker_count=len(self._children),
        )

    def stop(self, *, grace_s: float) -> None:
        """Have all workers drain; called again it shortens the grace."""
        stop_by_s = self._clock.monotonic_s() + grace_s
        if self._stop_grace_s is None or stop_by_s < self._stop_by_s:
            self._stop_grace_s = grace_s
            self._stop_by_s = stop_by_s
        self._hand_out()

    async def run(self) -> None:
        """Keep the workers running until `stop`."""
        try:
            async with asyncio.TaskGroup() as group:
                pacing = group.create_task(self._pace())
                async with asyncio.TaskGroup() as crew:
                    for child in self._children:
                        crew.create_task(self._keep(child))
                pacing.cancel()
        except BaseExceptionGroup as failed:
            lost, rest = failed.split(WorkerLost)
            if lost is None or rest is not None:
                raise
            raise _first_of(lost) from failed
        finally:
            for child in self._children:
                if child.process is not None:
                    await _dismiss(child.process)

    async def _keep(self, child: _Child) -> None:
        while True:
            await self._spawn(child)
            code = await self._listen(child)
            if child.report is not None:
                tally = tally_from_wire(child.report.tally)
                child.past.add(tally)
                if tally.succeeded + tally.failed:
                    child.deaths.clear()
            child.process = child.report = None
            child.fresh.clear()
            child.grants = (0, 0)
            await self._bury()
            if self._stop_grace_s is not None:
                return
            self._note_death(child, code)

    async def _spawn(self, child: _Child) -> None:
        process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES_MAX,
        )
        child.process = process
        assert process.stdin is not None
        process.stdin.write(self._greeting)

    async def _listen(self, child: _Child) -> int:
        process = child.process
        assert process is not None
        assert process.stdout is not None
        while line := await process.stdout.readline():
            try:
                child.report = _REPORT.decode(line)
            except msgspec.DecodeError:
                # A library may print; what it said is not repeated.
                logger.warning("worker %d wrote what is no report", child.number, extra={"action": "worker_chatter"})
                continue
            child.fresh.append(child.report.sample)
        return await process.wait()

    def _note_death(self, child: _Child, code: int) -> None:
        now_s = self._clock.monotonic_s()
        child.deaths = [at_s for at_s in child.deaths if now_s - at_s < _DEATHS_WITHIN_S] + [now_s]
        logger.warning(
            "worker %d ended with code %d; starting it again", child.number, code, extra={"action": "worker_died"}
        )
        if len(child.deaths) >= _DEATHS_MAX:
            raise WorkerLost(
                f"worker {child.number} died {len(child.deaths)} times in a minute, the last time with code {code}"
            )

    # -- shares ------------------------------------------------------------------------------------------------------

    async def _pace(self) -> None:
        rounds = 0
        while True:
            rounds += 1
            if self._all_have_reported() or rounds >= _ROUNDS_MAX:
                rounds = 0
                self._observe()
            self._hand_out()
            self._end_late_workers()
            await self._clock.sleep(_PACE_S)

    def _all_have_reported(self) -> bool:
        return all(child.fresh for child in self._children if child.process is not None)

    def _observe(self) -> None:
        """Show the window's controller all that came since the last time, each sample once."""
        samples = [joined(child.fresh) for child in self._children if child.fresh]
        for child in self._children:
            child.fresh.clear()
        if samples:
            self.window.observe(merged(samples))

    def _hand_out(self) -> None:
        """Split the window over the workers, an idle one keeping a place to begin with.

        A share grows only by what the others have let go of, so that all together never exceed the window.
        """
        running = [child for child in self._children if child.process is not None]
        idle = [child for child in running if not child.is_active]
        active = [child for child in running if child.is_active] or running
        left = self.window.size if active is running else max(len(active), self.window.size - len(idle))
        parts = dict.fromkeys(running, 1)
        for place, child in enumerate(active):
            parts[child] = left // len(active) + (1 if place < left % len(active) else 0)
        for child in running:
            taken = sum(max(parts[other], other.may_use) for other in running if other is not child)
            window = max(0, min(parts[child], self.window.size - taken))
            child.grants = (child.grants[1], window)
            # An idle worker needs no rate before it has said that it found work.
            self._send(child, self._share(window=window, part=1 / len(active) if child in active else 0.0))

    def _share(self, *, window: int, part: float) -> Share:
        settings = self._settings
        return Share(
            window=window,
            rpm=settings.rpm * part if settings.rpm else None,
            tpm=settings.tpm * part if settings.tpm else None,
            stop_grace_s=self._stop_grace_s,
        )

    def _send(self, child: _Child, share: Share) -> None:
        process = child.process
        if process is not None and process.stdin is not None and not process.stdin.is_closing():
            process.stdin.write(encode_message(share))

    def _end_late_workers(self) -> None:
        """Kill what has not drained long after its grace."""
        if self._stop_grace_s is None:
            return
        if self._clock.monotonic_s() < self._stop_by_s + _EXTRA_GRACE_S:
            return
        for pid in self.pids:
            logger.error("worker did not drain, killed", extra={"action": "worker_killed", "pid": pid})
            os.kill(pid, signal.SIGKILL)


async def _dismiss(process: asyncio.subprocess.Process) -> None:
    """End a worker that nobody listens to any more: it drains at once when its stdin closes."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        async with asyncio.timeout(_EXTRA_GRACE_S):
            await process.communicate()
    except TimeoutError:
        process.kill()
        await process.communicate()


def _first_of(group: BaseExceptionGroup[WorkerLost]) -> WorkerLost:
    first = group.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first
