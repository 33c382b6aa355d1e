"""What small batches wait behind a huge one that keeps a pinned window full, and what a server costs that has no work.

python -m bench.fairness [--lines 1000000] [--batches 100] [--workers 1]

Small batches of 20 lines are measured one by one, each as its client sees it, from its create to its end:

- on an idle server;
- while the huge batch is validated;
- one every 500 ms while the huge batch runs, which the window carries: compared with the time on an idle server;
- one every 200 ms while the huge batch runs. They bring more lines a second than a window of 64 carries at a latency of
  1 s, so they queue behind each other, whoever else is there: each is compared with its own time in the same stream
  without the huge batch.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from bench.inputs import LINE_URL, write_requests
from bench.measuring import median, scratch
from bench.results import Figure, print_table
from bench.served import API, TERMINAL, WORKER, Client, Served, client_of, serving
from bench.upstream import Upstream, simulator

WINDOW = 64
SMALL_LINES = 20
LATENCY = "1s"
CROWDED_S, CARRIED_S = 0.2, 0.5
_ALONE = 5
_STARTS = 3
# A server rests after 10 s without work.
_REST_S = 12.0
_IDLE_S = 20.0
_LOOK_S = 0.1
_GLANCE_S = 0.005
_FACTOR, _EXTRA_S = 2.0, 2.0

Times = dict[str, list[float]]


class Stream:
    """Small batches, one after the other, and how long each took."""

    def __init__(self, client: Client, stem: str) -> None:
        self._client = client
        self._stem = stem
        self._began_s: dict[str, float] = {}
        self._took_s: dict[str, float] = {}

    async def run(self, count: int, every_s: float) -> list[float]:
        """Make that many batches, one every so many seconds; give the seconds that each took, in order of creation."""
        looking = asyncio.create_task(self._look(count))
        first_s = time.perf_counter()
        async with asyncio.TaskGroup() as creating:
            for number in range(count):
                await asyncio.sleep(max(0.0, first_s + number * every_s - time.perf_counter()))
                creating.create_task(self._create(number))
        await looking
        return [self._took_s[batch_id] for batch_id in sorted(self._began_s, key=self._began_s.__getitem__)]

    async def _create(self, number: int) -> None:
        began_s = time.perf_counter()
        wanted = {"endpoint": LINE_URL, "completion_window": "24h", "requests": _requests(f"{self._stem}-{number}")}
        batch = await self._client.ask("POST", "/batches", json=wanted)
        self._began_s[batch["id"]] = began_s

    async def _look(self, count: int) -> None:
        """See all at one glance: a question for each would keep the server busy."""
        while len(self._took_s) < count:
            page = await self._client.ask("GET", "/batches?limit=100")
            now_s = time.perf_counter()
            for batch in page["data"]:
                if batch["id"] in self._began_s and batch["id"] not in self._took_s and batch["status"] in TERMINAL:
                    if batch["request_counts"]["completed"] != SMALL_LINES:
                        raise RuntimeError(f"a small batch is not whole: {batch}")
                    self._took_s[batch["id"]] = now_s - self._began_s[batch["id"]]
            await asyncio.sleep(_LOOK_S)


def _requests(stem: str) -> list[dict[str, object]]:
    return [
        {
            "custom_id": f"{stem}-{number}",
            "body": {"model": "sim", "messages": [{"role": "user", "content": f"{stem} {number}"}]},
        }
        for number in range(SMALL_LINES)
    ]


# -- a server without work -----------------------------------------------------------------------------------------


async def _idle_shares(served: Served) -> dict[str, float]:
    """Give how much of a core each kind of process takes while there is nothing to do, in percent."""
    await asyncio.sleep(_REST_S)
    before = {module: served.cpu_s(module) for module in (WORKER, API)}
    await asyncio.sleep(_IDLE_S)
    return {module: (served.cpu_s(module) - before[module]) / _IDLE_S * 100 for module in before}


async def _first_line_s(client: Client, upstream: Upstream, number: int) -> float:
    """Give the seconds from a create on a server at rest to its first line at the upstream."""
    before = (await asyncio.to_thread(upstream.stats))["total"]
    began_s = time.perf_counter()
    running = asyncio.create_task(Stream(client, f"start-{number}").run(1, 0.0))
    while (await asyncio.to_thread(upstream.stats))["total"] == before:
        await asyncio.sleep(_GLANCE_S)
    took_s = time.perf_counter() - began_s
    await running
    return took_s


async def _starts(client: Client, upstream: Upstream) -> list[float]:
    each_s = []
    for number in range(_STARTS):
        if number > 0:
            await asyncio.sleep(_REST_S)
        each_s.append(await _first_line_s(client, upstream, number))
    return each_s


# -- small batches beside a huge one -------------------------------------------------------------------------------


async def _begin(client: Client, upstream: Upstream, path: Path) -> tuple[str, float]:
    """Have the huge batch fill the window; gives its id, and the seconds of a small one that met its validation."""
    file_id = await client.upload(path)
    huge = await client.create(file_id)
    (small_s,) = await Stream(client, "beside-validation").run(1, 0.0)
    await client.when(huge, "in_progress")
    while (await asyncio.to_thread(upstream.stats))["in_flight"] < WINDOW:
        await asyncio.sleep(_LOOK_S)
    return huge, small_s


async def _beside(client: Client, upstream: Upstream, path: Path, batches: int) -> tuple[Times, int]:
    times: Times = {
        "alone": [(await Stream(client, f"alone-{number}").run(1, 0.0))[0] for number in range(_ALONE)],
        "crowded_alone": await Stream(client, "first").run(batches, CROWDED_S),
    }
    huge, small_s = await _begin(client, upstream, path)
    times["validating"] = [small_s]
    before = (await client.ask("GET", f"/batches/{huge}"))["request_counts"]["completed"]
    times["carried"] = await Stream(client, "carried").run(batches, CARRIED_S)
    times["crowded"] = await Stream(client, "second").run(batches, CROWDED_S)
    after = (await client.ask("GET", f"/batches/{huge}"))["request_counts"]["completed"]
    return times, after - before


async def _measure(served: Served, upstream: Upstream, path: Path, batches: int, workers: int) -> list[Figure]:
    async with client_of(served.base_url) as client:
        shares = await _idle_shares(served)
        starts_s = await _starts(client, upstream)
        times, huge_count = await _beside(client, upstream, path, batches)
    worker_share = shares[WORKER] / workers
    return [
        Figure("fairness.idle_worker", worker_share, "% of a core", f"a worker without work, {_IDLE_S:.0f} s", "< 1"),
        Figure("fairness.idle_api", shares[API], "% of a core", "the API without work"),
        Figure("fairness.first_line_s", max(starts_s), "s", "create to first line, server at rest", "<= 1", starts_s),
        *_figures(times, huge_count, batches),
    ]


def measure(*, lines: int = 1_000_000, batches: int = 100, workers: int = 1) -> list[Figure]:
    """A server without work, and small batches alone and beside the huge one."""
    with scratch() as folder, simulator(latency=LATENCY) as upstream:
        path = write_requests(folder / "huge.jsonl", lines, line_bytes=210)
        flags = ("--workers", str(workers), "--concurrency", str(WINDOW))
        with serving(folder / "server", upstream, *flags) as served:
            return asyncio.run(_measure(served, upstream, path, batches, workers))


def _over(times: Sequence[float], own: Sequence[float]) -> list[float]:
    """Seconds of each batch beyond twice its own time alone."""
    return [took_s - _FACTOR * own_s for took_s, own_s in zip(times, own, strict=True)]


def _figures(times: Times, huge_count: int, batches: int) -> list[Figure]:
    alone_s = median(times["alone"])
    bound, beside = f"<= {_EXTRA_S:g}", f"beside a huge batch, {batches} of {SMALL_LINES} lines"
    over = {name: _over(times[name], [alone_s] * len(times[name])) for name in ("validating", "carried")}
    over["crowded"] = _over(times["crowded"], times["crowded_alone"])

    def figure(name: str, what: str) -> Figure:
        return Figure(f"fairness.{name}_s", median(times[name]), "s", what, None, times[name])

    def worst(name: str, what: str) -> Figure:
        return Figure(f"fairness.{name}_over", max(over[name]), "s", what, bound, over[name])

    return [
        figure("alone", f"a batch of {SMALL_LINES} lines on an idle server"),
        worst("validating", "one while the huge batch is validated, less twice the time alone"),
        figure("carried", f"{beside}, 2 a second"),
        worst("carried", "the worst of them less twice the time alone"),
        figure("crowded_alone", f"{batches} of them, 5 a second, and no huge batch"),
        figure("crowded", f"{beside}, 5 a second"),
        worst("crowded", "the worst of them less twice its own time without the huge batch"),
        Figure("fairness.huge_lines", huge_count, "lines", "what the huge batch got done meanwhile", "> 0"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--workers", type=int, default=1)
    options = parser.parse_args()
    print_table(measure(lines=options.lines, batches=options.batches, workers=options.workers))


if __name__ == "__main__":
    main()
