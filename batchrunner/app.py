"""The composition root: settings become adapters, adapters become a Runner. The only place that names concrete
adapters.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import msgspec

from batchrunner import crash
from batchrunner.blobs.folder import FolderBlobs, open_blobs
from batchrunner.clock import SystemClock, SystemRng
from batchrunner.errors import BatchrunnerError, BlobsUnavailable, NotFound, UsageError
from batchrunner.fanout import Fanout
from batchrunner.journal import Journal
from batchrunner.limits import Cooldown, FirstContact, Gate, Outage, ReadBudget, TokenBucket
from batchrunner.metrics import Tally
from batchrunner.models import LOCAL_TENANT, BatchId, SessionId
from batchrunner.pace import Window
from batchrunner.pipeline import Pipeline
from batchrunner.ports import Store, Upstream
from batchrunner.sessions import SessionLocks
from batchrunner.settings import Settings
from batchrunner.shard_journal import Frozen
from batchrunner.store.schema import VERSION as SCHEMA
from batchrunner.store.schema import version_of_file as schema_of_file
from batchrunner.store.sqlite import SqliteStore
from batchrunner.supervisor import Live, Report, Share, Supervisor, encode_message
from batchrunner.tuning import freeze_start_up, tune_process
from batchrunner.upstream import AiohttpUpstream
from batchrunner.upstream_nowhere import NowhereUpstream
from batchrunner.worker import Worker

logger = logging.getLogger(__name__)

# A server whose workers die as soon as they start tries again after this time, and answers requests meanwhile.
_WORKER_WAITS_S = 30.0
# How often segments that are written in one request are looked at, and the results that may wait for that.
_FROZEN_TICK_S = 0.1
_FROZEN_BYTES_MAX = 16 << 20
_FROZEN_WRITERS = 4


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


class LogLine(logging.Formatter):
    """A log record as one line: an error of ours tells in its words, only one that nobody expects has its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, BatchrunnerError):
            return super().format(record)
        told = logging.makeLogRecord(record.__dict__ | {"exc_info": None, "exc_text": None})
        return f"{super().format(told)}: {error.code}: {error.message}"


def reap(adapters: Adapters, locks: SessionLocks, *, is_witnessed: bool = True) -> int:
    """End the leases of sessions whose process is gone; gives their number. Blocks.

    Only a death that somebody of the same run lived to see speaks against the lines under way: a run that was killed as
    a whole tells nothing of them.
    """
    count = 0
    for session in locks.dead_sessions():
        count += adapters.store.release_session(session, died=is_witnessed)
        locks.bury(session)
    return count


def begin_anew(adapters: Adapters, folder: Path) -> None:
    """Free what a run or server that was killed as a whole held of the folder; nobody else works on it now. Blocks."""
    reap(adapters, SessionLocks(folder), is_witnessed=False)
    try:
        adapters.blobs.drop_unfinished(older_than_s=0)
    except BlobsUnavailable as error:
        logger.warning("unfinished uploads stay: %s", error, extra={"action": "uploads_stay"})


