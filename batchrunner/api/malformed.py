"""Connections of the API: who wants to know hears when the caller hangs up, and requests that are no HTTP are answered
in the API's own words and never written to the log, for a line that cannot be read may hold a key or a prompt.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong

from batchrunner.api.envelope import Refusal, server_fault
from batchrunner.ports import Rng

logger = logging.getLogger(__name__)

RNG = web.AppKey("rng", Rng)


class Connection(web.RequestHandler):
    """A connection of the API. `on_hang_up` is called when it is lost."""

    __slots__ = ("_rng", "on_hang_up")

    def __init__(self, server: web.Server, rng: Rng, **settings: object) -> None:
        super().__init__(server, **settings)  # type: ignore[arg-type]
        self._rng = rng
        self.on_hang_up: Callable[[], None] | None = None

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio.Protocol."""
        super().connection_lost(exc)
        if self.on_hang_up is not None:
            self.on_hang_up()

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,  # noqa: ARG002 - it quotes the request
    ) -> web.StreamResponse:
        """Answer what could not be read, or what went wrong behind all our own handling, and end the connection."""
        is_bad = isinstance(exc, HttpProcessingError) or status < 500
        kind = type(exc).__name__
        request_id = f"req_{self._rng.token_hex(16)}"
        if is_bad:
            extra = {"action": "request_malformed", "status": status, "request_id": request_id}
            logger.info("a request is no HTTP: %s %s", kind, request_id, extra=extra)
        else:
            logger.error("request %s failed", request_id, exc_info=exc, extra={"action": "request_failed"})
        if request.writer.output_size > 0:
            raise ConnectionError("the answer has begun already")
        refusal = _malformed(status, exc) if is_bad else server_fault()
        headers = {"x-request-id": request_id, "content-type": "application/json", **refusal.headers()}
        response = web.Response(body=refusal.body(), status=refusal.status, headers=headers)
        response.force_close()
        return response


def _malformed(status: int, error: BaseException | None) -> Refusal:
    if isinstance(error, LineTooLong):
        message = "A line of the request's head is longer than this server takes."
    else:
        message = "The request could not be read: it is not valid HTTP."
    return Refusal(message, status=status, code="malformed_request")


class _Server(web.Server):
    """Makes connections of that kind."""

    def __init__(self, made: web.Server, rng: Rng, settings: dict[str, object]) -> None:
        super().__init__(made.request_handler, request_factory=made.request_factory)
        self._rng = rng
        self._settings = settings

    def __call__(self) -> web.RequestHandler:
        """See web.Server."""
        return Connection(self, self._rng, loop=asyncio.get_running_loop(), **self._settings)


class Runner(web.AppRunner):
    """Runs an application whose `RNG` makes request ids. `connection` are the settings of web.RequestHandler."""

    __slots__ = ("_connection",)

    def __init__(self, app: web.Application, *, shutdown_s: float, connection: dict[str, object]) -> None:
        super().__init__(app, handle_signals=False, shutdown_timeout=shutdown_s, handler_cancellation=False)
        self._connection = connection

    async def _make_server(self) -> web.Server:
        return _Server(await super()._make_server(), self.app[RNG], self._connection)
