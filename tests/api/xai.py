"""Short ways of xAI's clients for tests: requests, open batches, and all pages of what a batch has."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Any

from tests.api.batching import events
from tests.api.serving import Reply, Served


def chat(name: str | None, *, prompt: str | None = None, **body: Any) -> dict[str, Any]:
    """Make a chat request that bears its name in its prompt."""
    messages = [{"role": "user", "content": prompt or name}]
    return request(name, "chat_get_completion", model="m", messages=messages, **body)


def request(name: str | None, kind: str, **body: Any) -> dict[str, Any]:
    """Make a request of any kind, without an id where there is no name."""
    made: dict[str, Any] = {"batch_request": {kind: body}}
    return made if name is None else {"batch_request_id": name} | made


async def open_batch(served: Served, name: str = "nightly", *, root: str = "/v1") -> str:
    """Make an open batch and give its id."""
    reply = await served.call("POST", f"{root}/batches", json={"name": name})
    assert reply.status == 200, reply.body
    return str(reply.json["batch_id"])


async def add(served: Served, batch_id: str, *requests: dict[str, Any], **headers: str) -> Reply:
    """Add requests, whatever comes of it."""
    body = {"batch_requests": list(requests)}
    return await served.call("POST", f"/v1/batches/{batch_id}/requests", json=body, headers=headers)


async def added(served: Served, batch_id: str, names: Iterable[str], **body: Any) -> None:
    """Add chat requests."""
    reply = await add(served, batch_id, *(chat(name, **body) for name in names))
    assert (reply.status, reply.body) == (200, b"{}"), reply.body


async def show(served: Served, batch_id: str) -> dict[str, Any]:
    """Show a batch as xAI has it."""
    reply = await served.call("GET", f"/xai/v1/batches/{batch_id}")
    assert reply.status == 200
    return dict(reply.json)


async def pages(served: Served, batch_id: str, what: str, *, limit: int = 100, root: str = "/xai/v1") -> list[Reply]:
    """Walk the pages of `results` or `requests`; a token that comes twice would never end."""
    found: list[Reply] = []
    tokens: set[str] = set()
    query = f"?limit={limit}"
    while True:
        reply = await served.call("GET", f"{root}/batches/{batch_id}/{what}{query}")
        assert reply.status == 200, reply.body
        found.append(reply)
        token = reply.json["pagination_token"]
        if token is None:
            return found
        assert token not in tokens
        tokens.add(token)
        query = f"?limit={limit}&pagination_token={token}"


async def results(served: Served, batch_id: str, **walk: Any) -> list[dict[str, Any]]:
    """Give all results that there are now."""
    return [each for page in await pages(served, batch_id, "results", **walk) for each in page.json["results"]]


async def metadata(served: Served, batch_id: str, **walk: Any) -> list[dict[str, Any]]:
    """Give all requests with their states."""
    walked = await pages(served, batch_id, "requests", **walk)
    return [each for page in walked for each in page.json["batch_request_metadata"]]


async def until_done(served: Served, batch_id: str, count: int) -> None:
    """Wait until so many requests have their results; an open batch does not end with them."""
    async with asyncio.timeout(60), contextlib.aclosing(events(served, batch_id)) as seen:
        async for event in seen:
            state = event.batch["state"]
            if state["num_success"] + state["num_error"] + state["num_cancelled"] >= count:
                return
