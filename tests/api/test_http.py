"""Manners of HTTP that every route has."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import logging
import sqlite3
from pathlib import Path

import pytest

from batchrunner.api.dispatch import Router
from batchrunner.api.http import Answer, Call, Route
from batchrunner.api.routes import ROUTES
from batchrunner.errors import DiskFull, IdempotencyRunning, JournalCorrupt, StoreUnavailable
from tests.api.serving import FORM_HEADERS, LINE, Served, form, serving


async def test_a_sane_request_id_is_echoed_and_another_replaced(api: Served) -> None:
    echoed = await api.call("GET", "/v1/files", headers={"X-Request-ID": "trace-1.2:3_4"})
    replaced = await api.call("GET", "/v1/nothing", headers={"X-Request-ID": "a b"})

    assert echoed.headers["x-request-id"] == "trace-1.2:3_4"
    assert replaced.headers["x-request-id"].startswith("req_")
    assert len(replaced.headers["x-request-id"]) == 36
    assert int(echoed.headers["openai-processing-ms"]) >= 0
    assert echoed.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    "path", ["/v1/files/", "/openai/v1/files", "/openai/v1/files/", "/v1/file%73", "/v1/files?a=b"]
)
async def test_other_spellings_of_a_path_are_the_same_route(api: Served, path: str) -> None:
    assert (await api.call("GET", path)).json["object"] == "list"


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/v1",
        "/v1/",
        "/v2/files",
        "/V1/files",
        "/v1/Files",
        "/v1//files",
        "/v1/files//",
        "/v1/files%2F",
        "/openai/files",
        "/openai/openai/v1/files",
        "/v1/%66iles/a/b",
        "/v1/files/%ff",
        "/v1/files/%00",
        "/v1/files/a%0ab",
        "/openai/v1/docs",
        "/v1/files/" + "x" * 300,
    ],
)
async def test_what_is_no_route_is_a_404_in_json(api: Served, path: str) -> None:
    reply = await api.call("GET", path)

    assert reply.status == 404
    assert reply.json["error"]["type"] == "invalid_request_error"


async def test_ids_are_decoded_once(api: Served) -> None:
    file_id = (await api.upload()).json["id"]
    once = file_id.replace("-", "%2D")
    twice = file_id.replace("-", "%252D")

    assert (await api.call("GET", f"/v1/files/{once}")).status == 200
    assert (await api.call("GET", f"/v1/files/{twice}")).status == 404
    assert (await api.call("GET", f"/v1/files/{file_id.upper()}")).status == 404
    assert (await api.call("GET", f"/v1/files/{file_id}%2Fcontent")).status == 404
    assert (await api.call("GET", f"/v1/files/..%2Ffiles%2F{file_id}")).status == 404


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_every_path_tells_its_methods(keyed: Served, route: Route) -> None:
    path = route.path.replace("{", "").replace("}", "")

    options = await keyed.call("OPTIONS", path)
    wrong = await keyed.call("PATCH", path)

    assert (options.status, options.body) == (204, b"")
    assert {"OPTIONS", route.method} <= set(options.headers["Allow"].split(", "))
    assert wrong.status == 405
    assert wrong.headers["Allow"] == options.headers["Allow"]
    # xAI says what is wrong where OpenAI has an object.
    error = wrong.json["error"]
    assert (error if route.dialect == "xai" else error["message"]).startswith(f"Not allowed to PATCH on {path}.")


async def test_a_literal_segment_wins_over_a_name() -> None:
    async def handler(_call: Call) -> Answer:
        return Answer()

    named = Route(method="GET", path="/v1/a/{id}/x", handler=handler, summary="")
    literal = Route(method="GET", path="/v1/a/b/x", handler=handler, summary="")
    match = Router([named, literal]).match("/v1/a/b/x")

    assert match is not None
    assert match.routes["GET"] == [literal]


@pytest.mark.parametrize(
    ("path", "kind"), [("/v1/uploads", "application/json"), ("/v1/files", "multipart/form-data; boundary=x")]
)
async def test_compressed_body_is_refused_and_never_unpacked(
    api: Served, monkeypatch: pytest.MonkeyPatch, path: str, kind: str
) -> None:
    bomb = gzip.compress(b" " * (64 * 1024 * 1024))
    headers = {"Content-Encoding": "gzip", "Content-Type": kind}
    unpacked: list[object] = []
    monkeypatch.setattr("aiohttp.http_parser.DeflateBuffer.feed_data", lambda *given: unpacked.append(given))

    reply = await api.call("POST", path, body=bomb, headers=headers)

    assert (reply.status, reply.json["error"]["code"]) == (415, "unsupported_encoding")
    assert unpacked == []


async def test_bodies_that_do_not_fit_beside_others_come_again_later(
    api: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.parts.held, "_size_bytes_max", 100)
    held = api.parts.held
    held.take(90)

    busy = await api.call("POST", "/v1/uploads", body=b" " * 20)
    held.give_back(90)
    wrong = await api.call("POST", "/v1/uploads", body=b" " * 20)
    with_key = await api.call("POST", "/v1/uploads", body=b" " * 101, headers={"Idempotency-Key": "k"})

    assert (busy.status, busy.json["error"]["type"]) == (503, "server_error")
    assert busy.headers["retry-after"] == "1"
    assert (wrong.status, with_key.status) == (400, 503)
    assert held.size_bytes == 0


async def failing(_call: Call) -> Answer:
    raise RuntimeError("a secret in a bug")


async def without_store(_call: Call) -> Answer:
    raise StoreUnavailable("/home/somebody/state.db is locked")


async def without_space(_call: Call) -> Answer:
    raise DiskFull("no space in /home/somebody")


async def with_damage(_call: Call) -> Answer:
    raise JournalCorrupt("segment 7")


async def running(_call: Call) -> Answer:
    raise IdempotencyRunning("the first request has not ended")


async def broken_stream(_call: Call) -> Answer:
    async def chunks():
        yield b"half"
        raise RuntimeError("the other half is gone")

    return Answer(chunks=chunks(), size_bytes=8)


BAD = tuple(
    Route(method="GET", path=f"/bad/{handler.__name__}", handler=handler, summary="", scope=None)
    for handler in (failing, without_store, without_space, with_damage, running, broken_stream)
)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("failing", (500, None, None)),
        ("with_damage", (500, "journal_corrupt", None)),
        ("without_store", (503, "store_unavailable", "5")),
        ("without_space", (503, "disk_full", "5")),
        ("running", (409, "idempotency_running", "1")),
    ],
)
async def test_our_faults_tell_the_caller_when_to_come_again_and_no_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, expected: tuple[int, str | None, str | None]
) -> None:
    async with serving(tmp_path, routes=BAD) as api:
        reply = await api.call("GET", f"/bad/{name}")

    assert (reply.status, reply.json["error"]["code"], reply.headers.get("Retry-After")) == expected
    assert b"somebody" not in reply.body
    assert b"secret" not in reply.body
    if reply.status >= 500:
        assert reply.json["error"]["type"] == "server_error"
        traced = [each.getMessage() for each in caplog.records if each.exc_info]
        assert any(reply.headers["x-request-id"] in message for message in traced)


async def test_an_answer_that_breaks_off_is_not_taken_for_whole(tmp_path: Path) -> None:
    async with serving(tmp_path, routes=BAD) as api:
        with pytest.raises(Exception, match=r"payload|disconnected|reset|closed"):
            await api.call("GET", "/bad/broken_stream")


async def test_bytes_that_are_missing_are_our_fault(api: Served) -> None:
    file_id = (await api.upload()).json["id"]
    for name in list(api.parts.blobs.list("files/")):
        api.parts.blobs.delete(name)

    reply = await api.call("GET", f"/v1/files/{file_id}/content")

    assert (reply.status, reply.json["error"]["code"]) == (503, "blobs_unavailable")


async def test_the_log_line_has_no_body_and_no_id_of_a_tenant(api: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="batchrunner")
    file_id = (await api.upload()).json["id"]
    caplog.clear()

    reply = await api.call("GET", f"/v1/files/{file_id}/content?secret=s3cr3t")

    (record,) = [each for each in caplog.records if each.__dict__.get("action") == "request"]
    assert record.__dict__["route"] == "/v1/files/{file_id}/content"
    assert (record.__dict__["status"], record.__dict__["method"]) == (200, "GET")
    assert record.__dict__["request_id"] == reply.headers["x-request-id"]
    assert file_id not in record.getMessage()
    assert "s3cr3t" not in record.getMessage()


@pytest.mark.parametrize(
    ("said", "known"), [("2", 2), ("0", 0), (None, 0), ("-1", 0), ("1e9", 0), ("9" * 30, 0), ("\u0662", 0)]
)
async def test_the_log_line_tells_that_an_sdk_tries_again(
    api: Served, caplog: pytest.LogCaptureFixture, said: str | None, known: int
) -> None:
    caplog.set_level(logging.INFO, logger="batchrunner")

    await api.call("GET", "/v1/batches", headers={} if said is None else {"x-stainless-retry-count": said})

    (record,) = [each for each in caplog.records if each.__dict__.get("action") == "request"]
    assert record.__dict__["retry_count"] == known
    assert record.getMessage().endswith(" retry 2" if known else record.__dict__["request_id"])


async def test_head_of_a_route_without_get_is_refused(api: Served) -> None:
    assert (await api.call("HEAD", "/v1/uploads")).status == 405


async def raw(api: Served, request: bytes) -> bytes:
    """Send bytes as they stand and read until the server hangs up."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(request)
    await writer.drain()
    try:
        return await asyncio.wait_for(reader.read(), 20)
    finally:
        writer.close()


