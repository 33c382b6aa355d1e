"""Short ways of inference.club's clients for tests: batches, jobs, and waiting for their ends."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from tests.api.batching import events
from tests.api.serving import Reply, Served

CHAT, IMAGES = "/v1/chat/completions", "/v1/images/generations"


def chat(name: str, **body: Any) -> dict[str, Any]:
    """Make a chat request that bears its name in its prompt."""
    return {"endpoint": CHAT, "body": {"model": "m", "messages": [{"role": "user", "content": name}], **body}}


async def create(served: Served, *requests: Any, root: str = "/v1", label: str | None = None, **headers: str) -> Reply:
    """Ask for a batch, whatever comes of it."""
    body: dict[str, Any] = {"requests": list(requests)}
    if label is not None:
        body["label"] = label
    return await served.call("POST", f"{root}/batches", json=body, headers=headers)


async def created(served: Served, *requests: Any, **given: Any) -> str:
    """Make a batch and give its id."""
    reply = await create(served, *requests, **given)
    assert reply.status == 202, reply.body
    return str(reply.json["id"])


async def show(served: Served, batch_id: str, *, root: str = "/club/v1") -> dict[str, Any]:
    """Show a batch as inference.club has it."""
    reply = await served.call("GET", f"{root}/batches/{batch_id}")
    assert reply.status == 200, reply.body
    return dict(reply.json)


async def until_done(served: Served, batch_id: str) -> dict[str, Any]:
    """Wait until no job of a batch is active, by its events, and show it then."""
    async with asyncio.timeout(60), contextlib.aclosing(events(served, batch_id)) as seen:
        async for _ in seen:
            pass
    return await show(served, batch_id)


def error_of(reply: Reply) -> tuple[int, str]:
    """Give the status of a refusal and its type."""
    assert tuple(reply.json) == ("error",), reply.body
    assert tuple(reply.json["error"]) == ("message", "type")
    return reply.status, reply.json["error"]["type"]


def message_of(reply: Reply) -> str:
    """Give what a refusal says."""
    return str(reply.json["error"]["message"])
