"""The composition root: settings become adapters, adapters become a Runner. The only place that names concrete
adapters.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from batchrunner.blobs.folder import FolderBlobs, open_blobs
from batchrunner.clock import SystemClock, SystemRng
from batchrunner.errors import DiskFull, NotFound, StoreUnavailable, UsageError
from batchrunner.fanout import Fanout
from batchrunner.holdings import UpstreamLive
from batchrunner.housekeeping import drop_unfinished
from batchrunner.journal import open_journal
from batchrunner.limits import Cooldown, FirstContact, Gate, Outage, ReadBudget, TokenBucket
from batchrunner.metrics import Tally
from batchrunner.models import LOCAL_TENANT, BatchId, SessionId
from batchrunner.outlets import Outlet
from batchrunner.pipeline import Pipeline
from batchrunner.ports import Store
from batchrunner.routing import router_of
from batchrunner.session_locks import SessionLocks
from batchrunner.settings import Settings, has_upstream, targets_of
from batchrunner.store.schema import VERSION as SCHEMA
from batchrunner.store.schema import version_of_file as schema_of_file
from batchrunner.store.sqlite import SqliteStore
from batchrunner.supervisor import Live, Supervisor, WorkerGreeting, bound_of, encode_message, windows_of
from batchrunner.targets import Target
from batchrunner.upstream import AiohttpUpstream
from batchrunner.upstream_nowhere import NowhereUpstream
from batchrunner.worker import Worker

logger = logging.getLogger(__name__)

# A server whose workers die as soon as they start tries again after this time, and answers requests meanwhile.
_WORKER_WAITS_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapters:
    """What several sessions of one process share."""

    store: SqliteStore
    blobs: FolderBlobs
    clock: SystemClock
    rng: SystemRng


def open_adapters(folder: Path, settings: Settings | None = None) -> Adapters:
    """Open the store and the blobs of a data folder, making what is missing.

    Raises:
        FolderUnsuitable: the folder lies on a network file system.
        SchemaNewer: a newer version wrote it.
        UsageError: the settings lead to no blobs.
    """
    clock, rng = SystemClock(), SystemRng()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sessions").mkdir(exist_ok=True)
    return Adapters(
        blobs=open_blobs(folder, settings or Settings(), clock, rng),
        store=SqliteStore.open(folder / "state.db", clock),
        clock=clock,
        rng=rng,
    )


def open_to_read(folder: Path, settings: Settings) -> Adapters:
    """Open a folder for one thread that only reads, which a full disk does not hinder. Raises as `open_adapters`."""
    try:
        return open_adapters(folder, settings)
    except DiskFull as error:
        clock, rng = SystemClock(), SystemRng()
        try:
            store = SqliteStore.open_alone(folder / "state.db", clock)
        except StoreUnavailable:
            raise error from None
        return Adapters(blobs=open_blobs(folder, settings, clock, rng), store=store, clock=clock, rng=rng)


def schema_versions(folder: Path) -> tuple[str | None, str]:
    """Tell the schema of a folder's database, None without one, and this program's. Changes nothing. Blocks."""
    path = folder / "state.db"
    return (schema_of_file(path) if path.exists() else None), SCHEMA


def was_anything_sent(folder: Path, settings: Settings, batch_ids: Sequence[str]) -> bool:
    """Tell whether any of a run's batches ever left validation: before that no line is handed out. Blocks."""
    adapters = open_adapters(folder, settings)
    try:
        scope = adapters.store.scope(LOCAL_TENANT)
        return any(scope.batch(BatchId(each)).in_progress_at is not None for each in batch_ids)
    except NotFound:
        return False
    finally:
        adapters.store.close()


def reap(adapters: Adapters, locks: SessionLocks, *, is_witnessed: bool = True) -> int:
    """End the leases of sessions whose process is gone; gives their number. Blocks.

    Only a death that somebody of the same run lived to see speaks against the lines under way: a run that was killed as
    a whole tells nothing of them.
    """
    count = 0
    dead = locks.dead_sessions()
    for session in dead:
        count += adapters.store.release_session(session, died=is_witnessed)
        locks.bury(session)
    if dead:
        drop_unfinished(adapters.blobs, dead=dead)
    return count


