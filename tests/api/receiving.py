"""Receivers of webhooks on this machine, a courier to bring them, and what foreign verifiers say of what came."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson
from aiohttp import web

from batchrunner.courier import Courier
from batchrunner.models import SessionId
from tests.api.serving import Served

WAIT_S = 20.0


@dataclass(frozen=True, slots=True)
class Got:
    """One POST as it came off the wire."""

    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def event(self) -> Any:
        return orjson.loads(self.body)

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


@dataclass(slots=True)
class Receiver:
    """Takes POSTs; `answer` says by number what each gets."""

    base: str = ""
    got: list[Got] = field(default_factory=list)
    answer: Callable[[int], int | None] = lambda _number: 200
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    async def take(self, request: web.Request) -> web.Response:
        headers = {name.lower(): value for name, value in request.headers.items()}
        self.got.append(Got(request.path, headers, await request.read()))
        status = self.answer(len(self.got))
        self._news.set()
        if status is None:
            # For as long as the sender waits.
            await asyncio.Event().wait()
        return web.Response(status=status or 200)

    async def wait(self, count: int) -> list[Got]:
        """Wait for so many POSTs."""
        async with asyncio.timeout(WAIT_S):
            while len(self.got) < count:
                self._news.clear()
                await self._news.wait()
        return self.got


@contextlib.asynccontextmanager
async def receiving(answer: Callable[[int], int | None] = lambda _number: 200) -> AsyncIterator[Receiver]:
    """Have a receiver until the block ends."""
    receiver = Receiver(answer=answer)
    app = web.Application()
    app.router.add_post("/{path:.*}", receiver.take)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.base = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        yield receiver
    finally:
        await runner.cleanup()


@contextlib.asynccontextmanager
async def carrying(served: Served, *, name: str = "courier", each_max: int = 32) -> AsyncIterator[Courier]:
    """Have a courier over the server's store until the block ends."""
    parts = served.parts
    assert parts.poster is not None
    courier = Courier(
        session=SessionId(name),
        store=parts.store,
        poster=parts.poster,
        clock=served.clock,
        rng=parts.rng,
        each_max=each_max,
        threads=parts.executor,
    )
    running = asyncio.create_task(courier.run())
    try:
        yield courier
    finally:
        courier.stop(grace_s=0.0)
        await running
