"""Batches that end at once, told to three receivers, one fast, one slow, one not there, with the API killed in between.

python -m bench.notified [--batches 1000] [--slow 10] [--kills 2]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from batchrunner.app import open_adapters
from batchrunner.lifecycle import BatchEvent
from batchrunner.models import LOCAL_TENANT, BatchId
from bench.inputs import LINE_URL
from bench.measuring import scratch
from bench.results import Figure, print_table
from bench.served import API, Client, Served, client_of, serving
from bench.upstream import simulator

_PATIENCE_S = 900.0
_LOOK_S = 0.05


class Receiver:
    """Counts events by id, and remembers when each came first."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.count: Counter[str] = Counter()
        self.came_at_s: dict[str, float] = {}
        self._delay_s = delay_s

    async def take(self, request: web.Request) -> web.Response:
        batch_id = (await request.json())["data"]["id"]
        await asyncio.sleep(self._delay_s)
        self.came_at_s.setdefault(batch_id, time.perf_counter())
        self.count[batch_id] += 1
        return web.Response()

    async def until(self, wanted: int) -> None:
        async with asyncio.timeout(_PATIENCE_S):
            while len(self.count) < wanted:
                await asyncio.sleep(_LOOK_S)


@contextlib.asynccontextmanager
async def receiving(receiver: Receiver) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/hook", receiver.take)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0, backlog=1024).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/hook"
    finally:
        await runner.cleanup()


def nowhere() -> str:
    """An address where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return f"http://127.0.0.1:{taken.getsockname()[1]}/hook"


async def prepared(client: Client, urls: list[str], batches: int) -> tuple[list[str], list[str]]:
    """Register receivers and make batches that nobody works on."""
    endpoints = []
    for url in urls:
        wanted = {"name": url, "url": url, "event_types": ["batch.failed"]}
        endpoints.append(str((await client.ask("POST", "/webhook_endpoints", json=wanted))["id"]))
    request = {"custom_id": "a", "body": {"model": "m", "messages": []}}
    order = {"requests": [request], "endpoint": LINE_URL, "completion_window": "24h"}
    return endpoints, [str((await client.ask("POST", "/batches", json=order))["id"]) for _ in range(batches)]


def end_all(folder: Path, batch_ids: list[str]) -> float:
    """End the batches beside the server, as its operator can; gives the seconds that it took."""
    adapters = open_adapters(folder)
    began_s = time.perf_counter()
    scope = adapters.store.scope(LOCAL_TENANT)
    for each in batch_ids:
        scope.send(BatchId(each), BatchEvent.GAVE_UP)
    took_s = time.perf_counter() - began_s
    adapters.store.close()
    return took_s


async def kill_between(served: Served, fast: Receiver, batches: int, kills: int) -> None:
    """Kill the API process, each time that the fast receiver has got a part more."""
    for number in range(1, kills + 1):
        await fast.until(batches * number // (kills + 1))
        for pid in served.pids(API):
            os.kill(pid, signal.SIGKILL)


async def listed(client: Client, **narrowed: str) -> list[Any]:
    """Give all deliveries that a listing has; the API may just be gone."""
    found: list[Any] = []
    after: dict[str, str] = {}
    while True:
        try:
            page = await client.ask("GET", "/webhook_deliveries", params={"limit": "100", **narrowed, **after})
        except (aiohttp.ClientError, RuntimeError):
            await asyncio.sleep(_LOOK_S)
            continue
        found += page["data"]
        if not page["has_more"]:
            return found
        after = {"after": page["last_id"]}


async def tell(folder: Path, base_url: Any, *, batches: int, slow_s: float, kills: int) -> list[Figure]:
    fast, slow = Receiver(), Receiver(slow_s)
    with serving(folder, base_url, "--workers", "0") as served:
        async with receiving(fast) as one, receiving(slow) as two, client_of(served.base_url) as client:
            (*_, absent), ids = await prepared(client, [one, two, nowhere()], batches)
            began_s = time.perf_counter()
            killing = asyncio.create_task(kill_between(served, fast, batches, kills))
            ending_s = await asyncio.to_thread(end_all, served.data, ids)
            await killing
            await fast.until(batches)
            fast_s = max(fast.came_at_s.values()) - began_s - ending_s
            await slow.until(batches)
            slow_all_s = max(slow.came_at_s.values()) - began_s
            waiting = await listed(client, status="pending", webhook_endpoint_id=absent)
    what = f"{batches} batches at once, 3 receivers, {kills} kills"
    return [
        Figure("webhooks.fast", fast_s, "s", f"all at the fast receiver, after the last end; {what}", "<= 10"),
        Figure("webhooks.slow", slow_all_s, "s", f"all at the one that takes {slow_s:g} s"),
        Figure("webhooks.lost", 2 * batches - len(fast.count) - len(slow.count), "events", what, "= 0"),
        Figure("webhooks.kept", len(waiting), "events", "for whoever is not there", f"= {batches}"),
        Figure("webhooks.twice", fast.count.total() + slow.count.total() - 2 * batches, "events", "under the same id"),
        Figure("webhooks.ends", ending_s, "s", "in which the batches ended"),
    ]


def measure(*, batches: int = 1000, slow_s: float = 10.0, kills: int = 2) -> list[Figure]:
    """End many batches at once and see who is told when."""
    with scratch() as folder, simulator() as upstream:
        return asyncio.run(tell(folder, upstream, batches=batches, slow_s=slow_s, kills=kills))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.notified", description="Tell many ends at once.")
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--slow", type=float, default=10.0, help="seconds that the slow receiver takes")
    parser.add_argument("--kills", type=int, default=2)
    options = parser.parse_args()
    print_table(measure(batches=options.batches, slow_s=options.slow, kills=options.kills))


if __name__ == "__main__":
    main()
