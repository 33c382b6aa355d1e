"""What a pool measures between two looks of the window's controller."""

from __future__ import annotations

from batchrunner.pace import Bound, Sample

_SMOOTH_S = 1.0
_ASKING_S = 0.5


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

    def take(self, now_s: float, window: int, short_of: Bound) -> Sample:
        """Give the sample and begin the next one."""
        self.note_in_flight(now_s, self._in_flight)
        span_s = max(1e-6, now_s - self._began_s)
        mean = self._area / span_s
        self.per_s += min(1.0, span_s / _SMOOTH_S) * (self.answered / span_s - self.per_s)
        sample = Sample(
            at_s=now_s,
            span_s=span_s,
            answered=self.answered,
            refused=self.refused,
            broken=self.broken,
            latency_sum_s=self.latency_sum_s,
            in_flight_mean=mean,
            was_full=min(1.0, mean / max(1, window)),
            short_of=short_of,
        )
        self._began_s = now_s
        self._area = 0.0
        self._reset()
        return sample
