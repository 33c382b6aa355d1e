"""What a batch is made of: which dialect's the body of a create is, how it has to be, and how it becomes a NewBatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta, Raw

from batchrunner.adding import judge
from batchrunner.api.envelope import Refusal, invalid_value, missing_parameter, unknown_parameter
from batchrunner.api.file_object import BATCH, ExpiresAfter
from batchrunner.api.files import BlobSink, new_file
from batchrunner.api.http import LONG_BODY_BYTES, Call
from batchrunner.api.webhooks import Url, check_url
from batchrunner.errors import NotFound, UsageError
from batchrunner.models import (
    CLUB,
    OPENAI,
    OPENAI_STRICT,
    XAI,
    Batch,
    BatchId,
    File,
    FileId,
    NewBatch,
    OnInvalid,
    OnUnknown,
    Order,
)
from batchrunner.settings import ENDPOINTS, MIB, parse_window
from batchrunner.validation import Validation

# Source: the endpoints of OpenAI's Batch API.
STRICT_ENDPOINTS = ENDPOINTS[:8]
STRICT_WINDOW = "24h"
PRIORITY_MAX = 100
# Larger sets of requests are for a file: a body is held in memory and read at one go.
INLINE_BYTES_MAX = 8 * MIB

Metadata = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=512)]], Meta(max_length=16)
]
Priority = Annotated[int, Meta(ge=-PRIORITY_MAX, le=PRIORITY_MAX)]


# What is kept and shown again has to end somewhere; no id is as long, and no window.
Name = Annotated[str, Meta(max_length=512)]
Window = Annotated[str, Meta(max_length=32)]


class StrictBatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body that OpenAI takes."""

    input_file_id: Name
    endpoint: str
    completion_window: Window
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None


class InlineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request that comes in the create itself; without a url it goes to the batch's endpoint."""

    custom_id: str
    method: str = "POST"
    url: str | None = None
    body: Raw


class BatchRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a create: OpenAI's fields, and ours. Either `input_file_id` or `requests` says what to run."""

    input_file_id: Name | None = None
    endpoint: str
    completion_window: Window = STRICT_WINDOW
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = None
    requests: Annotated[list[InlineRequest], Meta(min_length=1)] | None = None
    on_invalid: OnInvalid = OnInvalid.FAIL
    on_unknown: OnUnknown = OnUnknown.RETRY
    order: Order = Order.INPUT
    priority: Priority = 0
    webhook_url: Url | None = None


class _Shape(NamedTuple):
    """What tells a create of one dialect by its keys: one of `marks`, none of `foreign`. It needs `needed`."""

    dialect: str
    title: str
    marks: frozenset[str]
    foreign: frozenset[str]
    needed: str


_OF_OPENAI = frozenset({"endpoint", "completion_window"})
_OF_CLUB = frozenset({"requests", "label"})
_FILE = frozenset({"input_file_id"})
# The first that fits is it: xAI's creates may name a file too, and OpenAI's, here, hold requests.
_SHAPES = (
    _Shape(CLUB, "inference.club's", _OF_CLUB, _OF_OPENAI | _FILE, "requests"),
    _Shape(XAI, "xAI's", frozenset({"name"}), _OF_OPENAI | _OF_CLUB, "name"),
    _Shape(OPENAI, "OpenAI's", _OF_OPENAI | _FILE, frozenset(), "endpoint"),
)


class _MessageRequest(msgspec.Struct):
    """What tells a request of Anthropic's message batches, which come in a body that looks like inference.club's."""

    params: Raw


class _MessageBatch(msgspec.Struct):
    requests: Annotated[list[_MessageRequest], Meta(min_length=1)]


async def shape_of(call: Call) -> str | None:
    """Name the dialect whose create has the keys of this body, None where they tell of none. Raises: Refusal."""
    found = _shape(await _keys_of(call))
    return found.dialect if found is not None else None


