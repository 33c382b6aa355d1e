"""Requests that are answered at once: what reaches the upstream, what comes back, and what frees it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import logging
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from batchrunner.holdings import KeyLimits, KeyScope
from batchrunner.members import renamed
from batchrunner.settings import ENDPOINTS, Settings
from batchrunner.simulate import Simulator, SimulatorSettings
from batchrunner.targets import Target
from tests.api.serving import BOUNDARY, FORM_HEADERS, NO_KEYS, Served, form, serving
from tests.hostile.peer import Talk, answer, obliging, peer_with, until

CHAT = "/v1/chat/completions"
TRANSCRIPTIONS = "/v1/audio/transcriptions"
LIMIT_S = 30.0
MIB = 1024 * 1024


def chat(prompt: str = "hello", **extra: object) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": prompt}], **extra}).encode()


@contextlib.asynccontextmanager
async def passing(
    folder: Path,
    *urls: str,
    tables: tuple[Target, ...] = (),
    is_open: bool = True,
    keys: Any = NO_KEYS,
    **more: Any,
) -> AsyncIterator[Served]:
    """Serve over an upstream, or several."""
    where: dict[str, Any] = {"upstream": tables} if tables else {"base_url": urls[0]}
    made = Settings(**where, **more)
    async with asyncio.timeout(LIMIT_S), serving(folder, settings=made, is_open=is_open, upstream_keys=keys) as served:
        yield served


@contextlib.asynccontextmanager
async def simulated(folder: Path, **settings: Any) -> AsyncIterator[tuple[Served, Simulator]]:
    async with Simulator(SimulatorSettings(**settings)) as simulator, passing(folder, simulator.url) as served:
        yield served, simulator


@contextlib.asynccontextmanager
async def streamed(folder: Path, script: Callable[[Talk], Any]) -> AsyncIterator[tuple[Served, aiohttp.ClientResponse]]:
    """Serve over a scripted upstream, and have the head of an answer."""
    async with (
        peer_with(script) as peer,
        passing(folder, peer.url) as served,
        served.session.post(served.base + CHAT, data=chat(stream=True)) as got,
    ):
        yield served, got


def saying(*answers: bytes) -> Callable[[Talk], Any]:
    """A script that answers each request of a connection with the next of these, then leaves."""

    async def script(talk: Talk) -> None:
        for each in answers:
            await talk.request()
            talk.say(each)
        await talk.gone()

    return script


def head_of(request: bytes) -> dict[str, str]:
    lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def error_of(reply: Any) -> tuple[int, str | None]:
    assert set(reply.json["error"]) == {"message", "type", "param", "code"}
    return reply.status, reply.json["error"]["code"]


# -- what comes back -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat()),
        (CHAT, chat(stream=True)),
        (CHAT, chat(model="missing-model")),
        (CHAT, chat(simulate=["500"])),
        (CHAT, chat(simulate=["400"])),
        (CHAT, chat(simulate=["429(2s)"])),
        (CHAT, chat(simulate=["gzip"])),
        (CHAT, chat(simulate=["html"])),
        (CHAT, chat(simulate=["huge"])),
        (CHAT, b'{"model":1,"messages":"none"}'),
        ("/v1/completions", b'{"model":"m","prompt":"a"}'),
        ("/v1/embeddings", b' { "model" : "m", "input" : ["a", "\xc3\xa9"] , "n":null}'),
        ("/v1/responses", b'{"model":"m","input":"a"}'),
        ("/v1/moderations", b'{"input":"a"}'),
        ("/v1/images/edits", b'{"prompt":"a"}'),
        ("/v1/rerank", b"{}"),
    ],
    ids=lambda value: value.decode()[:60] if isinstance(value, bytes) else value,
)
async def test_the_answer_is_the_upstreams_own_to_the_byte(tmp_path: Path, path: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    async with simulated(tmp_path, huge_bytes=4 * MIB) as (served, simulator):
        served.session._auto_decompress = False
        passed = await served.call("POST", path, body=body, headers=headers)
        simulator.reset()
        url = simulator.url.removesuffix("/v1") + path
        async with served.session.post(url, data=body, headers=headers) as direct:
            expected = await direct.read()

        assert passed.body == expected
        assert passed.status == direct.status
        for name in ("content-type", "content-encoding", "retry-after", "content-length"):
            assert passed.headers.get(name) == direct.headers.get(name), name


async def test_head_and_each_piece_of_a_stream_come_at_once(tmp_path: Path) -> None:
    begun, said = asyncio.Event(), asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.request()
        talk.say(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
        await begun.wait()
        talk.say(b"9\r\ndata: 1\n\n\r\n")
        await said.wait()
        talk.say(b"9\r\ndata: 2\n\n\r\n0\r\n\r\n")

    async with streamed(tmp_path, script) as (_, got):
        begun.set()
        first = await got.content.readany()
        said.set()
        rest = await got.content.read()

    assert (first, rest) == (b"data: 1\n\n", b"data: 2\n\n")
    assert got.headers["Content-Type"] == "text/event-stream"


async def test_headers_of_one_connection_stay_on_it_and_secrets_with_their_owner(tmp_path: Path) -> None:
    said = answer(
        b"{}",
        Connection="X-Hop, keep-alive",
        X_Hop="1",
        Set_Cookie="a=b",
        Keep_Alive="timeout=5",
        X_Request_Id="theirs",
        X_Ratelimit_Limit_Requests="9",
        Openai_Organization="of-the-operator",
        Openai_Project="of-the-operator",
        Openai_Processing_Ms="17",
        X_Kept="yes",
    )
    given = {
        "Authorization": "Bearer of-the-caller",
        "api-key": "of-the-caller",
        "Cookie": "of-the-caller",
        "X-Forwarded-For": "of-the-caller",
        "Connection": "x-hop",
        "x-hop": "of-the-caller",
        "OpenAI-Organization": "of-the-caller",
        "OpenAI-Beta": "b=1",
        "Idempotency-Key": "k",
        "x-request-id": "mine",
        "User-Agent": "me/1",
        "Content-Type": "application/json",
    }
    async with peer_with(saying(said)) as peer, passing(tmp_path, peer.url, keys={"default": "sk-operator"}) as served:
        reply = await served.call(
            "POST", CHAT, body=chat(headers={"Authorization": "Bearer in-the-body"}), headers=given
        )
        (request,) = peer.requests

    sent = head_of(request)
    assert sent.pop("authorization") == "Bearer sk-operator"
    assert sent.pop("content-length") == str(len(request.partition(b"\r\n\r\n")[2]))
    assert sent.pop("host") == f"127.0.0.1:{peer.port}"
    assert sent == {
        "accept": "*/*",
        "accept-encoding": sent["accept-encoding"],
        "content-type": "application/json",
        "idempotency-key": "k",
        "openai-beta": "b=1",
        "user-agent": "me/1",
        "x-request-id": "mine",
    }
    assert reply.headers["x-request-id"] == "mine"
    assert reply.headers["x-kept"] == "yes"
    assert reply.headers.getall("openai-processing-ms") == ["17"]
    for name in ("x-hop", "set-cookie", "keep-alive", "x-ratelimit-limit-requests"):
        assert name not in reply.headers, name
    assert "of-the-operator" not in reply.headers.values()


async def test_headers_that_are_no_text_are_left_out(tmp_path: Path) -> None:
    said = b"HTTP/1.1 200 OK\r\nContent-Type: a/\xff\r\nX-Bad: \xff\r\nX-Good: 1\r\nContent-Length: 2\r\n\r\n{}"
    async with peer_with(saying(said)) as peer, passing(tmp_path, peer.url) as served:
        reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
        body = chat()
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\nConnection: close\r\n"
        writer.write(head.encode() + b"User-Agent: \xff\r\nAccept: */*\r\n\r\n" + body)
        reply = await reader.read()
        writer.close()

    told = reply.partition(b"\r\n\r\n")[0].lower()
    assert told.startswith(b"http/1.1 200 ")
    assert b"x-good: 1" in told
    assert b"x-bad" not in told
    assert b"content-type: application/octet-stream" in told
    assert "user-agent" not in head_of(peer.requests[0])
    assert head_of(peer.requests[0])["accept"] == "*/*"


# -- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (answer(b"", "302 Found", Location="http://127.0.0.1:1/"), (502, "upstream_redirected")),
        (answer(b'{"error":"key sk-operator"}', "401 Unauthorized"), (502, "upstream_refused_key")),
        (b"nonsense\r\n\r\n", (502, "upstream_broke_off")),
        (b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\n\r\nhello", (502, "upstream_broke_off")),
        (b"HTTP/1.1 099 Odd\r\nContent-Length: 2\r\n\r\n{}", (502, "upstream_broke_off")),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n", (502, "upstream_broke_off")),
    ],
)
async def test_an_answer_that_is_not_for_the_caller_is_none(tmp_path: Path, said: bytes, expected: Any) -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        talk.say(said)
        talk.hang_up()

    async with peer_with(script) as peer, passing(tmp_path, peer.url) as served:
        reply = await served.call("POST", CHAT, body=chat())

    assert error_of(reply) == expected
    assert b"sk-operator" not in reply.body
    assert "location" not in reply.headers
    assert len(peer.requests) == 1


async def test_an_answer_that_breaks_off_is_not_taken_for_whole(tmp_path: Path) -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        talk.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        talk.hang_up()

    async with peer_with(script) as peer, passing(tmp_path, peer.url) as served:
        with pytest.raises(aiohttp.ClientError):
            await served.call("POST", CHAT, body=chat())

        assert served.parts.live is not None
        assert served.parts.live.failures == {"truncated": 1}
        assert served.parts.live.places[0].in_flight == 0


async def test_nobody_at_the_upstreams_address_is_said(tmp_path: Path) -> None:
    async with peer_with(saying()) as peer:
        await peer.die()
        async with passing(tmp_path, peer.url) as served:
            replies = [await served.call("POST", CHAT, body=chat()) for _ in range(2)]

    assert [error_of(reply) for reply in replies] == [(502, "upstream_unreachable")] * 2
    assert str(peer.port).encode() not in replies[0].body


@pytest.mark.parametrize("begun", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n"])
async def test_silence_of_the_upstream_has_an_end(tmp_path: Path, begun: bytes) -> None:
    async with peer_with(saying(begun)) as peer, passing(tmp_path, peer.url, request_timeout_s=0.1) as served:
        reply = await served.call("POST", CHAT, body=chat())
        await until(lambda: all(talk.is_left for talk in peer.talks))

    assert error_of(reply) == (504, "upstream_timeout")


async def test_server_without_an_upstream_says_so(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        reply = await served.call("POST", CHAT, body=chat())

    assert error_of(reply) == (503, "no_upstream")


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[1]", b'"a"', b"[" * 100_000])
async def test_what_is_no_json_object_reaches_nobody(tmp_path: Path, body: bytes) -> None:
    async with simulated(tmp_path) as (served, simulator):
        reply = await served.call("POST", CHAT, body=body)

        assert reply.status == 400
        assert simulator.stats().total == 0


async def test_endpoints_are_those_of_the_setting(tmp_path: Path) -> None:
    async with (
        Simulator() as simulator,
        passing(tmp_path, simulator.url, endpoints=("/v1/embeddings", "/v1/x/y")) as at,
    ):
        asked = [(await at.call("POST", path, body=b"{}")).status for path in (CHAT, "/v1/embeddings", TRANSCRIPTIONS)]
        added = await at.call("POST", "/v1/x/y", body=b"{}")

    assert asked == [404, 400, 200]
    assert error_of(added) == (404, "unknown_url")


async def test_there_is_a_route_for_every_endpoint(tmp_path: Path) -> None:
    async with simulated(tmp_path) as (served, _):
        for path in (*ENDPOINTS, TRANSCRIPTIONS):
            assert (await served.call("GET", path)).status == 405, path


@pytest.mark.parametrize("dialect", ["openai", "xai", "club"])
async def test_every_dialect_has_all_endpoints_under_its_path(tmp_path: Path, dialect: str) -> None:
    added = (*ENDPOINTS, "/v1/x/y")
    async with peer_with(obliging) as peer, passing(tmp_path, peer.url, endpoints=added) as served:
        for path in (*added, TRANSCRIPTIONS):
            reply = await served.call("POST", f"/{dialect}{path}", body=chat(stream=True))
            assert (reply.status, reply.body) == (200, chat(stream=True)), path
            assert peer.requests[-1].startswith(f"POST {path} ".encode())
        refused = await served.call("POST", f"/{dialect}{CHAT}", body=b"[]")

    assert refused.status == 400
    keys = {"openai": {"error"}, "xai": {"code", "error"}, "club": {"error"}}
    assert set(refused.json) == keys[dialect]


async def test_async_means_nothing_to_xais_api(tmp_path: Path) -> None:
    async with peer_with(obliging) as peer, passing(tmp_path, peer.url) as served:
        plain = await served.call("POST", f"/xai{CHAT}", body=b'{"model": "m", "async": true}')
        raw = form(fields={"async": "true"})
        upload = await served.call("POST", f"/xai{TRANSCRIPTIONS}", body=raw, headers=FORM_HEADERS)

    assert (plain.status, plain.body) == (200, b'{"model": "m"}')
    assert (upload.status, upload.body) == (200, raw)


# -- async -----------------------------------------------------------------------------------------------------------


async def test_the_word_async_does_not_reach_the_upstream(tmp_path: Path) -> None:
    async with peer_with(saying(answer())) as peer, passing(tmp_path, peer.url) as served:
        await served.call("POST", CHAT, body=b'{"model": "m", "async": false, "metadata": {"async": true}}')

    assert peer.requests[0].endswith(b'\r\n\r\n{"model": "m", "metadata": {"async": true}}')


async def test_what_asks_for_a_job_is_not_answered_at_once(tmp_path: Path) -> None:
    async with simulated(tmp_path) as (served, simulator):
        job = await served.call("POST", CHAT, body=chat()[:-1] + b', "async": true}')
        file = await served.call("POST", TRANSCRIPTIONS, body=b'{"async": true}')

        assert (job.status, job.json["status"]) == (202, "QUEUED")
        assert file.status == 400
        assert simulator.stats().total == 0


# -- who gets it -----------------------------------------------------------------------------------------------------


async def test_a_request_goes_where_its_model_is_served_under_its_name_there(tmp_path: Path) -> None:
    async with Simulator() as box, Simulator(SimulatorSettings(api_key="of-the-cloud")) as cloud:
        tables = (
            Target(name="box", base_url=box.url, models=("small",)),
            Target(name="cloud", base_url=cloud.url, models=("big",), aliases={"fast": "big"}),
        )
        async with passing(tmp_path, tables=tables, keys={"cloud": "of-the-cloud"}) as served:
            small = await served.call("POST", CHAT, body=chat(model="small"))
            fast = await served.call("POST", CHAT, body=chat(model="fast"))
            nobodys = await served.call("POST", CHAT, body=chat(model="huge"))
            file = await served.call("POST", f"{TRANSCRIPTIONS}?model=big", body=form(fields={}), headers=FORM_HEADERS)

        assert (small.json["model"], fast.json["model"], file.status) == ("small", "big", 200)
        assert (box.stats().total, cloud.stats().total) == (1, 2)
        assert error_of(nobodys) == (404, "model_not_found")
        assert nobodys.json["error"]["param"] == "model"


async def test_an_alias_in_a_long_body_keeps_nobody_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Taking 16 MiB of JSON apart takes seconds, in which all others would be silent."""
    threads: list[threading.Thread] = []

    def watched(*given: Any) -> bytes:
        threads.append(threading.current_thread())
        return renamed(*given)

    monkeypatch.setattr("batchrunner.live.renamed", watched)
    async with Simulator() as simulator:
        tables = (Target(name="box", base_url=simulator.url, aliases={"fast": "big"}),)
        async with passing(tmp_path, tables=tables, tpm=10**9) as served:
            reply = await served.call("POST", CHAT, body=chat("x" * MIB, model="fast"))

    assert reply.json["model"] == "big"
    assert len(threads) == 1
    assert threading.main_thread() not in threads


