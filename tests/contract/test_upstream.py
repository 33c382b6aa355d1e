"""What the Upstream port promises, kept by the adapter against real sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import aiohttp
import pytest
from aiohttp.http import HttpProcessingError, HttpResponseParser
from yarl import URL

from batchrunner.errors import UsageError
from batchrunner.models import Attempt, AttemptError
from batchrunner.upstream import AiohttpUpstream
from batchrunner.upstream_address import join_url
from tests.hostile.peer import SteppedClock, Talk, answer, obliging, peer_with, until
from tests.hostile.sending import CHAT, send, upstream_of


async def test_exchange_gives_the_whole_answer_and_its_times() -> None:
    clock = SteppedClock()

    async def script(talk: Talk) -> None:
        await talk.request()
        clock.step(2.5)
        talk.say(answer(b'{"ok":1}', Content_Type="Application/JSON; charset=utf-8", X_Request_Id="req_7"))
        await talk.gone()

    async with peer_with(script) as peer, upstream_of(peer.url, clock=clock) as upstream:
        attempt = await send(upstream)

    assert attempt == Attempt(
        status=200,
        body=b'{"ok":1}',
        content_type="application/json",
        request_id="req_7",
        started_at_s=1000.0,
        elapsed_s=2.5,
    )


async def test_request_on_the_wire_is_the_body_unchanged_under_prebuilt_headers() -> None:
    async with peer_with(obliging) as peer:
        async with upstream_of(peer.url, api_key="sk-1", headers={"OpenAI-Project": "p", "accept": "*/*"}) as upstream:
            await send(upstream, b'{"b" : "\xc3\xa9"}', key="k-1")
        request = peer.requests[0]

    head, _, body = request.partition(b"\r\n\r\n")
    start, *lines = head.decode().split("\r\n")
    assert start == "POST /v1/chat/completions HTTP/1.1"
    assert sorted(lines) == [
        "Accept-Encoding: identity",
        "Accept: */*",
        "Authorization: Bearer sk-1",
        "Content-Length: 12",
        "Content-Type: application/json",
        f"Host: 127.0.0.1:{peer.port}",
        "Idempotency-Key: k-1",
        "OpenAI-Project: p",
        "User-Agent: batchrunner/0.1.0",
    ]
    assert body == b'{"b" : "\xc3\xa9"}'


async def test_no_key_sends_no_authorization() -> None:
    async with peer_with(obliging) as peer, upstream_of(peer.url) as upstream:
        await send(upstream)

    assert b"authorization" not in peer.requests[0].lower()
    assert b"idempotency-key" not in peer.requests[0].lower()


@pytest.mark.parametrize(
    ("base", "line", "address"),
    [
        ("http://localhost:8000/v1", "/v1/chat/completions", "http://localhost:8000/v1/chat/completions"),
        ("http://localhost:8000/v1/", "/v1/chat/completions", "http://localhost:8000/v1/chat/completions"),
        ("http://localhost:8000", "/v1/embeddings", "http://localhost:8000/v1/embeddings"),
        ("http://localhost:8000/", "/v1/embeddings", "http://localhost:8000/v1/embeddings"),
        ("https://h/x/v1", "/v1/embeddings", "https://h/x/v1/embeddings"),
        ("https://h/x", "/v1/embeddings", "https://h/x/embeddings"),
        ("https://h/api//", "/v1/embeddings", "https://h/api/embeddings"),
        ("http://[::1]:8000/v1", "/v1/embeddings", "http://[::1]:8000/v1/embeddings"),
        ("http://[2001:db8::1]", "/v1/embeddings", "http://[2001:db8::1]/v1/embeddings"),
        ("HTTPS://API.Example.COM:443/v1", "/v1/embeddings", "https://api.example.com/v1/embeddings"),
        ("http://bücher.example/v1", "/v1/embeddings", "http://xn--bcher-kva.example/v1/embeddings"),
        ("http://h/a%2Fb/v1", "/v1/embeddings", "http://h/a%2Fb/v1/embeddings"),
        ("http://h/v1", "/embeddings", "http://h/v1/embeddings"),
        ("http://h/v1", "/v1beta/embeddings", "http://h/v1/v1beta/embeddings"),
    ],
)
def test_join_url_appends_the_line_less_its_v1(base: str, line: str, address: str) -> None:
    assert str(join_url(base, line)) == address


@pytest.mark.parametrize(
    "base",
    [
        "",
        "localhost:8000",
        "localhost",
        "/v1",
        "ftp://h/v1",
        "http://",
        "http:///v1",
        "http://h:0/v1",
        "http://h:99999/v1",
        "http://h:port/v1",
        "http://[::1/v1",
        "http://u:secret@h/v1",
        "http://@h/v1",
        "http://h/v1?api-version=1",
        "http://h/v1#x",
        "http://h/v1?",
        "http://h/v 1",
        "http://h/v1\r\nX: y",
        "http://h\\@evil/v1",
    ],
)
def test_join_url_refuses_a_base_that_is_none(base: str) -> None:
    with pytest.raises(UsageError) as refused:
        join_url(base, CHAT)

    assert "secret" not in refused.value.message + refused.value.advice


@pytest.mark.parametrize(
    "line",
    [
        "",
        "v1/x",
        "//evil/v1",
        "http://evil/",
        "/v1/../x",
        "/v1/./x",
        "/v1/x?y",
        "/v1/x#y",
        "/v1/x y",
        "/v1/x\r\nA: b",
        "/v1\\x",
        "/v1/é",
        "/v1/",
    ],
)
def test_join_url_refuses_a_line_url_that_leaves_the_base(line: str) -> None:
    with pytest.raises(UsageError):
        join_url("http://h/v1", line)


@pytest.mark.parametrize(
    "headers",
    [
        {"X": "a\r\nInjected: 1"},
        {"X": "a\nb"},
        {"X": "a\0b"},
        {"X": "snowman \u2603"},
        {"X": ""},
        {"X": " a"},
        {"X\r\nY": "a"},
        {"": "a"},
        {"Content-Length": "5"},
        {"transfer-encoding": "chunked"},
        {"Host": "elsewhere"},
        {"Idempotency-Key": "a"},
    ],
)
async def test_headers_that_would_break_the_message_are_refused(headers: dict[str, str]) -> None:
    with pytest.raises(UsageError):
        AiohttpUpstream("http://h/v1", clock=SteppedClock(), headers=headers)


async def test_key_with_a_line_break_is_refused_and_not_repeated() -> None:
    with pytest.raises(UsageError) as refused:
        AiohttpUpstream("http://h/v1", clock=SteppedClock(), api_key="sk-secret\r\nX: y")

    assert "secret" not in refused.value.message


async def test_idempotency_key_with_a_line_break_is_refused() -> None:
    async with peer_with(obliging) as peer, upstream_of(peer.url) as upstream:
        with pytest.raises(UsageError):
            await send(upstream, key="a\r\nX: y")

    assert peer.talks == []


async def test_connection_is_used_again_for_the_next_request() -> None:
    async with peer_with(obliging) as peer, upstream_of(peer.url) as upstream:
        bodies = [(await send(upstream, b"%d" % number)).body for number in range(5)]

    assert bodies == [b"0", b"1", b"2", b"3", b"4"]
    assert len(peer.talks) == 1


async def test_requests_in_flight_have_a_connection_each_and_their_own_answers() -> None:
    async with peer_with(obliging) as peer, upstream_of(peer.url) as upstream:
        numbers = range(200)
        attempts = await asyncio.gather(*(send(upstream, b'{"n":%d}' % number) for number in numbers))

    assert [attempt.body for attempt in attempts] == [b'{"n":%d}' % number for number in numbers]
    assert len(peer.talks) == 200


async def test_body_of_16_mebibytes_goes_and_comes_whole() -> None:
    body = bytes(range(256)) * (16 * 1024 * 1024 // 256)

    async with peer_with(obliging) as peer, upstream_of(peer.url) as upstream:
        attempts = [await send(upstream, body), await send(upstream, b"after")]

    assert [attempt.body == sent for attempt, sent in zip(attempts, [body, b"after"], strict=True)] == [True, True]
    assert len(peer.talks) == 1


async def stay_silent(talk: Talk) -> None:
    await talk.request()
    await talk.gone()
    talk.hang_up()


async def test_cancelled_send_closes_its_connection() -> None:
    async with peer_with(stay_silent) as peer, upstream_of(peer.url) as upstream:
        task = asyncio.create_task(upstream.send(CHAT, b"{}", idempotency_key=None))
        await until(lambda: len(peer.requests) == 1)

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        await until(lambda: peer.talks[0].is_left)
        assert (len(upstream._busy), len(upstream._idle)) == (0, 0)


async def test_abort_all_ends_what_is_in_flight_and_later_sends_work() -> None:
    async def script(talk: Talk) -> None:
        if b"stay" in await talk.request():
            await talk.gone()
        talk.say(answer(b"{}"))
        await talk.gone()

    async with peer_with(script) as peer, upstream_of(peer.url) as upstream:
        tasks = [asyncio.create_task(send(upstream, b"stay")) for _ in range(10)]
        await until(lambda: len(peer.requests) == 10)

        upstream.abort_all()
        attempts = await asyncio.gather(*tasks)
        later = await send(upstream)

    assert [attempt.error for attempt in attempts] == [AttemptError.ABORTED] * 10
    assert later.status == 200


async def test_close_ends_what_is_in_flight_and_what_comes_later() -> None:
    async with peer_with(stay_silent) as peer, upstream_of(peer.url) as upstream:
        task = asyncio.create_task(send(upstream))
        await until(lambda: len(peer.requests) == 1)

        await upstream.close()
        attempts = [await task, await send(upstream)]

    assert [attempt.error for attempt in attempts] == [AttemptError.ABORTED, AttemptError.ABORTED]


async def test_aiohttp_below_its_session_is_as_we_know_it() -> None:
    """The adapter stands on parts of aiohttp that may change without notice; this names what broke first."""
    assert HttpResponseParser.__module__ == "aiohttp._http_parser", "the C parser is missing: answers cost far more CPU"
    connector = aiohttp.TCPConnector(limit=0)
    try:
        async with peer_with(obliging) as peer:
            request = aiohttp.ClientRequest("POST", URL(peer.url), loop=asyncio.get_running_loop())
            connection = await connector.connect(request, [], aiohttp.ClientTimeout(total=None, connect=10.0))
            protocol, transport = connection.protocol, connection.transport
            assert protocol is not None
            assert transport is not None
            assert protocol.should_close is False
            protocol.connection_lost(None)
            transport.abort()
            connection.close()
            assert connection.protocol is None
    finally:
        await connector.close()

    owner: Any = ParserOwner()
    parser = HttpResponseParser(owner, asyncio.get_running_loop(), 65536, read_until_eof=True, auto_decompress=False)
    messages, upgraded, tail = parser.feed_data(answer(b"12345", X="y")[:-3])
    ((message, payload),) = messages
    assert (message.code, message.should_close, message.headers["x"]) == (200, False, "y")
    assert (payload.read_nowait(), payload.is_eof()) == (b"12", False)
    assert len(parser.feed_data(b"345")[0]) == 0
    assert (payload.read_nowait(), payload.is_eof()) == (b"345", True)
    assert (upgraded, tail) == (False, b"")
    assert len(parser.feed_data(answer(b""))[0]) == 1, "one parser reads all answers of a connection"
    parser.feed_data(answer(b"12345")[:-1])
    with pytest.raises(HttpProcessingError):
        parser.feed_eof()


class ParserOwner:
    """What the parser's streams ask of the protocol that owns it."""

    def pause_reading(self) -> None: ...

    def resume_reading(self, resume_parser: bool = True) -> None: ...


async def test_knock_asks_for_the_models_on_a_new_connection() -> None:
    async with peer_with(obliging) as peer, upstream_of(f"{peer.url}/", api_key="sk-1") as upstream:
        await send(upstream)
        answered = await upstream.knock()

        assert answered.error is None
        assert answered.status == 200
        assert len(peer.talks) == 2
        request = peer.talks[1].requests[0]
    assert request.startswith(b"GET /v1/models HTTP/1.1\r\n")
    assert b"Authorization: Bearer sk-1\r\n" in request
    assert request.endswith(b"Content-Length: 0\r\n\r\n")


async def test_knock_at_a_door_that_is_slammed_is_an_error() -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        talk.reset()

    async with peer_with(script) as peer, upstream_of(peer.url) as upstream:
        answered = await upstream.knock()

    assert answered.error is AttemptError.RESET


async def test_knock_that_nobody_answers_ends_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchrunner.upstream._KNOCK_S", 0.05)

    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.gone()

    async with peer_with(script) as peer, upstream_of(peer.url) as upstream:
        answered = await upstream.knock()
        await until(lambda: peer.talks[0].is_left)

    assert answered.error is AttemptError.TIMEOUT_TOTAL
    assert "no answer within" in answered.message
