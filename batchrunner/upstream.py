"""The Upstream port over HTTP/1.1: addresses, headers, idle connections, deadlines by a sweep, answers as Attempts."""

from __future__ import annotations

import asyncio
import logging
import re
import zlib
from collections import deque
from collections.abc import Mapping
from pathlib import Path

import msgspec
from aiohttp.hdrs import CONTENT_ENCODING, CONTENT_TYPE, RETRY_AFTER
from multidict import istr
from yarl import URL

from batchrunner import __version__
from batchrunner.errors import BlobsUnavailable, UsageError
from batchrunner.limits import ReadBudget
from batchrunner.models import Attempt, AttemptError
from batchrunner.ports import AssetOwner, Clock
from batchrunner.upstream_address import join_url, parse_base
from batchrunner.upstream_dialer import Dialer
from batchrunner.upstream_media import label, media_type
from batchrunner.upstream_wire import Failure, ReadLimits, Reply, Wire
from batchrunner.verdict import is_media, parse_retry_after

logger = logging.getLogger(__name__)

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\x21-\x7e\x80-\xff]([\t\x20-\x7e\x80-\xff]*[\x21-\x7e\x80-\xff])?")
# These frame the message or belong to a line: a setting must not send them twice.
_OWN_HEADERS = {"connection", "content-length", "expect", "host", "idempotency-key", "te", "trailer"}
_OWN_HEADERS |= {"transfer-encoding", "upgrade"}
_REQUEST_ID = istr("x-request-id")
_RETRY_AFTER_MS = istr("retry-after-ms")
_JSON_TYPE = "application/json"
_GZIP_MEMBERS_MAX = 16
_HEADS_MAX = 256
# Nobody waits long for an answer that only proves that somebody is there.
_KNOCK_S = 5.0
# A peer that had closed an idle connection says so at once; a later reset comes from somebody who was at work.
_STALE_WITHIN_S = 1.0


