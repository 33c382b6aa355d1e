"""The error envelope: what is refused, in the words and with the four keys of the OpenAI API; errors of the tree map
to it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Self

import msgspec

from batchrunner.errors import BatchrunnerError, CallerError, IdempotencyRunning, NotFound, PeerError

INVALID_REQUEST = "invalid_request_error"
SERVER_ERROR = "server_error"
# Source: contracts of the SDKs: longer waits make old ones ignore the header and new ones give up.
RETRY_AFTER_MAX_S = 60
UNAVAILABLE_RETRY_S = 5.0
# The SDKs send these again unless they are told that nothing will change.
_RETRIED_BY_SDKS = frozenset({408, 409, 429})
_encode = msgspec.json.Encoder().encode
UNPARSEABLE_JSON = (
    "We could not parse the JSON body of your request. (HINT: This likely means you aren't using your HTTP library "
    "correctly. The API expects a JSON payload, but what was sent was not valid JSON.)"
)
_SERVER_FAULT = "The server had an error while processing your request. Sorry about that!"


class ErrorMembers(msgspec.Struct, frozen=True):
    """What an error says; all four keys are always there."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """The body of an answer that is an error, in one dialect."""

    @classmethod
    def of(cls, refusal: Refusal) -> Self:
        """Say what was refused."""
        raise NotImplementedError


class ErrorEnvelope(ErrorBody, frozen=True):
    """Source: the OpenAI API."""

    error: ErrorMembers

    @classmethod
    def of(cls, refusal: Refusal) -> Self:
        """Say what was refused."""
        return cls(ErrorMembers(refusal.message, refusal.kind, refusal.param, refusal.code))


class Refusal(Exception):
    """An error answer on its way out: raise it anywhere below a handler.

    `code` None is a null on the wire. `retry_after_s` sets Retry-After; without it a 409 or 413 is final.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = INVALID_REQUEST,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s
        self.extra_headers = headers or {}

    def body(self, kind: type[ErrorBody] = ErrorEnvelope) -> bytes:
        """Give the JSON of the answer."""
        return _encode(kind.of(self))

    def headers(self) -> dict[str, str]:
        """Give what tells an SDK whether and when to try again, and the refusal's own headers."""
        headers = dict(self.extra_headers)
        if self.retry_after_s is not None:
            wait_s = min(max(self.retry_after_s, 0.0), RETRY_AFTER_MAX_S)
            headers["retry-after"] = str(math.ceil(wait_s))
            headers["retry-after-ms"] = str(math.ceil(wait_s * 1000))
        elif self.status in _RETRIED_BY_SDKS or self.status == 413:
            headers["x-should-retry"] = "false"
        return headers


def refusal_of(error: BatchrunnerError) -> Refusal:
    """Map an error of the tree by its status: what the caller may know of it, and when to come again."""
    if isinstance(error, IdempotencyRunning):
        # The one conflict that ends by itself.
        return Refusal(error.message, status=error.http_status, code=error.code, retry_after_s=1.0)
    if isinstance(error, CallerError):
        kind = "requests" if error.http_status == 429 else INVALID_REQUEST
        return Refusal(error.message, status=error.http_status, kind=kind, code=error.code)
    if error.http_status == 503:
        # What a disk or a database says is for the log; the code says enough to whoever calls.
        message = f"The server cannot do this now ({error.code}). {error.hint}"
        return Refusal(message, status=503, kind=SERVER_ERROR, code=error.code, retry_after_s=UNAVAILABLE_RETRY_S)
    status = error.http_status if isinstance(error, PeerError) else 500
    return Refusal(_SERVER_FAULT, status=status, kind=SERVER_ERROR, code=error.code)


def server_fault() -> Refusal:
    """What a bug answers; the log has the traceback under the same request id."""
    return Refusal(_SERVER_FAULT, status=500, kind=SERVER_ERROR)


def invalid_value(param: str, value: str, supported: Sequence[str]) -> Refusal:
    """A value that is none of those supported."""
    message = f"Invalid value: '{value}'. Supported values are: {_listed(supported)}."
    return Refusal(message, param=param, code="invalid_value")


def _listed(values: Sequence[str]) -> str:
    """List values as the API does: `'a', 'b', and 'c'`."""
    quoted = [f"'{each}'" for each in values]
    return " and ".join(quoted) if len(quoted) < 3 else f"{', '.join(quoted[:-1])}, and {quoted[-1]}"


def invalid_type(param: str, expected: str, got: str) -> Refusal:
    """A value of another JSON type."""
    message = f"Invalid type for '{param}': expected {expected}, but got {got} instead."
    return Refusal(message, param=param, code="invalid_type")


def missing_parameter(param: str) -> Refusal:
    """A field that has to be there."""
    return Refusal(f"Missing required parameter: '{param}'.", param=param, code="missing_required_parameter")


def unknown_parameter(param: str) -> Refusal:
    """A field that the strict API does not know."""
    return Refusal(f"Unknown parameter: '{param}'.", param=param, code="unknown_parameter")


@contextmanager
def refused_if_missing(refusal: Refusal) -> Iterator[None]:
    """Answer so when what the block looks for is not there."""
    try:
        yield
    except NotFound:
        raise refusal from None


def no_such_file(file_id: str) -> Refusal:
    """Source: recorded answer of the OpenAI API to an unknown file id."""
    return Refusal(f"No such File object: {file_id}", status=404, param="id")


def no_such_upload(upload_id: str) -> Refusal:
    """An unknown upload id, in the words used for files."""
    return Refusal(f"No such Upload object: {upload_id}", status=404, param="id")


def no_such_part(part_id: str) -> Refusal:
    """A part of an upload that is over."""
    return Refusal(f"No such UploadPart object: {part_id}", status=404, param="id")


def no_such_batch(batch_id: str) -> Refusal:
    """Source: recorded answer of the OpenAI API to an unknown batch id."""
    return Refusal(f"No batch found with id '{batch_id}'.", status=404)


def no_such_route(method: str, path: str) -> Refusal:
    """Source: the OpenAI API's answer to an unknown path."""
    return Refusal(f"Invalid URL ({method} {path})", status=404)


def wrong_method(method: str, path: str, allowed: Sequence[str]) -> Refusal:
    """Source: recorded answer of the OpenAI API to a known path with another method."""
    message = f"Not allowed to {method} on {path}. (HINT: Perhaps you meant to use a different HTTP method?)"
    return Refusal(message, status=405, headers={"allow": ", ".join(allowed)})


def body_too_large(size_bytes_max: int) -> Refusal:
    """A body above the cap of its route; sending it again will not help."""
    return Refusal(f"The request body is larger than the maximum of {size_bytes_max} bytes.", status=413)


def unparseable_json() -> Refusal:
    """Source: the OpenAI API's answer to a body that is no JSON."""
    return Refusal(UNPARSEABLE_JSON)