async def test_a_body_that_is_no_text_is_the_callers_fault_where_there_are_aliases(tmp_path: Path) -> None:
    async with Simulator() as simulator:
        tables = (Target(name="box", base_url=simulator.url, aliases={"fast": "big"}),)
        async with passing(tmp_path, tables=tables) as served:
            reply = await served.call("POST", CHAT, body=b'{"\xff": "x", "model": "fast"}')
            assert served.parts.live is not None
            assert served.parts.live.places[0].in_flight == 0

    assert reply.status == 400


@pytest.mark.parametrize("fault", ["away", "503", "502", "429(1s)"])
async def test_another_upstream_answers_for_one_that_does_not(tmp_path: Path, fault: str) -> None:
    async with (
        Simulator(SimulatorSettings(faults=f"{fault}:1" if fault != "away" else "")) as first,
        Simulator() as other,
    ):
        tables = (
            Target(name="first", base_url=first.url, weight=9),
            Target(name="other", base_url=other.url, weight=1),
        )
        if fault == "away":
            first.refuse(LIMIT_S)
        async with passing(tmp_path, tables=tables) as served:
            replies = [await served.call("POST", CHAT, body=chat(str(number))) for number in range(5)]
            assert served.parts.live is not None
            begun = served.parts.live.begun

        assert [reply.status for reply in replies] == [200] * 5
        assert other.stats().ok == 5
        # One that could not be reached is not asked again for a while.
        assert begun["first"] == (1 if fault == "away" else first.stats().total)
        assert begun["first"] >= 1


