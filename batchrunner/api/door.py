"""Takes connections in: how many there may be at once, and which one ends when there are too many."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Container

from aiohttp import web

from batchrunner.api.envelope import Refusal

logger = logging.getLogger(__name__)

# Between two requests, and for the whole head of one. The pools of the SDKs let go of a connection sooner than that.
IDLE_S = 75.0
CONNECTIONS_MAX = 1024


class Door:
    """Makes the protocol of each new connection, as `loop.create_server` wants it.

    A connection that has no request under way may be ended at any time by HTTP's own rules, so when there are too many
    the one of them that was opened first is; when all of them are `busy`, the new one is refused. So whoever opens
    connections and says nothing shuts nobody out.
    """

    def __init__(self, server: web.Server, busy: Container[object], *, connections_max: int) -> None:
        self._server = server
        self._busy = busy
        self._connections_max = connections_max

    def __call__(self) -> asyncio.Protocol:
        """Give the protocol of the next connection."""
        # One that was told to end has no transport any more, but is listed until the loop comes to it.
        held = [each for each in self._server.connections if each.transport is not None]
        if len(held) < self._connections_max:
            return self._server()
        idle = next((each for each in held if each not in self._busy), None)
        if idle is None:
            logger.warning("%d requests are under way, one is refused", len(held), extra={"action": "door_shut"})
            return _Refused()
        idle.force_close()
        return self._server()


class _Refused(asyncio.Protocol):
    """Says at once that there is no room."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        refusal = Refusal("The server has no room for another connection.", status=503, code="busy", retry_after_s=1.0)
        body = refusal.body()
        headers = {**refusal.headers(), "content-type": "application/json", "content-length": str(len(body))}
        head = "".join(f"{name}: {value}\r\n" for name, value in {**headers, "connection": "close"}.items())
        transport.write(f"HTTP/1.1 503 Service Unavailable\r\n{head}\r\n".encode() + body)
        transport.close()
