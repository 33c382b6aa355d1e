"""xAI's Batches API: its routes, what they take, and which requests to the root are its own.

Source: xAI's REST reference, Batches.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Annotated

import msgspec
from msgspec import Meta

from batchrunner.api import files, live
from batchrunner.api.batches import batch_of, cancelled, found_batches, shown
from batchrunner.api.creating import INLINE_BYTES_MAX, BatchRequest, Name, create, require_shape, shape_of
from batchrunner.api.http import Answer, Call, Route, json_answer
from batchrunner.api.paging import next_token
from batchrunner.api.results import LINES_TYPES
from batchrunner.api.xai_requests import (
    ADD_BYTES_MAX,
    Added,
    AddRequests,
    XaiRequestPage,
    add_requests,
    list_requests,
    present_addition,
)
from batchrunner.api.xai_results import LIMIT, XaiPage, XaiResultPage, list_results
from batchrunner.api.xai_words import XaiError
from batchrunner.holdings import KeyScope
from batchrunner.models import XAI, BatchId, NewBatch
from batchrunner.shared_object import NAME, SharedBatch, XaiBatch, xai_object

_LIST_MAX = 100
# What a reading of results names that wants lines of JSON and no page.
_OF_LINES = frozenset({"after", "outcome", "merged", "format"})


class XaiBatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a create: without a file the batch is open, and requests join it by calls of their own."""

    name: Name
    input_file_id: Name | None = None


class XaiBatchPage(msgspec.Struct, frozen=True):
    """The query of a listing. More than 100 are not given."""

    limit: Annotated[int, Meta(ge=1)] = LIMIT
    pagination_token: str | None = None


class XaiBatchList(msgspec.Struct, frozen=True):
    """A page of batches, newest first."""

    batches: list[XaiBatch]
    pagination_token: str | None


def _answer(call: Call, shared: SharedBatch) -> Answer:
    return json_answer(xai_object(shared) if call.is_pure else shared)


async def create_batch(call: Call) -> Answer:
    """Make a batch, open or of a file."""
    await require_shape(call)
    wanted = await call.json(XaiBatchRequest)
    order = BatchRequest(input_file_id=wanted.input_file_id, endpoint="", metadata={NAME: wanted.name})
    made = partial(create, call, order, shape=partial(_shape, call))
    return _answer(call, await call.blocking(lambda: shown(call, made())))


def _shape(call: Call, new: NewBatch) -> NewBatch:
    """Lines of such a batch may go anywhere; without a file it waits for them."""
    closes_at = call.parts.clock.now() + timedelta(seconds=call.parts.settings.open_idle_s)
    is_open = new.input_name is None
    return replace(new, dialect=XAI, endpoint=None, is_open=is_open, closes_at=closes_at if is_open else None)


async def present_batch(call: Call, batch_id: str) -> Answer:
    """Show the batch that an earlier request with the same Idempotency-Key made."""
    return _answer(call, await call.blocking(lambda: shown(call, call.scope.batch(BatchId(batch_id)))))


async def retrieve_batch(call: Call) -> Answer:
    """Show one batch."""
    return _answer(call, await call.blocking(lambda: shown(call, batch_of(call))))


async def list_batches(call: Call) -> Answer:
    """Give a page of the tenant's batches, newest first."""
    wanted = call.parameters(XaiBatchPage)
    limit = min(wanted.limit, _LIST_MAX)
    found = await call.blocking(found_batches, call, limit=limit, after=wanted.pagination_token)
    return json_answer(XaiBatchList([xai_object(each) for each in found[:limit]], next_token(found, limit=limit)))


async def cancel_batch(call: Call) -> Answer:
    """Cancel a batch; again is no error, after another end it is."""
    return _answer(call, await call.blocking(lambda: shown(call, cancelled(call))))


async def is_create(call: Call) -> bool:
    """Tell by its keys whether a create is xAI's."""
    return await shape_of(call) == XAI


async def wants_page(call: Call) -> bool:
    """Tell whether results are asked for as xAI gives them: those of its own batches, unless lines are asked for."""
    accepted = call.request.headers.get("Accept", "")
    if any(each in accepted for each in LINES_TYPES) or any(map(call.request.query.get, _OF_LINES)):
        return False
    return (await call.blocking(batch_of, call)).dialect == XAI


def _own(route: Route) -> Route:
    """Serve under xAI's path what is the same in OpenAI's API."""
    return replace(route, path=f"/{XAI}{route.path}", dialect=XAI, error=XaiError)


_route = partial(Route, dialect=XAI, error=XaiError)
_BATCH = "/xai/v1/batches/{batch_id}"

ROUTES = (
    _route(
        method="POST",
        path="/xai/v1/batches",
        handler=create_batch,
        summary="Create a batch of a file, or an open one that requests join later",
        scope=KeyScope.WRITE,
        request=XaiBatchRequest,
        answer=XaiBatch,
        body_bytes_max=INLINE_BYTES_MAX,
        present=present_batch,
        recognizes=is_create,
    ),
    _route(
        method="GET",
        path="/xai/v1/batches",
        handler=list_batches,
        summary="List batches, newest first",
        query=XaiBatchPage,
        answer=XaiBatchList,
    ),
    _route(
        method="GET",
        path=_BATCH,
        handler=retrieve_batch,
        summary="Show a batch",
        answer=XaiBatch,
    ),
    _route(
        method="POST",
        path=f"{_BATCH}:cancel",
        handler=cancel_batch,
        summary="Cancel a batch; finished results are kept",
        scope=KeyScope.WRITE,
        answer=XaiBatch,
    ),
    _route(
        method="POST",
        path=f"{_BATCH}/requests",
        handler=add_requests,
        summary="Add requests to an open batch, also while it runs",
        scope=KeyScope.WRITE,
        request=AddRequests,
        answer=Added,
        body_bytes_max=ADD_BYTES_MAX,
        present=present_addition,
    ),
    _route(
        method="GET",
        path=f"{_BATCH}/requests",
        handler=list_requests,
        summary="List the requests of a batch with their states",
        query=XaiPage,
        answer=XaiRequestPage,
    ),
    _route(
        method="GET",
        path=f"{_BATCH}/results",
        handler=list_results,
        summary="Page through the results of a batch, also while it runs",
        query=XaiPage,
        answer=XaiResultPage,
        recognizes=wants_page,
    ),
    *map(_own, (each for each in files.ROUTES if not each.path.endswith("/validation"))),
    *map(_own, live.ROUTES),
)


def extra_routes(endpoints: tuple[str, ...]) -> tuple[Route, ...]:
    """Give the routes of endpoints that the operator has added to the usual ones."""
    return tuple(map(_own, live.extra_routes(endpoints)))