async def test_the_last_refusal_is_the_answer_when_all_refuse(tmp_path: Path) -> None:
    async with (
        Simulator(SimulatorSettings(faults="503:1")) as first,
        Simulator(SimulatorSettings(is_down=True)) as other,
    ):
        tables = (Target(name="first", base_url=first.url), Target(name="other", base_url=other.url))
        async with passing(tmp_path, tables=tables) as served:
            reply = await served.call("POST", CHAT, body=chat())

        assert (reply.status, first.stats().total, other.stats().total) == (503, 1, 1)
        assert "simulator" in reply.json["error"]["message"]


async def test_connection_that_the_upstream_has_closed_meanwhile_costs_nobody_an_answer(tmp_path: Path) -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        talk.say(answer(b'{"n":1}'))
        if len(peer.talks) == 1:
            await talk.head()
            talk.reset()

    async with peer_with(script) as peer, passing(tmp_path, peer.url) as served:
        replies = [await served.call("POST", CHAT, body=chat()) for _ in range(2)]

    assert [reply.body for reply in replies] == [b'{"n":1}'] * 2
    assert len(peer.talks) == 2


# -- limits ----------------------------------------------------------------------------------------------------------


async def test_requests_beyond_the_pinned_window_are_told_to_come_again(tmp_path: Path) -> None:
    slow = SimulatorSettings(latency="30s")
    async with Simulator(slow) as simulator, passing(tmp_path, simulator.url, concurrency=1) as served:
        waiting = asyncio.create_task(served.call("POST", CHAT, body=chat()))
        await simulator.wait_until(lambda stats: stats.working == 1)
        refused = await served.call("POST", CHAT, body=chat())
        waiting.cancel()

    assert error_of(refused) == (429, "rate_limit_exceeded")
    assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize("limit", [{"rpm": 2}, {"tpm": 300}])
