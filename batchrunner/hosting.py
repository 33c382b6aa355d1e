"""The parent of a server: it holds the listening sockets, keeps one API process and the workers running over one data
folder, and drains them at the end. It answers nothing itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from batchrunner.errors import PortTaken, UsageError
from batchrunner.holdings import LiveUse
from batchrunner.orders import LISTENING, READY, Greeting, Pulse, Using, encode_order
from batchrunner.ports import Clock
from batchrunner.processes import ChildProcess, Grace
from batchrunner.settings import Settings, has_upstream

if TYPE_CHECKING:
    from batchrunner.app import Adapters
    from batchrunner.supervisor import Supervisor

logger = logging.getLogger(__name__)

_PULSE_S = 1.0
# A worker reports ten times a second.
_TICKING_S = 5.0
# The API process of a server that was killed lets go of the port as soon as it notices.
_PORT_WAIT_S = 3.0
_PORT_LOOK_S = 0.1
_NOT_SPOKEN = frozenset({errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT})


def addresses_of(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    """Resolve what is to be listened on.

    Raises:
        UsageError: the name means no address.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise UsageError(f"--host {host}: {error.strerror}") from error
    return list(dict.fromkeys((family, str(address[0])) for family, _, _, _, address in found))


def is_loopback(host: str) -> bool:
    """Tell whether nobody outside this machine can reach any address of the host. Raises: UsageError."""
    return all(ipaddress.ip_address(address.partition("%")[0]).is_loopback for _, address in addresses_of(host, 0))


