"""The append-only log of finished lines: one thread makes the records of all shards of a process durable in groups.

It knows bytes and durability only. What is registered, and who may register, is the Store's word.
"""

from __future__ import annotations

import logging
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace

from batchrunner import crash
from batchrunner.errors import BatchrunnerError, DiskFull, NameTaken, OwnError
from batchrunner.frames import HEADER_BYTES, Record, clipped, header, read_payload, seed
from batchrunner.models import NO_USAGE, BatchId, NewExtent, RecordKind, SegmentRef, SessionId, TaskRef, Usage
from batchrunner.ports import Appender, Blobs

logger = logging.getLogger(__name__)

# Parts up to this size are joined for one write.
_WRITE_BYTES = 1 << 20
# A lookup in the enum would cost a tenth of a microsecond a record.
_SUCCEEDED = RecordKind.SUCCEEDED


@dataclass(slots=True)
class _Sums:
    """What a run of frames holds."""

    size_bytes: int = 0
    succeeded_count: int = 0
    failed_count: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def absorb(self, later: _Sums) -> None:
        """Add what comes behind."""
        self.size_bytes += later.size_bytes
        self.succeeded_count += later.succeeded_count
        self.failed_count += later.failed_count
        self.input_tokens += later.input_tokens
        self.cached_tokens += later.cached_tokens
        self.output_tokens += later.output_tokens
        self.reasoning_tokens += later.reasoning_tokens

    @property
    def count(self) -> int:
        """Records of results; marks are none."""
        return self.succeeded_count + self.failed_count


@dataclass(slots=True)
class _Group:
    """Frames that become durable together."""

    parts: list[bytes] = field(default_factory=list)
    sums: _Sums = field(default_factory=_Sums)
    mark: int = 0


@dataclass(slots=True)
class _Range:
    """Durable bytes of one segment that nobody has taken for registration yet."""

    segment: int
    start: int
    sums: _Sums

    def extent(self, session: SessionId) -> NewExtent:
        """Put it into the Store's words."""
        sums = self.sums
        return NewExtent(
            session=session,
            segment=self.segment,
            byte_start=self.start,
            byte_end=self.start + sums.size_bytes,
            succeeded_count=sums.succeeded_count,
            failed_count=sums.failed_count,
            usage=Usage(sums.input_tokens, sums.cached_tokens, sums.output_tokens, sums.reasoning_tokens),
        )


class _Backlog:
    """What the shards of one process have handed to the commit thread. Everything in it is guarded by `lock`."""

    def __init__(self, *, wake_records: int, wake_bytes: int) -> None:
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        # `stirred`: there is something to write. `hurried`: do not wait for the tick.
        self.stirred = threading.Event()
        self.hurried = threading.Event()
        self.dirty: dict[ShardJournal, None] = {}
        self.trouble: BatchrunnerError | None = None
        self.records = 0
        self.bytes = 0
        self.wake_records = wake_records
        self.wake_bytes = wake_bytes
        # What may wait, the group being written included, before the commit thread is woken ahead of its tick.
        self.wake_at_records = wake_records
        self.wake_at_bytes = wake_bytes

    def stir(self, shard: ShardJournal) -> None:
        """Note that a shard has something to write; with the lock held."""
        if not self.dirty:
            self.stirred.set()
        self.dirty[shard] = None

    def hurry(self) -> None:
        """Wake the commit thread before its tick, unless it only waits to try again."""
        if self.trouble is None and not self.hurried.is_set():
            self.hurried.set()

    def take(self) -> list[ShardJournal]:
        """Give the dirty shards, each with its group cut off; with the lock held."""
        shards = list(self.dirty)
        self.dirty.clear()
        self.stirred.clear()
        for shard in shards:
            shard.cut_group()
        self.wake_at_records = self.records + self.wake_records
        self.wake_at_bytes = self.bytes + self.wake_bytes
        return shards

    def settle(self, sums: _Sums) -> None:
        """Forget what has become durable; with the lock held."""
        self.records -= sums.count
        self.bytes -= sums.size_bytes
        self.wake_at_records -= sums.count
        self.wake_at_bytes -= sums.size_bytes