async def test_rates_of_the_upstream_hold(tmp_path: Path, limit: dict[str, Any]) -> None:
    async with Simulator() as simulator, passing(tmp_path, simulator.url, **limit) as served:
        replies = [await served.call("POST", CHAT, body=chat(max_tokens=150)) for _ in range(3)]

    assert [reply.status for reply in replies] == [200, 200, 429]
    assert 50 <= int(replies[2].headers["retry-after"]) <= 60


async def test_keys_need_the_scope_and_have_their_own_limits(tmp_path: Path) -> None:
    async with Simulator() as simulator, passing(tmp_path, simulator.url, is_open=False) as served:
        reader = served.add_key("acme", scopes=[KeyScope.READ])
        writer = served.add_key("acme", scopes=[KeyScope.WRITE], limits=KeyLimits(rpm=1))
        without = await served.call("POST", CHAT, body=chat())
        lacking = await served.call("POST", CHAT, body=chat(), secret=reader)
        fine = await served.call("POST", CHAT, body=chat(), secret=writer)
        above = await served.call("POST", CHAT, body=chat(), secret=writer)

        assert [without.status, lacking.status, fine.status, above.status] == [401, 403, 200, 429]
        assert error_of(lacking) == (403, "missing_scope")
        assert fine.headers["x-ratelimit-remaining-requests"] == "0"
        assert simulator.stats().total == 1