async def bind(host: str, port: int, clock: Clock) -> list[socket.socket]:
    """Take the port at every address of the host, with 0 a free one, the same at all. Nobody listens yet.

    Raises:
        UsageError: the name means no address.
        PortTaken: somebody else has the port, or it may not be had.
    """
    give_up_at_s = clock.monotonic_s() + _PORT_WAIT_S
    while True:
        try:
            return _bound(host, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or clock.monotonic_s() >= give_up_at_s:
                raise PortTaken(f"cannot listen on {host} port {port}: {error.strerror}") from error
            await clock.sleep(_PORT_LOOK_S)


def _bound(host: str, port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, address in addresses_of(host, port):
            try:
                sockets.append(_bound_to(family, address, port))
            except OSError as error:
                # Names such as localhost may have an address of a kind that this machine does not speak.
                if error.errno not in _NOT_SPOKEN:
                    raise
                missing = error
            else:
                port = sockets[0].getsockname()[1]
    except OSError:
        for each in sockets:
            each.close()
        raise
    if missing is not None and not sockets:
        raise missing
    return sockets


def _bound_to(family: socket.AddressFamily, address: str, port: int) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind((address, port))
    except OSError:
        made.close()
        raise
    return made


def _open(folder: Path, settings: Settings) -> Adapters:
    from batchrunner.app import open_adapters

    return open_adapters(folder, settings)


_Heed = Callable[[tuple[LiveUse, ...]], None]


class _Api(ChildProcess):
    """The API process: how far it is, and what it uses of the upstreams."""

    def __init__(
        self,
        *,
        greeting: Greeting,
        clock: Clock,
        pulse: Callable[[], None],
        heed: _Heed,
    ) -> None:
        super().__init__(
            "the API process",
            command=[sys.executable, "-m", "batchrunner.serving"],
            greeting=encode_order(greeting),
            clock=clock,
            pass_fds=greeting.listening_fds,
        )
        self.ready = asyncio.Event()
        self._pulse = pulse
        self._heed = heed

    def hear(self, line: bytes) -> None:
        """Follow its start, then what it uses."""
        if line == READY:
            self.progressed()
            self.ready.set()
        elif line == LISTENING:
            self._pulse()
        else:
            self._hear_use(line)

    def _hear_use(self, line: bytes) -> None:
        try:
            self._heed(msgspec.json.decode(line, type=Using).uses)
        except msgspec.DecodeError:
            logger.warning("the API process wrote what is no word of it", extra={"action": "api_chatter"})

    async def mourn(self) -> None:
        """Give batches back what it used; its requests were answered or will be sent again."""
        self._heed(())


class Host:
    """A server over a data folder that nobody else works on. `run` returns after `stop`, when its processes have ended.

    `sockets` are bound and become the host's. With a `worker_count` of 0 there is only an API.

    Raises (from run):
        UsageError: others than this machine could reach it, and there is no API key.
        SchemaNewer: a newer version wrote the folder.
        WorkerLost: the API process dies as soon as it starts, again and again.
    """

    def __init__(
        self,
        *,
        folder: Path,
        settings: Settings,
        api_keys: Mapping[str, str],
        worker_count: int,
        sockets: Sequence[socket.socket],
        is_local: bool,
        clock: Clock,
    ) -> None:
        self._folder = folder
        self._settings = settings
        self._api_keys = api_keys
        self._worker_count = worker_count
        self._sockets = sockets
        self._is_local = is_local
        self._clock = clock
        self._crew: Supervisor | None = None
        self._uses: tuple[LiveUse, ...] = ()
        self._is_prepared = False
        self._grace = Grace(clock)
        self.has_keys = False
        greeting = Greeting(
            folder=str(folder),
            settings=settings,
            listening_fds=tuple(each.fileno() for each in sockets),
            is_local=is_local,
            api_keys=dict(api_keys),
        )
        self._api = _Api(greeting=greeting, clock=clock, pulse=self._send_pulse, heed=self._heed)

    @property
    def in_flight(self) -> int:
        """How many exchanges with upstreams are under way."""
        return self._crew.live().in_flight if self._crew is not None else 0

    def stop(self, *, grace_s: float) -> None:
        """Take nothing new and drain; called again it shortens the grace."""
        self._grace.give(grace_s)
        self._close_sockets()
        self._api.leave()
        if self._crew is not None:
            self._crew.stop(grace_s=grace_s)
        self._send_pulse()

    async def run(self, announce: Callable[[], None]) -> None:
        """Serve until `stop`; `announce` is called once when requests are answered."""
        adapters: Adapters | None = None
        try:
            async with asyncio.TaskGroup() as group:
                # Its start takes as long as all that follows: they go side by side.
                serving = group.create_task(self._api.keep())
                adapters = await asyncio.to_thread(_open, self._folder, self._settings)
                await self._prepare(adapters)
                pulsing = group.create_task(self._pulse())
                await self._first_of(serving, self._api.ready)
                if self._api.ready.is_set():
                    announce()
                    await self._work(adapters)
                await serving
                pulsing.cancel()
        finally:
            self._close_sockets()
            await self._api.dismiss()
            if adapters is not None:
                await asyncio.to_thread(adapters.store.close)

    async def _prepare(self, adapters: Adapters) -> None:
        """Free what a server that was killed held, and see who may ask."""
        from batchrunner.app import begin_anew

        await asyncio.to_thread(begin_anew, adapters, self._folder)
        self.has_keys = await asyncio.to_thread(adapters.store.has_keys)
        if not self.has_keys and not self._is_local:
            raise UsageError(
                f"there is no API key, and others could reach {self._settings.host}",
                hint=f"Make one with `batchrunner keys create --data {self._folder}`, or listen on 127.0.0.1.",
            )
        self._is_prepared = True
        self._send_pulse()

    async def _first_of(self, ending: asyncio.Task[None], event: asyncio.Event) -> None:
        waiting = asyncio.create_task(event.wait())
        await asyncio.wait({ending, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()

    async def _work(self, adapters: Adapters) -> None:
        """Run the workers; without any this ends at once."""
        from batchrunner.app import process_crew

        if self._worker_count == 0 or self._grace.given_s is not None:
            return
        self._crew = process_crew(
            adapters, self._folder, self._settings, self._api_keys, self._worker_count, is_server=True
        )
        self._crew.yield_to(self._uses)
        await self._crew.run()

    # -- what the API is told ----------------------------------------------------------------------------------------

    async def _pulse(self) -> None:
        while True:
            self._send_pulse()
            if self._grace.is_long_over:
                self._api.kill()
            await self._clock.sleep(_PULSE_S)

    def _send_pulse(self) -> None:
        """Say how things stand, from when the folder is ready for the API."""
        if self._is_prepared or self._grace.given_s is not None:
            self._api.send(encode_order(self._present()))

    def _present(self) -> Pulse:
        is_told = has_upstream(self._settings)
        if self._crew is None:
            # Until the workers are started they are expected, not missing.
            return Pulse(has_upstream=is_told, stop_grace_s=self._grace.given_s)
        live = self._crew.live()
        return Pulse(
            worker_count=live.worker_count,
            ticking_count=self._crew.ticking_count(within_s=_TICKING_S),
            has_upstream=is_told,
            in_flight=live.in_flight,
            waiting=live.waiting,
            window=live.window,
            upstreams=live.upstreams,
            tally=live.tally.to_wire(),
            trouble=live.trouble,
            stop_grace_s=self._grace.given_s,
        )

    def _heed(self, uses: tuple[LiveUse, ...]) -> None:
        """Leave to the API what it uses: batches get the rest."""
        self._uses = uses
        if self._crew is not None:
            self._crew.yield_to(uses)

    def _close_sockets(self) -> None:
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.close()
