"""The API process of a server: it composes the API over the data folder, answers, sweeps what time has ended, and stops
when its parent says so or is gone.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from aiohttp import web

from batchrunner.api.door import CONNECTIONS_MAX, Door
from batchrunner.api.http import ApiParts
from batchrunner.api.routes import build_app, described, make_runner
from batchrunner.api.vitals import Vitals
from batchrunner.app import Adapters, open_adapters
from batchrunner.child import run_child
from batchrunner.courier import IN_FLIGHT_MAX, Courier
from batchrunner.delivering import address_rules, carrying, open_poster
from batchrunner.errors import BatchrunnerError, DiskFull
from batchrunner.housekeeping import clear, drop_unfinished
from batchrunner.live import Live
from batchrunner.orders import LISTENING, READY, Greeting, Pulse, Using, encode_order
from batchrunner.ports import Clock
from batchrunner.queue_pages import queue_routes
from batchrunner.settings import Settings, has_upstream, targets_of
from batchrunner.tuning import allow_open_files, freeze_start_up
from batchrunner.upstream_live import AiohttpLiveSender

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_LOOK_S = 2.0
_UNFINISHED_S = 86400.0
# What is under way when the parent is gone: nobody waits for this process any more, and a new one may start.
_ORPHAN_GRACE_S = 1.0
# How long a request that is cut off gets to take it in, and to undo what it began.
_CUT_S = 0.5
_UNDO_S = 5.0
# A notification that does not end is sent again by the next process.
_LAST_POSTS_S = 2.0
# How soon batches hear of what they have to leave to requests that are answered at once.
_USE_S = 0.1


class ApiProcess:
    """One API over open adapters. `run` returns after `stop`, when what was under way has been answered or its grace is
    over.
    """

    def __init__(self, adapters: Adapters, greeting: Greeting, *, is_open: bool) -> None:
        settings = greeting.settings
        self.vitals = Vitals(is_local=greeting.is_local)
        self._adapters = adapters
        self._settings = settings
        self._folder = Path(greeting.folder)
        self._rules = address_rules(settings, is_open=is_open)
        self._fds = greeting.listening_fds
        self._executor = ThreadPoolExecutor(settings.api_threads, thread_name_prefix="api")
        self._parts = ApiParts(
            store=adapters.store,
            blobs=adapters.blobs,
            clock=adapters.clock,
            rng=adapters.rng,
            settings=settings,
            is_open=is_open,
            executor=self._executor,
            vitals=self.vitals,
            addresses=self._rules,
        )
        self._grace_s = settings.drain_grace_s
        self._limit: asyncio.Timeout | None = None
        self._api_keys = greeting.api_keys
        self._live: Live | None = None
        self._unfinished_at_s = adapters.clock.monotonic_s() + _UNFINISHED_S

    def stop(self, *, grace_s: float) -> None:
        """Take no more requests and end within the grace; called again it shortens it."""
        if self.vitals.closing.is_set():
            self._grace_s = min(self._grace_s, grace_s)
        else:
            self._grace_s = grace_s
        self.vitals.closing.set()
        if self._limit is not None:
            self._limit.reschedule(asyncio.get_running_loop().time() + self._grace_s)

    async def run(self) -> None:
        """Listen and answer until `stop`."""
        # A request may read a file or two while it is answered, and each notification has a socket.
        third = allow_open_files(2 * CONNECTIONS_MAX + IN_FLIGHT_MAX) // 3
        poster = open_poster(self._adapters, self._rules)
        try:
            async with carrying(
                self._adapters,
                self._folder,
                self._settings,
                poster,
                in_flight_max=min(IN_FLIGHT_MAX, third),
                threads=self._executor,
            ) as courier:
                self.vitals.posts = courier.posts
                self._live = open_live(self._settings, self._api_keys, self._adapters.clock)
                parts = replace(self._parts, poster=poster, live=self._live)
                await self._serve(courier, parts, connections_max=min(CONNECTIONS_MAX, third))
        finally:
            await poster.close()
            if self._live is not None:
                await self._live.close()

    def follow(self, pulse: Pulse) -> None:
        """Take in what the parent says."""
        self.vitals.feel(pulse, self._adapters.clock.monotonic_s())
        if self._live is not None:
            self._live.hear(pulse.upstreams)
        if pulse.stop_grace_s is not None:
            self.stop(grace_s=pulse.stop_grace_s)

    async def _serve(self, courier: Courier, parts: ApiParts, *, connections_max: int) -> None:
        table = described(*queue_routes(parts.rng.token_hex(32).encode()))
        runner = make_runner(build_app(parts, table), shutdown_s=_CUT_S)
        await runner.setup()
        assert runner.server is not None
        door = Door(runner.server, self.vitals.busy, connections_max=connections_max)
        loop = asyncio.get_running_loop()
        listening = [await loop.create_server(door, sock=socket.socket(fileno=fd)) for fd in self._fds]
        _tell_parent(READY)
        freeze_start_up()
        try:
            async with asyncio.TaskGroup() as group:
                steps = (self._keep_house(), self._look_around(), self._tell_use())
                loops = [group.create_task(each) for each in steps]
                group.create_task(courier.run())
                await self.vitals.closing.wait()
                courier.stop(grace_s=min(self._grace_s, _LAST_POSTS_S))
                for each in loops:
                    each.cancel()
        finally:
            await self._end(runner, listening)

    async def _end(self, runner: web.AppRunner, listening: Sequence[asyncio.Server]) -> None:
        """Stop listening, then wait for requests under way, then cut them off."""
        for each in listening:
            each.close()
        assert runner.server is not None
        runner.server.pre_shutdown()
        try:
            async with asyncio.timeout(self._grace_s) as self._limit:
                await self.vitals.idle()
        except TimeoutError:
            logger.warning("%d requests are cut off", self.vitals.under_way, extra={"action": "requests_cut"})
        await runner.cleanup()
        try:
            async with asyncio.timeout(_UNDO_S):
                await self.vitals.idle()
        except TimeoutError:
            logger.warning("what a request began is left to the sweep", extra={"action": "requests_left"})
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _keep_house(self) -> None:
        """Sweep now and then; at first, and once a day, what writers that died have left half written."""
        await self._called(lambda: drop_unfinished(self._adapters.blobs))
        while True:
            await self._try("the sweep", self._sweep)
            if self._adapters.clock.monotonic_s() >= self._unfinished_at_s:
                self._unfinished_at_s += _UNFINISHED_S
                await self._called(lambda: drop_unfinished(self._adapters.blobs))
            await self._adapters.clock.sleep(self._settings.sweep_s)

    async def _try(self, what: str, step: Callable[[], Awaitable[None]]) -> None:
        """Do what is done again and again; no trouble with it, and no bug in it, is worth the answers to all others."""
        try:
            await step()
        except BatchrunnerError as error:
            logger.warning("%s failed: %s", what, error, extra={"action": "upkeep_failed", "code": error.code})
        except Exception:
            logger.exception("%s broke", what, extra={"action": "upkeep_broke"})

    async def _sweep(self) -> None:
        in_use = self._parts.reading.names
        store, blobs = self._adapters.store, self._adapters.blobs
        cleared = await self._called(lambda: clear(store, blobs, in_use=in_use, is_stopping=self.vitals.closing.is_set))
        if cleared.blobs or cleared.journals or cleared.files or cleared.uploads:
            logger.info(
                "swept: %d files expired, %d uploads ended, %d journals and %d blobs deleted",
                cleared.files,
                cleared.uploads,
                cleared.journals,
                cleared.blobs,
                extra={"action": "swept"},
            )

    async def _tell_use(self) -> None:
        """Tell the parent what is used of the upstreams, whenever it has changed."""
        told = Using(uses=())
        while self._live is not None:
            using = Using(uses=self._live.uses())
            if using != told:
                _tell_parent(encode_order(using))
                told = using
            await self._adapters.clock.sleep(_USE_S)

    async def _look_around(self) -> None:
        """Notice what changes the rules: the first key, and a full disk."""
        while True:
            await self._try("the look around", self._look)
            await self._adapters.clock.sleep(_LOOK_S)

    async def _look(self) -> None:
        if self._parts.is_open and await self._called(self._adapters.store.has_keys):
            # Whether keys are asked for is settled when the API is made; the next process makes it anew.
            logger.info("there are API keys now: requests need one", extra={"action": "keys_appeared"})
            self.stop(grace_s=self._settings.drain_grace_s)
        await self._called(self._mind_the_reserve)

    def _mind_the_reserve(self) -> None:
        """Give the reserve up when the disk is full, so that a cancel can be written; take it again when it is not."""
        blobs, reserve_bytes = self._adapters.blobs, self._settings.reserve_bytes
        free_bytes = blobs.free_bytes()
        if free_bytes is None:
            return
        if free_bytes < reserve_bytes:
            blobs.release_reserve()
        elif free_bytes > 4 * reserve_bytes:
            try:
                blobs.keep_reserve(reserve_bytes)
            except DiskFull as error:
                logger.info("no reserve: %s", error, extra={"action": "reserve_missing"})

    async def _called(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function)


def open_live(settings: Settings, api_keys: Mapping[str, str], clock: Clock) -> Live | None:
    """Make what passes requests on, inside the loop that it serves; None where no upstream is named.

    Raises:
        UsageError: an upstream's base URL or key does not fit.
    """
    if not has_upstream(settings):
        return None
    targets = targets_of(settings)
    senders = [
        AiohttpLiveSender(
            target.base_url,
            clock=clock,
            api_key=api_keys.get(target.name),
            total_timeout_s=settings.request_timeout_s,
            idle_timeout_s=settings.idle_timeout_s,
            connect_timeout_s=settings.connect_timeout_s,
        )
        for target in targets
    ]
    return Live(targets, senders, clock.monotonic_s)


def _tell_parent(line: bytes) -> None:
    sys.stdout.buffer.write(line)
    sys.stdout.buffer.flush()


async def _obey(process: ApiProcess, stdin: asyncio.StreamReader) -> None:
    """Follow the parent's pulse; when its pipe closes, end soon: a new server may want the folder."""
    while line := await stdin.readline():
        process.follow(msgspec.json.decode(line, type=Pulse))
    process.stop(grace_s=_ORPHAN_GRACE_S)


async def _api_process(stdin: asyncio.StreamReader) -> None:
    greeting = msgspec.json.decode(await stdin.readline(), type=Greeting)
    _tell_parent(LISTENING)
    # The parent speaks once the folder's database has this program's schema.
    first = await stdin.readline()
    if not first:
        return
    adapters = await asyncio.to_thread(open_adapters, Path(greeting.folder), greeting.settings)
    is_open = greeting.is_local and not await asyncio.to_thread(adapters.store.has_keys)
    process = ApiProcess(adapters, greeting, is_open=is_open)
    process.follow(msgspec.json.decode(first, type=Pulse))
    stop = partial(process.stop, grace_s=greeting.settings.drain_grace_s)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    obeying = asyncio.create_task(_obey(process, stdin))
    try:
        await process.run()
    finally:
        obeying.cancel()
        adapters.store.close()


if __name__ == "__main__":
    run_child(_api_process, words="%(asctime)s api: %(message)s", level=logging.INFO)