class AiohttpUpstream:
    """Upstream over aiohttp's connector and parser. Made inside the running loop that it serves; its owner closes it.

    `total_timeout_s` runs from `send` to the last byte, connecting included; `idle_timeout_s` is the longest silence
    inside an answer that has begun. A connection that was idle for `keepalive_s` is not used again: many servers close
    theirs after 5 s. A request on a used connection that turns out
    to be closed before any byte of an answer came is sent again at once, but for a line that is at most once: for it
    that is AttemptError.RESET.

    Raises:
        UsageError: the base URL, a header, the key or the CA bundle does not fit.
    """

    def __init__(
        self,
        base_url: str,
        *,
        clock: Clock,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        total_timeout_s: float = 600.0,
        idle_timeout_s: float = 60.0,
        connect_timeout_s: float = 10.0,
        keepalive_s: float = 4.0,
        reply_bytes_max: int = 32 * 1024 * 1024,
        asset_bytes_max: int = 512 * 1024 * 1024,
        ca_bundle: Path | None = None,
        budget: ReadBudget | None = None,
    ) -> None:
        base = parse_base(base_url)
        self._base_url = base_url
        self._clock = clock
        self._total_timeout_s = total_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._keepalive_s = keepalive_s
        self._reply_bytes_max = reply_bytes_max
        self._shared_head = _shared_head(base, api_key, headers or {})
        self._knock_head = f"GET {base.raw_path}/models HTTP/1.1\r\n".encode("ascii") + self._shared_head + b"0\r\n\r\n"
        self._dialer = Dialer(
            base,
            connect_timeout_s=connect_timeout_s,
            limits=ReadLimits(reply_bytes_max, asset_bytes_max, budget or ReadBudget()),
            ca_bundle=ca_bundle,
        )
        self._heads: dict[str, bytes] = {}
        # Used from the right, so that what a smaller window leaves over grows old on the left.
        self._idle: deque[Wire] = deque()
        self._busy: set[Wire] = set()
        self._openings: dict[asyncio.Task[Wire | Failure], _Opening] = {}
        self._is_closed = False
        self._swept_at_s = clock.monotonic_s()

    async def send(
        self,
        url: str,
        body: bytes,
        *,
        idempotency_key: str | None,
        is_at_most_once: bool = False,
        owner: AssetOwner | None = None,
    ) -> Attempt:
        """See Upstream.

        Raises:
            UsageError: `url` or `idempotency_key` is nothing that may stand in a request's head.
        """
        started_at_s = self._clock.monotonic_s()
        head = self._head(url, len(body), idempotency_key)
        outcome: Reply | Failure
        wire = self._take_idle(started_at_s)
        if wire is not None:
            outcome = await self._exchange(wire, head, body, started_at_s, owner)
            is_stale = isinstance(outcome, Failure) and outcome.error is AttemptError.RESET and not wire.has_heard
            is_stale = is_stale and self._clock.monotonic_s() - started_at_s < _STALE_WITHIN_S
            if is_stale and not is_at_most_once:
                outcome = await self._exchange_anew(head, body, started_at_s, owner)
        else:
            outcome = await self._exchange_anew(head, body, started_at_s, owner)
        attempt = self._attempt(outcome, started_at_s)
        if owner is not None and attempt.content_type != _JSON_TYPE and is_media(attempt):
            return await _kept(attempt, owner)
        return attempt

    async def knock(self) -> Attempt:
        """See Upstream. It asks for the list of models, on a new connection."""
        started_at_s = self._clock.monotonic_s()
        outcome: Reply | Failure
        try:
            async with asyncio.timeout(_KNOCK_S):
                outcome = await self._exchange_anew(self._knock_head, b"", started_at_s)
        except TimeoutError:
            outcome = Failure(AttemptError.TIMEOUT_TOTAL, f"{self._dialer.peer} gave no answer within {_KNOCK_S:g} s")
        return self._attempt(outcome, started_at_s)

    def _take_idle(self, now_s: float) -> Wire | None:
        while self._idle:
            wire = self._idle.pop()
            if not wire.is_open:
                continue
            if now_s - wire.idle_since_s < self._keepalive_s:
                return wire
            wire.abort()
        return None

    async def _exchange_anew(
        self, head: bytes, body: bytes, started_at_s: float, owner: AssetOwner | None = None
    ) -> Reply | Failure:
        opened = await self._open(started_at_s)
        if isinstance(opened, Failure):
            return opened
        return await self._exchange(opened, head, body, started_at_s, owner)

    async def _exchange(
        self, wire: Wire, head: bytes, body: bytes, started_at_s: float, owner: AssetOwner | None
    ) -> Reply | Failure:
        self._busy.add(wire)
        try:
            outcome = await wire.exchange(head, body, started_at_s, owner)
            if isinstance(outcome, Reply) and CONTENT_ENCODING in outcome.headers:
                outcome = self._decoded(outcome)
                if isinstance(outcome, Failure):
                    wire.abort()
            return outcome
        finally:
            self._busy.discard(wire)
            if wire.is_open:
                wire.idle_since_s = self._clock.monotonic_s()
                self._idle.append(wire)

    async def _open(self, started_at_s: float) -> Wire | Failure:
        """Open a connection in a task of its own, which the sweep and `abort_all` can end."""
        if self._is_closed:
            return Failure(AttemptError.ABORTED, "the upstream was closed by batchrunner")
        opening = _Opening(started_at_s)
        task = asyncio.get_running_loop().create_task(self._dialer.open())
        self._openings[task] = opening
        try:
            return await task
        except asyncio.CancelledError:
            task.cancel()
            task.add_done_callback(_close_unclaimed)
            own = asyncio.current_task()
            if opening.failure is None or (own is not None and own.cancelling()):
                raise
            return opening.failure
        finally:
            del self._openings[task]

    def sweep_deadlines(self) -> None:
        """See Upstream. Also closes connections that have been idle for too long."""
        now_s = self._clock.monotonic_s()
        total = Failure(AttemptError.TIMEOUT_TOTAL, f"no whole answer within {self._total_timeout_s:g} s")
        oldest_start_s = now_s - self._total_timeout_s
        for task, opening in list(self._openings.items()):
            if opening.started_at_s <= oldest_start_s:
                opening.end(task, total)
        for wire in list(self._busy):
            if wire.is_paused:
                # It waits for us: that time is none of the peer's.
                wire.started_at_s += now_s - max(wire.started_at_s, self._swept_at_s)
                wire.progress_at_s = now_s
            elif wire.started_at_s <= oldest_start_s:
                wire.end(total.error, total.message)
            elif wire.received_bytes != wire.progress_bytes:
                wire.progress_bytes = wire.received_bytes
                wire.progress_at_s = now_s
            elif wire.progress_bytes >= 0 and now_s - wire.progress_at_s >= self._idle_timeout_s:
                told = f"the answer stood still for {self._idle_timeout_s:g} s after {wire.progress_bytes} bytes"
                wire.end(AttemptError.TIMEOUT_IDLE, told)
        self._swept_at_s = now_s
        while self._idle and now_s - self._idle[0].idle_since_s >= self._keepalive_s:
            self._idle.popleft().abort()

    def abort_all(self) -> None:
        """See Upstream."""
        aborted = Failure(AttemptError.ABORTED, "ended by batchrunner")
        for task, opening in list(self._openings.items()):
            opening.end(task, aborted)
        for wire in list(self._busy):
            wire.end(aborted.error, aborted.message)

    async def close(self) -> None:
        """See Upstream. Exchanges that are under way end as AttemptError.ABORTED, and so does every later one."""
        self._is_closed = True
        self.abort_all()
        while self._idle:
            self._idle.pop().abort()
        await self._dialer.close()

    def _head(self, url: str, body_bytes: int, idempotency_key: str | None) -> bytes:
        head = self._heads.get(url)
        if head is None:
            if len(self._heads) >= _HEADS_MAX:
                self._heads.clear()
            target = join_url(self._base_url, url).raw_path
            head = self._heads[url] = f"POST {target} HTTP/1.1\r\n".encode("ascii") + self._shared_head
        if idempotency_key is None:
            return b"%b%d\r\n\r\n" % (head, body_bytes)
        if not (idempotency_key.isascii() and idempotency_key.isprintable()):
            raise UsageError("the idempotency key holds a character that no header may carry")
        return b"%b%d\r\nIdempotency-Key: %b\r\n\r\n" % (head, body_bytes, idempotency_key.encode("ascii"))

    def _attempt(self, outcome: Reply | Failure, started_at_s: float) -> Attempt:
        if isinstance(outcome, Reply):
            headers = outcome.headers
            retry_after_s = None
            if RETRY_AFTER in headers or _RETRY_AFTER_MS in headers:
                ms, value = headers.get(_RETRY_AFTER_MS), headers.get(RETRY_AFTER)
                retry_after_s = parse_retry_after(ms, value, self._clock.now())
            request_id = headers.get(_REQUEST_ID)
            return Attempt(
                status=outcome.status,
                body=outcome.body,
                content_type=_JSON_TYPE if outcome.is_asset else media_type(headers.get(CONTENT_TYPE, "")),
                request_id=label(request_id) if request_id else None,
                retry_after_s=retry_after_s,
                started_at_s=started_at_s,
                elapsed_s=self._clock.monotonic_s() - started_at_s,
            )
        return self._failed(outcome, started_at_s)

    def _failed(self, failure: Failure, started_at_s: float) -> Attempt:
        return Attempt(
            status=failure.status,
            error=failure.error,
            message=failure.message,
            started_at_s=started_at_s,
            elapsed_s=self._clock.monotonic_s() - started_at_s,
        )

    def _decoded(self, reply: Reply) -> Reply | Failure:
        """Undo a content encoding that was not asked for, never to more than the cap."""
        peer, status, body = self._dialer.peer, reply.status, reply.body
        name = reply.headers[CONTENT_ENCODING].strip().lower()
        if name in {"", "identity"} or not body:
            return reply
        if name not in {"gzip", "x-gzip", "deflate"}:
            told = f"{peer} answered in content encoding {label(name)!r}, asked for was identity"
            return Failure(AttemptError.BAD_ENCODING, told, status)
        try:
            decoded = _inflate(body, _window_bits(name, body), self._reply_bytes_max)
        except zlib.error:
            return Failure(AttemptError.BAD_ENCODING, f"the answer of {peer} is broken {name}", status)
        if len(decoded) > self._reply_bytes_max:
            told = f"the answer of {peer} is over {self._reply_bytes_max} bytes when decoded"
            return Failure(AttemptError.TOO_LARGE, told, status)
        return Reply(status, reply.headers, decoded)


