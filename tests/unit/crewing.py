"""A crew without processes: a real supervisor over children that only listen, or that play pools in virtual time."""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from typing import Any

import msgspec

from batchrunner.limits import Cooldown
from batchrunner.metrics import Tally
from batchrunner.pace import Window
from batchrunner.sampler import Bound, Sample, Sampler
from batchrunner.settings import Settings
from batchrunner.supervisor import Activity, Part, Report, Share, Supervisor, encode_message
from tests.unit.fanning import VirtualClock
from tests.unit.queueing import TICK_S, Server

GREETING = b'{"hello":1}\n'
RETRY_AFTER_S = 1.0
REFUSED_FOR_S = 0.15


def report(*, in_flight: int = 0, waiting: int = 0, **fields: Any) -> Report:
    tally = fields.pop("tally", Tally())
    sample = fields.pop("sample", Sample(at_s=0.0, span_s=0.1))
    activity = Activity(sample=sample, in_flight=in_flight, waiting=waiting)
    return Report(activities=(activity,), waiting=waiting, tally=tally.to_wire(), **fields)


class PaperStdin:
    """What a child was told."""

    def __init__(self) -> None:
        self.shares: list[Share] = []

    def write(self, line: bytes) -> None:
        self.shares.append(msgspec.json.decode(line, type=Share))

    def is_closing(self) -> bool:
        return False

    @property
    def transport(self) -> PaperStdin:
        return self

    def get_write_buffer_size(self) -> int:
        return 0


class PaperProcess:
    """A child that only listens."""

    def __init__(self) -> None:
        self.stdin = PaperStdin()
        self.pid = 0


async def nobody_dies() -> None:
    """Bury nobody."""


def supervisor_of(count: int, *, clock: Any = None, **settings: Any) -> tuple[Supervisor, list[Any]]:
    made = Supervisor(
        command=["never"],
        greeting=GREETING,
        worker_count=count,
        settings=Settings(**settings),
        clock=clock or VirtualClock(),
        bury=nobody_dies,
    )
    children: list[Any] = made._children
    for child in children:
        child.process = PaperProcess()
    return made, children


def told(child: Any, place: int = 0) -> Part:
    return last_share(child).parts[place]


def last_share(child: Any) -> Share:
    share: Share = child.process.stdin.shares[-1]
    return share


class _Pool:
    """One child's pool: it keeps its share in flight, and pauses as a whole when the upstream asks for it."""

    def __init__(self, child: Any, now_s: float) -> None:
        self.child = child
        self.window = self.in_flight = self.refused_before = self.refused = 0
        self.cooldown = Cooldown()
        self.sampler = Sampler(now_s)

    def wants_more(self, now_s: float) -> bool:
        occupied = self.in_flight + self.refused + self.refused_before
        return now_s >= self.cooldown.until_s and occupied < self.window

    def forget_refusals(self) -> None:
        self.refused_before, self.refused = self.refused, 0

    def report(self, now_s: float) -> None:
        short_of = Bound.REFUSALS if now_s < self.cooldown.until_s else Bound.INPUT
        sample = self.sampler.take(now_s, self.window, short_of)
        self.child.hear(encode_message(report(sample=sample, in_flight=self.in_flight, waiting=1)))
        if self.child.process.stdin.shares:
            self.window = told(self.child).window


class Crew:
    """Several pools against one server without a queue, in step with nobody; lines never run short.

    It counts what the server answers and refuses, and what was in flight, over each tenth of a second.
    """

    def __init__(self, server: Server, count: int, *, seed: int = 1) -> None:
        self.server = server
        self.sizes: list[int] = []
        self.answered: list[int] = [0]
        self.refused: list[int] = [0]
        self.clock = VirtualClock()
        self.supervisor, children = supervisor_of(count, clock=self.clock)
        self.began_s = self.clock.now_s
        self._chance = random.Random(seed)
        self._serving = 0
        self._serial = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._pools = [_Pool(child, self.clock.now_s) for child in children]
        self._after(0.0, self._pace)
        for pool in self._pools:
            self._after(self._chance.uniform(0.0, TICK_S), self._report, pool)
            self._after(self._chance.uniform(0.0, REFUSED_FOR_S), self._forget, pool)

    @property
    def window(self) -> Window:
        return self.supervisor.windows[0]

    def run_until(self, end_s: float) -> None:
        while self._events[0][0] <= self.began_s + end_s:
            self.clock.now_s, _, happen = heapq.heappop(self._events)
            happen()
            self._fill()

    def rate(self, from_s: float, to_s: float) -> float:
        return sum(self.answered[round(from_s / TICK_S) : round(to_s / TICK_S)]) / (to_s - from_s)

    def refused_share(self, from_s: float, to_s: float) -> float:
        span = slice(round(from_s / TICK_S), round(to_s / TICK_S))
        refused = sum(self.refused[span])
        return refused / max(1, refused + sum(self.answered[span]))

    def _after(self, delay_s: float, happen: Callable[..., None], *arguments: Any) -> None:
        self._serial += 1
        heapq.heappush(self._events, (self.clock.now_s + delay_s, self._serial, lambda: happen(*arguments)))

    def _pace(self) -> None:
        self.supervisor._go_round()
        self.sizes.append(self.window.size)
        self.answered.append(0)
        self.refused.append(0)
        self._after(TICK_S, self._pace)

    def _report(self, pool: _Pool) -> None:
        pool.report(self.clock.now_s)
        self._after(TICK_S, self._report, pool)

    def _forget(self, pool: _Pool) -> None:
        pool.forget_refusals()
        self._after(REFUSED_FOR_S, self._forget, pool)

    def _fill(self) -> None:
        now_s = self.clock.now_s
        # Whose event comes first on a real machine is anybody's guess.
        for pool in self._chance.sample(self._pools, len(self._pools)):
            while pool.wants_more(now_s):
                if self._serving < self.server.slots and self._chance.random() >= self.server.refused_share:
                    self._serve(pool)
                else:
                    self._refuse(pool)

    def _serve(self, pool: _Pool) -> None:
        now_s = self.clock.now_s
        self._serving += 1
        pool.in_flight += 1
        pool.sampler.note_in_flight(now_s, pool.in_flight)
        self._after(self.server.service_s(self._chance, self._serving), self._answer, pool, now_s)

    def _answer(self, pool: _Pool, sent_s: float) -> None:
        now_s = self.clock.now_s
        self._serving -= 1
        pool.in_flight -= 1
        pool.sampler.note_in_flight(now_s, pool.in_flight)
        pool.sampler.note_answer(now_s - sent_s)
        self.answered[-1] += 1

    def _refuse(self, pool: _Pool) -> None:
        pool.sampler.refused += 1
        pool.refused += 1
        pool.cooldown.ask(self.clock.now_s, RETRY_AFTER_S, in_flight=pool.in_flight + 1, uniform=self._chance.random())
        self.refused[-1] += 1
