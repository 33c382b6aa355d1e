"""What is no HTTP, or old HTTP, on a raw socket: an answer in the API's own words, and nothing of it in the log."""

from __future__ import annotations

import asyncio
import logging

import orjson
import pytest

from tests.api.batching import CHAT
from tests.api.serving import Served

HOST = b"host: localhost\r\n"
SECRET = b"sk-very-secret"


async def raw(api: Served, request: bytes) -> tuple[bytes, bytes]:
    """Send bytes; give head and body of the answer."""
    async with asyncio.timeout(10):
        reading, writing = await asyncio.open_connection("127.0.0.1", api.port)
        writing.write(request)
        answer = await reading.read()
        writing.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.lower(), body


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"GET /v1/files HTTP/1.1\r\n" + HOST + b"authorization: Bearer " + SECRET + b"\x01\r\n\r\n",
        b"GET /v1/files HTTP/1.1\r\n" + HOST + b"authorization : Bearer " + SECRET + b"\r\n\r\n",
        b"POST /v1/batches HTTP/1.1\r\n" + HOST + b"transfer-encoding: chunked\r\n\r\nzz " + SECRET + b"\r\n",
        b"POST /v1/batches HTTP/1.1\r\n" + HOST + b"content-length: 1\r\ncontent-length: 2\r\n\r\n" + SECRET,
        b"GET /" + SECRET + b"\xff HTTP/1.1\r\n" + HOST + b"\r\n",
        b"WHAT " + SECRET + b"\r\n\r\n",
        b"GET /v1/files HTTP/1.1\r\n" + HOST + b"x: " + SECRET * 20_000 + b"\r\n\r\n",
    ],
    ids=["control character", "header name", "chunk", "two lengths", "path", "no HTTP", "long line"],
)
async def test_what_is_no_http_is_refused_in_json_and_quoted_nowhere(
    api: Served, caplog: pytest.LogCaptureFixture, request_bytes: bytes
) -> None:
    caplog.set_level(logging.DEBUG)

    head, body = await raw(api, request_bytes)

    assert b" 400 " in head.split(b"\r\n")[0]
    assert b"content-type: application/json" in head
    assert b"x-request-id: req_" in head
    error = orjson.loads(body)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "malformed_request")
    assert set(error) == {"message", "type", "param", "code"}
    formatted = "".join(logging.Formatter().format(record) for record in caplog.records)
    assert SECRET.decode() not in formatted + body.decode()
    assert "Traceback" not in formatted
    assert (await api.call("GET", "/healthz")).status == 200


async def test_streams_are_given_to_http_1_0_until_the_connection_ends(api: Served) -> None:
    asked = {"endpoint": CHAT, "requests": [{"custom_id": "a", "body": {"model": "m", "messages": []}}]}
    batch = (await api.call("POST", "/v1/batches", json=asked)).json
    await api.call("POST", f"/v1/batches/{batch['id']}/cancel")

    head, body = await raw(api, f"GET /v1/batches/{batch['id']}/results HTTP/1.0\r\n\r\n".encode())
    content, line = await raw(api, f"GET /v1/files/{batch['input_file_id']}/content HTTP/1.0\r\n\r\n".encode())

    assert head.startswith(b"http/1.0 200")
    assert b"chunked" not in head
    assert body == b""
    assert content.startswith(b"http/1.0 200")
    assert orjson.loads(line)["custom_id"] == "a"


async def test_error_behind_all_handling_is_a_500_in_json(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("batchrunner.api.dispatch._Turn.send", fail)

    head, body = await raw(api, b"GET /healthz HTTP/1.1\r\n" + HOST + b"\r\n")

    assert head.startswith((b"http/1.0 500", b"http/1.1 500"))
    assert orjson.loads(body)["error"]["type"] == "server_error"
