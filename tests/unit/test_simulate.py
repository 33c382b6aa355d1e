"""The simulated upstream: what it answers, how it queues, how it fails, what it counts; over real sockets."""

from __future__ import annotations

import asyncio
import base64
import gzip
import hashlib
import json
import random
import statistics
import struct
import wave
import zlib
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from typing import Any

import pytest

from batchrunner.errors import UsageError
from batchrunner.simulate import Simulator, SimulatorSettings, expected_reply
from batchrunner.simulate.connection import Connection
from batchrunner.simulate.rules import (
    FaultKind,
    parse_duration,
    parse_fault,
    parse_fault_rates,
    parse_latency,
    parse_script,
)
from batchrunner.simulate.wire import Answer, Request, RequestReader

CHAT = "/v1/chat/completions"
TIMEOUT_S = 20


def chat_body(prompt: str = "hello", **extra: object) -> bytes:
    return json.dumps({"model": "some-model", "messages": [{"role": "user", "content": prompt}], **extra}).encode()


def request_bytes(body: bytes, url: str = CHAT, *, method: str = "POST", headers: str = "") -> bytes:
    return f"{method} {url} HTTP/1.1\r\nHost: h\r\n{headers}Content-Length: {len(body)}\r\n\r\n".encode() + body


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self):
        return json.loads(self.body)


