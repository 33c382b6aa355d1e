"""CPU per request of our transport against a bare, tuned aiohttp session: same process, loop and allocator, in turns.

python -m bench.transport [--loop uvloop] [--requests 20000] [--pairs 5] [--in-flight 64]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable

import aiohttp
from yarl import URL

from batchrunner.clock import SystemClock
from batchrunner.tuning import freeze_start_up, raise_mmap_threshold, tune_process
from batchrunner.upstream import AiohttpUpstream
from batchrunner.upstream_address import join_url
from bench.instant import BODY as ANSWER_BODY
from bench.instant import instant_server

LINE_URL = "/v1/chat/completions"
BODY = b'{"model":"m","messages":[{"role":"user","content":"' + b"x" * 400 + b'"}]}'
WARM_UP_REQUESTS = 2000


async def drain(send: Callable[[], Awaitable[None]], requests: int, in_flight: int) -> tuple[float, float]:
    """Send from that many coroutines over one iterator; give CPU us per request and requests per second."""
    numbers = iter(range(requests))

    async def pull() -> None:
        for _ in numbers:
            await send()

    wall_s, cpu_s = time.perf_counter(), time.process_time()
    await asyncio.gather(*(pull() for _ in range(in_flight)))
    cpu_s, wall_s = time.process_time() - cpu_s, time.perf_counter() - wall_s
    return cpu_s / requests * 1e6, requests / wall_s


async def measure(base_url: str, pairs: int, requests: int, in_flight: int) -> list[tuple[float, float, float, float]]:
    url = URL(str(join_url(base_url, LINE_URL)))
    headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=60)
    upstream = AiohttpUpstream(base_url, clock=SystemClock(), api_key="k")
    session = aiohttp.ClientSession(
        connector=connector, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False, timeout=timeout
    )

    async def bare() -> None:
        async with session.post(url, data=BODY, headers=headers) as response:
            body = await response.read()
            assert (response.status, len(body)) == (200, len(ANSWER_BODY))

    async def ours() -> None:
        attempt = await upstream.send(LINE_URL, BODY, idempotency_key="0123456789abcdef0123456789abcdef")
        assert (attempt.status, len(attempt.body)) == (200, len(ANSWER_BODY))

    rows = []
    async with session:
        await drain(bare, WARM_UP_REQUESTS, in_flight)
        await drain(ours, WARM_UP_REQUESTS, in_flight)
        freeze_start_up()
        for number in range(pairs):
            # The order changes so that neither side always gets the warmer cache.
            if number % 2:
                ours_us, ours_rate = await drain(ours, requests, in_flight)
                bare_us, bare_rate = await drain(bare, requests, in_flight)
            else:
                bare_us, bare_rate = await drain(bare, requests, in_flight)
                ours_us, ours_rate = await drain(ours, requests, in_flight)
            rows.append((bare_us, ours_us, bare_rate, ours_rate))
    await upstream.close()
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--loop", choices=["asyncio", "uvloop"], default="asyncio")
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--in-flight", type=int, default=64)
    options = parser.parse_args()
    factory = tune_process(use_uvloop=options.loop == "uvloop")
    is_raised = raise_mmap_threshold()
    with instant_server() as base_url, asyncio.Runner(loop_factory=factory) as runner:
        rows = runner.run(measure(base_url, options.pairs, options.requests, options.in_flight))
    loop_name = factory.__module__.partition(".")[0]
    print(
        f"{options.requests} requests, {options.in_flight} in flight, {loop_name}, mmap threshold raised: {is_raised}"
    )
    print("pair  bare us  ours us  ratio  bare/s  ours/s")
    for number, (bare_us, ours_us, bare_rate, ours_rate) in enumerate(rows, start=1):
        ratio = ours_us / bare_us
        print(f"{number:4}  {bare_us:7.1f}  {ours_us:7.1f}  {ratio:5.2f}  {bare_rate:6.0f}  {ours_rate:6.0f}")
    bare_median, ours_median = (statistics.median(row[side] for row in rows) for side in (0, 1))
    ratios = [ours_us / bare_us for bare_us, ours_us, _, _ in rows]
    print(
        f"median: bare {bare_median:.1f} us, ours {ours_median:.1f} us, ratio {ours_median / bare_median:.2f} "
        f"({min(ratios):.2f} to {max(ratios):.2f})"
    )


if __name__ == "__main__":
    main()
