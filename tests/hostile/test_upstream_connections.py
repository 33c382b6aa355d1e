"""Connections that close, reset, stall, speak out of turn or fail to open, and a server that dies and comes back."""

from __future__ import annotations

import asyncio
import socket
import ssl
from pathlib import Path
from typing import NoReturn

import pytest

from batchrunner.errors import UsageError
from batchrunner.models import AttemptError
from batchrunner.upstream import AiohttpUpstream
from tests.hostile.peer import Peer, SteppedClock, Talk, answer, obliging, peer_with, until
from tests.hostile.sending import CHAT, send, upstream_of

# Made for these tests and trusted nowhere else.
CERTIFICATE = Path(__file__).parent / "certificates" / "localhost.crt"


async def close_after_each_answer(talk: Talk) -> None:
    await talk.request()
    talk.say(answer(b"{}"))
    talk.hang_up()


async def test_connection_closed_while_idle_is_noticed_before_sending() -> None:
    async with peer_with(close_after_each_answer) as peer, upstream_of(peer.url) as upstream:
        first = await send(upstream, is_at_most_once=True)
        await until(lambda: not any(wire.is_open for wire in upstream._idle))
        second = await send(upstream, is_at_most_once=True)

    assert [first.status, second.status] == [200, 200]
    assert [len(talk.requests) for talk in peer.talks] == [1, 1]


async def close_instead_of_second_answer(talk: Talk) -> None:
    await talk.request()
    talk.say(answer(b"{}"))
    await talk.request()
    talk.hang_up()


async def test_connection_that_dies_without_a_byte_is_replaced_once() -> None:
    async with peer_with(close_instead_of_second_answer) as peer, upstream_of(peer.url) as upstream:
        attempts = [await send(upstream), await send(upstream)]

    assert [attempt.status for attempt in attempts] == [200, 200]
    assert [len(talk.requests) for talk in peer.talks] == [2, 1]


async def test_at_most_once_is_not_sent_again_on_a_fresh_connection() -> None:
    async with (
        peer_with(close_instead_of_second_answer) as peer,
        upstream_of(peer.url) as upstream,
    ):
        attempts = [await send(upstream), await send(upstream, is_at_most_once=True)]

    assert [attempt.error for attempt in attempts] == [None, AttemptError.RESET]
    assert [len(talk.requests) for talk in peer.talks] == [2]


async def test_connection_that_dies_after_a_byte_is_not_replaced() -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        talk.say(answer(b"{}"))
        await talk.request()
        talk.say(b"H")
        talk.hang_up()

    async with peer_with(script) as peer, upstream_of(peer.url) as upstream:
        attempts = [await send(upstream), await send(upstream)]

    assert [attempt.error for attempt in attempts] == [None, AttemptError.RESET]
    assert len(peer.requests) == 2


async def test_fresh_connection_that_dies_is_not_replaced() -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        talk.hang_up()

    async with peer_with(script) as peer, upstream_of(peer.url) as upstream:
        attempt = await send(upstream)

    assert attempt.error is AttemptError.RESET
    assert len(peer.requests) == 1


async def test_bytes_nobody_asked_for_end_the_idle_connection() -> None:
    """A half of a late answer must not become the beginning of another line's."""

    async def script(talk: Talk) -> None:
        await talk.request()
        talk.say(answer(b"mine"))
        await release.wait()
        talk.say(b"HTTP/1.1 200 OK\r\nContent-Le")
        await talk.gone()

    release = asyncio.Event()
    async with peer_with(script) as peer, upstream_of(peer.url) as upstream:
        first = await send(upstream)
        release.set()
        await until(lambda: not any(wire.is_open for wire in upstream._idle))
        release.clear()
        second = await send(upstream)

    assert [first.body, second.body] == [b"mine", b"mine"]
    assert len(peer.talks) == 2


async def test_connection_that_was_idle_too_long_is_closed_not_used() -> None:
    clock = SteppedClock()
    async with peer_with(obliging) as peer, upstream_of(peer.url, clock=clock, keepalive_s=4.0) as upstream:
        await send(upstream)
        clock.step(3.9)
        await send(upstream)
        clock.step(4.0)
        await send(upstream)
        clock.step(4.0)
        upstream.sweep_deadlines()
        closed = len(upstream._idle)

    assert [len(talk.requests) for talk in peer.talks] == [2, 1]
    assert closed == 0


async def test_answer_before_the_whole_request_was_taken_is_kept_but_not_the_connection() -> None:
    async def script(talk: Talk) -> None:
        await talk.head()
        talk.say(answer(b"too long", "413 Content Too Large"))
        await talk.gone()

    async with peer_with(script) as peer, upstream_of(peer.url) as upstream:
        attempt = await send(upstream, b"x" * 64 * 1024 * 1024)
        kept = [wire for wire in upstream._idle if wire.is_open]

    assert (attempt.status, attempt.body) == (413, b"too long")
    assert kept == []
    assert len(peer.talks) == 1


async def stay_silent(talk: Talk) -> None:
    await talk.request()
    await talk.gone()
    talk.hang_up()


async def test_upstream_death_resets_all_in_flight_and_later_requests_connect_anew() -> None:
    async with peer_with(stay_silent) as peer, upstream_of(peer.url) as upstream:
        tasks = [asyncio.create_task(send(upstream)) for _ in range(50)]
        await until(lambda: len(peer.requests) == 50)

        await peer.die()
        attempts = await asyncio.gather(*tasks)
        while_down = await send(upstream)
        reborn = Peer(obliging)
        await reborn.listen(port=peer.port)
        later = await send(upstream)
        await reborn.die()

    assert [attempt.error for attempt in attempts] == [AttemptError.RESET] * 50
    assert while_down.error is AttemptError.NOT_CONNECTED
    assert later.status == 200