async def test_two_tenants_may_have_the_same_idempotency_key(tmp_path: Path) -> None:
    """The upstream has one account for all: what it keeps under a key must be one tenant's."""
    async with (
        peer_with(obliging) as peer,
        passing(tmp_path, peer.url, is_open=False) as served,
    ):
        secrets = [served.add_key("acme"), served.add_key("acme"), served.add_key("other")]
        for secret in secrets:
            await served.call("POST", CHAT, body=chat(), secret=secret, headers={"Idempotency-Key": "k"})
        one, again, other = (head_of(request)["idempotency-key"] for request in peer.requests)

    assert one == again
    assert one != other


# -- forms -----------------------------------------------------------------------------------------------------------


async def test_a_form_is_sent_on_while_it_comes_in(tmp_path: Path) -> None:
    has_come, parts = (
        asyncio.Event(),
        [f"--{BOUNDARY}\r\n".encode(), b"x" * 300_000, f"\r\n--{BOUNDARY}--\r\n".encode()],
    )

    async def script(talk: Talk) -> None:
        await talk.head()
        talk.requests.append(await talk._reader.readexactly(len(parts[0])))
        has_come.set()
        talk.requests.append(await talk._reader.readexactly(len(parts[1]) + len(parts[2])))
        talk.say(answer(b'{"text":"hi"}'))

    async def pieces() -> AsyncIterator[bytes]:
        yield parts[0]
        await has_come.wait()
        yield parts[1]
        yield parts[2]

    length = {"Content-Length": str(sum(map(len, parts)))}
    async with peer_with(script) as peer, passing(tmp_path, peer.url) as served:
        reply = await served.call("POST", TRANSCRIPTIONS, body=pieces(), headers=FORM_HEADERS | length)

    assert reply.body == b'{"text":"hi"}'
    assert b"".join(peer.requests) == b"".join(parts)


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, "/v1/images/edits"])
async def test_a_form_arrives_as_it_was_whatever_its_framing(tmp_path: Path, path: str) -> None:
    raw = form(fields={"model": "m"}, content=bytes(range(256)) * 4000, is_file_first=True)

    async def pieces() -> AsyncIterator[bytes]:
        yield raw

    async with simulated(tmp_path) as (served, simulator):
        sized = await served.call("POST", path, body=raw, headers=FORM_HEADERS)
        chunked = await served.call("POST", path, body=pieces(), headers=FORM_HEADERS)

        assert simulator.seen(raw).ok == 2
        assert sized.body == chunked.body


