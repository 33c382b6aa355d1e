"""The lines of output and error files, made by joining bytes, and what is read from an answer on the way.

Source: OpenAI's request output object: id, custom_id, response {status_code, request_id, body}, error {code, message}.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Annotated

import msgspec
import orjson
from msgspec import Meta, Raw, Struct

from batchrunner.models import NO_USAGE, BatchId, LineProblem, Usage

# A count that no answer can have; whoever reports more, or less than none, is not believed.
_TOKENS_MAX = 1 << 40
_NULL = Raw(b"null")
_NO_RESPONSE = (b"null",)

_Tokens = Annotated[int, Meta(ge=0, le=_TOKENS_MAX)]


class _InputDetails(Struct, gc=False):
    cached_tokens: _Tokens | None = None


class _OutputDetails(Struct, gc=False):
    reasoning_tokens: _Tokens | None = None


class _Usage(Struct, gc=False):
    """Tokens as chat, completions and embeddings report them (prompt, completion) and as Responses does (input,
    output).
    """

    prompt_tokens: _Tokens | None = None
    completion_tokens: _Tokens | None = None
    prompt_tokens_details: _InputDetails | None = None
    completion_tokens_details: _OutputDetails | None = None
    input_tokens: _Tokens | None = None
    output_tokens: _Tokens | None = None
    input_tokens_details: _InputDetails | None = None
    output_tokens_details: _OutputDetails | None = None


class _Reply(Struct, gc=False):
    usage: _Usage | None = None
    error: Raw = _NULL


class _LooseReply(Struct, gc=False):
    usage: Raw = _NULL
    error: Raw = _NULL
    choices: Raw = _NULL
    data: Raw = _NULL
    output: Raw = _NULL


class ReplyFacts(Struct, frozen=True, gc=False):
    """What a 2xx answer says of itself: its tokens, and whether it is an error after all."""

    usage: Usage = NO_USAGE
    has_error: bool = False


_NO_FACTS = ReplyFacts()
_decode_reply = msgspec.json.Decoder(_Reply).decode
_decode_loose = msgspec.json.Decoder(_LooseReply).decode
_decode_object = msgspec.json.Decoder(dict[str, Raw]).decode
_decode_tokens = msgspec.json.Decoder(_Tokens).decode
_decode_raw = msgspec.json.Decoder(Raw).decode


def reply_facts(body: bytes) -> ReplyFacts | None:
    """Read the facts of a 2xx answer in one typed pass; None if it is not JSON in valid UTF-8. Never raises."""
    try:
        reply = _decode_reply(body)
        if not body.isascii():
            body.decode()
    except (ValueError, RecursionError):
        return _loose_facts(body) if is_json(body) else None
    if reply.error != _NULL:
        return _loose_facts(body)
    return ReplyFacts(_usage(reply.usage)) if reply.usage is not None else _NO_FACTS


def is_json(body: bytes) -> bool:
    """Tell whether the bytes are one JSON value in valid UTF-8."""
    try:
        _decode_raw(body)
        if not body.isascii():
            body.decode()
    except (ValueError, RecursionError):
        return False
    return True


def _usage(given: _Usage) -> Usage:
    inputs = given.prompt_tokens_details or given.input_tokens_details
    outputs = given.completion_tokens_details or given.output_tokens_details
    return Usage(
        given.prompt_tokens or given.input_tokens or 0,
        (inputs.cached_tokens or 0) if inputs is not None else 0,
        given.completion_tokens or given.output_tokens or 0,
        (outputs.reasoning_tokens or 0) if outputs is not None else 0,
    )


def _loose_facts(body: bytes) -> ReplyFacts:
    """Read valid JSON of unusual types part by part: what does not fit counts as not reported."""
    try:
        reply = _decode_loose(body)
    except msgspec.ValidationError:
        # An array, a string or a number has neither usage nor error.
        return _NO_FACTS
    has_answer = any(part != _NULL for part in (reply.choices, reply.data, reply.output))
    usage = _parts(reply.usage)
    inputs = _parts(usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or _NULL)
    outputs = _parts(usage.get("completion_tokens_details") or usage.get("output_tokens_details") or _NULL)
    return ReplyFacts(
        Usage(
            _tokens(usage, "prompt_tokens") or _tokens(usage, "input_tokens"),
            _tokens(inputs, "cached_tokens"),
            _tokens(usage, "completion_tokens") or _tokens(usage, "output_tokens"),
            _tokens(outputs, "reasoning_tokens"),
        ),
        has_error=reply.error != _NULL and not has_answer,
    )


def _parts(value: Raw) -> dict[str, Raw]:
    try:
        return _decode_object(value)
    except msgspec.DecodeError:
        return {}


def _tokens(parts: dict[str, Raw], name: str) -> int:
    try:
        return _decode_tokens(parts.get(name, _NULL))
    except msgspec.DecodeError:
        return 0


class ResultLines:
    """Makes the finished lines of one batch. A line's id is a hash of batch and number: the same at each sealing."""

    __slots__ = ("_hash",)

    def __init__(self, batch_id: BatchId) -> None:
        # A copy of a begun hash costs half of what beginning one does.
        self._hash = blake2b(batch_id.encode() + b"/", digest_size=16)

    def id(self, line_number: int) -> str:
        """Give the id of a result line. Source: OpenAI's `batch_req_` and 32 hex digits."""
        begun = self._hash.copy()
        begun.update(b"%d" % line_number)
        return "batch_req_" + begun.hexdigest()

    def answered(
        self, line_number: int, custom_id: str | None, status: int, request_id: str | None, body: bytes
    ) -> bytes:
        """Give the line of an answer, whatever its status. A 2xx body must be JSON, as `reply_facts` has found.

        It is spliced in as it came, less line breaks. Another status may come with any body: what is no JSON becomes a
        JSON string.
        """
        spliced = one_line(body) if 200 <= status < 300 else as_json(body)
        return self._line(line_number, custom_id, _response(status, request_id, spliced), b"null")

    def failed(
        self,
        line_number: int,
        custom_id: str | None,
        *,
        code: str | None,
        message: str,
        status: int | None = None,
        request_id: str | None = None,
        body: bytes = b"",
    ) -> bytes:
        """Give the line of a failure: with an answer if there was one (`status`), and with `code` None by that alone.

        Source: an answer that is not 2xx has `error: null`, OpenAI's error files as observed.
        """
        response = _NO_RESPONSE if status is None else _response(status, request_id, as_json(body))
        error = b"null" if code is None else b'{"code":%b,"message":%b}' % (_text(code), _text(message))
        return self._line(line_number, custom_id, response, error)

    def refused(self, problem: LineProblem) -> bytes:
        """Give the line of a request that was refused before anything was sent; `line` is where it stands in the input.

        Source: code, message, param, line of OpenAI's Batch object, `errors.data[]`.
        """
        error = b'{"code":%b,"message":%b,"param":%b,"line":%d}' % (
            _text(problem.code),
            _text(problem.message),
            _text(problem.param),
            problem.line_number or 1,
        )
        return self._line(problem.line_number or 0, problem.custom_id, _NO_RESPONSE, error)

    def _line(self, line_number: int, custom_id: str | None, response: tuple[bytes, ...], error: bytes) -> bytes:
        # Joined once: an answer of 2 MB that is formatted takes fifty times as long, and more than twice the memory.
        begun = (b'{"id":"', self.id(line_number).encode(), b'","custom_id":', _text(custom_id), b',"response":')
        return b"".join((*begun, *response, b',"error":', error, b"}\n"))


def one_line(body: bytes) -> bytes:
    """Bring valid JSON to one line. Parts keep their bytes, so no number loses a digit."""
    if b"\n" not in body and b"\r" not in body:
        return body
    try:
        return msgspec.json.format(body, indent=-1)
    except RecursionError:
        # Outside of its strings, JSON may have a space wherever it has a line break, and inside there is none.
        return body.replace(b"\r", b" ").replace(b"\n", b" ")


def as_json(body: bytes) -> bytes:
    """Give any bytes as one line of JSON: as they are, or as a string with what is no UTF-8 replaced."""
    return one_line(body) if is_json(body) else orjson.dumps(body.decode(errors="replace"))


def _response(status: int, request_id: str | None, body: bytes) -> tuple[bytes, ...]:
    return (b'{"status_code":%d,"request_id":' % status, _text(request_id), b',"body":', body, b"}")


def _text(text: str | None) -> bytes:
    """Give a JSON string; a peer's header may hold lone surrogates, which no JSON can."""
    try:
        return orjson.dumps(text)
    except orjson.JSONEncodeError:
        return orjson.dumps(str(text).encode(errors="replace").decode())