async def _kept(attempt: Attempt, owner: AssetOwner) -> Attempt:
    """Have a media answer that came in one piece kept by its owner; as it is still whole here, it is never lost."""
    while True:
        sink = owner.open_asset(attempt.content_type)
        is_kept = False
        try:
            await sink.write([attempt.body])
            body = await sink.finish()
            is_kept = True
            return msgspec.structs.replace(attempt, body=body, content_type=_JSON_TYPE)
        except BlobsUnavailable as error:
            logger.warning("asset is written again: %s", error, extra={"action": "asset_again"})
        finally:
            if not is_kept:
                sink.abort()


class _Opening:
    """A connection that is being opened, and why it was ended from outside."""

    __slots__ = ("failure", "started_at_s")

    def __init__(self, started_at_s: float) -> None:
        self.started_at_s = started_at_s
        self.failure: Failure | None = None

    def end(self, task: asyncio.Task[Wire | Failure], failure: Failure) -> None:
        if not task.done():
            self.failure = failure
            task.cancel()


def _close_unclaimed(task: asyncio.Task[Wire | Failure]) -> None:
    """Close a connection that was opened in the moment in which its owner was cancelled."""
    if not task.cancelled() and task.exception() is None:
        opened = task.result()
        if isinstance(opened, Wire):
            opened.abort()