async def test_garbage_instead_of_http_is_refused(api: Served) -> None:
    reply = await raw(api, b"\x16\x03\x01garbage\r\n\r\n")

    assert reply.split(b" ")[1] == b"400"
    assert (await api.call("GET", "/v1/files")).status == 200


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/v1/batches/x/results?after=" + "7" * 50_000, 400),
        ("/v1/files?limit=" + "7" * 50_000, 400),
        ("/" + "x" * 50_000, 404),
    ],
)
async def test_long_request_line_is_answered_in_json(api: Served, path: str, status: int) -> None:
    reply = await api.call("GET", path)

    assert (reply.status, reply.headers["Content-Type"]) == (status, "application/json")
    assert reply.json["error"]["type"] == "invalid_request_error"


async def test_idempotency_key_makes_one_object(api: Served) -> None:
    wanted = {"bytes": 5, "filename": "a", "mime_type": "m", "purpose": "batch"}
    key = {"Idempotency-Key": "create-1"}

    replies = [await api.call("POST", "/v1/uploads", json=wanted, headers=key) for _ in range(3)]
    spaced = await api.call(
        "POST", "/v1/uploads", body=b'{"purpose":"batch",  "mime_type":"m","filename":"a","bytes":5}', headers=key
    )
    other = await api.call("POST", "/v1/uploads", json=wanted | {"bytes": 6}, headers=key)
    anew = await api.call("POST", "/v1/uploads", json=wanted, headers={"Idempotency-Key": "create-2"})

    assert len({reply.body for reply in [*replies, spaced]}) == 1
    assert "idempotent-replayed" not in replies[0].headers
    assert replies[1].headers["idempotent-replayed"] == "true"
    assert (other.status, other.json["error"]["code"]) == (422, "idempotency_mismatch")
    assert anew.json["id"] != replies[0].json["id"]


