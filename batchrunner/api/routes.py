"""The route table: the application, its OpenAPI document and the tests of who may do what are made from it."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import web

from batchrunner.api import (
    batches,
    club,
    club_assets,
    club_jobs,
    club_queue,
    deliveries,
    events,
    failures,
    files,
    health,
    live,
    results,
    uploads,
    webhooks,
    xai,
)
from batchrunner.api.dispatch import Dispatcher
from batchrunner.api.door import IDLE_S
from batchrunner.api.http import ApiParts, Route
from batchrunner.api.malformed import RNG, Runner
from batchrunner.api.reference import reference_routes
from batchrunner.settings import MIB

_TABLE: tuple[Route, ...] = (
    *files.ROUTES,
    *uploads.ROUTES,
    *batches.ROUTES,
    *results.ROUTES,
    *failures.ROUTES,
    *events.ROUTES,
    *webhooks.ROUTES,
    *deliveries.ROUTES,
    *live.ROUTES,
    *club.ROUTES,
    club_queue.ROUTE,
    club_assets.ROUTE,
    *xai.ROUTES,
    *health.ROUTES,
)


def described(*pages: Route) -> tuple[Route, ...]:
    """Give the table together with pages for people, and with what describes all of them."""
    table = (*_TABLE, *pages)
    return (*table, *reference_routes(table))


ROUTES = described()

# Room for a body to come in while the last piece of it is hashed and written.
_READ_BUFFER_BYTES = MIB
# What is longer than aiohttp takes it refuses in plain text; up to here our own envelope says what is wrong.
_LINE_BYTES_MAX = 64 * 1024


def build_app(parts: ApiParts, routes: Sequence[Route] = ROUTES) -> web.Application:
    """Make the application; whoever serves it runs it with `make_runner`."""
    app = web.Application()
    app[RNG] = parts.rng
    added = parts.settings.endpoints
    table = (*routes, *live.extra_routes(added), *club_jobs.extra_routes(added), *xai.extra_routes(added))
    table = health.opened(table) if parts.vitals.is_local else table
    app.router.add_route("*", r"/{path:[\s\S]*}", Dispatcher(parts, table).handle)

    async def stop_following(_app: web.Application) -> None:
        # Whoever follows a batch would keep the server waiting for as long as the batch takes.
        parts.watching.stop()

    app.on_shutdown.append(stop_following)
    return app


def make_runner(app: web.Application, *, shutdown_s: float = 30.0, idle_s: float = IDLE_S) -> web.AppRunner:
    """Give a runner of the application that logs no bodies, waits for requests under way, and reads uploads fast. It
    ends connections whose next request has not come within `idle_s`.
    """
    connection: dict[str, object] = {
        "access_log": None,
        "auto_decompress": False,
        "keepalive_timeout": idle_s,
        "read_bufsize": _READ_BUFFER_BYTES,
        "max_line_size": _LINE_BYTES_MAX,
    }
    return Runner(app, shutdown_s=shutdown_s, connection=connection)
