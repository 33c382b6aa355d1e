"""An upstream under test, closed whatever happens, and a send that cannot hang a test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from batchrunner.models import Attempt
from batchrunner.upstream import AiohttpUpstream
from tests.hostile.peer import LIMIT_S, SteppedClock

CHAT = "/v1/chat/completions"


@asynccontextmanager
async def upstream_of(url: str, **settings: Any) -> AsyncIterator[AiohttpUpstream]:
    upstream = AiohttpUpstream(url, clock=settings.pop("clock", SteppedClock()), **settings)
    try:
        yield upstream
    finally:
        await upstream.close()


async def send(
    upstream: AiohttpUpstream,
    body: bytes = b'{"n":1}',
    url: str = CHAT,
    key: str | None = None,
    *,
    is_at_most_once: bool = False,
) -> Attempt:
    sending = upstream.send(url, body, idempotency_key=key, is_at_most_once=is_at_most_once)
    return await asyncio.wait_for(sending, LIMIT_S)