async def test_a_refused_create_does_not_use_up_its_key(api: Served) -> None:
    key = {"Idempotency-Key": "k"}
    wanted = {"bytes": 5, "filename": "a", "mime_type": "m", "purpose": "batch"}

    refused = await api.call("POST", "/v1/uploads", json=wanted | {"bytes": -1}, headers=key)
    mended = await api.call("POST", "/v1/uploads", json=wanted, headers=key)

    assert (refused.status, mended.status) == (400, 200)


async def test_an_upload_with_a_key_is_kept_once(api: Served) -> None:
    async def send(content: bytes) -> tuple[int, str]:
        reply = await api.call(
            "POST",
            "/v1/files",
            body=form(fields={"purpose": "batch"}, content=content),
            headers=FORM_HEADERS | {"Idempotency-Key": "f1"},
        )
        return reply.status, reply.json.get("id") or reply.json["error"]["code"]

    first, again, other = await send(LINE), await send(LINE), await send(LINE * 2)

    assert first == again
    assert other == (422, "idempotency_mismatch")
    assert len((await api.call("GET", "/v1/files")).json["data"]) == 1


async def test_two_at_once_with_one_key_make_one_object(api: Served) -> None:
    wanted = {"bytes": 5, "filename": "a", "mime_type": "m", "purpose": "batch"}

    replies = await asyncio.gather(
        *(api.call("POST", "/v1/uploads", json=wanted, headers={"Idempotency-Key": "k"}) for _ in range(8))
    )

    made = {reply.json["id"] for reply in replies if reply.status == 200}
    assert len(made) == 1
    for reply in replies:
        if reply.status != 200:
            assert reply.status == 409
            assert "x-should-retry" not in reply.headers
            assert reply.headers["Retry-After"] == "1"


async def test_a_create_that_died_before_answering_answers_with_its_object(api: Served) -> None:
    """The store knows what was made for the key, but no answer: the process died in between."""
    wanted = {"bytes": 5, "filename": "a", "mime_type": "m", "purpose": "batch"}
    key = {"Idempotency-Key": "k"}
    first = await api.call("POST", "/v1/uploads", json=wanted, headers=key)
    forget_the_answer(api.folder)

    again = await api.call("POST", "/v1/uploads", json=wanted, headers=key)

    assert (again.status, again.json) == (200, first.json)


def forget_the_answer(folder: Path) -> None:
    with contextlib.closing(sqlite3.connect(folder / "state.db")) as database, database:
        assert database.execute("update idempotency set body = null").rowcount == 1