@contextlib.asynccontextmanager
async def worker_session(
    adapters: Adapters,
    folder: Path,
    settings: Settings,
    *,
    api_key: str | None,
    pacer: Callable[[Fanout], None],
    is_server: bool = False,
) -> AsyncIterator[Worker]:
    """Assemble one worker session; its lock, its connections and its leases end with the block."""
    loop = asyncio.get_running_loop()
    locks = SessionLocks(folder)
    session = SessionId(adapters.rng.token_hex(8))
    locks.hold(session)
    await asyncio.to_thread(adapters.store.open_session, session, host=socket.gethostname(), pid=os.getpid())
    journal = _journal(adapters, session, settings, on_durable=lambda: _call_soon(loop, worker.durable))
    gate = _gate(settings)
    upstream: Upstream
    if is_server and settings.base_url is None:
        upstream = NowhereUpstream(adapters.clock)
    else:
        upstream = _upstream(adapters, settings, api_key, gate.reading)
    pipeline = Pipeline(
        store=adapters.store, blobs=adapters.blobs, journal=journal, clock=adapters.clock, settings=settings
    )
    fanout = Fanout(
        upstream=upstream,
        journal=journal,
        clock=adapters.clock,
        rng=adapters.rng,
        settings=settings,
        gate=gate,
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
        await upstream.close()
        await asyncio.to_thread(journal.close)
        await asyncio.to_thread(adapters.store.release_session, session, died=False)
        locks.let_go(session)


def _journal(adapters: Adapters, session: SessionId, settings: Settings, *, on_durable: Callable[[], None]) -> Journal:
    """Prepare to make results durable: in small groups, or where each is a request, in few and large ones."""
    if not adapters.blobs.has_frozen_segments:
        return Journal(adapters.blobs, session, on_durable=on_durable, tick_s=settings.journal_tick_s)
    frozen = Frozen(
        clock=adapters.clock,
        segment_s=settings.segment_s,
        segment_bytes=settings.segment_bytes,
        writers=min(_FROZEN_WRITERS, settings.s3_threads),
    )
    return Journal(
        adapters.blobs,
        session,
        on_durable=on_durable,
        tick_s=_FROZEN_TICK_S,
        records_max=sys.maxsize,
        bytes_max=_FROZEN_BYTES_MAX,
        wake_records=sys.maxsize,
        wake_bytes=sys.maxsize,
        frozen=frozen,
    )


def _call_soon(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
    loop.call_soon_threadsafe(callback)


def _upstream(adapters: Adapters, settings: Settings, api_key: str | None, budget: ReadBudget) -> AiohttpUpstream:
    if settings.base_url is None:
        raise UsageError("no upstream is named", hint="Give -u URL or set OPENAI_BASE_URL.")
    return AiohttpUpstream(
        settings.base_url,
        clock=adapters.clock,
        api_key=api_key,
        total_timeout_s=settings.request_timeout_s,
        idle_timeout_s=settings.idle_timeout_s,
        connect_timeout_s=settings.connect_timeout_s,
        reply_bytes_max=settings.reply_bytes_max,
        asset_bytes_max=settings.asset_bytes_max,
        budget=budget,
    )


def _gate(settings: Settings) -> Gate:
    return Gate(
        cooldown=Cooldown(),
        outage=Outage(),
        first_contact=FirstContact(),
        requests=TokenBucket(settings.rpm) if settings.rpm else None,
        tokens=TokenBucket(settings.tpm) if settings.tpm else None,
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

    def __init__(self, adapters: Adapters, folder: Path, settings: Settings, api_key: str | None) -> None:
        self._adapters = adapters
        self._folder = folder
        self._settings = settings
        self._api_key = api_key
        self._window = Window(pinned=settings.concurrency, size_max=settings.window_max)
        self._worker: Worker | None = None
        self._stop_grace_s: float | None = None

    async def run(self) -> None:
        """See Crew."""
        session = worker_session(self._adapters, self._folder, self._settings, api_key=self._api_key, pacer=self._pace)
        async with session as self._worker:
            if self._stop_grace_s is not None:
                self._worker.stop(grace_s=self._stop_grace_s)
            await self._worker.run()

    def _pace(self, fanout: Fanout) -> None:
        self._window.observe(fanout.take_sample())
        fanout.window = self._window.size
        fanout.bound_by = str(self._window.bound_by)

    def stop(self, *, grace_s: float) -> None:
        """See Crew."""
        self._stop_grace_s = grace_s
        if self._worker is not None:
            self._worker.stop(grace_s=grace_s)

    def live(self) -> Live:
        """See Crew."""
        worker = self._worker
        if worker is None:
            return Live(window=self._window.size, bound_by="starting", in_flight=0, waiting=0, tally=Tally())
        fanout = worker.fanout
        return Live(
            window=self._window.size,
            bound_by=str(self._window.bound_by),
            in_flight=fanout.in_flight_count,
            waiting=fanout.waiting_count,
            tally=fanout.tally,
            trouble=worker.trouble_text,
            lost=worker.lost_text,
        )


def process_crew(
    adapters: Adapters,
    folder: Path,
    settings: Settings,
    api_key: str | None,
    worker_count: int,
    *,
    is_server: bool = False,
) -> Supervisor:
    """Prepare worker processes over the same folder. Those of a server wait for better times, whatever happens."""
    locks = SessionLocks(folder)

    async def bury() -> None:
        await asyncio.to_thread(reap, adapters, locks)

    greeting = _Greeting(folder=str(folder), settings=settings, api_key=api_key, is_server=is_server)
    return Supervisor(
        command=[sys.executable, "-m", "batchrunner.app"],
        greeting=msgspec.json.encode(greeting) + b"\n",
        worker_count=worker_count,
        settings=settings,
        clock=adapters.clock,
        bury=bury,
        waits_s=_WORKER_WAITS_S if is_server else None,
    )


class Runner:
    """The assembled system over one data folder: what the command line and embedders hold.

    `async with Runner(settings, folder) as runner` opens the store and frees what dead sessions held; `crew` starts the
    work.
    """

    def __init__(self, settings: Settings, folder: Path, *, api_key: str | None = None) -> None:
        self.settings = settings
        self.folder = folder
        self._api_key = api_key
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
            return LocalCrew(self.adapters, self.folder, self.settings, self._api_key)
        return process_crew(self.adapters, self.folder, self.settings, self._api_key, worker_count)


def arm_crash_point() -> None:
    """Have this process kill itself at the point that BATCHRUNNER_CRASH_AT names, so that tests can prove what
    survives.

    Raises:
        UsageError: there is no such point.
    """
    crash.arm(os.environ.get("BATCHRUNNER_CRASH_AT", ""), lambda: os.kill(os.getpid(), signal.SIGKILL))


# -- a worker process ------------------------------------------------------------------------------------------------


class _Greeting(msgspec.Struct, frozen=True, kw_only=True):
    """The first line that a worker process reads."""

    folder: str
    settings: Settings
    api_key: str | None
    is_server: bool = False


class _PipePacer:
    """Gives the supervisor a report at each call and applies the share that came last."""

    def __init__(self, worker: Callable[[], Worker], clock: SystemClock) -> None:
        self.share: Share | None = None
        self._worker = worker
        self._clock = clock

    def __call__(self, fanout: Fanout) -> None:
        worker = self._worker()
        report = Report(
            sample=fanout.take_sample(),
            in_flight=fanout.in_flight_count,
            waiting=fanout.waiting_count + fanout.untouched_count,
            tally=fanout.tally.to_wire(),
            trouble=worker.trouble_text,
            lost=worker.lost_text,
        )
        try:
            os.write(sys.stdout.fileno(), encode_message(report))
        except BrokenPipeError:
            # The supervisor is gone; the end of stdin says so as well and ends this process.
            worker.stop(grace_s=0.0)
        if self.share is not None:
            fanout.window = self.share.window
            fanout.bound_by = self.share.bound_by
            fanout.gate.set_rates(self._clock.monotonic_s(), rpm=self.share.rpm, tpm=self.share.tpm)


async def _work(greeting: _Greeting, stdin: asyncio.StreamReader) -> None:
    adapters = open_adapters(Path(greeting.folder), greeting.settings)
    workers: list[Worker] = []
    pacer = _PipePacer(lambda: workers[0], adapters.clock)
    session = worker_session(
        adapters,
        Path(greeting.folder),
        greeting.settings,
        api_key=greeting.api_key,
        pacer=pacer,
        is_server=greeting.is_server,
    )
    async with session as worker:
        workers.append(worker)
        worker.fanout.window = 0
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        async with asyncio.TaskGroup() as group:
            listening = group.create_task(_obey(worker, pacer, stdin))
            await worker.run()
            listening.cancel()
    adapters.store.close()


async def _obey(worker: Worker, pacer: _PipePacer, stdin: asyncio.StreamReader) -> None:
    """Follow the supervisor's shares; when its pipe closes, end at once: nobody would share out limits any more."""
    while line := await stdin.readline():
        pacer.share = msgspec.json.decode(line, type=Share)
        if pacer.share.stop_grace_s is not None:
            worker.stop(grace_s=pacer.share.stop_grace_s)
    worker.stop(grace_s=0.0)


async def _worker_process() -> None:
    loop = asyncio.get_running_loop()
    stdin = asyncio.StreamReader(limit=1 << 22)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin)
    greeting = msgspec.json.decode(await stdin.readline(), type=_Greeting)
    freeze_start_up()
    await _work(greeting, stdin)


def worker_main() -> None:
    """Run this process as a worker of the supervisor at the other end of its pipes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    arm_crash_point()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogLine("worker %(process)d: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    with asyncio.Runner(loop_factory=tune_process()) as runner:
        runner.run(_worker_process())


if __name__ == "__main__":
    worker_main()