async def test_too_large_a_form_is_refused(tmp_path: Path) -> None:
    raw = form(fields={}, content=b"x" * 2000)

    async def pieces() -> AsyncIterator[bytes]:
        yield raw

    async with Simulator() as simulator, passing(tmp_path, simulator.url, asset_bytes_max=1000) as served:
        announced = await served.call("POST", TRANSCRIPTIONS, body=raw, headers=FORM_HEADERS)
        chunked = await served.call("POST", TRANSCRIPTIONS, body=pieces(), headers=FORM_HEADERS)

        assert (announced.status, chunked.status) == (413, 413)
        assert simulator.stats().ok == 0


@pytest.mark.parametrize("said", ["true", "TRUE", "1", " true\r\n"])
@pytest.mark.parametrize("path", [TRANSCRIPTIONS, "/v1/images/edits", f"/club{TRANSCRIPTIONS}"])
async def test_a_form_that_asks_for_a_job_does_not_reach_its_end(tmp_path: Path, path: str, said: str) -> None:
    got = bytearray()

    async def script(talk: Talk) -> None:
        while piece := await talk._reader.read(MIB):
            got.extend(piece)
        talk.is_left = True

    raw = form(fields={"model": "m", "async": said}, content=b"x" * (4 * MIB), is_file_first=True)
    async with peer_with(script) as peer, passing(tmp_path, peer.url) as served:
        reply = await served.call("POST", path, body=raw, headers=FORM_HEADERS)
        await until(lambda: all(talk.is_left for talk in peer.talks))
        assert served.parts.live is not None
        assert (served.parts.live.places[0].in_flight, served.parts.live.failures) == (0, {})

    assert MIB < len(got) < len(raw)
    assert f"--{BOUNDARY}--".encode() not in got
    assert reply.status == 400
    assert "`async`" in reply.json["error"]["message"]
    assert reply.json["error"].get("param", "async") == "async"
    assert reply.json["error"]["type"] == ("invalid_request" if "/club/" in path else "invalid_request_error")


