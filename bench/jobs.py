"""Async jobs that come one by one from many clients at once: how fast they are accepted, and that each runs to its end,
also when the API and a worker are killed while they come.

python -m bench.jobs [--clients 64] [--seconds 10]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp

from batchrunner.members import without_member
from batchrunner.simulate import expected_reply
from bench.inputs import LINE_URL
from bench.measuring import median, scratch
from bench.results import Figure, print_table
from bench.served import API, WORKER, Client, Served, client_of, serving
from bench.server import p99
from bench.upstream import Upstream, simulator

_BODY = (
    b'{"model":"m","async":true,"messages":[{"role":"system","content":"You are a helpful assistant."},'
    b'{"role":"user","content":"Write a product description for lamp %d."}]}'
)
_HEADERS = {"Content-Type": "application/json"}
_WORKERS = 2
_PATIENCE_S = 900.0
_LOOK_S = 0.1
_READERS = 16


@dataclass
class Load:
    """What clients sent, and what of it was accepted: the body of each job by its number."""

    has_keys: bool = False
    numbers: Iterator[int] = field(default_factory=itertools.count)
    accepted: dict[str, bytes] = field(default_factory=dict)
    took_ms: list[float] = field(default_factory=list)
    refused: Counter[int] = field(default_factory=Counter)
    broken: int = 0

    async def send(self, client: Client, end_s: float) -> None:
        """Send one job after the other, as one client does."""
        while time.perf_counter() < end_s:
            number = next(self.numbers)
            body = _BODY % number
            headers = _HEADERS | ({"Idempotency-Key": f"key-{number}"} if self.has_keys else {})
            began_s = time.perf_counter()
            try:
                async with client.session.post(
                    f"{client.base_url}/chat/completions", data=body, headers=headers
                ) as answer:
                    found = await answer.json(content_type=None)
            except (aiohttp.ClientError, OSError):
                # Whoever is not answered does not know; the job may be there.
                self.broken += 1
                await asyncio.sleep(_LOOK_S)
                continue
            if answer.status == 202:
                self.took_ms.append((time.perf_counter() - began_s) * 1000)
                self.accepted[found["id"]] = body
            else:
                self.refused[answer.status] += 1


@dataclass(frozen=True)
class Ends:
    """How accepted jobs ended: those not found, those that failed, those with the answer to another prompt."""

    lost: int
    failed: int
    swapped: int
    waited_s: float


async def _ended(client: Client, load: Load) -> Ends:
    """Wait until no job is active, then look at every one that was accepted."""
    began_s = time.perf_counter()
    async with asyncio.timeout(_PATIENCE_S):
        while (await client.ask("GET", "/jobs", params={"active": "1", "limit": "1"}))["data"]:
            await asyncio.sleep(_LOOK_S)
    waited_s = time.perf_counter() - began_s
    found: Counter[str] = Counter()
    rest = iter(load.accepted.items())

    async def look() -> None:
        for number, body in rest:
            async with client.session.get(f"{client.base_url}/jobs/{number}") as answer:
                job = await answer.json(content_type=None) if answer.status == 200 else None
            if job is None:
                found["lost"] += 1
            elif job["status"] != "PROCESSED":
                found["failed"] += 1
            elif expected_reply(without_member(body, "async"), LINE_URL) not in str(job["result"]):
                found["swapped"] += 1

    await asyncio.gather(*(look() for _ in range(_READERS)))
    return Ends(found["lost"], found["failed"], found["swapped"], waited_s)


async def _submitted(served: Served, client: Client, load: Load, clients: int, seconds: float) -> tuple[float, float]:
    """Have clients submit for so long; gives how many a second were accepted, and the CPU of the API for each."""
    await load.send(client, time.perf_counter() + 0.5)  # Opens what opens once.
    load.took_ms.clear()
    before = len(load.accepted)
    cpu_s, began_s = served.cpu_s(API), time.perf_counter()
    await asyncio.gather(*(load.send(client, began_s + seconds) for _ in range(clients)))
    count = len(load.accepted) - before
    return count / (time.perf_counter() - began_s), (served.cpu_s(API) - cpu_s) / count * 1e6


async def _calm(served: Served, upstream: Upstream, clients: int, seconds: float) -> list[Figure]:
    load = Load()
    async with client_of(served.base_url) as client:
        rate, cpu_us = await _submitted(served, client, load, clients, seconds)
        ends = await _ended(client, load)
    what = f"{clients} clients at once for {seconds:g} s, {_WORKERS} workers running what comes"
    return [
        Figure("jobs.accepted", rate, "jobs/s", f"durable and answered 202; {what}", ">= 500"),
        Figure("jobs.answer_ms", median(load.took_ms), "ms", "until the 202, median"),
        Figure("jobs.answer_p99_ms", p99(load.took_ms), "ms", "until the 202, the 99th of a hundred", "< 250"),
        Figure("jobs.api_cpu_us", cpu_us, "us/job", "CPU of the API process, while they run too"),
        Figure("jobs.refused", load.refused.total() + load.broken, "requests", "that got anything but a 202", "= 0"),
        Figure("jobs.behind", ends.waited_s, "s", "from the last 202 until the last job has ended"),
        Figure("jobs.bad", ends.lost + ends.failed + ends.swapped, "jobs", "lost, failed or swapped", "= 0"),
        Figure("jobs.sent_twice", upstream.stats()["repeats"], "requests", "to the upstream, for nothing", "= 0"),
    ]


async def _keyed(served: Served, upstream: Upstream, clients: int, seconds: float) -> list[Figure]:
    load = Load(has_keys=True)
    async with client_of(served.base_url) as client:
        rate, _ = await _submitted(served, client, load, clients, seconds)
        ends = await _ended(client, load)
    bad = ends.lost + ends.failed + ends.swapped + abs(upstream.stats()["unique"] - len(load.accepted))
    return [
        Figure("jobs.keyed.accepted", rate, "jobs/s", "the same, each with an Idempotency-Key of its own", ">= 500"),
        Figure("jobs.keyed.answer_p99_ms", p99(load.took_ms), "ms", "until the 202, the 99th of a hundred", "< 250"),
        Figure("jobs.keyed.bad", bad, "jobs", "lost, failed, swapped or doubled", "= 0"),
    ]


async def _kill_between(served: Served, seconds: float) -> None:
    """Kill the API process after a third, and a worker after two."""
    for module in (API, WORKER):
        await asyncio.sleep(seconds / 3)
        os.kill(served.pids(module)[0], signal.SIGKILL)


async def _killed(served: Served, upstream: Upstream, clients: int, seconds: float) -> list[Figure]:
    load = Load()
    async with client_of(served.base_url) as client:
        end_s = time.perf_counter() + seconds
        await asyncio.gather(_kill_between(served, seconds), *(load.send(client, end_s) for _ in range(clients)))
        ends = await _ended(client, load)
    what = f"API killed after {seconds / 3:.1f} s, a worker after {seconds * 2 / 3:.1f} s"
    return [
        Figure("jobs.killed.accepted", len(load.accepted), "jobs", f"in {seconds:g} s; {what}"),
        Figure("jobs.killed.unanswered", load.broken, "requests", "that were cut off or found nobody"),
        Figure("jobs.killed.lost", ends.lost, "jobs", "accepted, and not there in the end", "= 0"),
        Figure("jobs.killed.failed", ends.failed, "jobs", "accepted, and not processed in the end", "= 0"),
        Figure("jobs.killed.swapped", ends.swapped, "jobs", "with the answer to another prompt", "= 0"),
        Figure("jobs.killed.behind", ends.waited_s, "s", "from the last 202 until the last job has ended"),
        Figure("jobs.killed.sent_twice", upstream.stats()["repeats"], "requests", "to the upstream, for nothing"),
    ]


def measure(*, clients: int = 64, seconds: float = 10.0) -> list[Figure]:
    """Both, each on a server of its own."""
    figures: list[Figure] = []
    options = ("--workers", str(_WORKERS))
    for run in (_calm, _keyed, _killed):
        with scratch() as folder, simulator() as upstream, serving(Path(folder), upstream, *options) as served:
            figures += asyncio.run(run(served, upstream, clients, seconds))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.jobs", description="Accept and run async jobs.")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=10.0)
    print_table(measure(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