async def test_refused_connection_is_not_connected_and_says_where_and_why() -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        async with upstream_of(f"http://127.0.0.1:{port}", api_key="sk-secret") as upstream:
            attempt = await send(upstream)

    assert attempt.error is AttemptError.NOT_CONNECTED
    assert attempt.status == 0
    assert f"127.0.0.1:{port}" in attempt.message
    assert "refused" in attempt.message
    assert "secret" not in attempt.message


async def test_unknown_host_is_not_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object, **__: object) -> NoReturn:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    async with upstream_of("http://nowhere.invalid:8000/v1") as upstream:
        attempt = await send(upstream)

    assert attempt.error is AttemptError.NOT_CONNECTED
    assert attempt.message == "cannot connect to nowhere.invalid:8000: the host name is not known"


def tls_server() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE, CERTIFICATE.with_suffix(".key"))
    return context


async def test_tls_with_a_trusted_certificate_works_and_keeps_its_connection() -> None:
    body = b"x" * 1024 * 1024
    async with peer_with(obliging, tls=tls_server()) as peer, upstream_of(peer.url, ca_bundle=CERTIFICATE) as upstream:
        attempts = [await send(upstream, body), await send(upstream, b"2")]

    assert [attempt.body == sent for attempt, sent in zip(attempts, [body, b"2"], strict=True)] == [True, True]
    assert len(peer.talks) == 1


async def test_tls_with_an_untrusted_certificate_is_not_connected() -> None:
    async with peer_with(obliging, tls=tls_server()) as peer, upstream_of(peer.url) as upstream:
        attempt = await send(upstream)

    assert attempt.error is AttemptError.NOT_CONNECTED
    assert "certificate is not trusted" in attempt.message


async def test_tls_for_another_name_is_not_connected() -> None:
    async with (
        peer_with(obliging, tls=tls_server()) as peer,
        upstream_of(peer.url.replace("localhost", "127.0.0.1"), ca_bundle=CERTIFICATE) as upstream,
    ):
        attempt = await send(upstream)

    assert attempt.error is AttemptError.NOT_CONNECTED
    assert "certificate is not trusted" in attempt.message


async def test_tls_to_a_plain_server_is_not_connected() -> None:
    async def script(talk: Talk) -> None:
        talk.say(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await talk.gone()

    async with peer_with(script) as peer, upstream_of(peer.url.replace("http:", "https:")) as upstream:
        attempt = await send(upstream)

    assert attempt.error is AttemptError.NOT_CONNECTED
    assert "TLS handshake failed" in attempt.message


async def test_ca_bundle_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        AiohttpUpstream("https://h/v1", clock=SteppedClock(), ca_bundle=tmp_path / "absent.pem")


async def never_shake_hands(talk: Talk) -> None:
    await talk.gone()
    talk.hang_up()


def half_open(peer: Peer) -> str:
    """An address that accepts connections but never finishes opening one."""
    return peer.url.replace("http:", "https:")


async def test_connection_that_takes_too_long_is_not_connected() -> None:
    async with (
        peer_with(never_shake_hands) as peer,
        upstream_of(half_open(peer), connect_timeout_s=0.05) as upstream,
    ):
        attempt = await send(upstream)

    assert attempt.error is AttemptError.NOT_CONNECTED
    assert "no connection within 0.05 s" in attempt.message


async def test_total_deadline_and_abort_reach_a_connection_that_is_being_opened() -> None:
    clock = SteppedClock()
    async with (
        peer_with(never_shake_hands) as peer,
        upstream_of(half_open(peer), clock=clock, total_timeout_s=5.0) as upstream,
    ):
        late = asyncio.create_task(send(upstream))
        await until(lambda: len(peer.talks) == 1)
        clock.step(5.0)
        upstream.sweep_deadlines()
        timed_out = await late
        aborted = asyncio.create_task(send(upstream))
        await until(lambda: len(peer.talks) == 2)
        upstream.abort_all()

        assert timed_out.error is AttemptError.TIMEOUT_TOTAL
        assert (await aborted).error is AttemptError.ABORTED
        await until(lambda: all(talk.is_left for talk in peer.talks))


async def test_cancel_while_opening_is_a_cancel() -> None:
    async with peer_with(never_shake_hands) as peer, upstream_of(half_open(peer)) as upstream:
        task = asyncio.create_task(upstream.send(CHAT, b"{}", idempotency_key=None))
        await until(lambda: len(peer.talks) == 1)

        upstream.abort_all()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        await until(lambda: peer.talks[0].is_left)
        assert upstream._openings == {}


async def test_cancel_in_the_moment_of_opening_closes_what_was_opened() -> None:
    async with peer_with(never_shake_hands) as peer, upstream_of(peer.url) as upstream:
        task = asyncio.create_task(upstream.send(CHAT, b"{}", idempotency_key=None))
        await until(lambda: any(opening.done() for opening in upstream._openings))

        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

        await until(lambda: [talk.is_left for talk in peer.talks] == [True])
        assert peer.requests == []


async def test_server_that_speaks_first_is_not_talked_to() -> None:
    async def script(talk: Talk) -> None:
        talk.say(b"220 mail.example ESMTP\r\n")
        await talk.gone()

    async with peer_with(script) as peer, upstream_of(peer.url) as upstream:
        attempt = await send(upstream)

    assert attempt.error in {AttemptError.NOT_CONNECTED, AttemptError.BAD_PROTOCOL}
