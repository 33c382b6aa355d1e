"""One request from its first byte to its last: route, key, limit, handler, answer, log line."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import unquote_to_bytes

from aiohttp import HttpVersion11, web

from batchrunner.api import auth
from batchrunner.api.auth import Caller
from batchrunner.api.envelope import (
    ErrorBody,
    ErrorEnvelope,
    Refusal,
    invalid_value,
    no_such_route,
    refusal_of,
    server_fault,
    wrong_method,
)
from batchrunner.api.http import DIALECT_HEADER, DIALECT_PARAMETER, Answer, ApiParts, Call, Route
from batchrunner.api.idempotency import answer_once
from batchrunner.errors import BatchrunnerError
from batchrunner.models import OPENAI
from batchrunner.settings import AUTO

logger = logging.getLogger(__name__)

# Where requests of all dialects come.
_ROOT = "v1"
# A caller that takes nothing of its answer for so long is given up.
TAKE_IDLE_S = 60.0
# So much has to be taken in that time: whoever is slow, but takes, is served.
_HANDED_BYTES = 128 * 1024
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ID_CHARS_MAX = 256
_NAME_CHARS_SHOWN = 64
# Source: what the official SDKs send with a request that they send again.
_RETRY_HEADER = "x-stainless-retry-count"
_RETRY_COUNT = re.compile(r"[0-9]{1,4}")


@dataclass(frozen=True, slots=True)
class Match:
    """What stands at a path: its routes by method, and the names looked up in it. Of several routes of a method the
    first is that of no dialect. `asked` is the name that the path begins with.
    """

    routes: Mapping[str, Sequence[Route]]
    path_params: Mapping[str, str]
    asked: str | None

    @property
    def allowed(self) -> list[str]:
        """The methods that the path takes."""
        methods = set(self.routes) | {"OPTIONS"} | ({"HEAD"} if "GET" in self.routes else set())
        return sorted(methods)


class Router:
    """Finds routes by path. A trailing slash makes no difference; each segment is decoded once."""

    def __init__(self, routes: Sequence[Route], *, is_openai_only: bool = False) -> None:
        """`is_openai_only` keeps what is under /v1 for OpenAI's API alone."""
        self._is_openai_only = is_openai_only
        self._errors = {route.dialect: route.error for route in routes if route.dialect is not None}
        self._patterns: dict[int, dict[tuple[str, ...], dict[str, list[Route]]]] = {}
        for route in sorted(routes, key=lambda each: each.dialect or ""):
            segments = tuple(route.root_path.strip("/").split("/"))
            methods = self._patterns.setdefault(len(segments), {}).setdefault(segments, {})
            methods.setdefault(route.method, []).append(route)
        for count, known in self._patterns.items():
            # A literal segment wins over a name wherever both would match, and a name with an end over one without.
            self._patterns[count] = dict(sorted(known.items(), key=lambda each: list(map(_openness, each[0]))))

    @property
    def dialects(self) -> list[str]:
        """The names that a path may begin with, and that a request may ask for."""
        return [OPENAI, *sorted(self._errors)]

    def error_of(self, raw_path: str) -> type[ErrorBody]:
        """Give the shape of refusals at a path where nothing stands."""
        return self._errors.get(raw_path.split("/", 2)[1] if "/" in raw_path else "", ErrorEnvelope)

    def match(self, raw_path: str) -> Match | None:
        """Find what stands at a path as it came, None if nothing does."""
        asked = next((name for name in self.dialects if raw_path.startswith(f"/{name}/v1/")), None)
        path = raw_path if asked is None else raw_path.removeprefix(f"/{asked}")
        try:
            given = tuple(unquote_to_bytes(each).decode() for each in _segments(path))
        except UnicodeDecodeError:
            return None
        if asked is None and self._is_openai_only and given[0] == _ROOT:
            # Elsewhere there is nothing of OpenAI's that another dialect could be taken for.
            asked = OPENAI
        for pattern, methods in self._patterns.get(len(given), {}).items():
            params = _params(pattern, given)
            if params is not None and (routes := _spoken(methods, asked)):
                return Match(routes, params, asked)
        return None


