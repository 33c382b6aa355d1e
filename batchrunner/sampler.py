"""What a pool measures between two looks of the window's controller."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

_SMOOTH_S = 1.0
_ASKING_S = 0.5


class Bound(StrEnum):
    """What keeps the window from being larger, in one word for people."""

    GROWING = "growing"
    THROUGHPUT = "throughput"
    REFUSALS = "refusals"
    FAILURES = "failures"
    MAXIMUM = "maximum"
    PINNED = "pinned"
    INPUT = "input"
    MEMORY = "memory"
    RATE = "rate"


class Sample(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What happened in one span of time that ends at `at_s`, in one process or in all.

    `answered` counts answers of any status but 429, 503 and 529, and `latency_sum_s` sums their latencies; `refused`
    counts 429, 503 and 529; `broken` timeouts and lost connections. `in_flight_mean` is the time-mean of requests in
    flight, `window` that of how many were allowed, and `short_of` says what was missing where fewer were in flight.
    While the upstream `is_down` nothing of it says what the window should be.

    A place that was refused must stay empty until the window was asked again (or for 50 ms): an upstream that refuses
    within a millisecond would otherwise be asked a thousand times a second by each place too many.
    """

    at_s: float
    span_s: float
    answered: int = 0
    refused: int = 0
    broken: int = 0
    latency_sum_s: float = 0.0
    in_flight_mean: float = 0.0
    window: float = 0.0
    short_of: Bound = Bound.INPUT
    is_down: bool = False

    @property
    def was_full(self) -> float:
        """What part of the window was in use, at most 1."""
        return min(1.0, self.in_flight_mean / max(1.0, self.window))


def merged(samples: Sequence[Sample]) -> Sample:
    """Give one sample for several processes over the same span; at least one.

    Samples of spans that overlap only in part may be given, as long as each is given exactly once: over several rounds
    their mean span adds up to the time that has passed. What is allowed to a process without lines is no part of the
    window that was to be filled; to one that pauses it is.
    """
    span_s = sum(sample.span_s for sample in samples) / len(samples)
    wanted = [sample for sample in samples if sample.in_flight_mean or sample.short_of is Bound.REFUSALS]
    window = sum(sample.window * sample.span_s for sample in wanted) / span_s
    # A process without lines to send does not know.
    is_down = any(sample.is_down for sample in samples) and not any(sample.answered for sample in samples)
    return _summed(samples, span_s=span_s, window=window, is_down=is_down)


def joined(samples: Sequence[Sample]) -> Sample:
    """Give one sample for consecutive spans of one process; at least one."""
    span_s = sum(sample.span_s for sample in samples)
    window = sum(sample.window * sample.span_s for sample in samples) / span_s
    return _summed(samples, span_s=span_s, window=window, is_down=samples[-1].is_down)


def _summed(samples: Sequence[Sample], *, span_s: float, window: float, is_down: bool) -> Sample:
    return Sample(
        at_s=max(sample.at_s for sample in samples),
        span_s=span_s,
        answered=sum(sample.answered for sample in samples),
        refused=sum(sample.refused for sample in samples),
        broken=sum(sample.broken for sample in samples),
        latency_sum_s=sum(sample.latency_sum_s for sample in samples),
        in_flight_mean=sum(sample.in_flight_mean * sample.span_s for sample in samples) / span_s,
        window=window,
        short_of=min(samples, key=lambda sample: sample.was_full).short_of,
        is_down=is_down,
    )


class Sampler:
    """Gathers what the window's controller wants to know about the last moments, and answers a second of late."""

    __slots__ = (
        "_area",
        "_began_s",
        "_in_flight",
        "_noted_s",
        "answered",
        "broken",
        "latency_sum_s",
        "per_s",
        "refused",
    )

    def __init__(self, now_s: float) -> None:
        self._began_s = now_s
        self._noted_s = now_s
        self._in_flight = 0
        self._area = 0.0
        self.per_s = 0.0
        self._reset()

    def _reset(self) -> None:
        self.answered = 0
        self.refused = 0
        self.broken = 0
        self.latency_sum_s = 0.0

    def note_answer(self, elapsed_s: float) -> None:
        """Count one answered exchange."""
        self.answered += 1
        self.latency_sum_s += elapsed_s

    def note_in_flight(self, now_s: float, count: int) -> None:
        """Integrate the number in flight over time."""
        self._area += self._in_flight * (now_s - self._noted_s)
        self._in_flight = count
        self._noted_s = now_s

    def lines_ahead(self, window: int) -> int:
        """Guess how many lines are handed out, at most, while the store is asked."""
        return int(4 * window + _ASKING_S * self.per_s)

    def take(self, now_s: float, window: int, short_of: Bound, *, is_down: bool = False) -> Sample:
        """Give the sample and begin the next one."""
        self.note_in_flight(now_s, self._in_flight)
        span_s = max(1e-6, now_s - self._began_s)
        self.per_s += min(1.0, span_s / _SMOOTH_S) * (self.answered / span_s - self.per_s)
        sample = Sample(
            at_s=now_s,
            span_s=span_s,
            answered=self.answered,
            refused=self.refused,
            broken=self.broken,
            latency_sum_s=self.latency_sum_s,
            in_flight_mean=self._area / span_s,
            window=window,
            short_of=short_of,
            is_down=is_down,
        )
        self._began_s = now_s
        self._area = 0.0
        self._reset()
        return sample
