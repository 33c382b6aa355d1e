"""xAI's words for ours: errors, kinds of requests, and a finished line as xAI shows it. Pure.

Source: xAI's Batches REST API, and what its clients read.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal, Self

import msgspec
from msgspec import UNSET, Raw, UnsetType

from batchrunner.api.envelope import ErrorBody, Refusal
from batchrunner.api.xai_chat import chat_of_response
from batchrunner.lines import CHAT_COMPLETIONS
from batchrunner.models import LineCode

CHAT, IMAGE, VIDEO = "chat_get_completion", "image_generation", "video_generation"
RESPONSES = "/v1/responses"
_EDITS = "/v1/videos/edits"
# What a request is called, and where it goes.
URLS: Mapping[str, str] = MappingProxyType(
    {
        CHAT: CHAT_COMPLETIONS,
        "responses": RESPONSES,
        IMAGE: "/v1/images/generations",
        "image_edit": "/v1/images/edits",
        VIDEO: "/v1/videos/generations",
        "video_extension": "/v1/videos/extensions",
    }
)
_UNKNOWN, _INVALID, _DEADLINE, _CANCELLED = 2, 3, 4, 1
_NOT_FOUND, _DENIED, _EXHAUSTED, _PRECONDITION, _ABORTED = 5, 7, 8, 9, 10
_INTERNAL, _UNAVAILABLE, _DATA_LOSS, _UNAUTHENTICATED = 13, 14, 15, 16
# By gRPC's numbers, in which xAI says how a request failed.
_CODES: Mapping[str, int] = MappingProxyType(
    {
        LineCode.REQUEST_TIMEOUT: _DEADLINE,
        LineCode.BATCH_EXPIRED: _DEADLINE,
        LineCode.BATCH_CANCELLED: _CANCELLED,
        LineCode.CONNECTION_ERROR: _UNAVAILABLE,
        LineCode.INVALID_RESPONSE: _INTERNAL,
        LineCode.OUTCOME_UNKNOWN: _UNKNOWN,
        LineCode.POISON_REQUEST: _ABORTED,
        LineCode.INPUT_LOST: _DATA_LOSS,
        LineCode.MODEL_NOT_SERVED: _NOT_FOUND,
    }
)
_STATUSES: Mapping[int, int] = MappingProxyType(
    {
        401: _UNAUTHENTICATED,
        403: _DENIED,
        404: _NOT_FOUND,
        408: _DEADLINE,
        409: _ABORTED,
        429: _EXHAUSTED,
        503: _UNAVAILABLE,
        504: _DEADLINE,
    }
)
_WORDS: Mapping[int, str] = MappingProxyType(
    {
        _INVALID: "invalid-argument",
        _DEADLINE: "deadline-exceeded",
        _NOT_FOUND: "not-found",
        _DENIED: "permission-denied",
        _EXHAUSTED: "resource-exhausted",
        _PRECONDITION: "failed-precondition",
        _ABORTED: "aborted",
        _INTERNAL: "internal",
        _UNAVAILABLE: "unavailable",
        _UNAUTHENTICATED: "unauthenticated",
    }
)


class XaiError(ErrorBody, frozen=True):
    """The body of every answer that is an error. Source: xAI's REST API."""

    code: str
    error: str

    @classmethod
    def of(cls, refusal: Refusal) -> Self:
        """Say what was refused."""
        number = _PRECONDITION if refusal.status == 409 else grpc_code(refusal.status)
        return cls(_WORDS[number], refusal.message)


class XaiFailure(msgspec.Struct, frozen=True):
    """How a request failed, by gRPC's number; 1 is one that was cancelled."""

    code: int
    message: str


class XaiOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """Either the answer, under the key of its kind, or how it failed."""

    response: dict[str, Raw] | UnsetType = UNSET
    error: XaiFailure | UnsetType = UNSET


class XaiResult(msgspec.Struct, frozen=True, kw_only=True):
    """One finished request. How it failed is told twice, for clients differ in where they look."""

    batch_request_id: str | None
    batch_result: XaiOutcome
    error_message: str | UnsetType = UNSET


State = Literal["pending", "succeeded", "failed", "cancelled"]


class XaiRequestMetadata(msgspec.Struct, frozen=True, kw_only=True):
    """One request and how it stands. When it was finished is not kept for each; `finish_time` is null."""

    batch_request_id: str
    endpoint: str
    model: str
    state: State
    create_time: str
    finish_time: str | None = None


class _Answer(msgspec.Struct):
    status_code: int
    body: Raw


class _Error(msgspec.Struct):
    code: str | None = None
    message: str | None = None


class _Line(msgspec.Struct):
    custom_id: str | None
    response: _Answer | None
    error: _Error | None


class _Told(msgspec.Struct):
    message: str | None = None


class _Refused(_Told):
    error: _Told | str | None = None


class _Shape(msgspec.Struct):
    kind: Any = msgspec.field(name="object", default=None)
    data: Any = None
    video: Any = None


_read_line = msgspec.json.Decoder(_Line).decode
_read_refused = msgspec.json.Decoder(_Refused).decode
_read_shape = msgspec.json.Decoder(_Shape).decode


def grpc_code(status: int) -> int:
    """Give gRPC's number for an HTTP status that is no success."""
    return _STATUSES.get(status, _INVALID if status < 500 else _INTERNAL)


def url_of(kind: str, body: Raw) -> str:
    """Tell where a request goes: a video that is made of another one is an edit."""
    if kind != VIDEO:
        return URLS[kind]
    try:
        return _EDITS if _read_shape(body).video is not None else URLS[VIDEO]
    except msgspec.DecodeError:
        return URLS[VIDEO]


def result_of(line: bytes, url: str | None) -> XaiResult:
    """Show a finished line, whose request went to `url`; None where nobody knows any more."""
    found = _read_line(line)
    if found.response is not None and 200 <= found.response.status_code < 300:
        body = found.response.body
        key = _key_of(url) if url is not None else _guessed_key(body)
        if key == CHAT:
            body = chat_of_response(body)
        return XaiResult(batch_request_id=found.custom_id, batch_result=XaiOutcome(response={key: body}))
    failure = _failure_of(found)
    return XaiResult(
        batch_request_id=found.custom_id, batch_result=XaiOutcome(error=failure), error_message=failure.message
    )


def _failure_of(line: _Line) -> XaiFailure:
    if line.response is not None:
        status = line.response.status_code
        return XaiFailure(grpc_code(status), _said(line.response.body) or f"The upstream answered HTTP {status}.")
    error = line.error or _Error()
    # Codes that are none of these are those of lines that were refused before they were sent.
    return XaiFailure(_CODES.get(error.code or "", _INVALID), error.message or error.code or "")


def _said(body: Raw) -> str | None:
    """Give what an upstream says of its refusal, in any of the usual shapes."""
    try:
        found = _read_refused(body)
    except (msgspec.DecodeError, RecursionError):
        return None
    return (found.error.message if isinstance(found.error, _Told) else found.error) or found.message


def _key_of(url: str) -> str:
    if url.startswith("/v1/images/"):
        return IMAGE
    return VIDEO if url.startswith("/v1/videos") else CHAT


def _guessed_key(body: Raw) -> str:
    """Tell an answer's kind by what it looks like."""
    try:
        shape = _read_shape(body)
    except (msgspec.DecodeError, RecursionError):
        return CHAT
    if shape.video is not None or shape.kind == "video":
        return VIDEO
    first = shape.data[0] if isinstance(shape.data, list) and shape.data else None
    return IMAGE if isinstance(first, dict) and ("url" in first or "b64_json" in first) else CHAT