def _spoken(methods: Mapping[str, Sequence[Route]], asked: str | None) -> Mapping[str, Sequence[Route]]:
    """Leave out what the dialect that was asked for does not have."""
    if asked is None:
        return methods
    dialect = None if asked == OPENAI else asked
    spoken = {method: [each for each in routes if each.dialect == dialect] for method, routes in methods.items()}
    return {method: routes for method, routes in spoken.items() if routes}


def _openness(segment: str) -> int:
    return 0 if not segment.startswith("{") else 1 if not segment.endswith("}") else 2


def _segments(path: str) -> list[str]:
    trimmed = path.removeprefix("/")
    return (trimmed.removesuffix("/") if trimmed != "/" else "").split("/")


def _params(pattern: Sequence[str], given: Sequence[str]) -> dict[str, str] | None:
    params: dict[str, str] = {}
    for wanted, each in zip(pattern, given, strict=True):
        if wanted.startswith("{"):
            name, _, end = wanted[1:].partition("}")
            value = each.removesuffix(end)
            if not each.endswith(end) or not value or len(value) > _ID_CHARS_MAX or not value.isprintable():
                return None
            params[name] = value
        elif wanted != each:
            return None
    return params


class Dispatcher:
    """The one handler of the aiohttp application: it knows the table, and every answer leaves through it."""

    def __init__(self, parts: ApiParts, routes: Sequence[Route]) -> None:
        self._parts = parts
        self._router = Router(routes, is_openai_only=parts.settings.dialects != AUTO)
        self._ring = auth.KeyRing(parts.store.find_key, parts.clock)
        self._meters = auth.Meters(parts.clock)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer a request, whatever happens."""
        with self._parts.vitals.request(request.protocol):
            return await self._handle(request)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        turn = _Turn(self._parts, request)
        try:
            answer = await self._answer(turn)
        except Refusal as refusal:
            answer = turn.refused(refusal)
        except BatchrunnerError as error:
            answer = turn.refused(refusal_of(error))
            if answer.status >= 500:
                logger.exception("request %s failed", turn.request_id, extra=turn.known(answer.status))
        except Exception:
            logger.exception("request %s failed", turn.request_id, extra=turn.known(500))
            answer = turn.refused(server_fault())
        return await turn.send(answer)

    async def _answer(self, turn: _Turn) -> Answer:
        request = turn.request
        raw_path = request.rel_url.raw_path
        turn.error = self._router.error_of(raw_path)
        match = self._router.match(raw_path)
        if match is None:
            raise no_such_route(request.method, raw_path)
        if request.method == "OPTIONS":
            turn.template = next(iter(match.routes.values()))[0].path
            return Answer(status=204, headers={"allow": ", ".join(match.allowed)})
        routes = match.routes.get("GET" if request.method == "HEAD" else request.method)
        if routes is None:
            raise wrong_method(request.method, raw_path, match.allowed)
        turn.speak(routes[0])
        caller = await self._admit(turn, routes[0])
        asked = match.asked or self._asked(request)
        call = Call(
            parts=self._parts,
            route=routes[0],
            request=request,
            request_id=turn.request_id,
            path=raw_path,
            path_params=match.path_params,
            is_strict=asked == OPENAI,
            tenant=caller.tenant,
            key=caller.key,
            is_pure=asked is not None,
        )
        try:
            call.route = await _chosen(call, routes, asked)
            turn.speak(call.route)
            answer = await answer_once(call)
        finally:
            call.let_go()
        return answer if request.method == "HEAD" else await _begun(answer)

    def _asked(self, request: web.Request) -> str | None:
        """Give the dialect that a request to the root asks for by name. Raises: Refusal when there is none such."""
        named = [request.headers.get(DIALECT_HEADER), request.query.get(DIALECT_PARAMETER)]
        given = [each for each in named if each is not None]
        for each in given:
            if each not in self._router.dialects:
                shown = each[:_NAME_CHARS_SHOWN] if each.isprintable() else ""
                raise invalid_value(DIALECT_PARAMETER, shown, self._router.dialects)
        return given[0] if given else None

    async def _admit(self, turn: _Turn, route: Route) -> Caller:
        """Find out who calls, and whether they may. Raises: Refusal."""
        if route.scope is None:
            return auth.OPEN_CALLER
        if self._parts.is_open:
            auth.check_open_door(turn.request)
            return auth.OPEN_CALLER
        secret = auth.bearer_of(turn.request.headers)
        if secret is None and route.refuse is not None:
            secret = auth.password_of(turn.request.headers)
        if secret is None:
            raise auth.no_key()
        digest = auth.digest_of(secret)
        key = self._ring.remembered(digest)
        if key is None:
            key = await asyncio.get_running_loop().run_in_executor(self._parts.executor, self._ring.look_up, digest)
            if key is None:
                raise auth.wrong_key(secret)
            self._ring.remember(digest, key)
        turn.key_id = key.id
        auth.check_scope(key, route.scope)
        turn.limit_headers = self._meters.admit(key)
        return Caller(tenant=key.tenant, key=key)


class _Turn:
    """One request and its answer: the headers that every answer has, and the log line at its end."""

    def __init__(self, parts: ApiParts, request: web.Request) -> None:
        self.request = request
        self.template = "-"
        self.error: type[ErrorBody] = ErrorEnvelope
        self.refuse: Callable[[Refusal], Answer] | None = None
        self.key_id = "-"
        self.limit_headers: Mapping[str, str] = {}
        self._clock = parts.clock
        self._vitals = parts.vitals
        self._began_s = parts.clock.monotonic_s()
        given = request.headers.get("x-request-id", "")
        told = request.headers.get(_RETRY_HEADER, "")
        self.retry_count = int(told) if _RETRY_COUNT.fullmatch(told) else 0
        self.request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{parts.rng.token_hex(16)}"

    def speak(self, route: Route) -> None:
        """Go on in the name and the dialect of a route."""
        self.template, self.error, self.refuse = route.path, route.error, route.refuse

    def refused(self, refusal: Refusal) -> Answer:
        """Give the answer that is an error."""
        if self.refuse is not None:
            return self.refuse(refusal)
        return Answer(body=refusal.body(self.error), status=refusal.status, headers=refusal.headers())

    def known(self, status: int) -> dict[str, object]:
        """What a log line tells: never a body, never an id of a tenant's object."""
        return {
            "action": "request",
            "method": self.request.method,
            "route": self.template,
            "status": status,
            "elapsed_ms": self._elapsed_ms(),
            "key_id": self.key_id,
            "request_id": self.request_id,
            "retry_count": self.retry_count,
        }

    async def send(self, answer: Answer) -> web.StreamResponse:
        """Write the answer. One that cannot be ended as announced is broken off, so that nobody takes it for whole."""
        response = self._response(answer)
        try:
            if answer.chunks is not None:
                await self._stream(response, answer)
            return response
        except ConnectionError:
            logger.debug("request %s: the caller hung up", self.request_id, extra=self.known(499))
            return response
        finally:
            self._vitals.note_answer(answer.status, self._clock.monotonic_s() - self._began_s)
            logger.info(
                "%s %s %d %d ms %s %s%s",
                self.request.method,
                self.template,
                answer.status,
                self._elapsed_ms(),
                self.key_id,
                self.request_id,
                f" retry {self.retry_count}" if self.retry_count else "",
                extra=self.known(answer.status),
            )

    async def _stream(self, response: web.StreamResponse, answer: Answer) -> None:
        assert answer.chunks is not None
        try:
            await response.prepare(self.request)
            if self.request.method == "HEAD":
                return
            if answer.size_bytes is None:
                # Otherwise the head would wait for the first piece.
                await self._hand_over(response.write(b""))
            chunks = _until(self._vitals.closing, answer.chunks) if answer.is_endless else answer.chunks
            async for chunk in chunks:
                for start in range(0, len(chunk), _HANDED_BYTES):
                    await self._hand_over(response.write(memoryview(chunk)[start : start + _HANDED_BYTES]))
            await self._hand_over(response.write_eof())
        except ConnectionError:
            raise
        except Refusal as refusal:
            known = self.known(answer.status)
            logger.warning("request %s broke off: %s", self.request_id, refusal.message, extra=known)
            self._abort()
        except Exception:
            logger.exception("request %s broke off", self.request_id, extra=self.known(answer.status))
            self._abort()
        finally:
            await _close(answer)

    async def _hand_over(self, writing: Awaitable[None]) -> None:
        """Raises: ConnectionAbortedError when the caller takes nothing for too long."""
        try:
            async with asyncio.timeout(TAKE_IDLE_S):
                await writing
        except TimeoutError:
            self._abort()
            raise ConnectionAbortedError(f"the caller took nothing for {TAKE_IDLE_S:.0f} s") from None

    def _abort(self) -> None:
        if self.request.transport is not None:
            self.request.transport.abort()

    def _response(self, answer: Answer) -> web.StreamResponse:
        headers = {
            "x-request-id": self.request_id,
            "openai-processing-ms": str(self._elapsed_ms()),
            "openai-version": "2020-10-01",
            "x-content-type-options": "nosniff",
            **self.limit_headers,
            **answer.headers,
        }
        if answer.status != 204:
            headers["content-type"] = answer.content_type
        if answer.chunks is None:
            return web.Response(body=answer.body, status=answer.status, headers=headers)
        response = web.StreamResponse(status=answer.status, headers=headers)
        response.content_length = answer.size_bytes
        if answer.size_bytes is not None:
            return response
        if self.request.version >= HttpVersion11:
            response.enable_chunked_encoding()
        else:
            # Proxies ask in HTTP/1.0 unless told otherwise: the end of the connection is the end of the answer.
            response.force_close()
        return response

    def _elapsed_ms(self) -> int:
        return round((self._clock.monotonic_s() - self._began_s) * 1000)


