"""How close the window that `run` finds by itself comes to the best fixed one, on simulators with 200 ms latency.

python -m bench.found_window [--slots 8 64 512] [--workers 1 2] [--settle 30] [--span 15]

Rates and requests in flight are the upstream's own counts; the mean time of a request follows by Little's law.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from bench.inputs import write_requests
from bench.measuring import Command, batchrunner, scratch
from bench.results import Figure, print_table
from bench.upstream import Upstream, simulator

LATENCY_S = 0.2
_LOOK_S = 0.1


@dataclass(frozen=True)
class Observed:
    """What an upstream saw for a while."""

    rate: float
    in_flight_mean: float
    in_flight_max: int
    refused_share: float

    @property
    def latency_s(self) -> float:
        return self.in_flight_mean / self.rate if self.rate else 0.0


def observe(upstream: Upstream, span_s: float) -> Observed:
    """Watch the upstream's counters for that long."""
    began_s, first = time.perf_counter(), upstream.stats()
    levels = []
    while time.perf_counter() - began_s < span_s:
        levels.append(upstream.stats()["in_flight"])
        time.sleep(_LOOK_S)
    ended_s, last = time.perf_counter(), upstream.stats()
    total = last["total"] - first["total"]
    refused = last["faulted"] - first["faulted"]
    return Observed(
        rate=(last["ok"] - first["ok"]) / (ended_s - began_s),
        in_flight_mean=sum(levels) / len(levels),
        in_flight_max=max(levels),
        refused_share=refused / total if total else 0.0,
    )


class Running:
    """A `run` that is watched for a while and then killed."""

    def __init__(self, path: Path, folder: Path, upstream: Upstream, *, workers: int, concurrency: str) -> None:
        arguments = ("run", str(path), "-o", str(folder / "out.jsonl"), "-u", upstream.base_url, "--fresh", "--json")
        self._command = Command(batchrunner(*arguments, "--workers", str(workers), "--concurrency", concurrency))
        while upstream.stats()["total"] == 0:
            time.sleep(_LOOK_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._command.is_running():
            raise RuntimeError(f"run ended too early: {self._command.wait()}")
        self._command.kill()
        self._command.wait()


def best_fixed_rate(path: Path, folder: Path, slots: int, workers: int, span_s: float) -> float:
    """Give the best rate among pinned windows around the number of slots."""
    rates = []
    for concurrency in (slots, slots + slots // 4):
        with (
            simulator("--slots", str(slots), latency="200ms") as upstream,
            Running(path, folder, upstream, workers=workers, concurrency=str(concurrency)),
        ):
            time.sleep(3.0)
            rates.append(observe(upstream, span_s).rate)
    return max(rates)


def find(path: Path, folder: Path, slots: int, *, workers: int, settle_s: float, span_s: float) -> list[Figure]:
    """Compare the found window with the best fixed one, before and after the capacity halves."""
    best = best_fixed_rate(path, folder, slots, workers, span_s)
    stem, where = f"window.slots_{slots}.workers_{workers}", f"{slots} slots, {workers} worker(s)"
    with (
        simulator("--slots", str(slots), latency="200ms") as upstream,
        Running(path, folder, upstream, workers=workers, concurrency="auto"),
    ):
        time.sleep(settle_s)
        found = observe(upstream, span_s)
        upstream.control(slots=slots // 2)
        time.sleep(10.0)
        halved = observe(upstream, span_s)
    return [
        Figure(f"{stem}.best_rate", best, "requests/s", f"best fixed window, {where}"),
        Figure(f"{stem}.share", found.rate / best, "of best", f"found window after {settle_s:.0f} s", ">= 0.95"),
        Figure(f"{stem}.in_flight", found.in_flight_max / slots, "x slots", "most requests in flight", "<= 2"),
        Figure(f"{stem}.latency", found.latency_s / LATENCY_S, "x alone", "mean time of a request", "<= 2"),
        Figure(
            f"{stem}.halved_share", halved.rate / (best / 2), "of best", "10 s after half the slots went", ">= 0.95"
        ),
        Figure(f"{stem}.halved_in_flight", halved.in_flight_max / (slots // 2), "x slots", "the same", "<= 2"),
        Figure(f"{stem}.halved_latency", halved.latency_s / LATENCY_S, "x alone", "the same", "<= 2"),
    ]


def refuse(path: Path, folder: Path, workers: int, settle_s: float, span_s: float) -> list[Figure]:
    """Measure the share of 429 at an upstream that refuses what has no slot."""
    stem = f"window.refusing.workers_{workers}"
    with (
        simulator("--slots", "64", "--queue", "0", latency="200ms") as upstream,
        Running(path, folder, upstream, workers=workers, concurrency="auto"),
    ):
        time.sleep(settle_s)
        seen = observe(upstream, 2 * span_s)
    return [
        Figure(f"{stem}.share_429", seen.refused_share, "of attempts", "64 slots, no queue, steady state", "< 0.01"),
        Figure(f"{stem}.share", seen.rate / (64 / LATENCY_S), "of capacity", "answered, the same"),
    ]


def measure(
    *,
    slots: Sequence[int] = (8, 64, 512),
    workers: Sequence[int] = (1, 2),
    settle_s: float = 30.0,
    span_s: float = 15.0,
) -> list[Figure]:
    figures = []
    with scratch() as folder:
        for count in slots:
            lines = int((settle_s + 2 * span_s + 30.0) * count / LATENCY_S * 1.5)
            path = write_requests(folder / f"slots-{count}.jsonl", lines)
            for each in workers:
                figures += find(path, folder, count, workers=each, settle_s=settle_s, span_s=span_s)
        path = write_requests(folder / "refusing.jsonl", int((settle_s + 2 * span_s + 10.0) * 64 / LATENCY_S * 1.5))
        for each in workers:
            figures += refuse(path, folder, each, settle_s, span_s)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 64, 512])
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--settle", type=float, default=30.0)
    parser.add_argument("--span", type=float, default=15.0)
    options = parser.parse_args()
    print_table(measure(slots=options.slots, workers=options.workers, settle_s=options.settle, span_s=options.span))


if __name__ == "__main__":
    main()
