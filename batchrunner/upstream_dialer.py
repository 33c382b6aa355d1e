"""Opens the connections to the upstream through aiohttp's connector, below its session."""

from __future__ import annotations

import asyncio
import os
import ssl
from pathlib import Path

import aiohttp
from yarl import URL

from batchrunner.errors import UsageError
from batchrunner.models import AttemptError
from batchrunner.upstream_wire import READ_BYTES, Failure, ReadLimits, Wire


class Dialer:
    """Opens connections to one base URL through aiohttp's connector: DNS with a cache, happy eyeballs, TLS.

    Made inside the running loop that it serves. `ca_bundle` is a PEM file that replaces the system's certificate store.

    Raises:
        UsageError: the CA bundle cannot be read.
    """

    def __init__(
        self,
        base: URL,
        *,
        connect_timeout_s: float,
        limits: ReadLimits,
        ca_bundle: Path | None,
    ) -> None:
        self.peer = f"{base.host_subcomponent}:{base.port}"
        self._connect_timeout_s = connect_timeout_s
        self._limits = limits
        # The fan-out bounds what is in flight, and idle connections are kept by the owner of the wires.
        self._connector = aiohttp.TCPConnector(limit=0, ssl=_trust(ca_bundle) if ca_bundle else True)
        self._request = aiohttp.ClientRequest("POST", base, loop=asyncio.get_running_loop())
        self._timeout = aiohttp.ClientTimeout(total=None, connect=connect_timeout_s)
        self._read_buffer = memoryview(bytearray(READ_BYTES))

    async def open(self) -> Wire | Failure:
        """Open one connection. Nothing was sent when this fails."""
        try:
            connection = await self._connector.connect(self._request, [], self._timeout)
        except (aiohttp.ClientError, OSError) as error:
            return Failure(
                AttemptError.NOT_CONNECTED, f"cannot connect to {self.peer}: {cause_of(error, self._connect_timeout_s)}"
            )
        handler, transport = connection.protocol, connection.transport
        if handler is None or transport is None or handler.should_close:
            connection.close()
            cause = "it spoke or closed before it was asked"
            return Failure(AttemptError.NOT_CONNECTED, f"cannot talk to {self.peer}: {cause}")
        wire = Wire(
            connection,
            handler,
            transport,
            peer=self.peer,
            read_buffer=self._read_buffer,
            limits=self._limits,
        )
        transport.set_protocol(wire)
        return wire

    async def close(self) -> None:
        """Close what is still open and stop name lookups."""
        await self._connector.close()


def cause_of(error: Exception, connect_timeout_s: float) -> str:
    """Say why no connection could be opened, in the system's words."""
    match error:
        case TimeoutError():
            return f"no connection within {connect_timeout_s:g} s"
        case aiohttp.ClientConnectorDNSError():
            return "the host name is not known"
        case aiohttp.ClientConnectorCertificateError(certificate_error=ssl.SSLCertVerificationError() as refused):
            return f"its TLS certificate is not trusted ({refused.verify_message})"
        case aiohttp.ClientSSLError(os_error=ssl.SSLError() as refused):
            return f"the TLS handshake failed ({refused.reason})"
        case aiohttp.ClientConnectorError(os_error=cause):
            # asyncio words it its own way ("Connect call failed"); people know the system's words.
            return os.strerror(cause.errno) if cause.errno else cause.strerror or type(cause).__name__
        case _:
            return type(error).__name__


def _trust(ca_bundle: Path) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=str(ca_bundle))
    except OSError as error:
        raise UsageError(f"cannot read the CA bundle {ca_bundle}: {error.strerror or error}") from error
    context.set_alpn_protocols(["http/1.1"])
    return context
