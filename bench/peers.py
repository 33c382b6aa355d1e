"""The clients that we are compared with, each in a process of its own: bare, transport, naive and openai.

python -m bench.peers KIND INPUT BASE_URL [--in-flight 64] prints the CPU and wall clock seconds of its loop as JSON.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import orjson

from bench.inputs import LINE_URL

Send = Callable[[Any], Awaitable[None]]


def read_bodies(path: str) -> list[bytes]:
    with Path(path).open("rb") as stream:
        return [orjson.dumps(orjson.loads(raw)["body"]) for raw in stream]


async def timed(send: Send, bodies: list, in_flight: int) -> dict[str, float]:
    """Send all from that many coroutines over one iterator."""
    supply = iter(bodies)

    async def pull() -> None:
        for body in supply:
            await send(body)

    wall_s, cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(pull() for _ in range(in_flight)))
    return {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s, "count": len(bodies)}


async def bare(path: str, base_url: str, in_flight: int) -> dict[str, float]:
    """A tuned aiohttp loop that only POSTs and reads: nothing is judged, kept or written."""
    import aiohttp
    from yarl import URL

    from batchrunner.tuning import freeze_start_up

    bodies = read_bodies(path)
    url = URL(base_url + LINE_URL.removeprefix("/v1"))
    headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
    session = aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        timeout=aiohttp.ClientTimeout(total=60),
    )

    async def send(body: object) -> None:
        async with session.post(url, data=body, headers=headers) as response:
            await response.read()
            assert response.status == 200

    async with session:
        freeze_start_up()
        return await timed(send, bodies, in_flight)


async def transport(path: str, base_url: str, in_flight: int) -> dict[str, float]:
    """Our own transport without anything around it: what `run` costs more is the price of keeping results."""
    from batchrunner.clock import SystemClock
    from batchrunner.tuning import freeze_start_up
    from batchrunner.upstream import AiohttpUpstream

    bodies = read_bodies(path)
    upstream = AiohttpUpstream(base_url, clock=SystemClock(), api_key="k")

    async def send(body: bytes) -> None:
        attempt = await upstream.send(LINE_URL, body, idempotency_key="bench")
        assert attempt.status == 200

    freeze_start_up()
    told = await timed(send, bodies, in_flight)
    await upstream.close()
    return told


async def naive(path: str, base_url: str, in_flight: int) -> dict[str, float]:
    """Send with aiohttp as most scripts do."""
    import aiohttp

    bodies = [orjson.loads(body) for body in read_bodies(path)]
    async with aiohttp.ClientSession() as session:

        async def send(body: object) -> None:
            url = base_url + LINE_URL.removeprefix("/v1")
            async with session.post(url, json=body, headers={"Authorization": "Bearer k"}) as response:
                response.raise_for_status()
                await response.json()

        return await timed(send, bodies, in_flight)


async def openai(path: str, base_url: str, in_flight: int) -> dict[str, float]:
    """The official SDK with its default http client, a task per request and a semaphore around each."""
    from openai import AsyncOpenAI

    bodies = [orjson.loads(body) for body in read_bodies(path)]
    semaphore = asyncio.Semaphore(in_flight)
    async with AsyncOpenAI(base_url=base_url, api_key="k") as client:

        async def send(body: dict) -> None:
            async with semaphore:
                await client.chat.completions.create(**body)

        wall_s, cpu_s = time.perf_counter(), time.process_time()
        await asyncio.gather(*(send(body) for body in bodies))
        return {"wall_s": time.perf_counter() - wall_s, "cpu_s": time.process_time() - cpu_s, "count": len(bodies)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=["bare", "transport", "naive", "openai"])
    parser.add_argument("input")
    parser.add_argument("base_url")
    parser.add_argument("--in-flight", type=int, default=64)
    options = parser.parse_args()
    loops = {"bare": bare, "transport": transport, "naive": naive, "openai": openai}
    factory = None
    if options.kind in {"bare", "transport"}:
        from batchrunner.tuning import tune_process

        factory = tune_process()
    with asyncio.Runner(loop_factory=factory) as runner:
        print(json.dumps(runner.run(loops[options.kind](options.input, options.base_url, options.in_flight))))


if __name__ == "__main__":
    main()
