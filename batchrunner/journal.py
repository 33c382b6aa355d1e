"""The append-only log of finished lines: one thread makes the records of all shards of a process durable in groups.

It knows bytes and durability only. What is registered, and who may register, is the Store's word.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from batchrunner import crash
from batchrunner.errors import BatchrunnerError, DiskFull, OwnError
from batchrunner.frames import Record, read_payload
from batchrunner.models import BatchId, SegmentRef, SessionId, TaskRef
from batchrunner.ports import Blobs, Clock
from batchrunner.settings import Settings
from batchrunner.shard_journal import WRITE_BYTES, Backlog, Frozen, ShardJournal

logger = logging.getLogger(__name__)

# How often segments that are written in one request are looked at, and the results that may wait for that.
_FROZEN_TICK_S = 0.1
_FROZEN_BYTES_MAX = 16 << 20
_FROZEN_WRITERS = 4


class Journal:
    """The journals of all shards of one process, made durable by one thread.

    `on_durable` is called in that thread after every group, whether it was written or failed. Blobs with frozen
    segments need `frozen`.
    """

    def __init__(
        self,
        blobs: Blobs,
        session: SessionId,
        *,
        on_durable: Callable[[], None],
        tick_s: float = 0.05,
        retry_s: float = 1.0,
        records_max: int = 256,
        bytes_max: int = 8 << 20,
        wake_records: int = 128,
        wake_bytes: int = 1 << 20,
        frozen: Frozen | None = None,
    ) -> None:
        self._blobs = blobs
        self._session = session
        self._on_durable = on_durable
        self._tick_s = tick_s
        self._retry_s = retry_s
        self._records_max = records_max
        self._bytes_max = bytes_max
        self._backlog = Backlog(wake_records=wake_records, wake_bytes=wake_bytes, frozen=frozen)
        self._frozen = frozen
        self._writers = ThreadPoolExecutor(frozen.writers, "journal-write") if frozen is not None else None
        self._writing_since_s: float | None = None
        self._shards: set[ShardJournal] = set()
        self._is_closing = False
        self._thread: threading.Thread | None = None

    @property
    def trouble(self) -> BatchrunnerError | None:
        """Why nothing becomes durable now, None when well."""
        return self._backlog.trouble

    @property
    def waiting_records(self) -> int:
        """Records of all shards that were added and are not durable."""
        return self._backlog.records

    @property
    def waiting_bytes(self) -> int:
        """Bytes of all shards that were added and are not durable."""
        return self._backlog.bytes

    @property
    def is_full(self) -> bool:
        """Tell that no further line may be handed out until more has become durable."""
        waiting = self._backlog
        return (
            waiting.records >= self._records_max
            or waiting.bytes >= self._bytes_max
            or waiting.trouble is not None
            or (self._writing_since_s is not None and self._is_stalled())
        )

    def _is_stalled(self) -> bool:
        since_s, frozen = self._writing_since_s, self._frozen
        return frozen is not None and since_s is not None and frozen.clock.monotonic_s() - since_s > frozen.stalled_s

    def open(self, batch_id: BatchId, ref: TaskRef, *, first_mark: int, tells_lines: bool = False) -> ShardJournal:
        """Start the journal of a claimed shard; no line up to `first_mark` will be handed out. Its extents tell their
        lines where that is wanted. Writes nothing yet.

        Raises:
            OwnError: the journal is closed.
        """
        first = SegmentRef(batch_id=batch_id, task_id=ref.task_id, epoch=ref.epoch, session=self._session, number=1)
        shard = ShardJournal(self._blobs, self._backlog, first, first_mark=first_mark, tells_lines=tells_lines)
        with self._backlog.lock:
            if self._is_closing:
                raise OwnError("the journal is closed")
            self._shards.add(shard)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="journal-commit", daemon=True)
                self._thread.start()
        return shard

    def request_sync(self) -> None:
        """Have what waits written now, and what failed tried again now, without waiting for the tick."""
        self._backlog.hurried.set()

    def close(self) -> None:
        """Write a last group and end the commit thread. What `trouble` kept from the disk is not durable then."""
        with self._backlog.lock:
            self._is_closing = True
            for shard in self._shards:
                shard.is_closed = True
            self._backlog.stirred.set()
            self._backlog.hurried.set()
        if self._thread is not None:
            self._thread.join()
        if self._writers is not None:
            self._writers.shutdown()

    def _run(self) -> None:
        backlog = self._backlog
        try:
            is_last = False
            while not is_last:
                backlog.stirred.wait()
                backlog.hurried.wait(self._retry_s if self.trouble else self._tick_s)
                backlog.hurried.clear()
                is_last = self._is_closing
                if is_last or not self._is_still_full():
                    self._commit_group()
            for shard in self._shards:
                shard.let_go()
        except Exception:
            logger.exception("journal died", extra={"action": "journal_died"})
            self._tell(OwnError("the journal's commit thread died"))

    def _commit_group(self) -> None:
        """Write and sync every dirty segment; what fails stays whole and dirty."""
        backlog = self._backlog
        with backlog.lock:
            shards = backlog.take()
        trouble = None
        for shard, error in zip(shards, self._write(shards), strict=True):
            crash.point("journal.synced")
            with backlog.lock:
                if error is None:
                    shard.acknowledge()
                    if shard.is_closed:
                        self._shards.discard(shard)
                else:
                    trouble = error
                    backlog.stir(shard)
        self._tell(trouble)

    def _write(self, shards: list[ShardJournal]) -> Iterator[BatchrunnerError | None]:
        """Write the groups, side by side where each is a request; gives for each its error, if it has one."""
        if self._frozen is None or self._writers is None:
            yield from (shard.write_group(tries=1 if self.trouble else 2) for shard in shards)
            return
        self._writing_since_s = self._frozen.clock.monotonic_s()
        try:
            yield from self._writers.map(ShardJournal.write_frozen, shards)
        finally:
            self._writing_since_s = None

    def _tell(self, trouble: BatchrunnerError | None) -> None:
        if trouble is not None and self.trouble is None:
            logger.error("journal cannot write: %s", trouble, extra={"action": "journal_blocked", "code": trouble.code})
        elif trouble is None and self.trouble is not None:
            logger.warning("journal writes again", extra={"action": "journal_recovered"})
        with self._backlog.lock:
            self._backlog.trouble = trouble
            self._backlog.changed.notify_all()
        try:
            self._on_durable()
        except Exception:
            # The listener may be a loop that has gone; that must not keep results from the disk.
            logger.exception("journal's listener failed", extra={"action": "journal_listener_failed"})

    def _is_still_full(self) -> bool:
        """Look before a full disk is tried again, so that empty segments do not come and go every second."""
        if not isinstance(self.trouble, DiskFull):
            return False
        try:
            free_bytes = self._blobs.free_bytes()
        except BatchrunnerError as error:
            logger.warning("free space unknown: %s", error, extra={"action": "journal_space_unknown"})
            return False
        return free_bytes is not None and free_bytes < self.waiting_bytes


def open_journal(
    blobs: Blobs, session: SessionId, settings: Settings, clock: Clock, *, on_durable: Callable[[], None]
) -> Journal:
    """Make a session's journal: small groups many times a second, or where each is a request, few and large ones."""
    if not blobs.has_frozen_segments:
        return Journal(blobs, session, on_durable=on_durable, tick_s=settings.journal_tick_s)
    frozen = Frozen(
        clock=clock,
        segment_s=settings.segment_s,
        segment_bytes=settings.segment_bytes,
        writers=min(_FROZEN_WRITERS, settings.s3_threads),
    )
    return Journal(
        blobs,
        session,
        on_durable=on_durable,
        tick_s=_FROZEN_TICK_S,
        records_max=sys.maxsize,
        bytes_max=_FROZEN_BYTES_MAX,
        wake_records=sys.maxsize,
        wake_bytes=sys.maxsize,
        frozen=frozen,
    )


def copy_salvaged(blobs: Blobs, records: Iterable[Record], shard: ShardJournal) -> None:
    """Write salvaged records into the claimer's own journal; they are durable there when it returns. Blocks.

    Raises:
        JournalCorrupt: a record changed since it was found.
        BatchrunnerError: the journal's trouble; some records are queued, so this claim's journal is of no more use.
    """
    for record in records:
        shard.add(record.line_number, record.kind, record.usage, read_payload(blobs, record))
        if shard.waiting_bytes >= WRITE_BYTES:
            shard.flush()
    shard.flush()
