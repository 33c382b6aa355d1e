"""Listening to a scripted server: a stream that breaks is resumed where it broke, however long nothing was said."""

from __future__ import annotations

import pytest
from aiohttp import web

from batchrunner.client import OUTAGE_S
from batchrunner.webhook_client import Heard, WebhookClient
from tests.unit.fanning import SteadyRng
from tests.unit.test_client import Handler, InstantClock, served

EVENT = b'event: batch.failed\nid: evt_9\ndata: {"id":"evt_9","type":"batch.failed"}\n\n'


class HeardEnoughError(Exception):
    """The test has what it waited for."""


def saying(*words: bytes, after: float = 0.0, clock: list[InstantClock] | None = None) -> Handler:
    """Send a part of a stream, let time pass, send the next; then break off."""

    async def say(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for word in words:
            if clock:
                clock[0].slept.append(after)
            await response.write(word)
        assert request.transport is not None
        request.transport.close()
        return response

    return say


async def heard_from(*handlers: Handler, clocks: list[InstantClock]) -> tuple[list[Heard], list[str | None]]:
    """Listen until the first event; gives it and the places that were asked for."""
    heard: list[Heard] = []
    begun: list[str] = []

    async def hear(each: Heard) -> None:
        heard.append(each)
        raise HeardEnoughError

    async with served(*handlers) as (plain, scripted, clock):
        clocks.append(clock)
        async with WebhookClient(plain.base_url, None, clock=clock, rng=SteadyRng(0.5), tell=print) as client:
            with pytest.raises(HeardEnoughError):
                await client.listen(hear, begin=lambda: begun.append("once"))
    assert begun == ["once"]
    return heard, [each.headers.get("Last-Event-ID") for each in scripted.requests]


async def test_a_stream_that_breaks_before_its_first_event_misses_none() -> None:
    clocks: list[InstantClock] = []
    heard, asked = await heard_from(saying(b": listening\nid: evt_1\n\n"), saying(EVENT), clocks=clocks)

    assert [each.event.id for each in heard] == ["evt_9"]
    assert asked == [None, "evt_1"]


async def test_a_stream_in_which_nothing_happened_for_long_is_resumed() -> None:
    clocks: list[InstantClock] = []
    silent = saying(b": listening\nid: evt_1\n\n", b": still here\n\n", after=OUTAGE_S, clock=clocks)

    heard, asked = await heard_from(silent, saying(EVENT), clocks=clocks)

    assert heard[0].body == b'{"id":"evt_9","type":"batch.failed"}'
    assert asked == [None, "evt_1"]
