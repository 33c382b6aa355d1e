"""What passing a request on adds: to each piece of a stream, and to a whole answer, beside the upstream asked directly.

python -m bench.live [--events 300] [--pairs 5]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp

from bench.measuring import median, scratch
from bench.results import Figure, print_table
from bench.served import Served
from bench.server import p99
from bench.upstream import Upstream, simulator

EVERY_S = 0.005
_BODY = b'{"model":"m","stream":true,"messages":[{"role":"user","content":"hello"}]}'
_WHOLE = b'{"model":"m","messages":[{"role":"user","content":"hello"}]}'
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
_HEADERS = {"Content-Type": "application/json"}


@contextlib.asynccontextmanager
async def _stamping(events: int) -> AsyncIterator[str]:
    """Have an upstream in this process that streams the time at which each event leaves; give its base URL."""

    async def stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # The end of the bench finds it waiting for one more request.
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(_BODY))
                writer.write(_HEAD)
                for _ in range(events):
                    await asyncio.sleep(EVERY_S)
                    event = b"data: %.9f\n\n" % time.perf_counter()
                    writer.write(b"%x\r\n%b\r\n" % (len(event), event))
                writer.write(b"0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(stream, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


async def _delays_ms(session: aiohttp.ClientSession, base_url: str) -> list[float]:
    """Read one stream; give for each event how long it took from its writing to its reading."""
    async with session.post(f"{base_url}/chat/completions", data=_BODY, headers=_HEADERS) as answer:
        return [
            (time.perf_counter() - float(line[6:])) * 1000
            async for line in answer.content
            if line.startswith(b"data: ")
        ]


async def _whole_ms(session: aiohttp.ClientSession, base_url: str, count: int) -> list[float]:
    took = []
    for _ in range(count):
        began_s = time.perf_counter()
        async with session.post(f"{base_url}/chat/completions", data=_WHOLE, headers=_HEADERS) as answer:
            await answer.read()
        took.append((time.perf_counter() - began_s) * 1000)
    return took


async def _pairs(
    measure_one: Callable[[str], Awaitable[list[float]]], direct: str, ours: str, pairs: int
) -> tuple[list[float], list[float]]:
    sides: dict[str, list[float]] = {direct: [], ours: []}
    for base_url in sides:
        await measure_one(base_url)  # Opens the connections.
    for number in range(pairs):
        for base_url in sides if number % 2 == 0 else reversed(sides):
            sides[base_url] += await measure_one(base_url)
    return sides[direct], sides[ours]


async def _streams(events: int, pairs: int) -> list[Figure]:
    with scratch() as folder:
        async with _stamping(events) as direct, aiohttp.ClientSession() as session:
            served = await asyncio.to_thread(Served, folder, direct, "--workers", "1")
            try:
                found = await _pairs(lambda url: _delays_ms(session, url), direct, served.base_url, pairs)
            finally:
                served.kill()
    bare, ours = found
    what = f"{pairs} streams of {events} events, one every {EVERY_S * 1000:g} ms"
    return [
        Figure("live.event_added_ms", median(ours) - median(bare), "ms", f"added to an event, median, {what}", "< 5"),
        Figure("live.event_ms", median(bare), "ms", "an event without us, median"),
        Figure("live.event_p99_ms", p99(bare), "ms", "the same, the 99th of a hundred: what the machine does"),
        Figure("live.event_through_p99_ms", p99(ours), "ms", "an event through us, the 99th of a hundred"),
    ]


async def _whole(served: Served, upstream: Upstream, count: int, pairs: int) -> list[Figure]:
    async with aiohttp.ClientSession() as session:
        bare, ours = await _pairs(lambda url: _whole_ms(session, url, count), upstream.base_url, served.base_url, pairs)
    return [
        Figure("live.answer_added_ms", median(ours) - median(bare), "ms", "added to a whole answer, median", "< 5"),
        Figure("live.answer_ms", median(bare), "ms", "a whole answer of the simulator without us, median"),
    ]


def measure(*, events: int = 300, pairs: int = 5) -> list[Figure]:
    """Both."""
    figures = asyncio.run(_streams(events, pairs))
    with scratch() as folder, simulator() as upstream:
        served = Served(folder, upstream.base_url, "--workers", "1")
        try:
            return figures + asyncio.run(_whole(served, upstream, events, pairs))
        finally:
            served.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--events", type=int, default=300)
    parser.add_argument("--pairs", type=int, default=5)
    print_table(measure(**vars(parser.parse_args())))


if __name__ == "__main__":
    main()
