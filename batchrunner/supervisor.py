"""Worker processes: keep them running, hand each its share of the window and the limits, drain them at the end.

Supervisor and worker talk in JSON lines.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from batchrunner.errors import DiskFull, StoreUnavailable, WorkerLost
from batchrunner.holdings import LiveUse, UpstreamLive
from batchrunner.metrics import Tally, tally_from_wire
from batchrunner.pace import Window
from batchrunner.ports import Clock
from batchrunner.processes import ChildProcess, Grace
from batchrunner.sampler import Sample, joined, merged
from batchrunner.settings import Settings, targets_of

logger = logging.getLogger(__name__)

_PACE_S = 0.1
# What has not changed is said again after this time to a worker without work.
_REPEAT_S = 1.0
# A worker that is slow to report is waited for so many rounds.
_ROUNDS_MAX = 3
# Where there are fewer places than busy workers, those that have one keep it so long.
_TURN_S = 5.0


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """How much of one upstream's limits a child may use, and what bounds the window of all. Rates are per minute, None
    where there is no limit.
    """

    window: int
    bound_by: str | None = None
    rpm: float | None = None
    tpm: float | None = None


class WorkerGreeting(msgspec.Struct, frozen=True, kw_only=True):
    """Parent to child, the first line: what it works on, and with what."""

    folder: str
    settings: Settings
    api_keys: dict[str, str]
    is_server: bool = False


class Share(msgspec.Struct, frozen=True, kw_only=True):
    """Parent to child: its parts, in the order of the upstreams."""

    parts: tuple[Part, ...]
    stop_grace_s: float | None = None


class Activity(msgspec.Struct, frozen=True, kw_only=True):
    """What happened at one upstream since the last report, and how it stands. `waiting` counts the lines that could be
    sent there, as far as they were looked at.
    """

    sample: Sample
    in_flight: int
    waiting: int = 0
    is_down: bool = False


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """Child to parent, every 100 ms: what it does at each upstream, in their order, how many lines it has besides those
    under way, and why it stands still if it does.
    """

    activities: tuple[Activity, ...]
    waiting: int
    tally: dict[str, object]
    trouble: str | None = None
    lost: str | None = None

    @property
    def in_flight(self) -> int:
        """Exchanges under way with all upstreams."""
        return sum(each.in_flight for each in self.activities)


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """How the work stands at this moment, summed over all workers, and for each upstream."""

    window: int
    bound_by: str
    in_flight: int
    waiting: int
    tally: Tally
    trouble: str | None = None
    lost: str | None = None
    worker_count: int = 1
    upstreams: tuple[UpstreamLive, ...] = ()


_UNUSED = LiveUse()
_ENCODER = msgspec.json.Encoder()
_REPORT = msgspec.json.Decoder(Report)


def encode_message(message: WorkerGreeting | Share | Report) -> bytes:
    """Give a message as one line."""
    return _ENCODER.encode(message) + b"\n"


class _Child(ChildProcess):
    """One worker process and what it last reported."""

    def __init__(
        self,
        number: int,
        *,
        command: Sequence[str],
        greeting: bytes,
        clock: Clock,
        bury: Callable[[], Awaitable[None]],
        waits_s: float | None,
    ) -> None:
        super().__init__(f"worker {number}", command=command, greeting=greeting, clock=clock, waits_s=waits_s)
        self.report: Report | None = None
        self.reported_at_s = -math.inf
        self.fresh: list[Report] = []
        self.past = Tally()
        self.grants: dict[int, tuple[int, int]] = {}
        self._told = b""
        self._told_at_s = -math.inf
        self._bury = bury

    def is_active(self, place: int) -> bool:
        """Whether it had anything to send to that upstream lately; lines that were not looked at may be for any, but
        where some are under way, those are read on.
        """
        report = self.report
        if report is None:
            return False
        activity = report.activities[place]
        return bool(activity.in_flight or activity.waiting or (report.waiting and not report.in_flight))

    def may_use(self, place: int) -> int:
        """The most that it may have in flight there now: its last two shares, since the last may not have reached it
        yet.
        """
        in_flight = self.report.activities[place].in_flight if self.report is not None else 0
        return max(*self.grants.get(place, (0, 0)), in_flight)

    @property
    def is_idle(self) -> bool:
        """Whether it said that it has nothing to send to anybody."""
        report = self.report
        return report is not None and not report.waiting and not any(each.in_flight for each in report.activities)

    def tell(self, share: Share) -> None:
        """Say what it may use. A worker without work would be kept busy by hearing the same all the time."""
        line, now_s = encode_message(share), self.clock.monotonic_s()
        if not self.is_idle or line != self._told or now_s - self._told_at_s >= _REPEAT_S:
            self._told, self._told_at_s = line, now_s
            self.send(line)

    def hear(self, line: bytes) -> None:
        """Take in a report."""
        try:
            self.report = _REPORT.decode(line)
        except msgspec.DecodeError:
            # A library may print; what it said is not repeated.
            logger.warning("%s wrote what is no report", self.name, extra={"action": "worker_chatter"})
            return
        self.reported_at_s = self.clock.monotonic_s()
        self.fresh.append(self.report)

    async def mourn(self) -> None:
        """Keep the counts of the dead, and end its leases."""
        if self.report is not None:
            tally = tally_from_wire(self.report.tally)
            self.past.add(tally)
            if tally.succeeded + tally.failed:
                self.progressed()
        self.report = None
        self.fresh.clear()
        self.grants.clear()
        self._told = b""
        try:
            await self._bury()
        except (StoreUnavailable, DiskFull) as error:
            # The living bury too, and leases run out: a full disk that ended one worker must not end them all.
            logger.warning("%s keeps its leases for now: %s", self.name, error, extra={"action": "burial_failed"})


class _Turns:
    """Whose turn it is at an upstream with fewer places than busy workers."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._first = 0
        self._since_s = clock.monotonic_s()

    def of(self, busy: Sequence[_Child], *, places: int) -> list[_Child]:
        """Give those that may use a place now."""
        if self._clock.monotonic_s() - self._since_s >= _TURN_S:
            self._first += places
            self.begin()
        self._first %= len(busy)
        return [busy[(self._first + number) % len(busy)] for number in range(places)]

    def begin(self) -> None:
        """Have the present turn begin now: somebody has to wait for a place whose last exchange is still under way."""
        self._since_s = self._clock.monotonic_s()