async def _chosen(call: Call, routes: Sequence[Route], asked: str | None) -> Route:
    """Choose among the routes of a path and method: by name, by what the request is, else that of no dialect."""
    if asked is not None:
        return next((each for each in routes if each.dialect == asked), routes[0])
    for each in routes[1:]:
        if each.recognizes is not None and await each.recognizes(call):
            return each
    return routes[0]


async def _until(closing: asyncio.Event, chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Give what comes until the server is to end: a stream of events has no end of its own, and can be resumed."""
    ending = asyncio.ensure_future(closing.wait())
    coming = asyncio.ensure_future(anext(chunks, None))
    try:
        while True:
            await asyncio.wait({coming, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not coming.done() or (chunk := coming.result()) is None:
                return
            yield chunk
            coming = asyncio.ensure_future(anext(chunks, None))
    finally:
        ending.cancel()
        if not coming.done():
            coming.cancel()
            await asyncio.wait({coming})


async def _begun(answer: Answer) -> Answer:
    """Have the first piece before the head goes out, so that what cannot be read at all is an error and no broken
    answer. A stream without a known end may be silent at first, and is left alone.
    """
    if answer.chunks is None or not answer.size_bytes:
        return answer
    first = await anext(answer.chunks)
    return replace(answer, chunks=_Begun(first, answer))


class _Begun:
    """Chunks of which the first is there already; unlike a generator it can be closed before it was started."""

    def __init__(self, first: bytes, answer: Answer) -> None:
        assert answer.chunks is not None
        self._first: bytes | None = first
        self._answer = answer
        self._rest = answer.chunks

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        first, self._first = self._first, None
        return await anext(self._rest) if first is None else first

    async def aclose(self) -> None:
        """End what was not read to its end."""
        await _close(self._answer)


async def _close(answer: Answer) -> None:
    """End a generator that was not read to its end."""
    close = getattr(answer.chunks, "aclose", None)
    if close is not None:
        await close()