def begin_anew(adapters: Adapters, folder: Path) -> None:
    """Free what a run or server that was killed as a whole held of the folder; nobody else works on it now. Blocks."""
    reap(adapters, SessionLocks(folder), is_witnessed=False)
    drop_unfinished(adapters.blobs, is_alone=True)


@contextlib.asynccontextmanager
async def worker_session(
    adapters: Adapters,
    folder: Path,
    settings: Settings,
    *,
    api_keys: Mapping[str, str],
    pacer: Callable[[Fanout], None],
    is_server: bool = False,
) -> AsyncIterator[Worker]:
    """Assemble one worker session; its lock, connections and leases end with the block. `api_keys` go by upstream."""
    loop = asyncio.get_running_loop()
    locks = SessionLocks(folder)
    session = SessionId(adapters.rng.token_hex(8))
    locks.hold(session)
    await asyncio.to_thread(adapters.store.open_session, session, host=socket.gethostname(), pid=os.getpid())
    journal = open_journal(
        adapters.blobs, session, settings, adapters.clock, on_durable=lambda: _call_soon(loop, worker.durable)
    )
    outlets = _outlets(adapters, settings, api_keys, is_server=is_server)
    pipeline = Pipeline(
        store=adapters.store, blobs=adapters.blobs, journal=journal, clock=adapters.clock, settings=settings
    )
    fanout = Fanout(
        outlets=outlets,
        journal=journal,
        clock=adapters.clock,
        rng=adapters.rng,
        settings=settings,
        router=router_of(targets_of(settings)),
    )
    worker = Worker(
        session=session,
        store=adapters.store,
        pipeline=pipeline,
        fanout=fanout,
        pacer=pacer,
        reap=lambda: reap(adapters, locks),
        clock=adapters.clock,
        settings=settings,
        is_server=is_server,
    )
    try:
        yield worker
    finally:
        for outlet in outlets:
            await outlet.upstream.close()
        await asyncio.to_thread(journal.close)
        try:
            await asyncio.to_thread(adapters.store.release_session, session, died=False)
        except (StoreUnavailable, DiskFull) as error:
            # Whoever finds the lock free ends its leases, or they run out.
            logger.warning("leases not given back: %s", error, extra={"action": "release_failed"})
            locks.leave(session)
        else:
            locks.let_go(session)


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(callback)


def _outlets(adapters: Adapters, settings: Settings, api_keys: Mapping[str, str], *, is_server: bool) -> list[Outlet]:
    """Make the upstreams, in the order of their targets; one that was told none waits in a server."""
    if not has_upstream(settings):
        if not is_server:
            raise UsageError("no upstream is named", hint="Give -u URL or set OPENAI_BASE_URL.")
        (nowhere,) = targets_of(settings)
        upstream = NowhereUpstream(adapters.clock)
        return [Outlet(name=nowhere.name, upstream=upstream, gate=_gate(settings, nowhere, ReadBudget()))]
    reading = ReadBudget()
    return [
        Outlet(
            name=target.name,
            upstream=_upstream(adapters, settings, target, api_keys.get(target.name), reading),
            gate=_gate(settings, target, reading),
            aliases=target.aliases,
            address=target.base_url,
        )
        for target in targets_of(settings)
    ]


def _upstream(
    adapters: Adapters, settings: Settings, target: Target, api_key: str | None, budget: ReadBudget
) -> AiohttpUpstream:
    return AiohttpUpstream(
        target.base_url,
        clock=adapters.clock,
        api_key=api_key,
        total_timeout_s=settings.request_timeout_s,
        idle_timeout_s=settings.idle_timeout_s,
        connect_timeout_s=settings.connect_timeout_s,
        reply_bytes_max=settings.reply_bytes_max,
        asset_bytes_max=settings.asset_bytes_max,
        budget=budget,
    )


def _gate(settings: Settings, target: Target, reading: ReadBudget) -> Gate:
    return Gate(
        cooldown=Cooldown(),
        outage=Outage(),
        first_contact=FirstContact(patience_s=settings.first_contact_s),
        requests=TokenBucket(target.rpm) if target.rpm else None,
        tokens=TokenBucket(target.tpm) if target.tpm else None,
        reading=reading,
    )


class Crew(Protocol):
    """The workers of a run, whether they live in this process or in others."""

    async def run(self) -> None:
        """Work until `stop`."""

    def stop(self, *, grace_s: float) -> None:
        """Drain; called again it shortens the grace."""

    def live(self) -> Live:
        """How the work stands now."""