def _shared_head(base: URL, api_key: str | None, extra: Mapping[str, str]) -> bytes:
    """Give the header lines that all requests share, up to the value of Content-Length."""
    headers = {
        "Host": base.host_port_subcomponent or "",
        "User-Agent": f"batchrunner/{__version__}",
        "Accept": "application/json, */*;q=0.1",
        # Decoding costs more CPU than the bytes saved; a server that compresses all the same is understood.
        "Accept-Encoding": "identity",
        "Content-Type": "application/json",
    }
    if api_key:
        headers["Authorization"] = f"Bearer {api_key}"
    known = {name.lower(): name for name in headers}
    for name, value in extra.items():
        if not _TOKEN.fullmatch(name) or name.lower() in _OWN_HEADERS:
            raise UsageError(f"header {name[:100]!r}: not a name that may be set")
        headers[known.get(name.lower(), name)] = value
    for name, value in headers.items():
        if not _HEADER_VALUE.fullmatch(value):
            # The value is not repeated: it may be a key.
            raise UsageError(f"header {name}: its value holds a character that no header may carry")
    return "".join([*(f"{name}: {value}\r\n" for name, value in headers.items()), "Content-Length: "]).encode("latin-1")


def _window_bits(name: str, body: bytes) -> int:
    """Tell zlib which of the three wrappers to expect; servers call raw deflate "deflate" too.

    Source: RFC 9110 section 8.4.1, RFC 1950 section 2.2.
    """
    if name != "deflate":
        return zlib.MAX_WBITS | 16
    is_wrapped = body[0] & 0x0F == 8 and int.from_bytes(body[:2], "big") % 31 == 0
    return zlib.MAX_WBITS if is_wrapped else -zlib.MAX_WBITS


def _inflate(body: bytes, window_bits: int, decoded_bytes_max: int) -> bytes:
    """Decompress every member of the stream, to at most one byte over the cap.

    Raises:
        zlib.error: the stream is damaged, ends too early or has too many members.
    """
    parts: list[bytes] = []
    room_bytes = decoded_bytes_max + 1
    for _ in range(_GZIP_MEMBERS_MAX):
        inflater = zlib.decompressobj(window_bits)
        part = inflater.decompress(body, room_bytes)
        parts.append(part)
        room_bytes -= len(part)
        if room_bytes == 0 or (inflater.eof and not inflater.unused_data):
            return b"".join(parts)
        if not inflater.eof:
            raise zlib.error("the stream ends too early")
        body = inflater.unused_data
    raise zlib.error("the stream has too many members")
