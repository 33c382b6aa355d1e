"""The client of batch servers against a scripted one: what it sends again, what it resumes, what it tells."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from batchrunner.client import FIRST_CONTACT_S, OUTAGE_S, BatchClient, server_url
from batchrunner.clock import SystemClock
from batchrunner.errors import (
    BatchrunnerError,
    KeyRefused,
    NotFound,
    PayloadTooLarge,
    PermissionRefused,
    QuotaExceeded,
    ServerRefused,
    ServerUnavailable,
    TransitionRefused,
    UsageError,
)
from tests.unit.fanning import SteadyRng

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
BATCH = {"id": "batch_1", "object": "batch", "status": "completed", "request_counts": {"total": 2, "completed": 2}}


class InstantClock(SystemClock):
    """Sleeps take no time, but time passes by them; they are remembered."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    def monotonic_s(self) -> float:
        return sum(self.slept)

    async def sleep(self, duration_s: float) -> None:
        self.slept.append(duration_s)


class Scripted:
    """A server that answers each request with the next handler, and the last one for ever; it remembers requests."""

    def __init__(self, *handlers: Handler) -> None:
        self.handlers = list(handlers)
        self.requests: list[web.Request] = []
        self.bodies: list[bytes] = []

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self.requests.append(request)
        self.bodies.append(await request.read())
        return await (self.handlers.pop(0) if len(self.handlers) > 1 else self.handlers[0])(request)


def replying(status: int, body: object = None, **headers: str) -> Handler:
    async def reply(_: web.Request) -> web.StreamResponse:
        return web.json_response(body, status=status, headers={k.replace("_", "-"): v for k, v in headers.items()})

    return reply


def refusing(status: int, message: str = "no", **headers: str) -> Handler:
    return replying(status, {"error": {"message": message, "type": "x", "param": None, "code": None}}, **headers)


async def hanging_up(request: web.Request) -> web.StreamResponse:
    """Close the connection without a word."""
    assert request.transport is not None
    request.transport.close()
    return web.Response()


def sending(content: bytes, *, cut_at: int | None = None, has_ranges: bool = True) -> Handler:
    """Send a file, with a range if one is asked for, and break off after so many bytes."""

    async def send(request: web.Request) -> web.StreamResponse:
        asked = request.headers.get("Range")
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked and has_ranges else 0
        if asked and has_ranges and start >= len(content):
            return web.Response(status=416)
        response = web.StreamResponse(status=206 if asked and has_ranges else 200)
        response.content_length = len(content) - start
        await response.prepare(request)
        await response.write(content[start : cut_at if cut_at is not None else len(content)])
        if cut_at is not None:
            assert request.transport is not None
            request.transport.close()
        return response

    return send


@contextlib.asynccontextmanager
async def served(*handlers: Handler) -> AsyncIterator[tuple[BatchClient, Scripted, InstantClock]]:
    scripted, clock = Scripted(*handlers), InstantClock()
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", scripted.answer)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        async with BatchClient(url, "secret", clock=clock, rng=SteadyRng(0.5), tell=print) as client:
            yield client, scripted, clock
    finally:
        await runner.cleanup()


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("http://127.0.0.1:8080", "http://127.0.0.1:8080/v1"),
        ("http://127.0.0.1:8080/v1/", "http://127.0.0.1:8080/v1"),
        ("localhost:8080", "http://localhost:8080/v1"),
        ("https://batch.example/team/v1", "https://batch.example/team/v1"),
    ],
)
def test_address_is_what_the_sdks_call_base_url(given: str, meant: str) -> None:
    assert server_url(given) == meant


@pytest.mark.parametrize("given", ["", "ftp://x/v1", "http://", "http://x/v1?a=b"])
def test_address_that_is_none_is_refused(given: str) -> None:
    with pytest.raises(UsageError):
        server_url(given)


async def test_busy_server_is_asked_again_when_it_said() -> None:
    busy = refusing(503, retry_after="7")
    async with served(busy, refusing(429, retry_after_ms="1500"), replying(200, BATCH)) as (client, scripted, clock):
        shown = await client.batch("batch_1")

        assert shown.batch.status == "completed"
        assert shown.batch.counts.completed == 2
        assert clock.slept == [7.0, 1.5]
        assert scripted.requests[0].headers["Authorization"] == "Bearer secret"


async def test_connection_that_breaks_is_made_again() -> None:
    async with served(hanging_up, hanging_up, replying(200, BATCH)) as (client, scripted, _):
        assert (await client.batch("batch_1")).batch.id == "batch_1"
        assert len(scripted.requests) == 3


async def test_wait_is_never_longer_than_a_minute_whatever_the_server_asks() -> None:
    async with served(refusing(503, retry_after="86400"), replying(200, BATCH)) as (client, _, clock):
        await client.batch("batch_1")

        assert clock.slept == [60.0]


async def test_wait_may_be_a_date() -> None:
    dates = {"Retry_After": "Wed, 21 Oct 2026 07:28:09 GMT", "Date": "Wed, 21 Oct 2026 07:28:00 GMT"}
    async with served(refusing(503, **dates), replying(200, BATCH)) as (client, _, clock):
        await client.batch("batch_1")

        assert clock.slept == [9.0]