class LocalCrew:
    """One worker session on this process's own loop."""

    def __init__(self, adapters: Adapters, folder: Path, settings: Settings, api_keys: Mapping[str, str]) -> None:
        self._adapters = adapters
        self._folder = folder
        self._settings = settings
        self._api_keys = api_keys
        self._windows = windows_of(settings)
        self._worker: Worker | None = None
        self._stop_grace_s: float | None = None

    async def run(self) -> None:
        """See Crew."""
        session = worker_session(
            self._adapters, self._folder, self._settings, api_keys=self._api_keys, pacer=self._pace
        )
        async with session as self._worker:
            if self._stop_grace_s is not None:
                self._worker.stop(grace_s=self._stop_grace_s)
            await self._worker.run()

    def _pace(self, fanout: Fanout) -> None:
        for pool, window in zip(fanout.pools, self._windows, strict=True):
            window.observe(pool.take_sample())
            pool.window = window.size
            pool.bound_by = str(window.bound_by)

    def stop(self, *, grace_s: float) -> None:
        """See Crew."""
        self._stop_grace_s = grace_s
        if self._worker is not None:
            self._worker.stop(grace_s=grace_s)

    def live(self) -> Live:
        """See Crew."""
        worker = self._worker
        window = sum(each.size for each in self._windows)
        if worker is None:
            return Live(window=window, bound_by="starting", in_flight=0, waiting=0, tally=Tally())
        fanout = worker.fanout
        upstreams = tuple(
            UpstreamLive(
                name=pool.name,
                window=window.size,
                bound_by=str(window.bound_by),
                in_flight=len(pool.in_flight),
                waiting=fanout.waiting_for(pool),
                is_down=pool.is_down,
            )
            for pool, window in zip(fanout.pools, self._windows, strict=True)
        )
        return Live(
            window=window,
            bound_by=bound_of(upstreams),
            in_flight=fanout.in_flight_count,
            waiting=fanout.waiting_count,
            tally=fanout.tally,
            trouble=worker.trouble_text,
            lost=worker.lost_text,
            upstreams=upstreams,
        )


def process_crew(
    adapters: Adapters,
    folder: Path,
    settings: Settings,
    api_keys: Mapping[str, str],
    worker_count: int,
    *,
    is_server: bool = False,
) -> Supervisor:
    """Prepare worker processes over the same folder. Those of a server wait for better times, whatever happens."""
    locks = SessionLocks(folder)

    async def bury() -> None:
        await asyncio.to_thread(reap, adapters, locks)

    greeting = WorkerGreeting(folder=str(folder), settings=settings, api_keys=dict(api_keys), is_server=is_server)
    return Supervisor(
        command=[sys.executable, "-m", "batchrunner.working"],
        greeting=encode_message(greeting),
        worker_count=worker_count,
        settings=settings,
        clock=adapters.clock,
        bury=bury,
        waits_s=_WORKER_WAITS_S if is_server else None,
    )


class Runner:
    """The assembled system over one data folder: what the command line and embedders hold.

    `async with Runner(settings, folder) as runner` opens the store and frees what dead sessions held; `crew` starts the
    work. `api_keys` are those of the upstreams by their names, which is `default` for the one that `base_url` names.
    """

    def __init__(self, settings: Settings, folder: Path, *, api_keys: Mapping[str, str] | None = None) -> None:
        self.settings = settings
        self.folder = folder
        self._api_keys = api_keys or {}
        self._adapters: Adapters | None = None

    async def __aenter__(self) -> Self:
        self._adapters = await asyncio.to_thread(open_adapters, self.folder, self.settings)
        await asyncio.to_thread(begin_anew, self._adapters, self.folder)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.to_thread(self.adapters.store.close)

    @property
    def adapters(self) -> Adapters:
        """Store, blobs and clocks; open while the runner is."""
        assert self._adapters is not None
        return self._adapters

    @property
    def store(self) -> Store:
        """The store."""
        return self.adapters.store

    def crew(self, worker_count: int) -> Crew:
        """Prepare the workers: one in this process, more in processes of their own."""
        if worker_count == 1:
            return LocalCrew(self.adapters, self.folder, self.settings, self._api_keys)
        return process_crew(self.adapters, self.folder, self.settings, self._api_keys, worker_count)
