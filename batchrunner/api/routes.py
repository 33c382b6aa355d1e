"""The route table: the application, its OpenAPI document and the tests of who may do what are made from it."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from batchrunner.api import files, uploads
from batchrunner.api.dispatch import Dispatcher
from batchrunner.api.http import ApiParts, Route
from batchrunner.settings import MIB

ROUTES: tuple[Route, ...] = (*files.ROUTES, *uploads.ROUTES)

# Room for a body to come in while the last piece of it is hashed and written.
_READ_BUFFER_BYTES = MIB


def build_app(parts: ApiParts, routes: Sequence[Route] = ROUTES) -> web.Application:
    """Make the application; whoever serves it runs it with `make_runner`."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", Dispatcher(parts, routes).handle)
    return app


def make_runner(app: web.Application, *, shutdown_s: float = 30.0) -> web.AppRunner:
    """Give a runner of the application that logs no bodies, waits for requests under way, and reads uploads fast."""
    return web.AppRunner(
        app,
        access_log=None,
        handle_signals=False,
        handler_cancellation=False,
        shutdown_timeout=shutdown_s,
        read_bufsize=_READ_BUFFER_BYTES,
    )