class Journal:
    """The journals of all shards of one process, made durable by one thread.

    `on_durable` is called in that thread after every group, whether it was written or failed.
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
    ) -> None:
        self._blobs = blobs
        self._session = session
        self._on_durable = on_durable
        self._tick_s = tick_s
        self._retry_s = retry_s
        self._records_max = records_max
        self._bytes_max = bytes_max
        self._backlog = _Backlog(wake_records=wake_records, wake_bytes=wake_bytes)
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
        return waiting.records >= self._records_max or waiting.bytes >= self._bytes_max or waiting.trouble is not None

    def open(self, batch_id: BatchId, ref: TaskRef, *, first_mark: int) -> ShardJournal:
        """Start the journal of a claimed shard; no line up to `first_mark` will be handed out. Writes nothing yet.

        Raises:
            OwnError: the journal is closed.
        """
        first = SegmentRef(batch_id=batch_id, task_id=ref.task_id, epoch=ref.epoch, session=self._session, number=1)
        shard = ShardJournal(self._blobs, self._backlog, first, first_mark=first_mark)
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
        for shard in shards:
            error = shard.write_group(tries=1 if self.trouble else 2)
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


class ShardJournal:
    """The records of one shard under one epoch and session, in segments 1, 2...

    No line above `durable_mark` may be handed out.
    """

    __slots__ = (
        "_appender", "_backlog", "_blobs", "_length", "_lock", "_queue", "_ranges", "_reserved", "_seed", "_segment",
        "_unsynced", "durable_mark", "is_closed",
    )  # fmt: skip

    def __init__(self, blobs: Blobs, backlog: _Backlog, segment: SegmentRef, *, first_mark: int) -> None:
        self.durable_mark = first_mark
        self.is_closed = False
        self._blobs = blobs
        self._backlog = backlog
        self._lock = backlog.lock
        self._segment = segment
        self._seed = seed(segment)
        self._appender: Appender | None = None
        # Durable bytes of the present segment: where the next frame will stand.
        self._length = 0
        self._queue = _Group()
        self._unsynced = _Group(mark=first_mark)
        self._reserved = first_mark
        self._ranges: list[_Range] = []

    def add(self, line_number: int, kind: RecordKind, usage: Usage, payload: bytes) -> None:
        """Queue a result; `payload` is the finished JSON line with its newline. From any thread.

        Raises:
            OwnError: the shard's journal is closed.
        """
        try:
            head = header(self._seed, line_number, kind, usage, payload)
        except struct.error:
            usage = clipped(usage)
            head = header(self._seed, line_number, kind, usage, payload)
        size_bytes = HEADER_BYTES + len(payload)
        backlog = self._backlog
        with self._lock:
            if self.is_closed:
                raise OwnError(f"line {line_number} came after the journal of its shard was closed")
            group = self._queue
            if not group.parts:
                backlog.stir(self)
            group.parts += (head, payload)
            sums = group.sums
            sums.size_bytes += size_bytes
            if kind is _SUCCEEDED:
                sums.succeeded_count += 1
            else:
                sums.failed_count += 1
            sums.input_tokens += usage.input_tokens
            sums.cached_tokens += usage.cached_tokens
            sums.output_tokens += usage.output_tokens
            sums.reasoning_tokens += usage.reasoning_tokens
            backlog.records += 1
            backlog.bytes += size_bytes
            if backlog.records >= backlog.wake_at_records or backlog.bytes >= backlog.wake_at_bytes:
                backlog.hurry()

    @property
    def waiting_records(self) -> int:
        """Records that were added and are not durable."""
        with self._lock:
            return self._queue.sums.count + self._unsynced.sums.count

    @property
    def waiting_bytes(self) -> int:
        """Bytes that were added and are not durable."""
        with self._lock:
            return self._queue.sums.size_bytes + self._unsynced.sums.size_bytes

    @property
    def wanted_mark(self) -> int:
        """The highest line reserved so far, durable or not."""
        return self._reserved

    def reserve(self, line_number: int) -> None:
        """Ask for a durable mark of at least `line_number` at once; `durable_mark` tells when it is there."""
        with self._lock:
            if line_number > self._reserved:
                self._reserved = line_number
                self._backlog.stir(self)
                self._backlog.hurry()

    def take_registrable(self) -> tuple[NewExtent, ...]:
        """Give the durable ranges not given before, in the order of their bytes; the caller has to register them.

        Ranges of a segment meet without gaps; marks lie in the range of the records before or behind them.
        """
        with self._lock:
            taken = tuple(each.extent(self._segment.session) for each in self._ranges if each.sums.count)
            # A range of marks alone waits for records, unless its segment has ended.
            self._ranges = [each for each in self._ranges[-1:] if not each.sums.count]
        return taken

    def flush(self) -> None:
        """Block until everything queued and reserved is durable. Never on an event loop.

        Raises:
            BatchrunnerError: the journal's trouble; what was queued stays queued.
        """
        backlog = self._backlog
        with self._lock:
            backlog.hurried.set()
            backlog.changed.wait_for(lambda: backlog.trouble or self._is_durable())
            if backlog.trouble:
                raise backlog.trouble

    def close(self) -> None:
        """Take no more records; the file is let go once what waits is durable."""
        with self._lock:
            self.is_closed = True
            self._backlog.stir(self)

    def _is_durable(self) -> bool:
        return not self._queue.parts and not self._unsynced.parts and self.durable_mark >= self._reserved

    def cut_group(self) -> None:
        """Commit thread, lock held: everything queued so far, and the mark, join what has to be written."""
        group, self._queue = self._queue, _Group()
        if self._reserved > self._unsynced.mark:
            self._unsynced.mark = self._reserved
            group.parts.append(header(self._seed, self._reserved, RecordKind.MARK, NO_USAGE, b""))
            group.sums.size_bytes += HEADER_BYTES
            self._backlog.bytes += HEADER_BYTES
        self._unsynced.parts += group.parts
        self._unsynced.sums.absorb(group.sums)

    def write_group(self, *, tries: int) -> BatchrunnerError | None:
        """Commit thread: make the group durable, after a failure as a whole in a new segment; else the error."""
        error: BatchrunnerError | None = None
        for _ in range(tries):
            try:
                self._write_once()
                return None
            except BatchrunnerError as failed:
                error = failed
                self._end_segment(failed)
        return error

    def _write_once(self) -> None:
        if not self._unsynced.parts:
            return
        while self._appender is None:
            try:
                self._appender = self._blobs.create_segment(self._segment.blob)
            except NameTaken:
                self._segment = replace(self._segment, number=self._segment.number + 1)
        for chunk in _chunks(self._unsynced.parts):
            self._appender.append(chunk)
        self._appender.sync()

    def _end_segment(self, error: BatchrunnerError) -> None:
        """Trust the present segment up to its last sync, for good."""
        name, length = self._segment.blob, self._length
        logger.warning("segment %s ended at byte %d: %s", name, length, error, extra={"action": "segment_ended"})
        self.let_go()
        if length:
            self._segment = replace(self._segment, number=self._segment.number + 1)
            self._length = 0
            return
        # Without a durable byte it goes, its number is free again: no litter, no gap that hides others from salvage.
        try:
            self._blobs.delete(name)
        except BatchrunnerError as stays:
            logger.warning("segment %s stays: %s", name, stays, extra={"action": "segment_stays"})

    def acknowledge(self) -> None:
        """Commit thread, lock held, after the sync: the group is durable."""
        group, self._unsynced = self._unsynced, _Group(mark=self._unsynced.mark)
        sums = group.sums
        if sums.size_bytes:
            last = self._ranges[-1] if self._ranges else None
            if last is None or last.segment != self._segment.number:
                last = _Range(self._segment.number, self._length, _Sums())
                self._ranges.append(last)
            last.sums.absorb(sums)
            self._length += sums.size_bytes
        self.durable_mark = group.mark
        self._backlog.settle(sums)
        if self.is_closed and self._is_durable():
            self.let_go()

    def let_go(self) -> None:
        """Commit thread: close the present segment's file."""
        if self._appender is not None:
            self._appender.close()
            self._appender = None


def _chunks(parts: list[bytes]) -> Iterator[bytes]:
    """Join small parts for one write; a large one goes by itself, so that it is not copied."""
    small: list[bytes] = []
    size_bytes = 0
    for part in parts:
        if size_bytes + len(part) > _WRITE_BYTES and small:
            yield b"".join(small)
            small, size_bytes = [], 0
        small.append(part)
        size_bytes += len(part)
    yield b"".join(small)


def copy_salvaged(blobs: Blobs, records: Iterable[Record], shard: ShardJournal) -> None:
    """Write salvaged records into the claimer's own journal; they are durable there when it returns. Blocks.

    Raises:
        JournalCorrupt: a record changed since it was found.
        BatchrunnerError: the journal's trouble; some records are queued, so this claim's journal is of no more use.
    """
    for record in records:
        shard.add(record.line_number, record.kind, record.usage, read_payload(blobs, record))
        if shard.waiting_bytes >= _WRITE_BYTES:
            shard.flush()
    shard.flush()
