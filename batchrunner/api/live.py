"""Requests that are answered at once: each goes to the upstream that serves its model, and the answer comes back as the
upstream wrote it, piece by piece.

Source: the OpenAI API's inference endpoints; what they say is the upstream's to say.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Annotated, Any, ParamSpec, TypeVar

import msgspec
from msgspec import Meta

from batchrunner.api.envelope import (
    SERVER_ERROR,
    Refusal,
    body_too_large,
    invalid_type,
    no_such_route,
    unparseable_json,
)
from batchrunner.api.http import JSON, LONG_BODY_BYTES, Answer, Call, Route
from batchrunner.api.multipart import MULTIPART, FieldWatch
from batchrunner.holdings import KeyScope
from batchrunner.limits import estimate_tokens
from batchrunner.live import Asked, Body, Failure, Live, LiveAnswer, LivePlace, body_for, may_go_elsewhere, read_asked
from batchrunner.models import CLUB, AttemptError
from batchrunner.settings import ENDPOINTS

logger = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

TRANSCRIPTIONS = "/v1/audio/transcriptions"
# They take files, so that nothing of them can be queued.
FORM_URLS = frozenset({TRANSCRIPTIONS, "/v1/images/edits"})
# The word by which a request asks to be queued.
ASYNC = "async"
_ECHOED_CHARS_MAX = 200
_PIECE_BYTES = 256 * 1024
# Everything else that a caller sends is between it and this server: its key, its cookies, whence it came.
_SENT = (
    "accept",
    "accept-encoding",
    "accept-language",
    "anthropic-beta",
    "anthropic-version",
    "content-type",
    "idempotency-key",
    "openai-beta",
    "traceparent",
    "tracestate",
    "user-agent",
)
# Source: RFC 9110 section 7.6.1; the rest is about the connection, or about the upstream's dealings with this server.
_NOT_PASSED = frozenset(
    {
        "alt-svc",
        "connection",
        "content-length",
        "content-type",
        "date",
        "keep-alive",
        "location",
        "openai-organization",
        "openai-project",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "server",
        "set-cookie",
        "strict-transport-security",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "www-authenticate",
        "x-request-id",
    }
)
_NOT_PASSED_GROUPS = ("access-control-", "x-ratelimit-")
_WITHOUT_BODY = frozenset({204, 304})


_Async = Annotated[Any, Meta(description="At /v1 and under /club/v1: what is true asks for a job.")]


class InferenceRequest(msgspec.Struct):
    """What is looked at of a body; all of it but `async` goes to the upstream."""

    model: str | None = None
    stream: bool | None = None
    is_async: _Async = msgspec.field(name=ASYNC, default=None)


class InferenceAnswer(msgspec.Struct):
    """What the upstream says, its errors too; nothing of it is looked at."""


class InferenceForm(msgspec.Struct):
    """What is known of a form, of which nothing else is looked at than whether it says `async`."""

    model: str | None = None


class FormQuery(msgspec.Struct):
    """Where a form goes, whose own model may follow the file."""

    model: str | None = None


class Inference:
    """Handles the calls of one endpoint."""

    def __init__(self, url: str) -> None:
        self._url = url
        self.__name__ = f"create_{url.removeprefix('/v1/').replace('/', '_')}"

    async def __call__(self, call: Call) -> Answer:
        """Pass a request on, and its answer back. Raises: Refusal."""
        if self._url not in FORM_URLS and self._url not in call.parts.settings.endpoints:
            raise no_such_route(call.request.method, call.path)
        live = call.parts.live
        if live is None:
            raise _unable("This server has no upstream: it was started without -u URL.", 503, "no_upstream")
        if is_form(call):
            model = call.parameters(FormQuery).model
            return await _pass(call, live, model, _Form(self._url, call, _watch(call)))
        asked = await asked_of(call)
        has_tpm = any(place.target.tpm for place in live.places)
        tokens = await _taken_apart(call, asked.body, estimate_tokens, asked.body) if has_tpm else 0
        return await _pass(call, live, asked.model, _Whole(self._url, call, asked, tokens))


def _watch(call: Call) -> FieldWatch | None:
    """Look for the word `async`, but where a dialect that does not know it is asked for by name."""
    if call.is_pure and call.route.dialect != CLUB:
        return None
    try:
        return FieldWatch(call.request.headers.get("Content-Type", ""), field=ASYNC)
    except Refusal:
        # What it is instead is for the upstream to judge.
        return None


def synchronous_only() -> Refusal:
    """What takes a file cannot be queued. Source: inference.club's async jobs."""
    message = f"This endpoint is synchronous only: send it without `{ASYNC}`."
    return Refusal(message, param=ASYNC, code="invalid_value")