class PlainClient:
    """A client without any HTTP library: what it sees is what is on the wire."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, sent: bytes) -> None:
        self.writer.write(sent)

    async def head(self) -> tuple[int, dict[str, str]]:
        head = (await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), TIMEOUT_S)).decode("latin-1")
        status_line, *lines = head[:-4].split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(status_line.split(" ")[1]), headers

    async def reply(self) -> Reply:
        status, headers = await self.head()
        body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), TIMEOUT_S)
        return Reply(status=status, headers=headers, body=body)

    async def rest(self) -> bytes:
        return await asyncio.wait_for(self.reader.read(), TIMEOUT_S)

    async def call(self, body: bytes, url: str = CHAT, *, method: str = "POST", headers: str = "") -> Reply:
        self.send(request_bytes(body, url, method=method, headers=headers))
        return await self.reply()

    def drop(self) -> None:
        self.writer.transport.abort()


@asynccontextmanager
async def connected(simulator: Simulator) -> AsyncIterator[PlainClient]:
    reader, writer = await asyncio.open_connection("127.0.0.1", simulator.port)
    try:
        yield PlainClient(reader, writer)
    finally:
        writer.transport.abort()


@asynccontextmanager
async def simulated(**settings: Any) -> AsyncIterator[tuple[Simulator, PlainClient]]:
    async with Simulator(SimulatorSettings(**settings)) as simulator, connected(simulator) as client:
        yield simulator, client


async def until(simulator: Simulator, is_reached) -> None:
    await asyncio.wait_for(simulator.wait_until(is_reached), TIMEOUT_S)


BODIES = {
    CHAT: {"model": "m", "messages": [{"role": "user", "content": "{}"}]},
    "/v1/completions": {"model": "m", "prompt": "{}"},
    "/v1/embeddings": {"model": "m", "input": "{}"},
    "/v1/responses": {"model": "m", "input": "{}"},
    "/v1/moderations": {"model": "m", "input": "{}"},
    "/v1/images/generations": {"model": "m", "prompt": "{}"},
    "/v1/images/edits": {"model": "m", "prompt": "{}", "image": {"url": "https://h.example/x.png"}},
    "/v1/videos": {"model": "m", "prompt": "{}"},
    "/v1/videos/generations": {"model": "m", "prompt": "{}"},
    "/v1/videos/edits": {"model": "m", "prompt": "{}"},
    "/v1/videos/extensions": {"model": "m", "prompt": "{}"},
    "/v1/music/generations": {"model": "m", "prompt": "{}"},
    "/v1/audio/speech": {"model": "m", "input": "{}"},
}


def body_for(url: str, prompt: str) -> bytes:
    return json.dumps(BODIES[url]).replace("{}", prompt).encode()


class TestAnswers:
    @pytest.mark.parametrize("url", BODIES)
    async def test_each_endpoint_answers_each_body_in_its_own_way(self, url):
        bodies = [body_for(url, f"prompt {number}") for number in range(20)]
        async with simulated() as (_, client):
            replies = [await client.call(body, url) for body in bodies]
            again = await client.call(bodies[0], url)

        assert {reply.status for reply in replies} == {200}
        assert again.body == replies[0].body
        for body in bodies:
            marker = expected_reply(body, url).encode()
            assert [marker in reply.body for reply in replies].count(True) == 1
            assert marker in replies[bodies.index(body)].body

    async def test_chat_has_the_shape_of_openai(self):
        body = chat_body("Why is the sky blue? " * 10)
        async with simulated() as (_, client):
            reply = await client.call(body)

        answer = reply.json
        (choice,) = answer["choices"]
        usage = answer["usage"]
        assert answer["object"] == "chat.completion"
        assert answer["id"].startswith("chatcmpl-")
        assert answer["model"] == "some-model"
        assert isinstance(answer["created"], int)
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["role"] == "assistant"
        assert choice["message"]["content"] == f"{expected_reply(body, CHAT)} {('Why is the sky blue? ' * 10)[:64]}"
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert 0 < usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
        assert 0 <= usage["completion_tokens_details"]["reasoning_tokens"] <= usage["completion_tokens"]
        assert 550 <= len(reply.body) <= 750
        assert reply.headers["content-type"] == "application/json"

    async def test_request_ids_differ_between_answers(self):
        async with simulated() as (_, client):
            replies = [await client.call(chat_body()) for _ in range(3)]

        assert len({reply.headers["x-request-id"] for reply in replies}) == 3

    @pytest.mark.parametrize(
        ("messages", "quoted"),
        [
            ([{"role": "user", "content": "first"}, {"role": "user", "content": "last"}], "last"),
            ([{"role": "user", "content": "asked"}, {"role": "assistant", "content": "said"}], "asked"),
            ([{"role": "user", "content": [{"type": "image_url"}, {"type": "text", "text": "part"}]}], "part"),
            ([{"role": "user", "content": 'q"\\\n\u00e9\U0001f600'}], 'q"\\\n\u00e9\U0001f600'),
            ([{"role": "system", "content": "only"}], ""),
        ],
    )
    async def test_chat_quotes_the_last_user_message(self, messages, quoted):
        body = json.dumps({"model": "m", "messages": messages}).encode()
        async with simulated() as (_, client):
            reply = await client.call(body)

        assert reply.json["choices"][0]["message"]["content"] == f"{expected_reply(body, CHAT)} {quoted}"

    async def test_completions_answers_each_prompt_of_a_list(self):
        body = json.dumps({"model": "m", "prompt": ["one", "two"]}).encode()
        async with simulated() as (_, client):
            answer = (await client.call(body, "/v1/completions")).json

        marker = expected_reply(body, "/v1/completions")
        assert [choice["text"] for choice in answer["choices"]] == [f"{marker} one", f"{marker} two"]

    @pytest.mark.parametrize(
        ("given", "count"), [("text", 1), (["a", "b", "c"], 3), ([1, 2, 3], 1), ([[1, 2], [3]], 2)]
    )
    async def test_embeddings_gives_one_vector_an_input(self, given, count):
        body = json.dumps({"model": "m", "input": given, "dimensions": 5}).encode()
        async with simulated() as (_, client):
            answer = (await client.call(body, "/v1/embeddings")).json

        vectors = [tuple(item["embedding"]) for item in answer["data"]]
        assert [item["index"] for item in answer["data"]] == list(range(count))
        assert {len(vector) for vector in vectors} == {5}
        assert len(set(vectors)) == count

    async def test_embeddings_in_base64_are_packed_floats(self):
        body = json.dumps({"model": "m", "input": "x", "encoding_format": "base64"}).encode()
        async with simulated() as (_, client):
            answer = (await client.call(body, "/v1/embeddings")).json

        packed = base64.b64decode(answer["data"][0]["embedding"])
        vector = struct.unpack("<8f", packed)
        assert all(-1.0 <= number <= 1.0 for number in vector)
        assert len(set(vector)) > 1

    async def test_responses_counts_input_and_output_tokens(self):
        body = json.dumps({"model": "m", "input": [{"role": "user", "content": "hi"}]}).encode()
        async with simulated() as (_, client):
            answer = (await client.call(body, "/v1/responses")).json

        usage = answer["usage"]
        assert answer["output"][0]["content"][0]["text"] == f"{expected_reply(body, '/v1/responses')} hi"
        assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
        assert set(usage) >= {"input_tokens_details", "output_tokens_details"}

    async def test_models_are_listed(self):
        async with simulated() as (simulator, client):
            reply = await client.call(b"", "/v1/models?limit=5", method="GET")

        assert reply.json["object"] == "list"
        assert {model["object"] for model in reply.json["data"]} == {"model"}
        assert simulator.stats().total == 0

    @pytest.mark.parametrize(
        ("method", "url", "status"),
        [
            ("GET", CHAT, 405),
            ("POST", "/v1/models", 405),
            ("POST", "/v1/nothing", 404),
            ("GET", "/", 404),
            ("GET", "/__nothing", 404),
        ],
    )
    async def test_other_paths_and_methods_get_an_error_envelope(self, method, url, status):
        async with simulated() as (_, client):
            reply = await client.call(b"", url, method=method)

        assert reply.status == status
        assert set(reply.json["error"]) == {"message", "type", "param", "code"}

    async def test_head_gets_no_body(self):
        async with simulated() as (_, client):
            client.send(request_bytes(b"", method="HEAD"))
            status, _ = await client.head()
            after = await client.call(chat_body())

        assert (status, after.status) == (405, 200)

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"{",
            b"[]",
            b'{"model": "m"}',
            b'{"messages": []}',
            b'{"model":"m","messages":"x"}',
            b"[" * 5000,
            b"\xff",
        ],
    )
    async def test_a_body_that_does_not_fit_is_answered_400(self, body):
        async with simulated() as (_, client):
            reply = await client.call(body)

        assert reply.status == 400
        assert reply.json["error"]["type"] == "invalid_request_error"

    async def test_streaming_is_refused_where_there_is_none(self):
        body = json.dumps({"model": "m", "input": "hello", "stream": True}).encode()
        async with simulated() as (_, client):
            reply = await client.call(body, "/v1/responses")

        assert reply.status == 400
        assert reply.json["error"]["param"] == "stream"

    async def test_a_streamed_chat_says_the_expected_reply_in_pieces_and_ends(self):
        body = chat_body("a question that is long enough", stream=True)
        async with simulated() as (simulator, client):
            client.send(request_bytes(body, headers="Connection: close\r\n"))
            status, headers = await client.head()
            chunks = await client.rest()
            stats = simulator.stats()

        assert (status, headers["transfer-encoding"]) == (200, "chunked")
        assert headers["content-type"].startswith("text/event-stream")
        *events, last = [line.removeprefix("data: ") for line in chunks.decode().split("\r\n") if "data: " in line]
        deltas = [json.loads(event)["choices"][0]["delta"] for event in events]
        text = "".join(delta.get("content", "") for delta in deltas)
        assert text == f"{expected_reply(body, CHAT)} a question that is long enough"
        assert len(deltas) > 3
        assert last.strip() == "[DONE]"
        assert chunks.endswith(b"\r\n0\r\n\r\n")
        assert (stats.ok, stats.in_flight, stats.working) == (1, 0, 0)

    async def test_a_client_that_leaves_in_mid_stream_frees_its_slot(self):
        async with simulated(stream_interval_s=30.0) as (simulator, client):
            client.send(request_bytes(chat_body(stream=True)))
            await client.head()
            client.drop()
            await until(simulator, lambda stats: stats.abandoned == 1 and stats.working == 0)

        assert simulator.stats().ok == 0

    @pytest.mark.parametrize("url", ["/v1/audio/transcriptions", "/v1/images/edits"])
    async def test_a_form_is_answered_by_its_bytes(self, url):
        form = b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.wav"\r\n\r\nsound\r\n--x--\r\n'
        async with simulated() as (_, client):
            reply = await client.call(form, url, headers="Content-Type: multipart/form-data; boundary=x\r\n")

        assert reply.status == 200
        assert expected_reply(form, url) in reply.body.decode()

    async def test_the_missing_model_is_answered_404(self):
        async with simulated() as (_, client):
            reply = await client.call(chat_body(model="missing-model"))

        assert reply.status == 404
        assert reply.json["error"]["code"] == "model_not_found"

    async def test_a_key_is_asked_for_when_one_is_set(self):
        async with simulated(api_key="secret") as (simulator, client):
            refused = await client.call(chat_body(), headers="Authorization: Bearer other\r\n")
            no_models = await client.call(b"", "/v1/models", method="GET")
            taken = await client.call(chat_body(), headers="authorization: Bearer secret\r\n")

        assert (refused.status, refused.json["error"]["code"]) == (401, "invalid_api_key")
        assert no_models.status == 401
        assert taken.status == 200
        assert simulator.stats().repeats == 0

    def test_expected_reply_of_an_unknown_url_raises(self):
        with pytest.raises(KeyError):
            expected_reply(b"{}", "/v1/nothing")


def png_chunks(content: bytes) -> dict[bytes, bytes]:
    """Take a PNG apart as a strict decoder does."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    found, at = {}, 8
    while at < len(content):
        (length,) = struct.unpack_from(">I", content, at)
        kind, inside = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack_from(">I", content, at + 8 + length) == (zlib.crc32(kind + inside),)
        found[kind] = inside
        at += 12 + length
    return found


def boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Take an MP4, or a box of one, apart."""
    while content:
        (length,) = struct.unpack_from(">I", content)
        assert 8 <= length <= len(content)
        yield content[4:8], content[8:length]
        content = content[length:]


class TestMedia:
    @pytest.mark.parametrize("url", ["/v1/images/generations", "/v1/images/edits"])
    async def test_pictures_in_base64_are_as_many_as_wanted_and_differ(self, url):
        body = json.dumps({"model": "m", "prompt": "a lamp", "n": 3, "response_format": "b64_json"}).encode()
        async with simulated() as (_, client):
            answer = (await client.call(body, url)).json

        marker = expected_reply(body, url)
        pictures = [png_chunks(base64.b64decode(each["b64_json"])) for each in answer["data"]]
        assert [each["revised_prompt"] for each in answer["data"]] == [f"{marker} a lamp"] * 3
        assert [each[b"tEXt"] for each in pictures] == [f"Comment\0{marker}-{n}".encode() for n in (1, 2, 3)]
        assert {each[b"IHDR"] for each in pictures} == {struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 0)}
        rows = [zlib.decompress(each[b"IDAT"]) for each in pictures]
        assert {len(each) for each in rows} == {8 * 9}
        assert len(set(rows)) == 3

    async def test_pictures_are_addresses_unless_base64_is_wanted(self):
        body = body_for("/v1/images/generations", "a lamp")
        async with simulated() as (_, client):
            (picture,) = (await client.call(body, "/v1/images/generations")).json["data"]

        marker = expected_reply(body, "/v1/images/generations")
        assert picture["url"] == f"https://images.example/{marker}-1.png"

    async def test_a_film_in_base64_is_boxes_within_boxes(self):
        body = json.dumps({"model": "m", "prompt": "waves", "response_format": "b64_json"}).encode()
        async with simulated() as (_, client):
            answer = (await client.call(body, "/v1/videos/generations")).json

        found = dict(boxes(base64.b64decode(answer["data"][0]["b64_json"])))
        assert answer["status"] == "completed"
        assert [*found] == [b"ftyp", b"moov", b"free"]
        assert [(kind, len(inside)) for kind, inside in boxes(found[b"moov"])] == [(b"mvhd", 100)]
        assert found[b"free"].decode() == expected_reply(body, "/v1/videos/generations")

    @pytest.mark.parametrize(("url", "key"), [("/v1/audio/speech", "input"), ("/v1/music/generations", "prompt")])
    async def test_sound_is_a_wav_that_opens_where_wanted(self, url, key):
        body = json.dumps({"model": "m", key: "hello", "response_format": "wav"}).encode()
        async with simulated() as (_, client):
            reply = await client.call(body, url)

        assert reply.headers["content-type"] == "audio/wav"
        assert expected_reply(body, url).encode() in reply.body
        with wave.open(BytesIO(reply.body)) as sound:
            assert (sound.getframerate(), sound.getnframes()) == (8000, 800)
            assert len(set(sound.readframes(800))) > 4

    @pytest.mark.parametrize("url", ["/v1/audio/speech", "/v1/music/generations"])
    async def test_sound_is_an_mp3_by_default_whose_frames_follow_its_title(self, url):
        body = body_for(url, "hello")
        async with simulated() as (_, client):
            reply = await client.call(body, url)

        assert reply.headers["content-type"] == "audio/mpeg"
        a, b, c, d = reply.body[6:10]
        tag_bytes = 10 + (a << 21 | b << 14 | c << 7 | d)
        assert reply.body[10:tag_bytes].endswith(expected_reply(body, url).encode())
        frames = reply.body[tag_bytes:]
        assert [frames[at : at + 2] for at in range(0, len(frames), 96)] == [b"\xff\xf3"] * 4

    async def test_music_in_base64_stands_in_an_object(self):
        body = json.dumps({"model": "m", "prompt": "a waltz", "response_format": "b64_json"}).encode()
        async with simulated() as (_, client):
            answer = (await client.call(body, "/v1/music/generations")).json

        assert answer["audio"]["format"] == "wav"
        assert expected_reply(body, "/v1/music/generations").encode() in base64.b64decode(answer["audio"]["data"])

    @pytest.mark.parametrize(
        ("url", "extra", "param"),
        [
            ("/v1/images/generations", {"prompt": "x", "n": 0}, "n"),
            ("/v1/images/generations", {"prompt": "x", "n": 11}, "n"),
            ("/v1/images/generations", {"prompt": "x", "response_format": "gif"}, "response_format"),
            ("/v1/videos", {"prompt": "x", "response_format": "gif"}, "response_format"),
            ("/v1/audio/speech", {"input": "x", "response_format": "opus"}, "response_format"),
            ("/v1/audio/speech", {"prompt": "x"}, "input"),
            ("/v1/music/generations", {"input": "x"}, "prompt"),
        ],
    )
    async def test_what_it_cannot_make_is_refused(self, url, extra, param):
        async with simulated() as (_, client):
            reply = await client.call(json.dumps({"model": "m", **extra}).encode(), url)

        assert reply.status == 400
        assert reply.json["error"]["param"] == param


class TestWire:
    async def test_many_pipelined_requests_are_answered_in_order(self):
        bodies = [chat_body(f"number {number}") for number in range(3000)]
        async with simulated() as (_, client):
            client.send(b"".join(map(request_bytes, bodies)))
            replies = [await client.reply() for _ in bodies]

        assert all(
            expected_reply(body, CHAT).encode() in reply.body for body, reply in zip(bodies, replies, strict=True)
        )

    async def test_pipelined_requests_with_latency_are_answered_in_order(self):
        bodies = [chat_body(f"number {number}") for number in range(30)]
        async with simulated(latency="0s..2ms") as (simulator, client):
            client.send(b"".join(map(request_bytes, bodies)))
            replies = [await client.reply() for _ in bodies]

        assert all(
            expected_reply(body, CHAT).encode() in reply.body for body, reply in zip(bodies, replies, strict=True)
        )
        assert simulator.stats().peak_in_flight == 1

    @pytest.mark.parametrize("is_chunked", [False, True])
    async def test_bytes_may_come_one_by_one(self, is_chunked):
        body = chat_body("slow")
        sent = chunked_request(body, 7) if is_chunked else request_bytes(body)
        async with simulated() as (_, client):
            for position in range(len(sent) * 2):
                client.send((sent + sent)[position : position + 1])
                # The server runs on the same loop: here it takes the byte.
                await asyncio.sleep(0)
            replies = [await client.reply(), await client.reply()]

        assert all(expected_reply(body, CHAT).encode() in reply.body for reply in replies)

    @pytest.mark.parametrize("chunk_bytes", [1, 10, 1_000_000])
    async def test_a_chunked_body_is_put_together(self, chunk_bytes):
        body = chat_body("chunked " * 100)
        async with simulated() as (_, client):
            client.send(chunked_request(body, chunk_bytes) + request_bytes(chat_body("next")))
            first, second = await client.reply(), await client.reply()

        assert expected_reply(body, CHAT).encode() in first.body
        assert expected_reply(chat_body("next"), CHAT).encode() in second.body

    async def test_a_long_body_arrives_whole(self):
        body = chat_body("long " * 1_000_000)
        async with simulated() as (_, client):
            reply = await client.call(body)

        assert expected_reply(body, CHAT).encode() in reply.body

    async def test_continue_is_sent_before_the_body_comes(self):
        body = chat_body()
        sent = request_bytes(body, headers="Expect: 100-continue\r\n")
        async with simulated() as (_, client):
            client.send(sent[: -len(body)])
            interim, _ = await client.head()
            client.send(body)
            reply = await client.reply()

        assert (interim, reply.status) == (100, 200)

    @pytest.mark.parametrize(
        ("version", "headers", "is_kept"),
        [
            ("1.1", "", True),
            ("1.1", "Connection: close\r\n", False),
            ("1.0", "", False),
            ("1.0", "Connection: Keep-Alive\r\n", True),
        ],
    )
    async def test_the_connection_is_kept_as_the_client_asks(self, version, headers, is_kept):
        sent = request_bytes(chat_body(), headers=headers).replace(b"HTTP/1.1", f"HTTP/{version}".encode())
        async with simulated() as (_, client):
            client.send(sent)
            reply = await client.reply()
            rest = b"" if is_kept else await client.rest()
            if is_kept:
                client.send(sent)
                assert (await client.reply()).status == 200

        assert reply.headers["connection"] == ("keep-alive" if is_kept else "close")
        assert rest == b""

    @pytest.mark.parametrize(
        ("sent", "status"),
        [
            (b"nonsense\r\n\r\n", 400),
            (b"GET / HTTP/2.0\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
            (b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n", 413),
            (b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", 501),
            (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
            (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n" + b"0" * 2000, 400),
            (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nfffffff0\r\n", 413),
            (b"GET / HTTP/1.1\r\nX: " + b"x" * 70_000, 431),
        ],
    )
    async def test_what_is_no_request_ends_the_connection(self, sent, status):
        async with simulated() as (_, client):
            client.send(sent)
            reply = await client.reply()
            rest = await client.rest()

        assert reply.status == status
        assert rest == b""

    @pytest.mark.parametrize("is_chunked", [False, True])
    @pytest.mark.parametrize("piece_bytes", [1, 2, 3, 50, 97])
    def test_requests_are_the_same_however_the_bytes_are_cut(self, is_chunked, piece_bytes):
        bodies = [chat_body("x" * length) for length in (0, 1, 200)] + [b""]
        sent = b"\r\n".join(chunked_request(body, 64) if is_chunked else request_bytes(body) for body in bodies)
        reader, taken = RequestReader(), []
        for start in range(0, len(sent), piece_bytes):
            reader.feed(sent[start : start + piece_bytes])
            while (request := reader.next_request()) is not None:
                taken.append(request)

        assert [request.body for request in taken] == bodies
        assert {(request.method, request.path, request.keep_alive) for request in taken} == {
            (b"POST", CHAT.encode(), True)
        }
        assert reader.waiting_bytes == 0

    def test_a_short_head_is_found_after_a_long_one_that_came_in_two_pieces(self):
        long, short = request_bytes(b"1", headers=f"X: {'x' * 500}\r\n"), request_bytes(b"2")
        reader = RequestReader()
        reader.feed(long[:-6])
        nothing_yet = reader.next_request()
        reader.feed(long[-6:])
        first = reader.next_request()
        reader.feed(short)
        second = reader.next_request()

        assert nothing_yet is None
        assert first is not None
        assert second is not None
        assert (first.body, second.body) == (b"1", b"2")

    def test_a_client_that_pipelines_too_far_ahead_is_held_back_until_it_is_answered(self):
        desk, transport = FakeDesk(), FakeTransport()
        connection = Connection(desk)
        connection.connection_made(transport)
        bodies = [b"x" * 600_000 for _ in range(3)]
        for body in bodies:
            connection.data_received(request_bytes(body))
        is_held = not transport.is_reading()
        for _ in bodies:
            connection.answer(Answer(200, b"{}"))

        assert is_held
        assert transport.is_reading()
        assert [request.body for request in desk.taken] == bodies

    def test_a_client_that_reads_slowly_is_answered_when_it_has_read(self):
        desk, transport = FakeDesk(), FakeTransport()
        connection = Connection(desk)
        connection.connection_made(transport)
        connection.data_received(request_bytes(b"1") + request_bytes(b"2"))
        connection.pause_writing()
        connection.answer(Answer(200, b"{}"))
        taken_while_paused = len(desk.taken)
        connection.resume_writing()

        assert taken_while_paused == 1
        assert [request.body for request in desk.taken] == [b"1", b"2"]


class FakeDesk:
    def __init__(self) -> None:
        self.taken: list[Request] = []

    def take(self, connection: Connection, request: Request) -> None:
        self.taken.append(request)

    def opened(self, connection: Connection) -> None: ...

    def lost(self, connection: Connection) -> None: ...

    def next_request_number(self) -> int:
        return len(self.taken)


class FakeTransport(asyncio.Transport):
    is_reading_now = True

    def write(self, data) -> None: ...

    def is_closing(self) -> bool:
        return False

    def pause_reading(self) -> None:
        self.is_reading_now = False

    def resume_reading(self) -> None:
        self.is_reading_now = True

    def is_reading(self) -> bool:
        return self.is_reading_now


def chunked_request(body: bytes, chunk_bytes: int) -> bytes:
    head = f"POST {CHAT} HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    chunks = [body[start : start + chunk_bytes] for start in range(0, len(body), chunk_bytes)]
    return head + b"".join(b"%X;x=y\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks) + b"0\r\nTrailer: t\r\n\r\n"


class TestSlots:
    async def test_beyond_slots_and_queue_requests_are_refused_at_once(self):
        async with simulated(slots=0, queue=1) as (simulator, first), connected(simulator) as second:
            first.send(request_bytes(chat_body("first")))
            await until(simulator, lambda stats: stats.waiting == 1)
            refused = await second.call(chat_body("second"))
            simulator.change(replace(simulator.settings, slots=1))
            reply = await first.reply()
            retried = await second.call(chat_body("second"))

        assert refused.status == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json["error"]["code"] == "rate_limit_exceeded"
        assert (reply.status, retried.status) == (200, 200)
        assert simulator.stats().repeats == 0

    async def test_the_queue_is_first_come_first_served(self):
        async with simulated(slots=1) as (simulator, holder):
            holder.send(request_bytes(chat_body(simulate="stall")))
            await until(simulator, lambda stats: stats.working == 1)
            order: list[int] = []

            async def ask(number: int) -> None:
                async with connected(simulator) as client:
                    client.send(request_bytes(chat_body(f"number {number}")))
                    await until(simulator, lambda stats: stats.waiting > number)
                    started.set()
                    await client.reply()
                    order.append(number)

            async with asyncio.TaskGroup() as group:
                for number in range(4):
                    started = asyncio.Event()
                    group.create_task(ask(number))
                    await started.wait()
                holder.drop()

        assert order == [0, 1, 2, 3]

    async def test_no_more_than_the_slots_are_worked_on(self):
        async with simulated(slots=2, latency="1ms") as (simulator, _):

            async def ask(number: int) -> int:
                async with connected(simulator) as client:
                    return (await client.call(chat_body(f"number {number}"))).status

            most = 0

            def watch(stats) -> bool:
                nonlocal most
                most = max(most, stats.working)
                return stats.ok == 20

            watching = asyncio.create_task(simulator.wait_until(watch))
            statuses = await asyncio.gather(*(ask(number) for number in range(20)))
            stats = await watching

        assert set(statuses) == {200}
        assert most == 2
        assert stats.peak_in_flight > 2

    async def test_a_client_that_leaves_frees_its_slot_and_its_place(self):
        async with simulated(slots=1, latency="5m") as (simulator, working), connected(simulator) as waiting:
            working.send(request_bytes(chat_body("working")))
            await until(simulator, lambda stats: stats.working == 1)
            waiting.send(request_bytes(chat_body("waiting")))
            await until(simulator, lambda stats: stats.waiting == 1)

            waiting.drop()
            await until(simulator, lambda stats: stats.waiting == 0)
            simulator.change(replace(simulator.settings, latency="0"))
            working.drop()
            await until(simulator, lambda stats: stats.working == 0)
            async with connected(simulator) as client:
                reply = await client.call(chat_body("working"))

        stats = simulator.stats()
        assert reply.status == 200
        assert (stats.abandoned, stats.repeats, stats.repeats_paid) == (2, 1, 0)

    async def test_a_client_that_leaves_is_not_answered_when_its_time_comes(self):
        async with simulated(latency="20ms") as (simulator, leaver), connected(simulator) as client:
            leaver.send(request_bytes(chat_body("leaver")))
            await until(simulator, lambda stats: stats.in_flight == 1)
            leaver.drop()
            await until(simulator, lambda stats: stats.abandoned == 1)
            # Started later and as long: when it is answered, the time of the other is over.
            await client.call(chat_body("stayer"))

        stats = simulator.stats()
        assert (stats.total, stats.ok, stats.abandoned, stats.in_flight, stats.working) == (2, 1, 1, 0, 0)

    async def test_all_that_wait_are_let_through_at_once(self):
        async with simulated(slots=0) as (simulator, _):
            clients = [PlainClient(*await asyncio.open_connection("127.0.0.1", simulator.port)) for _ in range(300)]
            for number, client in enumerate(clients):
                client.send(request_bytes(chat_body(f"number {number}")))
            await until(simulator, lambda stats: stats.waiting == 300)
            simulator.change(replace(simulator.settings, slots=1))
            replies = [await client.reply() for client in clients]
            for client in clients:
                client.drop()

        assert {reply.status for reply in replies} == {200}
        assert simulator.stats().in_flight == 0


async def scripted(simulate: object, **settings: Any) -> tuple[Simulator, Reply]:
    async with simulated(**settings) as (simulator, client):
        return simulator, await client.call(chat_body(simulate=simulate))


class TestFaults:
    async def test_a_script_is_played_once_then_all_is_well(self):
        body = chat_body(simulate=["429(2s)", "ok", "500"])
        async with simulated() as (simulator, client):
            replies = [await client.call(body) for _ in range(5)]

        stats = simulator.stats()
        assert [reply.status for reply in replies] == [429, 200, 500, 200, 200]
        assert (stats.faulted, stats.ok, stats.repeats) == (2, 3, 2)
        assert stats.faults == {"429(2s)": 1, "500": 1}

    async def test_always_goes_on_for_ever(self):
        body = chat_body(simulate="always:400")
        async with simulated() as (simulator, client):
            replies = [await client.call(body) for _ in range(3)]

        assert [reply.status for reply in replies] == [400, 400, 400]
        assert simulator.stats().repeats == 0

    async def test_the_word_in_a_prompt_is_no_script(self):
        async with simulated() as (_, client):
            reply = await client.call(chat_body(metadata={"simulate": "always:500"}))

        assert reply.status == 200

    @pytest.mark.parametrize("script", [5, "nothing", ["429", "900"], "429(2 hours)"])
    async def test_a_script_that_does_not_fit_is_answered_400(self, script):
        _, reply = await scripted(script)

        assert reply.status == 400
        assert reply.json["error"]["param"] == "simulate"

    @pytest.mark.parametrize(
        ("fault", "header", "value"),
        [("429(2s)", "retry-after", "2"), ("503(1.2s)", "retry-after", "2"), ("429(50ms)", "retry-after-ms", "50")],
    )
    async def test_a_status_may_ask_for_a_wait(self, fault, header, value):
        _, reply = await scripted(fault)

        assert reply.status == int(fault[:3])
        assert reply.headers[header] == value

    @pytest.mark.parametrize(
        ("status", "kind"), [(400, "invalid_request_error"), (500, "server_error"), (529, "server_error")]
    )
    async def test_a_status_has_an_envelope(self, status, kind):
        _, reply = await scripted(str(status))

        assert reply.status == status
        assert reply.json["error"]["type"] == kind

    async def test_garbage_is_not_json(self):
        _, reply = await scripted("garbage")

        assert reply.status == 200
        with pytest.raises(json.JSONDecodeError):
            json.loads(reply.body)

    async def test_error200_is_an_error_with_status_200(self):
        simulator, reply = await scripted("error200")

        assert reply.status == 200
        assert "error" in reply.json
        assert simulator.stats().faulted == 1

    async def test_redirect_leads_elsewhere(self):
        _, reply = await scripted("redirect")

        assert (reply.status, reply.headers["location"]) == (302, "/v1/redirected")

    async def test_html_says_so(self):
        _, reply = await scripted("html")

        assert reply.headers["content-type"].startswith("text/html")
        assert reply.body.startswith(b"<!doctype html>")

    async def test_badutf8_cannot_be_decoded(self):
        _, reply = await scripted("badutf8")

        assert reply.body.startswith(b"{")
        with pytest.raises(UnicodeDecodeError):
            reply.body.decode()

    async def test_gzip_holds_the_good_answer_and_counts_as_one(self):
        simulator, reply = await scripted("gzip")

        body = chat_body(simulate="gzip")
        assert reply.headers["content-encoding"] == "gzip"
        assert expected_reply(body, CHAT).encode() in gzip.decompress(reply.body)
        assert (simulator.stats().ok, simulator.stats().faulted) == (1, 0)

    async def test_huge_is_valid_and_forty_mebibytes(self):
        _, reply = await scripted("huge")

        assert len(reply.body) == 40 * 1024 * 1024
        assert reply.json["object"] == "chat.completion"

    async def test_the_size_of_huge_can_be_set(self):
        _, reply = await scripted("huge", huge_bytes=3_000_000)

        assert len(reply.body) == 3_000_000

    async def test_reset_comes_before_the_answer(self):
        async with simulated() as (_, client):
            client.send(request_bytes(chat_body(simulate="reset")))
            with pytest.raises(ConnectionResetError):
                await client.rest()

    async def test_reset_mid_comes_within_the_body(self):
        async with simulated() as (_, client):
            client.send(request_bytes(chat_body(simulate="reset_mid")))
            status, headers = await client.head()
            with pytest.raises(ConnectionResetError):
                await asyncio.wait_for(client.reader.readexactly(int(headers["content-length"])), TIMEOUT_S)

        assert status == 200

    async def test_truncate_announces_more_than_it_sends(self):
        async with simulated() as (_, client):
            client.send(request_bytes(chat_body(simulate="truncate")))
            status, headers = await client.head()
            rest = await client.rest()

        assert status == 200
        assert 0 < len(rest) < int(headers["content-length"])

    async def test_stall_holds_its_slot_until_the_client_leaves(self):
        async with simulated(slots=1) as (simulator, client), connected(simulator) as other:
            client.send(request_bytes(chat_body(simulate=["stall"])))
            await until(simulator, lambda stats: stats.faulted == 1)
            other.send(request_bytes(chat_body("other")))
            await until(simulator, lambda stats: stats.waiting == 1)
            client.drop()
            reply = await other.reply()
            retried = await other.call(chat_body(simulate=["stall"]))

        stats = simulator.stats()
        assert (reply.status, retried.status) == (200, 200)
        assert (stats.faulted, stats.abandoned, stats.repeats, stats.working) == (1, 0, 0, 0)

    async def test_drip_sends_the_body_byte_by_byte(self):
        loop = asyncio.get_running_loop()
        async with simulated(drip_interval_s=0.02, slots=1) as (simulator, client):
            client.send(request_bytes(chat_body(simulate="drip")))
            status, _ = await client.head()
            started_at = loop.time()
            for _ in range(5):
                await asyncio.wait_for(client.reader.readexactly(1), TIMEOUT_S)
            elapsed_s = loop.time() - started_at
            client.drop()
            await until(simulator, lambda stats: stats.working == 0)

        assert status == 200
        assert elapsed_s >= 0.06

    async def test_drip_ends_with_the_whole_answer(self):
        _, reply = await scripted("drip", drip_interval_s=0.0)

        assert reply.json["object"] == "chat.completion"

    async def test_rates_are_met_and_the_same_seed_fails_alike(self):
        async def statuses(seed: int) -> list[int]:
            async with simulated(faults="429:0.2,500:10%", seed=seed) as (_, client):
                bodies = [chat_body(f"number {number}") for number in range(1000)]
                client.send(b"".join(map(request_bytes, bodies)))
                return [(await client.reply()).status for _ in bodies]

        first, same, other = await statuses(1), await statuses(1), await statuses(2)

        assert first == same
        assert first != other
        assert 150 <= first.count(429) <= 250
        assert 60 <= first.count(500) <= 140


class TestControl:
    async def test_stats_add_up(self):
        twice, flaky, away = chat_body("twice"), chat_body("flaky", simulate=["500", "503"]), chat_body("away")
        async with simulated(latency="0") as (simulator, client):
            for body in (twice, twice, twice, flaky, flaky, flaky):
                await client.call(body)
            simulator.change(replace(simulator.settings, latency="5m"))
            async with connected(simulator) as leaver:
                leaver.send(request_bytes(away))
                await until(simulator, lambda stats: stats.in_flight == 1)
            await until(simulator, lambda stats: stats.in_flight == 0)
            simulator.change(replace(simulator.settings, latency="0"))
            await client.call(away)
            shown = (await client.call(b"", "/__stats", method="GET")).json
            seen = (await client.call(b"", f"/__seen/{hashlib.sha256(flaky).hexdigest()}", method="GET")).json
            unseen = (await client.call(b"", f"/__seen/{'0' * 64}", method="GET")).json

        assert shown["total"] == 8 == shown["ok"] + shown["faulted"] + shown["abandoned"] + shown["in_flight"]
        assert shown["unique"] == 3
        assert (shown["ok"], shown["faulted"], shown["abandoned"]) == (5, 2, 1)
        # Two needless sends of `twice`, and one of `away`, whose first client had gone.
        assert (shown["repeats"], shown["repeats_paid"]) == (3, 2)
        assert shown["statuses"] == {"200": 5, "500": 1, "503": 1}
        assert seen == {"seen": 3, "ok": 1, "faulted": 2, "repeats": 0}
        assert unseen == {"seen": 0, "ok": 0, "faulted": 0, "repeats": 0}

    async def test_a_fault_after_a_repeat_allows_one_send_more(self):
        body = chat_body(simulate=["ok", "500", "ok"])
        async with simulated() as (simulator, client):
            for _ in range(3):
                await client.call(body)

        assert simulator.seen(body)._asdict() == {"seen": 3, "ok": 2, "faulted": 1, "repeats": 1}

    async def test_reset_starts_counting_from_zero_even_with_a_request_under_way(self):
        async with simulated(slots=0) as (simulator, held), connected(simulator) as client:
            held.send(request_bytes(chat_body("held")))
            await until(simulator, lambda stats: stats.waiting == 1)
            reset = await client.call(b"", "/__reset")
            simulator.change(replace(simulator.settings, slots=1))
            await held.reply()
            await client.call(chat_body("new"))

        stats = simulator.stats()
        assert reset.status == 200
        assert (stats.total, stats.unique, stats.ok, stats.in_flight) == (1, 1, 1, 0)

    @pytest.mark.parametrize("digest", ["", "00", "z" * 64])
    async def test_seen_wants_a_digest(self, digest):
        async with simulated() as (_, client):
            reply = await client.call(b"", f"/__seen/{digest}", method="GET")

        assert reply.status == 400

    async def test_settings_change_over_the_wire(self):
        wanted = {"slots": 3, "queue": 4, "latency": "1ms", "faults": "500:1"}
        async with simulated() as (simulator, client):
            reply = await client.call(json.dumps(wanted).encode(), "/__control")
            faulted = await client.call(chat_body())
            unlimited = await client.call(b'{"slots": null}', "/__control")

        assert reply.json == {**wanted, "is_down": False}
        assert faulted.status == 500
        assert unlimited.json["slots"] is None
        assert simulator.settings.queue == 4

    @pytest.mark.parametrize(
        "body",
        [
            b"",
            b"[]",
            b'{"slot": 1}',
            b'{"slots": -1}',
            b'{"latency": "soon"}',
            b'{"faults": "x:1"}',
            b'{"refuse_ms": -1}',
        ],
    )
    async def test_a_change_that_does_not_fit_changes_nothing(self, body):
        async with simulated() as (simulator, client):
            before = simulator.settings
            reply = await client.call(body, "/__control")

        assert reply.status == 400
        assert simulator.settings == before

    async def test_down_answers_503_to_all_until_it_is_up(self):
        async with simulated() as (simulator, client):
            await client.call(b'{"down": true}', "/__control")
            chat, models = await client.call(chat_body()), await client.call(b"", "/v1/models", method="GET")
            await client.call(b'{"down": false}', "/__control")
            again = await client.call(chat_body())

        assert (chat.status, models.status, again.status) == (503, 503, 200)
        assert simulator.stats().repeats == 0

    async def test_refuse_hangs_up_and_comes_back_by_itself(self):
        async with simulated(latency="5m") as (simulator, client), connected(simulator) as controller:
            client.send(request_bytes(chat_body("under way")))
            await until(simulator, lambda stats: stats.in_flight == 1)
            answered = await controller.call(b'{"refuse_ms": 500, "latency": "0"}', "/__control")
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await client.reply()
            with pytest.raises(ConnectionError):
                await asyncio.open_connection("127.0.0.1", simulator.port)
            reply = await reconnect_and_call(simulator, chat_body("under way"))

        stats = simulator.stats()
        assert (answered.status, reply.status) == (200, 200)
        assert (stats.faulted, stats.repeats, stats.in_flight) == (1, 0, 0)


async def reconnect_and_call(simulator: Simulator, body: bytes) -> Reply:
    deadline_at = asyncio.get_running_loop().time() + TIMEOUT_S
    while True:
        try:
            async with connected(simulator) as client:
                return await client.call(body)
        except ConnectionError:
            assert asyncio.get_running_loop().time() < deadline_at


class TestRules:
    @pytest.mark.parametrize(("text", "seconds"), [("0", 0.0), ("200ms", 0.2), ("1.5s", 1.5), ("2m", 120.0)])
    def test_durations(self, text, seconds):
        assert parse_duration(text) == pytest.approx(seconds)

    @pytest.mark.parametrize("text", ["", "5", "ms", "-1s", "1h", "1 s", "nan", "1e3s", "0x1s"])
    def test_a_duration_without_number_or_unit_is_refused(self, text):
        with pytest.raises(UsageError):
            parse_duration(text)

    def test_a_constant_latency_is_constant(self):
        assert parse_latency("200ms").draw_s(random.Random(1)) == pytest.approx(0.2)

    def test_a_uniform_latency_stays_between_its_bounds(self):
        latency, rng = parse_latency("200ms..800ms"), random.Random(1)
        drawn = [latency.draw_s(rng) for _ in range(1000)]

        assert 0.2 <= min(drawn) < 0.22
        assert 0.78 < max(drawn) <= 0.8

    def test_a_lognormal_latency_has_its_median_and_a_long_tail(self):
        latency, rng = parse_latency("lognormal:200ms,0.4"), random.Random(1)
        drawn = [latency.draw_s(rng) for _ in range(5000)]

        assert statistics.median(drawn) == pytest.approx(0.2, rel=0.05)
        assert max(drawn) > 0.6

    @pytest.mark.parametrize(
        "text",
        ["", "soon", "1s..", "..1s", "2s..1s", "lognormal:1s", "lognormal:1s,x", "lognormal:1s,-1", "lognormal:1s,nan"],
    )
    def test_a_latency_of_another_form_is_refused(self, text):
        with pytest.raises(UsageError):
            parse_latency(text)

    def test_fault_rates_are_running_sums(self):
        rates = parse_fault_rates("429(2s):0.01, reset:2%, 500:0")

        assert [fault.name for fault in rates.faults] == ["429(2s)", "reset"]
        assert rates.thresholds == pytest.approx((0.01, 0.03))

    @pytest.mark.parametrize("text", ["0.05", "5%"])
    def test_a_total_rate_is_spread_over_the_usual_faults(self, text):
        rates = parse_fault_rates(text)

        assert [fault.name for fault in rates.faults] == ["429(50ms)", "500", "503", "reset", "truncate"]
        assert rates.thresholds[-1] == pytest.approx(0.05)

    @pytest.mark.parametrize("text", ["", "0", "0%", "429:0"])
    def test_no_rate_means_no_fault(self, text):
        rng = random.Random(1)

        assert all(parse_fault_rates(text).draw(rng) is None for _ in range(100))

    @pytest.mark.parametrize(
        "text", ["x", "2", "101%", "-1", "nan", "429:", "429:0.6,500:0.6", "200:0.1", "boom:0.1", "429:0.1,"]
    )
    def test_fault_rates_of_another_form_are_refused(self, text):
        with pytest.raises(UsageError):
            parse_fault_rates(text)

    def test_every_kind_has_a_name(self):
        for kind in FaultKind:
            name = "500" if kind is FaultKind.STATUS else kind.value

            assert parse_fault(name).kind is kind

    @pytest.mark.parametrize("body", [b'{"simulate": null}', b"{}", b"{", b'{"a": {"simulate": "reset"}}'])
    def test_a_body_without_the_key_has_no_script(self, body):
        assert parse_script(body) is None
