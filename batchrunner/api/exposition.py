"""The counts of a server in the text format of Prometheus, under the names of the table of metrics."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from batchrunner.lifecycle import BatchStatus
from batchrunner.metrics import METRICS, Latencies, Metric
from batchrunner.orders import Pulse

if TYPE_CHECKING:
    from prometheus_client.core import Metric as Family

TEXT = "text/plain; version=0.0.4; charset=utf-8"

# The value of a metric's label, "" where it has none, and the number.
Sample = tuple[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """All that one scrape shows."""

    pulse: Pulse
    answered: Mapping[int, int] = field(default_factory=dict)
    latencies: Latencies = field(default_factory=Latencies)
    batches: Mapping[BatchStatus, int] = field(default_factory=dict)
    free_bytes: int | None = None
    posted: Mapping[str, int] = field(default_factory=dict)
    post_latencies: Latencies = field(default_factory=Latencies)
    deliveries: Mapping[str, int] = field(default_factory=dict)
    live_begun: Mapping[str, int] = field(default_factory=dict)
    live_failures: Mapping[str, int] = field(default_factory=dict)
    live_in_flight: Mapping[str, int] = field(default_factory=dict)

    def numbers(self) -> dict[str, list[Sample]]:
        """Give counters and gauges by name."""
        tally, pulse = self.pulse.counts(), self.pulse
        return {
            "batchrunner_attempts_total": [("", tally.attempts)],
            "batchrunner_lines_total": [("succeeded", tally.succeeded), ("failed", tally.failed)],
            "batchrunner_failures_total": sorted(tally.failures.items()),
            "batchrunner_retries_total": [("", tally.retries)],
            "batchrunner_tokens_total": [("input", tally.tokens_in), ("output", tally.tokens_out)],
            "batchrunner_in_flight": [("", pulse.in_flight)],
            "batchrunner_window": [("", pulse.window)],
            "batchrunner_waiting": [("", pulse.waiting)],
            "batchrunner_upstream_up": [(each.name, float(not each.is_down)) for each in pulse.upstreams],
            "batchrunner_upstream_in_flight": [(each.name, each.in_flight) for each in pulse.upstreams],
            "batchrunner_upstream_window": [(each.name, each.window) for each in pulse.upstreams],
            "batchrunner_live_requests_total": sorted(self.live_begun.items()),
            "batchrunner_live_failures_total": sorted(self.live_failures.items()),
            "batchrunner_live_in_flight": sorted(self.live_in_flight.items()),
            "batchrunner_workers": [("", pulse.ticking_count)],
            "batchrunner_batches": [(status.value, count) for status, count in self.batches.items()],
            "batchrunner_free_bytes": [] if self.free_bytes is None else [("", self.free_bytes)],
            "batchrunner_http_requests_total": [(str(each), count) for each, count in sorted(self.answered.items())],
            "batchrunner_webhook_attempts_total": sorted(self.posted.items()),
            "batchrunner_webhook_deliveries": sorted(self.deliveries.items()),
            "batchrunner_journal_damage_total": [("", tally.damages)],
        }

    def histograms(self) -> dict[str, Latencies]:
        """Give histograms by name."""
        return {
            "batchrunner_latency_seconds": self.pulse.counts().latencies,
            "batchrunner_http_latency_seconds": self.latencies,
            "batchrunner_webhook_latency_seconds": self.post_latencies,
        }


def expose(counts: Counts) -> bytes:
    """Write all metrics of the table."""
    # 30 ms to import, which only those who scrape should wait for.
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.registry import Collector

    class _Table(Collector):
        def collect(self) -> Iterable[Family]:
            return _families(counts)

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Table())
    return generate_latest(registry)


def _families(counts: Counts) -> Iterator[Family]:
    numbers, histograms = counts.numbers(), counts.histograms()
    for metric in METRICS:
        if metric.kind == "histogram":
            yield _histogram(metric, histograms[metric.name])
        else:
            yield _numbers(metric, numbers[metric.name])


def _numbers(metric: Metric, samples: Iterable[Sample]) -> Family:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    kind = CounterMetricFamily if metric.kind == "counter" else GaugeMetricFamily
    family = kind(metric.name, metric.meaning, labels=[metric.label] if metric.label else [])
    for label, number in samples:
        family.add_metric([label] if metric.label else [], number)
    return family


def _histogram(metric: Metric, latencies: Latencies) -> Family:
    from prometheus_client.core import HistogramMetricFamily

    buckets = [("+Inf" if bound == math.inf else f"{bound:g}", count) for bound, count in latencies.cumulative()]
    family = HistogramMetricFamily(metric.name, metric.meaning)
    family.add_metric([], buckets, sum_value=latencies.total_s())
    return family
