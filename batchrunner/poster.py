"""Poster over aiohttp: one webhook POST, whose name is looked up and whose every address is checked for this attempt.

The check stands where sockets are made, so that neither a literal address nor a second answer of a name server gets
round it.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from batchrunner.addresses import AddressRules, url_problem
from batchrunner.courier import TIMEOUT_S
from batchrunner.deliveries import Posted, PostError
from batchrunner.ports import Clock
from batchrunner.verdict import parse_retry_after

# Made when they are needed: as many names may hang at a time before others wait.
_LOOKUP_THREADS = 256
# What an answer says does not matter; a receiver that is still writing it should not find its connection gone.
_ANSWER_BYTES = 1 << 14
_ANSWER_S = 0.5

# Family, type, protocol, canonical name, address: what getaddrinfo gives.
Found = tuple[int, int, int, str, tuple[Any, ...]]
Lookup = Callable[[str, int], list[Found]]


class AddressRefused(Exception):
    """A connection to this address may not be made."""


def system_lookup(host: str, port: int) -> list[Found]:
    """Ask the system's resolver. Blocks. Raises: OSError."""
    return [
        (int(family), int(kind), protocol, name, address)
        for family, kind, protocol, name, address in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    ]


class CheckedResolver(AbstractResolver):
    """Looks names up in threads of its own, one question for all who ask at a time, and refuses a name as a whole when
    one of its addresses is refused.
    """

    def __init__(self, check: Callable[[str], None], lookup: Lookup) -> None:
        self._check = check
        self._lookup = lookup
        # The loop's own threads are few, and one dead name server would hold them all.
        self._threads = ThreadPoolExecutor(_LOOKUP_THREADS, thread_name_prefix="lookup")
        self._asked: dict[tuple[str, int], asyncio.Future[list[Found]]] = {}

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """See AbstractResolver. Raises: AddressRefused."""
        found = await self._ask(host, port)
        for *_, address in found:
            self._check(str(address[0]))
        return [
            ResolveResult(
                hostname=host,
                # With its scope, where it has one.
                host=str(address[0]),
                port=port,
                family=each,
                proto=protocol,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for each, _, protocol, _, address in found
            if family in (socket.AF_UNSPEC, each)
        ]

    async def _ask(self, host: str, port: int) -> list[Found]:
        asked = self._asked.get((host, port))
        if asked is None:
            loop = asyncio.get_running_loop()
            asked = asyncio.ensure_future(loop.run_in_executor(self._threads, self._lookup, host, port))
            self._asked[host, port] = asked
            asked.add_done_callback(lambda done: self._answered(host, port, done))
        return await asyncio.shield(asked)

    def _answered(self, host: str, port: int, done: asyncio.Future[list[Found]]) -> None:
        del self._asked[host, port]
        # Whoever asked may have left: then nobody else looks at what went wrong.
        if not done.cancelled():
            done.exception()

    async def close(self) -> None:
        """See AbstractResolver."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class AiohttpPoster:
    """Poster over sessions of aiohttp, made inside the loop that they serve. A connection is used once: every attempt
    is checked, and no receiver is lost to a connection that went stale.
    """

    def __init__(
        self, rules: AddressRules, clock: Clock, *, lookup: Lookup = system_lookup, timeout_s: float = TIMEOUT_S
    ) -> None:
        self._rules = rules
        self._clock = clock
        self._lookup = lookup
        self._timeout_s = timeout_s
        self._resolvers: list[CheckedResolver] = []
        # What may be connected to differs by scheme, so each has a connector of its own.
        self._sessions = {scheme: self._session(is_plain=scheme == "http") for scheme in ("https", "http")}

    def _session(self, *, is_plain: bool) -> aiohttp.ClientSession:
        def check(address: str) -> None:
            if why := self._rules.refusal(address, is_plain=is_plain):
                raise AddressRefused(why)

        def make_socket(info: tuple[Any, ...]) -> socket.socket:
            family, kind, protocol, _, address = info
            check(str(address[0]))
            return socket.socket(family=family, type=kind, proto=protocol)

        resolver = CheckedResolver(check, self._lookup)
        self._resolvers.append(resolver)
        connector = aiohttp.TCPConnector(
            resolver=resolver,
            use_dns_cache=False,
            force_close=True,
            limit=0,
            socket_factory=make_socket,
        )
        return aiohttp.ClientSession(
            connector=connector,
            connector_owner=True,
            timeout=aiohttp.ClientTimeout(total=self._timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            skip_auto_headers=("Accept", "Accept-Encoding"),
        )

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Posted:
        """See Poster."""
        if why := url_problem(url, self._rules):
            return Posted(error=PostError.ADDRESS_REFUSED, message=why)
        address = URL(url)
        began_s = self._clock.monotonic_s()
        status: int | None = None
        retry_after_s: float | None = None
        error: PostError | None = None
        message: str | None = None
        try:
            session = self._sessions[address.scheme]
            async with session.post(address, data=body, headers=headers, allow_redirects=False) as answer:
                status = answer.status
                asked = answer.headers.get("Retry-After")
                retry_after_s = parse_retry_after(None, asked, self._clock.now())
                await _listen_a_little(answer)
        except (AddressRefused, aiohttp.ClientError, OSError, ValueError) as problem:
            if status is None:
                error, message = _told(problem, self._timeout_s)
        return Posted(
            status=status,
            error=error,
            message=message,
            retry_after_s=retry_after_s,
            elapsed_s=self._clock.monotonic_s() - began_s,
        )

    async def close(self) -> None:
        """See Poster."""
        for session in self._sessions.values():
            await session.close()
        for resolver in self._resolvers:
            await resolver.close()


async def _listen_a_little(answer: aiohttp.ClientResponse) -> None:
    """Take the beginning of the answer, whatever it is; its status is all that was wanted."""
    try:
        async with asyncio.timeout(_ANSWER_S):
            await answer.content.read(_ANSWER_BYTES)
    finally:
        answer.close()


def _told(problem: Exception, timeout_s: float) -> tuple[PostError, str]:
    """Put what went wrong into words of ours: never a header, never a body."""
    match problem:
        case AddressRefused():
            return PostError.ADDRESS_REFUSED, str(problem)
        case TimeoutError():
            return PostError.TIMEOUT, f"no answer within {timeout_s:g} s"
        case aiohttp.ClientConnectorDNSError():
            return PostError.UNREACHABLE, "the host name is not known"
        case aiohttp.ClientSSLError():
            return PostError.TLS, "the TLS handshake failed or its certificate is not trusted"
        case aiohttp.ClientConnectorError(os_error=cause):
            # asyncio puts the address where the reason would stand.
            number = cause.errno or 0
            reason = os.strerror(number) if number > 0 else type(cause).__name__
            return PostError.UNREACHABLE, f"cannot connect: {reason}"
        case aiohttp.ServerDisconnectedError() | aiohttp.ClientResponseError() | aiohttp.ClientPayloadError():
            return PostError.BROKEN_ANSWER, "the connection ended before a whole answer"
        case _:
            return PostError.UNREACHABLE, type(problem).__name__