def is_form(call: Call) -> bool:
    """Tell whether a request comes as a form, which is passed on as it comes in."""
    return call.request.content_type.startswith("multipart/")


async def asked_of(call: Call) -> Asked:
    """Read a JSON body. Raises: Refusal."""
    if call.asked is None:
        raw = await call.body(call.parts.settings.line_bytes_max)
        call.asked = await _taken_apart(call, raw, read_asked, raw)
    return call.asked


async def _taken_apart(call: Call, body: bytes, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do something with a body, off the event loop if it is long. Raises: Refusal."""
    try:
        if len(body) > LONG_BODY_BYTES:
            return await call.blocking(step, *args, **kwargs)
        return step(*args, **kwargs)
    except msgspec.ValidationError:
        raise invalid_type("body", "an object", "something else") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise unparseable_json() from None


class _Whole:
    """A JSON body, which may be sent as often as it takes."""

    refusal: Refusal | None = None
    is_repeatable = True

    def __init__(self, url: str, call: Call, asked: Asked, tokens: int) -> None:
        self.url = url
        self.tokens = tokens
        self._call = call
        self._asked = asked

    async def for_upstream(self, place: LivePlace) -> Body:
        """Give what is sent to an upstream. Raises: Refusal."""
        content = await _taken_apart(self._call, self._asked.body, body_for, place, self._asked)

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(content), _PIECE_BYTES):
                yield content[start : start + _PIECE_BYTES]

        return Body(pieces, len(content), True)


class _Form:
    """A form as it comes in. What is wrong with it is kept: the client that sends it on says it in its own words."""

    # Nobody knows what is in it.
    tokens = 0

    def __init__(self, url: str, call: Call, watch: FieldWatch | None) -> None:
        self.url = url
        self.is_repeatable = True
        self._watch = watch
        self.refusal: Refusal | None = None
        self._call = call
        self._size_bytes = call.request.content_length
        self._size_bytes_max = call.parts.settings.asset_bytes_max
        if self._size_bytes is not None and self._size_bytes > self._size_bytes_max:
            raise body_too_large(self._size_bytes_max)

    async def for_upstream(self, place: LivePlace) -> Body:  # noqa: ARG002 - as for a whole body
        """Give what is sent."""
        return Body(self._pieces, self._size_bytes, False)

    async def _pieces(self) -> AsyncIterator[bytes]:
        # What has come in is gone.
        self.is_repeatable = False
        try:
            async for piece in self._call.incoming(self._size_bytes_max):
                # Before it goes on: a form that asks for a job does not reach its end.
                await self._look_at(piece)
                yield piece
        except Refusal as refusal:
            self.refusal = refusal
            raise

    async def _look_at(self, piece: bytes) -> None:
        """Raises: Refusal when the form asks for a job."""
        if self._watch is None:
            return
        if len(piece) > LONG_BODY_BYTES:
            await self._call.blocking(self._watch.feed, piece)
        else:
            self._watch.feed(piece)
        if self._watch.is_yes:
            raise synchronous_only()


async def _pass(call: Call, live: Live, model: str | None, content: _Whole | _Form) -> Answer:
    """Send to one upstream after the other until one answers, and give its answer. Raises: Refusal."""
    route = live.route(model)
    if route is None:
        message = f"The model `{(model or '')[:_ECHOED_CHARS_MAX]}` does not exist or you do not have access to it."
        raise Refusal(message, status=404, param="model", code="model_not_found")
    tried: set[int] = set()
    place = live.choose(route, tried)
    if place is None:
        raise _full(live.wait_s(route))
    while True:
        outcome = await _send(call, live, place, content)
        tried.add(place.number)
        is_open = content.is_repeatable and may_go_elsewhere(outcome)
        another = live.choose(route, tried) if is_open else None
        if another is None:
            break
        _let_go(place, outcome)
        place = another
    if isinstance(outcome, Failure):
        _let_go(place, outcome)
        raise content.refusal or _refusal_of(outcome)
    return await _answered(place, outcome, _Relay(call, live, place, outcome))


class _Relay:
    """An answer on its way through. The upstream is free at its end, and as soon as the caller hangs up."""

    def __init__(self, call: Call, live: Live, place: LivePlace, answer: LiveAnswer) -> None:
        self._call = call
        self._live = live
        self._place = place
        self._answer = answer
        self._is_over = False
        call.on_hang_up(answer.abort)

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        piece = await self._answer.read()
        if isinstance(piece, Failure):
            await self.aclose()
            if not self._call.has_listener:
                raise ConnectionAbortedError("the caller hung up")
            self._live.failures[str(piece.error)] += 1
            raise _refusal_of(piece)
        if not piece:
            await self.aclose()
            raise StopAsyncIteration
        return piece

    async def aclose(self) -> None:
        """Free the upstream."""
        if not self._is_over:
            self._is_over = True
            self._call.on_hang_up(None)
            _let_go(self._place, self._answer)


async def _send(call: Call, live: Live, place: LivePlace, content: _Whole | _Form) -> LiveAnswer | Failure:
    """Send to one upstream, where the request counts until `_let_go`; stops as soon as the caller hangs up."""
    place.begin(content.tokens)
    live.begun[place.target.name] += 1
    sending = asyncio.ensure_future(_sent(call, place, content))

    def stop() -> None:
        sending.cancel()

    call.on_hang_up(stop)
    outcome: LiveAnswer | Failure | None = None
    try:
        call.require_listener()
        await asyncio.wait({sending})
        if sending.cancelled():
            call.require_listener()
        outcome = sending.result()
    finally:
        call.on_hang_up(None)
        if outcome is None:
            sending.add_done_callback(_drop_unclaimed)
            sending.cancel()
            place.end()
    if isinstance(outcome, Failure) and content.refusal is None:
        live.failures[str(outcome.error)] += 1
        logger.warning("upstream %s: %s", place.target.name, outcome.message, extra={"action": "live_failed"})
        if outcome.error is AttemptError.NOT_CONNECTED:
            place.note_unreached()
    elif not isinstance(outcome, Failure):
        place.note_answer(outcome.status)
    return outcome


async def _sent(call: Call, place: LivePlace, content: _Whole | _Form) -> LiveAnswer | Failure:
    body = await content.for_upstream(place)
    return await place.sender.send(content.url, _headers(call), body)


def _drop_unclaimed(sending: asyncio.Task[LiveAnswer | Failure]) -> None:
    """Free an upstream that answered in the moment in which nobody wanted it any more."""
    if not sending.cancelled() and sending.exception() is None:
        outcome = sending.result()
        if not isinstance(outcome, Failure):
            outcome.abort()


def _let_go(place: LivePlace, outcome: LiveAnswer | Failure) -> None:
    if not isinstance(outcome, Failure):
        outcome.abort()
    place.end()


def _headers(call: Call) -> Mapping[str, str]:
    given = call.request.headers
    # Bytes that are no text could not be written again.
    sent = {name: given[name] for name in _SENT if given.get(name, "").isprintable() and name in given}
    if call.key is not None and "idempotency-key" in sent:
        # All tenants share the upstream's account: nobody gets what another was answered under the same key.
        named = f"{call.tenant}\0{sent['idempotency-key']}"
        sent["idempotency-key"] = hashlib.sha256(named.encode()).hexdigest()
    # Without one, the client that sends it on would make one up.
    return {"content-type": JSON, **sent, "x-request-id": call.request_id}


async def _answered(place: LivePlace, answer: LiveAnswer, relay: _Relay) -> Answer:
    """Give the upstream's answer to the caller, but for one that is meant for this server. Raises: Refusal."""
    status = answer.status
    if (refusal := _not_for_caller(place, status)) is not None:
        await relay.aclose()
        raise refusal
    listed: dict[str, list[str]] = {}
    for name, value in answer.headers:
        if value.isprintable():
            listed.setdefault(name.lower(), []).append(value)
    content_type = listed.get("content-type", ["application/octet-stream"])[0]
    length = listed.get("content-length", [""])[0]
    if status in _WITHOUT_BODY:
        await relay.aclose()
        return Answer(status=status, headers=_passed(listed))
    return Answer(
        status=status,
        content_type=content_type,
        headers=_passed(listed),
        chunks=relay,
        size_bytes=int(length) if length.isdecimal() else None,
    )


def _passed(listed: Mapping[str, list[str]]) -> dict[str, str]:
    named = {each.strip().lower() for value in listed.get("connection", ()) for each in value.split(",")}
    return {
        name: ", ".join(values)
        for name, values in listed.items()
        if name not in _NOT_PASSED and name not in named and not name.startswith(_NOT_PASSED_GROUPS)
    }


def _not_for_caller(place: LivePlace, status: int) -> Refusal | None:
    """What the upstream says of this server's own key, and where it wants to send it, is the operator's to know."""
    if status in {401, 407}:
        logger.warning("upstream %s refuses the key", place.target.name, extra={"action": "live_key_refused"})
        return _unable("The upstream refuses the key of this server.", 502, "upstream_refused_key")
    if 300 <= status < 400 and status != 304:
        logger.warning("upstream %s redirects (%d)", place.target.name, status, extra={"action": "live_redirected"})
        return _unable("The upstream answered with a redirect, which is not followed.", 502, "upstream_redirected")
    return None


def _refusal_of(failure: Failure) -> Refusal:
    """Say what went wrong; where the upstream is, and what it said of itself, is in the log."""
    match failure.error:
        case AttemptError.NOT_CONNECTED:
            return _unable("The upstream cannot be reached.", 502, "upstream_unreachable")
        case AttemptError.TIMEOUT_TOTAL | AttemptError.TIMEOUT_IDLE:
            return _unable("The upstream did not answer in time.", 504, "upstream_timeout")
        case _:
            return _unable("The upstream's answer broke off.", 502, "upstream_broke_off")


def _unable(message: str, status: int, code: str) -> Refusal:
    return Refusal(message, status=status, kind=SERVER_ERROR, code=code)


def _full(wait_s: float) -> Refusal:
    return Refusal(
        "The limits of the upstream are reached. Please try again later.",
        status=429,
        kind="requests",
        code="rate_limit_exceeded",
        retry_after_s=wait_s,
    )


def inference_row(url: str) -> Route:
    """Give the route of an endpoint."""
    takes_form = url == TRANSCRIPTIONS
    return Route(
        method="POST",
        path=url,
        handler=Inference(url),
        summary=f"Have the upstream answer {url.removeprefix('/v1/')} at once",
        scope=KeyScope.WRITE,
        request=InferenceForm if takes_form else InferenceRequest,
        request_media=MULTIPART if takes_form else JSON,
        answer=InferenceAnswer,
        query=FormQuery if url in FORM_URLS else None,
    )


ROUTES: tuple[Route, ...] = tuple(map(inference_row, (*ENDPOINTS, TRANSCRIPTIONS)))


def extra_routes(endpoints: tuple[str, ...]) -> tuple[Route, ...]:
    """Give the routes of endpoints that the operator has added to the usual ones."""
    return tuple(map(inference_row, extra_urls(endpoints)))


def extra_urls(endpoints: tuple[str, ...]) -> tuple[str, ...]:
    """Give the endpoints that the operator has added."""
    return tuple(url for url in endpoints if url not in ENDPOINTS and url != TRANSCRIPTIONS)