async def require_shape(call: Call) -> None:
    """Raises: Refusal when a create that asks for a dialect by name has the shape of another, or any that of one that
    is not served; it says where to send it.
    """
    if _is_of_messages(await call.body()):
        message = (
            "These are requests of a message batch, and /v1/messages/batches is not served. Send each of them as "
            '{"endpoint": "/v1/messages", "body": {...}} to /club/v1/batches, with its `params` as the body.'
        )
        raise Refusal(message, param="requests")
    if not call.is_pure:
        return
    keys = await _keys_of(call)
    found = _shape(keys)
    own = next(each for each in _SHAPES if each.dialect == (call.route.dialect or OPENAI))
    if found is None or found is own:
        return
    mark = min(found.marks & keys)
    lack = missing_parameter(own.needed) if own.needed not in keys else unknown_parameter(mark)
    hint = f"With '{mark}' it has the shape of {found.title} API: send it to /{found.dialect}{call.route.root_path}."
    raise Refusal(f"{lack.message} {hint}", param=lack.param, code=lack.code)


def _shape(keys: frozenset[str]) -> _Shape | None:
    return next((each for each in _SHAPES if each.marks & keys and not each.foreign & keys), None)


async def _keys_of(call: Call) -> frozenset[str]:
    """Give the keys of a body; none where it is no object. Raises: Refusal."""
    raw = await call.body()
    return await call.blocking(_keys, raw) if len(raw) > LONG_BODY_BYTES else _keys(raw)


def _keys(raw: bytes) -> frozenset[str]:
    try:
        return frozenset(msgspec.json.decode(raw, type=dict[str, Raw]))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return frozenset()


def _is_of_messages(body: bytes) -> bool:
    if b'"params"' not in body:
        return False
    try:
        msgspec.json.decode(body, type=_MessageBatch)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True


async def read_request(call: Call) -> BatchRequest:
    """Read and check the body of a create. Raises: Refusal."""
    await require_shape(call)
    if call.is_strict:
        strict = await call.json(StrictBatchRequest)
        wanted = BatchRequest(**{name: getattr(strict, name) for name in strict.__struct_fields__})
    else:
        wanted = await call.json(BatchRequest)
    if wanted.requests is None and wanted.input_file_id is None:
        raise missing_parameter("input_file_id")
    if wanted.requests is not None and wanted.input_file_id is not None:
        raise Refusal(
            "Only one of 'input_file_id' and 'requests' can be given.", param="requests", code="invalid_value"
        )
    supported = STRICT_ENDPOINTS if call.is_strict else call.parts.settings.endpoints
    if wanted.endpoint not in supported:
        raise invalid_value("endpoint", _echoed(wanted.endpoint), supported)
    window_s(wanted.completion_window, is_strict=call.is_strict)
    check_priority(call, wanted.priority)
    check_url(call.parts, wanted.webhook_url, param="webhook_url")
    return wanted


def window_s(window: str, *, is_strict: bool) -> float:
    """Give the seconds of a completion window. Raises: Refusal."""
    if is_strict and window != STRICT_WINDOW:
        raise invalid_value("completion_window", _echoed(window), [STRICT_WINDOW])
    try:
        return parse_window(window, what="completion_window")
    except UsageError:
        raise Refusal(
            f"Invalid value: '{_echoed(window)}'. Supported values are: durations from '1m' to '14d', such as '24h'.",
            param="completion_window",
            code="invalid_value",
        ) from None


def check_priority(call: Call, priority: int) -> None:
    """Raises: Refusal when the key may not ask for so much."""
    priority_max = call.limits.priority_max
    if priority_max is not None and priority > priority_max:
        raise Refusal(
            f"This key may ask for a priority of at most {priority_max}, not {priority}.",
            status=403,
            param="priority",
            code="priority_above_limit",
        )


def as_it_is(new: NewBatch) -> NewBatch:
    """Shape a batch as OpenAI's dialect has it."""
    return new


def create(call: Call, wanted: BatchRequest, *, shape: Callable[[NewBatch], NewBatch] = as_it_is) -> Batch:
    """Make the batch, in the shape that its dialect gives it. Blocks.

    Raises:
        Refusal: the input is a file for something else.
        QuotaExceeded: the key's limits are reached.
    """
    batch_id = BatchId(f"batch_{call.parts.rng.token_hex(16)}")
    if wanted.requests is not None:
        return _create_inline(call, batch_id, wanted)
    new = shape(_new_batch(call, batch_id, wanted, _input_file(call, wanted)))
    try:
        return call.scope.create_batch(new, replay=call.replay, limits=call.limits)
    except NotFound:
        # Deleted since it was looked up.
        new = shape(_new_batch(call, batch_id, wanted, None))
        return call.scope.create_batch(new, replay=call.replay, limits=call.limits)


