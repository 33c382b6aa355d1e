"""All benchmarks by name, each with the size that its promises are made for and a small one for trying it out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from bench import (
    end_to_end,
    fairness,
    found_window,
    jobs,
    kills,
    live,
    memory,
    notified,
    scaling,
    server,
    starting,
    validation,
)
from bench.results import Figure

Bench = Callable[[bool], list[Figure]]


def _end_to_end(is_quick: bool) -> list[Figure]:  # noqa: FBT001 - one word for all benches
    if is_quick:
        return end_to_end.measure(lines=5000, pairs=2, openai_lines=200)
    return end_to_end.measure(lines=20_000, pairs=5)


def _validation(is_quick: bool) -> list[Figure]:  # noqa: FBT001
    figures = []
    for corpus, row in validation.main(50_000 if is_quick else 1_000_000).items():
        if corpus == "memory":
            per_line = row["bytes_per_line"]
            figures.append(Figure("validation.memory", per_line, "bytes/line", "beyond a constant", "<= 30"))
            continue
        stem = f"validation.{corpus.split(',')[0].replace(' ', '_')}.{len(figures)}"
        rate = 1e6 / row["validation_us"]
        figures += [
            Figure(f"{stem}.ratio", row["ratio"], "x", f"orjson.loads per line / ours, wall: {corpus}", ">= 1"),
            Figure(f"{stem}.rate", rate, "lines/s", corpus),
            Figure(f"{stem}.mb_rate", rate * row["line_bytes"] / 1e6, "MB/s", corpus),
        ]
    return figures


def _memory(is_quick: bool) -> list[Figure]:  # noqa: FBT001
    return memory.measure(lines=100_000, few=10_000) if is_quick else memory.measure(lines=1_000_000, few=10_000)


def _scaling(is_quick: bool) -> list[Figure]:  # noqa: FBT001
    return scaling.measure(lines=20_000, pairs=1) if is_quick else scaling.measure(lines=100_000, pairs=9)


def _starting(is_quick: bool) -> list[Figure]:  # noqa: FBT001
    return starting.measure(lines=100_000 if is_quick else 1_000_000)


def _server(is_quick: bool) -> list[Figure]:  # noqa: FBT001
    if is_quick:
        return server.measure(server.Sizes(lines=200_000, seconds=5.0, upload_mib=50, pairs=1, cost_lines=5000))
    return server.measure(server.Sizes())


def _fairness(is_quick: bool) -> list[Figure]:  # noqa: FBT001
    return fairness.measure(lines=50_000, batches=10) if is_quick else fairness.measure()


def _window(is_quick: bool) -> list[Figure]:  # noqa: FBT001
    return found_window.measure(slots=(64,), workers=(1,)) if is_quick else found_window.measure()


def _kills(is_quick: bool) -> list[Figure]:  # noqa: FBT001
    if is_quick:
        return kills.measure(lines=1000, kills=3)
    return kills.measure() + kills.measure(workers=2)


def _live(is_quick: bool) -> list[Figure]:  # noqa: FBT001
    return live.measure(events=50, pairs=2) if is_quick else live.measure()


def _webhooks(is_quick: bool) -> list[Figure]:  # noqa: FBT001
    return notified.measure(batches=100, slow_s=1.0) if is_quick else notified.measure()


def _jobs(is_quick: bool) -> list[Figure]:  # noqa: FBT001
    return jobs.measure(seconds=3.0) if is_quick else jobs.measure()


BENCHES: Mapping[str, Bench] = MappingProxyType(
    {
        "end_to_end": _end_to_end,
        "validation": _validation,
        "memory": _memory,
        "scaling": _scaling,
        "starting": _starting,
        "window": _window,
        "server": _server,
        "fairness": _fairness,
        "webhooks": _webhooks,
        "live": _live,
        "jobs": _jobs,
    }
)
# Counts of lines and requests, which no noise of the machine changes.
PROOFS: Mapping[str, Bench] = MappingProxyType({"kills": _kills, **BENCHES})
