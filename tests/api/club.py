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


async def submit(served: Served, url: str = CHAT, *, root: str = "", **body: Any) -> Reply:
    """Ask an endpoint for a job, whatever comes of it. What is in capitals is a header."""
    headers = {"Idempotency-Key": str(body.pop("KEY"))} if "KEY" in body else {}
    return await served.call("POST", root + url, json={"async": True} | body, headers=headers)


async def submitted(served: Served, name: str = "a", **body: Any) -> str:
    """Make a job of a chat request and give its id."""
    messages = [{"role": "user", "content": name}]
    reply = await submit(served, model="m", messages=messages, **body)
    assert reply.status == 202, reply.body
    return str(reply.json["id"])


async def job(served: Served, job_id: str) -> dict[str, Any]:
    """Show a job."""
    reply = await served.call("GET", f"/v1/jobs/{job_id}")
    assert reply.status == 200, reply.body
    return dict(reply.json)


async def until_over(served: Served, *job_ids: str) -> list[dict[str, Any]]:
    """Ask for jobs until none is active, and give them; each look is a request and paces the next."""
    found = []
    async with asyncio.timeout(60):
        for job_id in job_ids:
            while (shown := await job(served, job_id))["status"] in ("QUEUED", "PROCESSING"):
                pass
            found.append(shown)
    return found