class Supervisor:
    """A crew of worker processes. `run` returns when all have ended after `stop`.

    `command` starts a worker, `greeting` is the first line that it reads. `bury` is awaited after each death: it must
    end the dead session's leases. A worker that dies again and again as soon as it starts is started again after
    `waits_s`, if that is given.

    Raises (from run):
        WorkerLost: a worker does so, and there is no `waits_s`.
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
        waits_s: float | None = None,
    ) -> None:
        self._targets = targets_of(settings)
        self.windows = windows_of(settings)
        self._clock = clock
        self._children = [
            _Child(number, command=command, greeting=greeting, clock=clock, bury=bury, waits_s=waits_s)
            for number in range(worker_count)
        ]
        self._grace = Grace(clock)
        self._uses = (_UNUSED,) * len(self._targets)
        self._refused = [0] * len(self._targets)
        # Since the windows last saw what came.
        self._rounds = 0
        self._turns = [_Turns(clock) for _ in self._targets]

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers that run now."""
        return [child.pid for child in self._children if child.pid is not None]

    def ticking_count(self, *, within_s: float) -> int:
        """Count the workers that have reported within the time."""
        since_s = self._clock.monotonic_s() - within_s
        return sum(child.report is not None and child.reported_at_s >= since_s for child in self._children)

    def live(self) -> Live:
        """Sum up what the workers last reported."""
        tally = Tally()
        reports = [child.report for child in self._children if child.report is not None]
        for child in self._children:
            tally.add(child.past)
            if child.report is not None:
                tally.add(tally_from_wire(child.report.tally))
        upstreams = self._upstreams(reports)
        return Live(
            window=sum(window.size for window in self.windows),
            bound_by=bound_of(upstreams),
            in_flight=sum(report.in_flight for report in reports),
            waiting=sum(report.waiting for report in reports),
            tally=tally,
            trouble=next((report.trouble for report in reports if report.trouble), None),
            lost=next((report.lost for report in reports if report.lost), None),
            worker_count=len(self._children),
            upstreams=upstreams,
        )

    def _upstreams(self, reports: Sequence[Report]) -> tuple[UpstreamLive, ...]:
        return tuple(
            upstream_live(target.name, window, [report.activities[place] for report in reports])
            for place, (target, window) in enumerate(zip(self._targets, self.windows, strict=True))
        )

    def stop(self, *, grace_s: float) -> None:
        """Have all workers drain; called again it shortens the grace."""
        self._grace.give(grace_s)
        for child in self._children:
            child.leave()
        self._hand_out()

    async def run(self) -> None:
        """Keep the workers running until `stop`."""
        try:
            async with asyncio.TaskGroup() as group:
                pacing = group.create_task(self._pace())
                async with asyncio.TaskGroup() as crew:
                    for child in self._children:
                        crew.create_task(child.keep())
                pacing.cancel()
        except BaseExceptionGroup as failed:
            lost, rest = failed.split(WorkerLost)
            if lost is None or rest is not None:
                raise
            raise _first_of(lost) from failed
        finally:
            for child in self._children:
                await child.dismiss()

    def yield_to(self, uses: Sequence[LiveUse]) -> None:
        """Take in what requests that are answered at once use of each upstream, nothing if there are none: from the
        next round on the workers share the rest.
        """
        self._uses = tuple(uses) or (_UNUSED,) * len(self._targets)
        self._refused = [so_far + use.refused for so_far, use in zip(self._refused, self._uses, strict=True)]

    # -- shares ------------------------------------------------------------------------------------------------------

    async def _pace(self) -> None:
        while True:
            self._go_round()
            self._end_late_workers()
            await self._clock.sleep(_PACE_S)

    def _go_round(self) -> None:
        self._rounds += 1
        if self._all_have_reported() or self._rounds >= _ROUNDS_MAX:
            self._rounds = 0
            self._observe()
        self._hand_out()

    def _all_have_reported(self) -> bool:
        return all(child.fresh for child in self._children if child.process is not None)

    def _observe(self) -> None:
        """Show each window's controller all that came since the last time, each sample once."""
        fresh = [child.fresh for child in self._children if child.fresh]
        for child in self._children:
            child.fresh = []
        for place, window in enumerate(self.windows if fresh else ()):
            samples = [[report.activities[place].sample for report in reports] for reports in fresh]
            window.observe(self._with_use(place, merged([joined(each) for each in samples])))

    def _with_use(self, place: int, sample: Sample) -> Sample:
        """Count the places that are left to others as if lines were in them: the window is that of all together, and
        what it gives is measured by the latency of lines.
        """
        refused, self._refused[place] = self._refused[place], 0
        if not sample.in_flight_mean:
            return sample
        taken = self.windows[place].size - self._left(place)
        return msgspec.structs.replace(
            sample,
            in_flight_mean=sample.in_flight_mean + taken,
            window=sample.window + taken,
            refused=sample.refused + refused,
        )

    def _left(self, place: int) -> int:
        """Give the part of an upstream's window that is for batches. A window that was found keeps one place for them,
        so that they go on and it is measured; one that is pinned is a limit.
        """
        window = self.windows[place]
        return max(0 if window.pinned is not None else 1, window.size - self._uses[place].places)

    def _hand_out(self) -> None:
        """Tell every worker what it may use."""
        running = [child for child in self._children if child.process is not None]
        parts = [self._parts(place, running) for place in range(len(self.windows))]
        for number, child in enumerate(running):
            child.tell(Share(parts=tuple(each[number] for each in parts), stop_grace_s=self._grace.given_s))

    def _parts(self, place: int, running: Sequence[_Child]) -> list[Part]:
        """Split one upstream's window over the workers.

        A share grows only by what the others have let go of, so that all together never exceed the window.
        """
        whole = self._left(place)
        busy = [child for child in running if child.is_active(place)] or list(running)
        sharing = busy if len(busy) <= whole else self._turns[place].of(busy, places=whole)
        wanted = _wanted(whole, running, busy, sharing)
        parts = []
        for child in running:
            taken = sum(max(wanted[other], other.may_use(place)) for other in running if other is not child)
            window = min(wanted[child], max(whole - taken, child.may_use(place)))
            child.grants[place] = (child.grants.get(place, (0, 0))[1], window)
            if child in sharing and not window:
                self._turns[place].begin()
            # An idle worker needs no rate before it has said that it found work.
            parts.append(self._part(place, window=window, part=1 / len(sharing) if child in sharing else 0.0))
        return parts

    def _part(self, place: int, *, window: int, part: float) -> Part:
        target, use = self._targets[place], self._uses[place]
        return Part(
            window=window,
            bound_by=str(self.windows[place].bound_by),
            rpm=max(0, target.rpm - use.requests) * part if target.rpm else None,
            tpm=max(0, target.tpm - use.tokens) * part if target.tpm else None,
        )

    def _end_late_workers(self) -> None:
        """Kill what has not drained long after its grace."""
        for child in self._children if self._grace.is_long_over else ():
            child.kill()


