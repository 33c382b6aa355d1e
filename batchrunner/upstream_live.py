"""Sends requests that are answered at once, by aiohttp's client: nothing is buffered, decoded or followed."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import SimpleNamespace

import aiohttp
from aiohttp import hdrs
from multidict import CIMultiDict

from batchrunner.errors import UsageError
from batchrunner.live import Body, Failure
from batchrunner.models import AttemptError
from batchrunner.ports import Clock
from batchrunner.upstream_address import join_url, parse_base
from batchrunner.upstream_dialer import cause_of

# What the client would add by itself: an answer is the upstream's to the caller's own request.
_NOT_ADDED = (hdrs.USER_AGENT, hdrs.ACCEPT, hdrs.ACCEPT_ENCODING, hdrs.CONTENT_TYPE)
# Many servers close a connection that was idle for 5 s.
_KEEPALIVE_S = 4.0
# A peer that had closed an idle connection says so at once; a later reset comes from somebody who was at work.
_STALE_WITHIN_S = 1.0


class AiohttpLiveSender:
    """LiveSender over aiohttp. Made inside the running loop that it serves; its owner closes it.

    `total_timeout_s` runs from `send` to the last byte, `idle_timeout_s` is the longest silence in an answer that has
    begun. A body that can be sent twice goes over kept connections, any other over one of its own.

    Raises:
        UsageError: the base URL or the key does not fit.
    """

    def __init__(
        self,
        base_url: str,
        *,
        clock: Clock,
        api_key: str | None,
        total_timeout_s: float,
        idle_timeout_s: float,
        connect_timeout_s: float,
    ) -> None:
        base = parse_base(base_url)
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise UsageError("the upstream's key holds a character that no header may carry")
        self._base_url = base_url
        self._peer = f"{base.host_subcomponent}:{base.port}"
        self._key: dict[str, str] = {hdrs.AUTHORIZATION: f"Bearer {api_key}"} if api_key else {}
        self._clock = clock
        self._total_timeout_s = total_timeout_s
        self._idle_timeout_s = idle_timeout_s
        self._connect_timeout_s = connect_timeout_s
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_reuseconn.append(_note_reuse)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
        connectors = (
            aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S),
            aiohttp.TCPConnector(limit=0, force_close=True),
        )
        self._kept, self._single = (
            aiohttp.ClientSession(
                connector=connector,
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                skip_auto_headers=_NOT_ADDED,
                timeout=timeout,
                trace_configs=[tracing],
            )
            for connector in connectors
        )

    async def send(self, url: str, headers: Mapping[str, str], body: Body) -> LiveReply | Failure:
        """See LiveSender."""
        ends_at_s = self._clock.monotonic_s() + self._total_timeout_s
        began_s = self._clock.monotonic_s()
        used = SimpleNamespace(is_reused=False)
        outcome = await self._try(url, headers, body, used, ends_at_s)
        is_stale = isinstance(outcome, Failure) and outcome.error is AttemptError.RESET and used.is_reused
        if is_stale and body.is_repeatable and self._clock.monotonic_s() - began_s < _STALE_WITHIN_S:
            outcome = await self._try(url, headers, body._replace(is_repeatable=False), used, ends_at_s)
        return outcome

    async def _try(
        self, url: str, headers: Mapping[str, str], body: Body, used: SimpleNamespace, ends_at_s: float
    ) -> LiveReply | Failure:
        session = self._kept if body.is_repeatable else self._single
        sent: CIMultiDict[str] = CIMultiDict(headers)
        sent.update(self._key)
        if body.size_bytes is not None:
            sent[hdrs.CONTENT_LENGTH] = str(body.size_bytes)
        try:
            async with asyncio.timeout(ends_at_s - self._clock.monotonic_s()):
                answer = await session.post(
                    join_url(self._base_url, url),
                    data=body.pieces(),
                    headers=sent,
                    allow_redirects=False,
                    trace_request_ctx=used,
                )
        except (aiohttp.ClientError, OSError) as error:
            return self._failure(error)
        return LiveReply(answer, self._peer, self._clock, idle_s=self._idle_timeout_s, ends_at_s=ends_at_s)

    def _failure(self, error: Exception) -> Failure:
        match error:
            case aiohttp.ClientConnectorError() | aiohttp.ConnectionTimeoutError() | aiohttp.ClientSSLError():
                cause = cause_of(error, self._connect_timeout_s)
                return Failure(AttemptError.NOT_CONNECTED, f"cannot connect to {self._peer}: {cause}")
            case TimeoutError():
                told = f"{self._peer} gave no answer within {self._total_timeout_s:g} s"
                return Failure(AttemptError.TIMEOUT_TOTAL, told)
            case aiohttp.ClientResponseError():
                return Failure(AttemptError.BAD_PROTOCOL, f"{self._peer} answered in broken HTTP")
            case _:
                return Failure(AttemptError.RESET, f"{self._peer} closed the connection before it answered")

    async def close(self) -> None:
        """See LiveSender."""
        await self._kept.close()
        await self._single.close()


class LiveReply:
    """LiveAnswer of aiohttp's client."""

    def __init__(
        self, answer: aiohttp.ClientResponse, peer: str, clock: Clock, *, idle_s: float, ends_at_s: float
    ) -> None:
        self.status = answer.status
        self._answer = answer
        self._peer = peer
        self._clock = clock
        self._idle_s = idle_s
        self._ends_at_s = ends_at_s

    @property
    def headers(self) -> Sequence[tuple[str, str]]:
        """See LiveAnswer."""
        return tuple(self._answer.headers.items())

    async def read(self) -> bytes | Failure:
        """See LiveAnswer."""
        left_s = self._ends_at_s - self._clock.monotonic_s()
        try:
            async with asyncio.timeout(min(self._idle_s, left_s)):
                return await self._answer.content.readany()
        except TimeoutError:
            if left_s <= self._idle_s:
                return Failure(AttemptError.TIMEOUT_TOTAL, f"{self._peer} gave no whole answer in time")
            return Failure(AttemptError.TIMEOUT_IDLE, f"the answer stood still for {self._idle_s:g} s")
        except (aiohttp.ClientError, OSError):
            return Failure(AttemptError.TRUNCATED, f"{self._peer} closed the connection in the middle of the answer")

    def abort(self) -> None:
        """See LiveAnswer."""
        self._answer.close()


async def _note_reuse(_session: aiohttp.ClientSession, context: SimpleNamespace, _event: object) -> None:
    context.trace_request_ctx.is_reused = True