async def test_server_that_is_not_there_is_given_up_soon() -> None:
    clock = InstantClock()
    async with BatchClient("http://127.0.0.1:9", None, clock=clock, rng=SteadyRng(0.5), tell=print) as client:
        with pytest.raises(ServerUnavailable, match="cannot connect to http://127"):
            await client.batch("batch_1")

    assert FIRST_CONTACT_S <= sum(clock.slept) < FIRST_CONTACT_S + 8


async def test_server_that_stays_away_is_given_up_after_a_long_while() -> None:
    async with served(refusing(503, "out of order")) as (client, _, clock):
        with pytest.raises(ServerUnavailable, match="out of order"):
            await client.batch("batch_1")

        assert OUTAGE_S <= sum(clock.slept) < OUTAGE_S + 8


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, ServerRefused),
        (401, KeyRefused),
        (403, PermissionRefused),
        (404, NotFound),
        (409, TransitionRefused),
        (410, NotFound),
        (413, PayloadTooLarge),
        (422, ServerRefused),
    ],
)
async def test_refusal_is_final_and_in_the_servers_words(status: int, kind: type[BatchrunnerError]) -> None:
    async with served(refusing(status, "the reason")) as (client, scripted, _):
        with pytest.raises(kind, match="the reason") as refused:
            await client.cancel("batch_1")

        assert len(scripted.requests) == 1
        assert refused.value.advice


async def test_server_has_the_last_word_on_what_may_be_sent_again() -> None:
    async with served(refusing(429, x_should_retry="false")) as (client, scripted, _):
        with pytest.raises(QuotaExceeded):
            await client.batch("batch_1")
        assert len(scripted.requests) == 1

    async with served(refusing(409, retry_after="1"), replying(200, BATCH)) as (client, scripted, _):
        await client.cancel("batch_1")
        assert len(scripted.requests) == 2


async def test_answer_that_is_no_batch_says_so() -> None:
    async with served(replying(200, ["a"])) as (client, _, _):
        with pytest.raises(ServerRefused, match="not that of a Batch API"):
            await client.batch("batch_1")


async def test_page_of_a_proxy_is_no_traceback() -> None:
    async def page(_: web.Request) -> web.StreamResponse:
        return web.Response(status=404, text="<html>")

    async with served(page) as (client, _, _):
        with pytest.raises(NotFound, match="404 Not Found"):
            await client.batch("batch_1")


async def test_upload_that_is_sent_again_has_its_whole_body_and_one_idempotency_key(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b'{"custom_id":"a"}\n' * 100)
    async with served(hanging_up, refusing(500), replying(200, {"id": "file-1"})) as (client, scripted, _):
        assert await client.upload(tmp_path / "in.jsonl", filename="in.jsonl") == "file-1"

    assert len({request.headers["Idempotency-Key"] for request in scripted.requests}) == 1
    assert [body.count(b'{"custom_id":"a"}\n') for body in scripted.bodies] == [100, 100, 100]


async def test_download_goes_on_where_it_broke() -> None:
    content, got = bytes(range(256)) * 4000, bytearray()
    async with served(sending(content, cut_at=300_000), sending(content, cut_at=700_000), sending(content)) as (
        client,
        scripted,
        _,
    ):
        assert await client.download("file-1", got.extend) == len(content)

    assert got == content
    asked: list[Any] = [request.headers.get("Range") for request in scripted.requests]
    assert asked[0] is None
    assert all(each.startswith("bytes=") for each in asked[1:])


async def test_download_from_a_server_without_ranges_leaves_out_what_is_there() -> None:
    content, got = b"0123456789" * 100_000, bytearray(b"0123456789" * 10)
    async with served(sending(content, cut_at=500_000, has_ranges=False), sending(content, has_ranges=False)) as (
        client,
        _,
        _,
    ):
        assert await client.download("file-1", got.extend, start=100) == len(content)

    assert got == content


async def test_download_of_what_is_whole_already_gives_nothing() -> None:
    async with served(sending(b"abc")) as (client, _, _):
        assert await client.download("file-1", bytearray().extend, start=3) == 3


async def test_page_that_broke_off_is_asked_for_again_whole() -> None:
    content = b'{"id":"x"}\n' * 50_000

    async with served(sending(content, cut_at=300_000), sending(content)) as (client, scripted, _):
        page = await client.finished("batch_1", after="17", outcome="failed")

        assert page is not None
        with page.content:
            assert page.content.read() == content
        assert page.line_count == 50_000
    assert [request.query["after"] for request in scripted.requests] == ["17", "17"]


async def test_server_without_our_extensions_is_known_by_its_404() -> None:
    async with served(refusing(404, "Invalid URL (GET /v1/batches/batch_1/results)")) as (client, _, _):
        assert await client.finished("batch_1", after="0", outcome=None) is None
        assert await client.failures("batch_1") is None
