"""A closed-loop client with an adaptive window against a queueing server, in virtual time: seeded, without a clock."""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from batchrunner.pace import Window
from batchrunner.sampler import Bound, Sample

TICK_S = 0.1

# Draws a service time, given the chance to draw from and how many are being served.
Service = Callable[[random.Random, int], float]


@dataclass
class Server:
    """`slots` requests are served at a time, `queue` more wait (None: any number), others are refused at once.

    `service_s` draws a service time, given how many are being served; `delay_s` is spent on top, occupying no slot.
    """

    slots: int
    service_s: Service
    queue: int | None = None
    delay_s: float = 0.0
    refused_share: float = 0.0
    broken_share: float = 0.0


@dataclass
class Tally:
    """What one tick saw."""

    at_s: float
    size: int
    bound_by: Bound
    answered: int
    refused: int
    latencies_s: list[float]


@dataclass
class Loop:
    """The client: keeps `window.size` in flight, leaves a refused place empty until the next tick."""

    server: Server
    window: Window
    seed: int = 1
    now_s: float = 0.0
    in_flight: int = 0
    held: int = 0
    serving: int = 0
    waiting: deque[float] = field(default_factory=deque)
    events: list[tuple[float, int, str, float]] = field(default_factory=list)
    ticks: list[Tally] = field(default_factory=list)
    count: int = 0
    supply: Callable[[float], int] | None = None

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self._clear()
        self._push(TICK_S, "tick", 0.0)

    def _clear(self) -> None:
        self.answered = self.refused = self.broken = 0
        self.latencies: list[float] = []
        self.area = 0.0
        self.since_s = self.now_s

    def _push(self, at_s: float, kind: str, sent_s: float) -> None:
        self.count += 1
        heapq.heappush(self.events, (at_s, self.count, kind, sent_s))

    def _limit(self) -> int:
        return self.window.size if self.supply is None else min(self.window.size, self.supply(self.now_s))

    def _advance(self, at_s: float) -> None:
        span_s = at_s - self.since_s
        self.area += span_s * self.in_flight
        self.since_s = self.now_s = at_s

    def _fill(self) -> None:
        limit = self._limit()
        server = self.server
        while self.in_flight + self.held < limit:
            if server.refused_share and self.random.random() < server.refused_share:
                self.refused += 1
                self.held += 1
            elif self.serving < server.slots and not self.waiting:
                self.in_flight += 1
                self._serve(self.now_s)
            elif server.queue is None or len(self.waiting) < server.queue:
                self.in_flight += 1
                self.waiting.append(self.now_s)
            else:
                self.refused += 1
                self.held += 1

    def _serve(self, sent_s: float) -> None:
        self.serving += 1
        self._push(self.now_s + self.server.service_s(self.random, self.serving), "served", sent_s)

    def _served(self, sent_s: float) -> None:
        self.serving -= 1
        while self.waiting and self.serving < self.server.slots:
            self._serve(self.waiting.popleft())
        if self.server.delay_s:
            self._push(self.now_s + self.server.delay_s, "answered", sent_s)
        else:
            self._answered(sent_s)

    def _answered(self, sent_s: float) -> None:
        self.in_flight -= 1
        if self.server.broken_share and self.random.random() < self.server.broken_share:
            self.broken += 1
            return
        self.answered += 1
        self.latencies.append(self.now_s - sent_s)

    def _tick(self) -> None:
        self.ticks.append(
            Tally(self.now_s, self.window.size, self.window.bound_by, self.answered, self.refused, self.latencies)
        )
        self.window.observe(
            Sample(
                at_s=self.now_s,
                span_s=TICK_S,
                answered=self.answered,
                refused=self.refused,
                broken=self.broken,
                latency_sum_s=sum(self.latencies),
                in_flight_mean=self.area / TICK_S,
                window=self.window.size,
            )
        )
        self.held = 0
        self._clear()
        self._push(self.now_s + TICK_S, "tick", 0.0)

    def run_until(self, end_s: float) -> None:
        self._fill()
        while self.events[0][0] <= end_s:
            at_s, _, kind, sent_s = heapq.heappop(self.events)
            self._advance(at_s)
            if kind == "served":
                self._served(sent_s)
            elif kind == "answered":
                self._answered(sent_s)
            else:
                self._tick()
            self._fill()

    def resize(self, slots: int) -> None:
        self.server.slots = slots
        while self.waiting and self.serving < slots:
            self._serve(self.waiting.popleft())

    def between(self, from_s: float, to_s: float) -> list[Tally]:
        return [tick for tick in self.ticks if from_s < tick.at_s <= to_s]

    def rate(self, from_s: float, to_s: float) -> float:
        return sum(tick.answered for tick in self.between(from_s, to_s)) / (to_s - from_s)

    def p50_s(self, from_s: float, to_s: float) -> float:
        latencies = sorted(each for tick in self.between(from_s, to_s) for each in tick.latencies_s)
        return latencies[len(latencies) // 2]

    def sizes(self, from_s: float, to_s: float) -> list[int]:
        return [tick.size for tick in self.between(from_s, to_s)]

    def refused_share(self, from_s: float, to_s: float) -> float:
        ticks = self.between(from_s, to_s)
        refused = sum(tick.refused for tick in ticks)
        return refused / max(1, refused + sum(tick.answered for tick in ticks))


def constant(mean_s: float) -> Service:
    return lambda _chance, _serving: mean_s


def lognormal(mean_s: float, sigma: float = 0.4) -> Service:
    return lambda chance, _serving: mean_s * chance.lognormvariate(-sigma * sigma / 2, sigma)


def uniform(mean_s: float) -> Service:
    return lambda chance, _serving: mean_s * (0.5 + chance.random())


def batching(base_s: float, knee: float = 48.0) -> Service:
    return lambda chance, serving: base_s * (1.0 + serving / knee) * (0.9 + 0.2 * chance.random())
