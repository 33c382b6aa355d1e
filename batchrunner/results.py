"""The lines of output and error files, made by joining bytes, and what is read from an answer on the way.

Source: OpenAI's request output object: id, custom_id, response {status_code, request_id, body}, error {code, message}.
"""

from __future__ import annotations

from hashlib import blake2b

import msgspec
import orjson
from msgspec import Raw, Struct

from batchrunner.models import NO_USAGE, BatchId, LineCode, Usage

_TOKENS_MAX = 2**53


class _CachedTokens(Struct, gc=False):
    cached_tokens: int | None = None


class _ReasoningTokens(Struct, gc=False):
    reasoning_tokens: int | None = None


class _Usage(Struct, gc=False):
    """Usage as chat, completions and embeddings report it (prompt, completion) and as Responses does (input, output)."""

    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None
    prompt_tokens_details: _CachedTokens | None = None
    completion_tokens_details: _ReasoningTokens | None = None
    input_tokens_details: _CachedTokens | None = None
    output_tokens_details: _ReasoningTokens | None = None


class _Reply(Struct, gc=False):
    usage: _Usage | None = None
    error: Raw = Raw(b"null")


class _LooseReply(Struct, gc=False):
    usage: Raw = Raw(b"null")
    error: Raw = Raw(b"null")
    choices: Raw = Raw(b"null")
    data: Raw = Raw(b"null")
    output: Raw = Raw(b"null")


class ReplyFacts(Struct, frozen=True, gc=False):
    """What an answer with status 2xx says of itself: its tokens, and whether it is an error after all."""

    usage: Usage = NO_USAGE
    has_error: bool = False


_decode_reply = msgspec.json.Decoder(_Reply).decode
_decode_loose = msgspec.json.Decoder(_LooseReply).decode
_decode_usage = msgspec.json.Decoder(_Usage).decode
_NULL = b"null"
_PLAIN = ReplyFacts()


def reply_facts(body: bytes) -> ReplyFacts | None:
    """Read an answer's facts in one typed pass; None if it is not valid UTF-8 JSON. Never raises."""
    try:
        reply = _decode_reply(body)
        if not body.isascii():
            body.decode()
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return _loose_facts(body)
    if bytes(reply.error) != _NULL:
        return _loose_facts(body)
    return ReplyFacts(_sum(reply.usage)) if reply.usage is not None else _PLAIN


def _loose_facts(body: bytes) -> ReplyFacts | None:
    """The slow way, for answers that do not fit the usual types."""
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    try:
        reply = _decode_loose(body)
    except (msgspec.DecodeError, RecursionError):
        # Valid JSON, but no object: an array, a string or a number.
        return _PLAIN
    has_error = bytes(reply.error) != _NULL and all(bytes(part) == _NULL for part in (reply.choices, reply.data, reply.output))
    try:
        usage = _sum(_decode_usage(reply.usage))
    except (msgspec.DecodeError, RecursionError):
        usage = NO_USAGE
    return ReplyFacts(usage, has_error)


def _sum(usage: _Usage) -> Usage:
    cached = usage.prompt_tokens_details or usage.input_tokens_details
    reasoning = usage.completion_tokens_details or usage.output_tokens_details
    return Usage(
        _bounded(usage.prompt_tokens or usage.input_tokens),
        _bounded(cached.cached_tokens) if cached is not None else 0,
        _bounded(usage.completion_tokens or usage.output_tokens),
        _bounded(reasoning.reasoning_tokens) if reasoning is not None else 0,
    )


def _bounded(tokens: int | None) -> int:
    """Bring a count into a range that every sum can hold; a peer may say anything."""
    return min(max(tokens or 0, 0), _TOKENS_MAX)


class ResultLines:
    """Makes the finished lines of one batch. Ids are a keyed hash of the line number: the same at each sealing."""

    __slots__ = ("_key",)

    def __init__(self, batch_id: BatchId) -> None:
        self._key = blake2b(batch_id.encode(), digest_size=32).digest()

    def _id(self, line_number: int) -> bytes:
        return blake2b(b"%d" % line_number, digest_size=16, key=self._key).hexdigest().encode()

    def answered(
        self, line_number: int, custom_id: str | None, status: int, request_id: str | None, body: bytes
    ) -> bytes:
        """Give the line of an answer, whatever its status; its body is spliced in as it came if it is one line of JSON."""
        return b"".join(
            (
                b'{"id":"batch_req_',
                self._id(line_number),
                b'","custom_id":',
                orjson.dumps(custom_id),
                b',"response":',
                _response(status, request_id, body),
                b',"error":null}\n',
            )
        )

    def failed(
        self,
        line_number: int,
        custom_id: str | None,
        *,
        code: LineCode | str | None,
        message: str,
        status: int | None = None,
        request_id: str | None = None,
        body: bytes = b"",
    ) -> bytes:
        """Give the line of a failure. With `code` None the answer is the failure: its `error` is null, as OpenAI has it."""
        if code is None and status is not None:
            return self.answered(line_number, custom_id, status, request_id, body if _is_json(body) else _quoted(body))
        response = _NULL
        if status is not None:
            response = _response(status, request_id, body if _is_json(body) else _quoted(body))
        return b"".join(
            (
                b'{"id":"batch_req_',
                self._id(line_number),
                b'","custom_id":',
                orjson.dumps(custom_id),
                b',"response":',
                response,
                b',"error":',
                orjson.dumps({"code": str(code or LineCode.INVALID_RESPONSE), "message": message}),
                b"}\n",
            )
        )


def _response(status: int, request_id: str | None, body: bytes) -> bytes:
    """The `response` object around a body of valid JSON, which is compacted only when it has more than one line."""
    if b"\n" in body or b"\r" in body:
        body = _compact(body)
    return b'{"status_code":%d,"request_id":%b,"body":%b}' % (status, orjson.dumps(request_id), body)


def _compact(body: bytes) -> bytes:
    """Bring JSON to one line; line breaks in JSON stand only between its parts, so numbers keep their digits."""
    return b" ".join(part.strip() for part in body.strip().splitlines())


def _is_json(body: bytes) -> bool:
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True


def _quoted(body: bytes) -> bytes:
    """A body that is not JSON, as a JSON string."""
    return orjson.dumps(body.decode(errors="replace"))