async def test_a_form_that_asks_for_a_job_piece_by_piece_is_refused(tmp_path: Path) -> None:
    raw = form(fields={"async": "true"}, content=b"x" * 100)

    async def pieces() -> AsyncIterator[bytes]:
        for place in range(len(raw)):
            yield raw[place : place + 1]

    async with simulated(tmp_path) as (served, simulator):
        reply = await served.call("POST", TRANSCRIPTIONS, body=pieces(), headers=FORM_HEADERS)

        assert (reply.status, reply.json["error"]["param"]) == (400, "async")
        assert simulator.stats().ok == 0


@pytest.mark.parametrize(
    ("path", "raw", "dialect"),
    [
        (f"/openai{TRANSCRIPTIONS}", form(fields={"async": "true"}), None),
        (TRANSCRIPTIONS, form(fields={"async": "true"}), "openai"),
        (TRANSCRIPTIONS, form(fields={"async": "false"}), None),
        (TRANSCRIPTIONS, form(fields={"async": "true" + " " * 99 + "x"}), None),
        (TRANSCRIPTIONS, form(fields={"asynchronous": "true"}, content=b'name="async"\r\n\r\ntrue\r\n'), None),
        (f"/club{TRANSCRIPTIONS}", form(fields={"prompt": "async"}), None),
        (TRANSCRIPTIONS, b"no form at all", None),
    ],
)
async def test_any_other_form_arrives_as_it_was(tmp_path: Path, path: str, raw: bytes, dialect: str | None) -> None:
    headers = FORM_HEADERS if dialect is None else FORM_HEADERS | {"Batchrunner-Dialect": dialect}
    async with peer_with(obliging) as peer, passing(tmp_path, peer.url) as served:
        reply = await served.call("POST", path, body=raw, headers=headers)

    assert reply.status == 200
    assert peer.requests[0].partition(b"\r\n\r\n")[2] == raw


@pytest.mark.parametrize("kind", ["multipart/form-data", "multipart/mixed; boundary=x"])
async def test_what_is_no_form_is_for_the_upstream_to_judge(tmp_path: Path, kind: str) -> None:
    async with peer_with(obliging) as peer, passing(tmp_path, peer.url) as served:
        reply = await served.call("POST", TRANSCRIPTIONS, body=form(fields={}), headers={"Content-Type": kind})

    assert reply.status == 200
    assert peer.requests[0].endswith(form(fields={}))


# -- hanging up ------------------------------------------------------------------------------------------------------


async def check_freed(served: Served, simulator: Simulator) -> None:
    """Wait until the upstream's only request was given up: nothing of it is held here either."""
    stats = await simulator.wait_until(lambda stats: stats.abandoned == 1)

    assert stats.working == 0
    await served.parts.vitals.idle()
    assert served.parts.live is not None
    assert served.parts.live.places[0].in_flight == 0


async def test_a_caller_that_hangs_up_before_the_answer_frees_the_upstream(tmp_path: Path) -> None:
    async with simulated(tmp_path, latency="30s") as (served, simulator):
        asking = asyncio.create_task(served.call("POST", CHAT, body=chat()))
        await simulator.wait_until(lambda stats: stats.working == 1)
        asking.cancel()

        await check_freed(served, simulator)