def _input_file(call: Call, wanted: BatchRequest) -> File | None:
    """Look the input up; one that is not there makes a batch that fails, as with OpenAI."""
    if wanted.input_file_id is None:
        return None
    try:
        file = call.scope.file(FileId(wanted.input_file_id))
    except NotFound:
        return None
    if file.purpose != BATCH:
        raise Refusal(
            f"Invalid 'input_file_id': the file has the purpose '{file.purpose}', expected '{BATCH}'.",
            param="input_file_id",
            code="invalid_value",
        )
    return file


def _create_inline(call: Call, batch_id: BatchId, wanted: BatchRequest) -> Batch:
    """Write the requests as the file that somebody else would have uploaded, so that the engine has one way only; file
    and batch are made together or not at all.
    """
    assert wanted.requests is not None
    sink = BlobSink(
        call.parts, f"files/{call.parts.rng.token_hex(16)}", size_bytes_max=call.parts.settings.file_bytes_max
    )
    try:
        # The body was held whole already, and its lines are no larger.
        sink.feed(b"".join(map(line_of, wanted.requests)))
        file = new_file(
            call,
            sink.finish(),
            blob=sink.name,
            filename=f"{batch_id}_requests.jsonl",
            purpose=BATCH,
            expires_after_s=None,
        )
        new = _new_batch(call, batch_id, wanted, file)
        return call.scope.create_batch(new, replay=call.replay, limits=call.limits, file=file)
    except BaseException:
        sink.abort()
        raise


def sound_lines(call: Call, requests: Sequence[InlineRequest], *, param: str) -> tuple[bytes, Validation]:
    """Write requests as lines and judge them as validation would in a file. Raises: Refusal, naming the first bad one
    by its place in `param`.
    """
    content = b"".join(map(line_of, requests))
    found = judge(content, call.parts.settings)
    if found.is_rejected:
        first = found.problems[0]
        place = "" if first.line_number is None else f"{param}[{first.line_number - 1}]: "
        raise Refusal(place + first.message, param=param, code=first.code)
    return content, found


def line_of(request: InlineRequest) -> bytes:
    """Give a request as a line; whatever it holds, validation judges it as it would in a file."""
    given: dict[str, object] = {"custom_id": request.custom_id, "method": request.method}
    if request.url is not None:
        given["url"] = request.url
    # Line ends of a pretty-printed body would cut the line in two.
    body = bytes(request.body)
    given["body"] = Raw(msgspec.json.format(body, indent=-1) if b"\n" in body or b"\r" in body else body)
    return msgspec.json.encode(given) + b"\n"


def _new_batch(call: Call, batch_id: BatchId, wanted: BatchRequest, file: File | None) -> NewBatch:
    seconds = window_s(wanted.completion_window, is_strict=call.is_strict)
    return NewBatch(
        id=batch_id,
        tenant=call.tenant,
        dialect=OPENAI_STRICT if call.is_strict else OPENAI,
        endpoint=wanted.endpoint,
        input_file_id=file.id if file is not None else None,
        input_name=file.id if file is not None else wanted.input_file_id,
        source=file.blob if file is not None else "",
        input_sha256=file.sha256 if file is not None else None,
        completion_window=wanted.completion_window,
        deadline_at=call.parts.clock.now() + timedelta(seconds=seconds),
        on_invalid=wanted.on_invalid,
        on_unknown=wanted.on_unknown,
        order=wanted.order,
        priority=wanted.priority,
        metadata=dict(wanted.metadata or {}),
        output_expires_after_s=_output_life_s(call, wanted),
        webhook_url=wanted.webhook_url or call.parts.settings.webhook_url,
        created_by=call.key.id if call.key is not None else None,
    )


def _output_life_s(call: Call, wanted: BatchRequest) -> int | None:
    """How long the batch's files are kept, None for ever."""
    if wanted.output_expires_after is not None:
        return wanted.output_expires_after.seconds
    kept_s = call.parts.settings.output_retention_s
    return None if kept_s is None else int(kept_s)


def _echoed(text: str) -> str:
    shown = "".join(each if each.isprintable() else "?" for each in text)
    return shown if len(shown) <= 100 else f"{shown[:100]}..."
