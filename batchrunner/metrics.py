"""What a process counts while it works, and the table of the names under which the counts are shown.

Counts are plain numbers on one thread; snapshots of several processes add up. Labels are closed sets, never ids.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

# Eight buckets per doubling from 1 ms: a quantile is right within 9 %.
_PER_DOUBLING = 8
_FIRST_S = 0.001
_BUCKETS = 25 * _PER_DOUBLING


class Metric(NamedTuple):
    """One row of the table: a name with its base unit, what kind it is, its label, and what it says."""

    name: str
    kind: str
    label: str | None
    meaning: str


METRICS = (
    Metric("batchrunner_attempts_total", "counter", None, "exchanges begun with the upstream, retries included"),
    Metric("batchrunner_lines_total", "counter", "outcome", "lines that got their final result"),
    Metric(
        "batchrunner_failures_total", "counter", "code", "attempts that did not succeed, by HTTP status or error code"
    ),
    Metric("batchrunner_retries_total", "counter", None, "attempts that were put back to be made again"),
    Metric("batchrunner_latency_seconds", "histogram", None, "time of an answered exchange"),
    Metric("batchrunner_tokens_total", "counter", "kind", "tokens that the upstream reported"),
    Metric("batchrunner_in_flight", "gauge", None, "exchanges under way"),
    Metric("batchrunner_window", "gauge", None, "exchanges that may be under way"),
    Metric("batchrunner_waiting", "gauge", None, "lines in the hands of workers that are not under way"),
    Metric("batchrunner_upstream_up", "gauge", "upstream", "1 while the upstream answers, 0 while it is down"),
    Metric("batchrunner_upstream_in_flight", "gauge", "upstream", "exchanges under way with it"),
    Metric("batchrunner_upstream_window", "gauge", "upstream", "exchanges that may be under way with it"),
    Metric(
        "batchrunner_live_requests_total",
        "counter",
        "upstream",
        "exchanges begun for requests that are answered at once",
    ),
    Metric("batchrunner_live_failures_total", "counter", "code", "those that got no whole answer, by error code"),
    Metric("batchrunner_live_in_flight", "gauge", "upstream", "those under way"),
    Metric("batchrunner_workers", "gauge", None, "worker processes of this server that reported a moment ago"),
    Metric("batchrunner_batches", "gauge", "status", "batches that are not over"),
    Metric("batchrunner_free_bytes", "gauge", None, "space left where results are written"),
    Metric("batchrunner_http_requests_total", "counter", "status", "requests that the API answered, by status"),
    Metric("batchrunner_http_latency_seconds", "histogram", None, "time that the API took for a request"),
    Metric("batchrunner_webhook_attempts_total", "counter", "outcome", "notifications sent, by what came of it"),
    Metric("batchrunner_webhook_latency_seconds", "histogram", None, "time of a notification that was answered"),
    Metric("batchrunner_webhook_deliveries", "gauge", "state", "notifications of the last 30 days"),
    Metric("batchrunner_journal_damage_total", "counter", None, "registered byte ranges that failed their checksum"),
)


class Latencies:
    """A histogram of seconds with log-spaced buckets; adding costs one logarithm."""

    __slots__ = ("counts",)

    def __init__(self, counts: list[int] | None = None) -> None:
        self.counts = counts or [0] * _BUCKETS

    def add(self, elapsed_s: float) -> None:
        """Count one exchange."""
        if elapsed_s <= _FIRST_S:
            self.counts[0] += 1
            return
        bucket = int(math.log2(elapsed_s / _FIRST_S) * _PER_DOUBLING) + 1
        self.counts[bucket if bucket < _BUCKETS else _BUCKETS - 1] += 1

    def cumulative(self) -> list[tuple[float, int]]:
        """Give for each doubling of seconds how many exchanges took at most so long; the last bound is infinite."""
        bounds, total = [], 0
        for bucket, count in enumerate(self.counts):
            total += count
            if bucket % _PER_DOUBLING == 0:
                bounds.append((_FIRST_S * 2.0 ** (bucket // _PER_DOUBLING), total))
        return [*bounds, (math.inf, total)]

    def total_s(self) -> float:
        """Give about how long all exchanges took together: each counts as the middle of its bucket."""
        return sum(
            count * _FIRST_S * math.exp2(max(bucket - 0.5, 0.0) / _PER_DOUBLING)
            for bucket, count in enumerate(self.counts)
            if count
        )

    def quantile(self, share: float) -> float | None:
        """Seconds below which `share` (0 to 1) of all exchanges stayed, None without any."""
        total = sum(self.counts)
        if total == 0:
            return None
        wanted, seen = share * total, 0
        for bucket, count in enumerate(self.counts):
            seen += count
            if seen >= wanted and count:
                return _FIRST_S * math.exp2((bucket - 0.5) / _PER_DOUBLING) if bucket else _FIRST_S
        return None


@dataclass(slots=True)
class Tally:
    """The counts of one process since it began; `add` folds another process's tally in."""

    attempts: int = 0
    succeeded: int = 0
    failed: int = 0
    retries: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    damages: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    latencies: Latencies = field(default_factory=Latencies)

    def add(self, other: Tally) -> None:
        """Fold another process's counts in."""
        self.attempts += other.attempts
        self.succeeded += other.succeeded
        self.failed += other.failed
        self.retries += other.retries
        self.tokens_in += other.tokens_in
        self.tokens_out += other.tokens_out
        self.damages += other.damages
        self.failures.update(other.failures)
        self.latencies.counts = [a + b for a, b in zip(self.latencies.counts, other.latencies.counts, strict=True)]

    def to_wire(self) -> dict[str, object]:
        """The counts as plain values, for a pipe."""
        return {
            "attempts": self.attempts,
            "succeeded": self.succeeded,
            "failed": self.failed,
            "retries": self.retries,
            "tokens_in": self.tokens_in,
            "tokens_out": self.tokens_out,
            "damages": self.damages,
            "failures": dict(self.failures),
            "latencies": self.latencies.counts,
        }


def tally_from_wire(values: dict[str, object]) -> Tally:
    """Undo `Tally.to_wire`."""
    rest = {name: value for name, value in values.items() if name not in ("failures", "latencies")}
    failures, counts = values["failures"], values["latencies"]
    assert isinstance(failures, dict)
    assert isinstance(counts, list)
    return Tally(**rest, failures=Counter(failures), latencies=Latencies(counts))  # type: ignore[arg-type]