async def test_a_caller_that_hangs_up_in_mid_stream_frees_the_upstream(tmp_path: Path) -> None:
    async with simulated(tmp_path, stream_interval_s=30.0) as (served, simulator):
        async with served.session.post(served.base + CHAT, data=chat(stream=True)) as got:
            await got.content.readany()
            got.close()

        await check_freed(served, simulator)


async def test_a_caller_that_takes_slowly_makes_the_upstream_wait(tmp_path: Path) -> None:
    """Nothing is gathered: what the caller does not take stays at the upstream, and in what the kernel holds."""
    sent = 0

    async def script(talk: Talk) -> None:
        nonlocal sent
        await talk.request()
        talk.say(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (96 * MIB))
        for _ in range(96):
            await talk.say_on(bytes(MIB))
            sent += 1

    async with streamed(tmp_path, script) as (served, got):
        # Time enough for all of it, were anybody to take it.
        for _ in range(300):
            await served.call("GET", "/healthz")
        assert 0 < sent < 64
        size_bytes = 0
        while chunk := await got.content.readany():
            size_bytes += len(chunk)

    assert size_bytes == 96 * MIB


async def test_a_body_is_in_memory_no_longer_than_until_the_answer_begins(tmp_path: Path) -> None:
    body = chat("x" * (8 * MIB), stream=True)

    async def script(talk: Talk) -> None:
        await talk.request()
        talk.requests.clear()
        talk.say(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n")
        await talk.gone()

    tracemalloc.start()
    try:
        async with peer_with(script) as peer, passing(tmp_path, peer.url) as served:
            before_bytes = tracemalloc.get_traced_memory()[0]
            async with served.session.post(served.base + CHAT, data=io.BytesIO(body)) as got:
                assert await got.content.readany() == b"hello"
                assert served.parts.held.size_bytes == 0
                assert tracemalloc.get_traced_memory()[0] - before_bytes < 4 * MIB
                got.close()
    finally:
        tracemalloc.stop()


# -- what is told ----------------------------------------------------------------------------------------------------


async def test_metrics_tell_of_each_upstream(tmp_path: Path) -> None:
    async with Simulator() as box, Simulator() as cloud:
        tables = (Target(name="box", base_url=box.url, models=("m",)), Target(name="cloud", base_url=cloud.url))
        async with passing(tmp_path, tables=tables) as served:
            await served.call("POST", CHAT, body=chat())
            cloud.refuse(LIMIT_S)
            await served.call("POST", CHAT, body=chat(model="other"))
            told = (await served.call("GET", "/metrics")).body.decode()

    assert 'batchrunner_live_requests_total{upstream="box"} 1.0' in told
    assert 'batchrunner_live_requests_total{upstream="cloud"} 1.0' in told
    assert 'batchrunner_live_failures_total{code="not_connected"} 1.0' in told
    assert 'batchrunner_live_in_flight{upstream="box"} 0.0' in told


async def test_the_log_has_no_word_of_what_was_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with simulated(tmp_path) as (served, _):
        await served.call("POST", CHAT, body=chat("the secret question"), headers={"x-request-id": "req_1"})
        with contextlib.suppress(aiohttp.ClientError):
            await served.call("POST", CHAT, body=chat("the secret question", simulate=["truncate"]))

    told = "\n".join(record.getMessage() for record in caplog.records)
    assert "POST /v1/chat/completions 200" in told
    assert "req_1" in told
    assert "secret" not in caplog.text
    assert "echo:" not in caplog.text


async def test_a_stream_goes_on_while_the_server_is_about_to_end(tmp_path: Path) -> None:
    said = asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.request()
        talk.say(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n1\r\na\r\n")
        await said.wait()
        talk.say(b"1\r\nb\r\n0\r\n\r\n")

    async with streamed(tmp_path, script) as (served, got):
        assert await got.content.readany() == b"a"
        served.parts.vitals.closing.set()
        said.set()
        assert await got.content.read() == b"b"