def _wanted(
    whole: int, running: Sequence[_Child], busy: Sequence[_Child], sharing: Sequence[_Child]
) -> dict[_Child, int]:
    """Divide a window evenly among those that share it, the idle keeping a place each to begin with where it has more
    places than the busy need.
    """
    idle = [child for child in running if child not in busy][: max(0, whole - len(busy))]
    left = whole - len(idle)
    wanted = dict.fromkeys(running, 0) | dict.fromkeys(idle, 1)
    for number, child in enumerate(sharing):
        wanted[child] = left // len(sharing) + (1 if number < left % len(sharing) else 0)
    return wanted


def windows_of(settings: Settings) -> list[Window]:
    """Make a window for each upstream; a server that was told none has one all the same, for whoever waits."""
    targets = targets_of(settings)
    return [Window(pinned=target.window, size_max=settings.window_max) for target in targets]


def upstream_live(name: str, window: Window, activities: Sequence[Activity]) -> UpstreamLive:
    """Sum up what workers do at one upstream."""
    return UpstreamLive(
        name=name,
        window=window.size,
        bound_by=str(window.bound_by),
        in_flight=sum(each.in_flight for each in activities),
        waiting=sum(each.waiting for each in activities),
        is_down=any(each.is_down for each in activities),
    )


def bound_of(upstreams: Sequence[UpstreamLive]) -> str:
    """Tell what bounds the window, of several upstreams by their names where they differ."""
    words = {each.bound_by for each in upstreams}
    if len(words) == 1:
        return words.pop()
    return ", ".join(f"{each.name} {each.bound_by}" for each in upstreams)


def _first_of(group: BaseExceptionGroup[WorkerLost]) -> WorkerLost:
    first = group.exceptions[0]
    return _first_of(first) if isinstance(first, BaseExceptionGroup) else first
