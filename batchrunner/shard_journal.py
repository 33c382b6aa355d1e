"""The records of one shard on their way into segments, and what the shards of a process have handed to the thread that
makes them durable.
"""

from __future__ import annotations

import logging
import struct
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from batchrunner.errors import BatchrunnerError, NameTaken, OwnError
from batchrunner.frames import HEADER_BYTES, clipped, header, seed
from batchrunner.models import NO_USAGE, NewExtent, RecordKind, SegmentRef, SessionId, Usage
from batchrunner.ports import Appender, Blobs, Clock

logger = logging.getLogger(__name__)

# Parts up to this size are joined for one write.
WRITE_BYTES = 1 << 20
# A lookup in the enum would cost a tenth of a microsecond a record.
_SUCCEEDED = RecordKind.SUCCEEDED


@dataclass(slots=True)
class Sums:
    """What a run of frames holds."""

    size_bytes: int = 0
    succeeded_count: int = 0
    failed_count: int = 0
    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def absorb(self, later: Sums) -> None:
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
class Group:
    """Frames that become durable together."""

    parts: list[bytes] = field(default_factory=list)
    sums: Sums = field(default_factory=Sums)
    mark: int = 0
    # Which lines have ended and how, where somebody wants to know.
    lines: list[tuple[int, RecordKind]] = field(default_factory=list)


@dataclass(slots=True)
class Range:
    """Durable bytes of one segment that nobody has taken for registration yet."""

    segment: int
    start: int
    sums: Sums
    lines: list[tuple[int, RecordKind]] = field(default_factory=list)

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
            lines=tuple(self.lines),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Frozen:
    """How segments are written whose bytes are fixed by their first sync: few, large, and side by side."""

    clock: Clock
    segment_s: float
    segment_bytes: int
    writers: int
    # A write that takes longer keeps further lines from being handed out.
    stalled_s: float = 1.0


class Backlog:
    """What the shards of one process have handed to the commit thread. Everything in it is guarded by `lock`."""

    def __init__(self, *, wake_records: int, wake_bytes: int, frozen: Frozen | None) -> None:
        self.frozen = frozen
        self.group_bytes = frozen.segment_bytes if frozen is not None else sys.maxsize
        self.lock = threading.Lock()
        self.changed = threading.Condition(self.lock)
        # `stirred`: there is something to write. `hurried`: do not wait for the tick.
        self.stirred = threading.Event()
        self.hurried = threading.Event()
        self.dirty: dict[ShardJournal, float] = {}
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
        self.dirty.setdefault(shard, self.frozen.clock.monotonic_s() if self.frozen is not None else 0.0)

    def hurry(self) -> None:
        """Wake the commit thread before its tick, unless it only waits to try again."""
        if self.trouble is None and not self.hurried.is_set():
            self.hurried.set()

    def take(self) -> list[ShardJournal]:
        """Give the dirty shards whose time has come, each with its group cut off; with the lock held."""
        frozen = self.frozen
        shards = list(self.dirty)
        if frozen is not None:
            old_s = frozen.clock.monotonic_s() - frozen.segment_s
            shards = [shard for shard, since_s in self.dirty.items() if since_s <= old_s or shard.is_due]
        for shard in shards:
            del self.dirty[shard]
            shard.cut_group()
        if not self.dirty:
            self.stirred.clear()
        self.wake_at_records = self.records + self.wake_records
        self.wake_at_bytes = self.bytes + self.wake_bytes
        return shards

    def settle(self, sums: Sums) -> None:
        """Forget what has become durable; with the lock held."""
        self.records -= sums.count
        self.bytes -= sums.size_bytes
        self.wake_at_records -= sums.count
        self.wake_at_bytes -= sums.size_bytes


class ShardJournal:
    """The records of one shard under one epoch and session, in segments 1, 2...

    No line above `durable_mark` may be handed out. Where the journal `keeps_marks` it moves that mark by itself;
    otherwise whoever has registered one says so.
    """

    __slots__ = (
        "_appender", "_backlog", "_blobs", "_hurried_mark", "_is_urgent", "_length", "_lock", "_queue", "_ranges",
        "_reserved", "_seed", "_segment", "_tells_lines", "_unsynced", "durable_mark", "group_count", "is_closed",
        "keeps_marks",
    )  # fmt: skip

    def __init__(
        self, blobs: Blobs, backlog: Backlog, segment: SegmentRef, *, first_mark: int, tells_lines: bool
    ) -> None:
        self.durable_mark = first_mark
        self._tells_lines = tells_lines
        self.is_closed = False
        self.keeps_marks = backlog.frozen is None
        # Records of the last group: so many lines are about as many as are handed out while one is on its way.
        self.group_count = 0
        self._is_urgent = False
        self._blobs = blobs
        self._backlog = backlog
        self._lock = backlog.lock
        self._segment = segment
        self._seed = seed(segment)
        self._appender: Appender | None = None
        # Durable bytes of the present segment: where the next frame will stand.
        self._length = 0
        self._queue = Group()
        self._unsynced = Group(mark=first_mark)
        self._reserved = first_mark
        self._hurried_mark = first_mark
        self._ranges: list[Range] = []

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
            if self._tells_lines:
                group.lines.append((line_number, kind))
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
            if (
                backlog.records >= backlog.wake_at_records
                or backlog.bytes >= backlog.wake_at_bytes
                or sums.size_bytes >= backlog.group_bytes
            ):
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

    def reserve(self, line_number: int, *, is_early: bool = False) -> None:
        """Ask for a durable mark of at least `line_number`, at once, or where nobody waits for it yet, with the group
        that is written next; `durable_mark` tells when it is there.
        """
        with self._lock:
            if line_number > self._reserved:
                self._reserved = line_number
                if self.keeps_marks:
                    self._backlog.stir(self)
            if self.keeps_marks and not is_early and line_number > self._hurried_mark:
                self._hurried_mark = line_number
                self._backlog.hurry()

    def mark_registered(self, line_number: int) -> None:
        """Say that a mark is durable elsewhere."""
        with self._lock:
            self._reserved = max(self._reserved, line_number)
            self.durable_mark = max(self.durable_mark, line_number)

    def request_sync(self) -> None:
        """Have what waits written now."""
        with self._lock:
            self._is_urgent = True
        self._backlog.hurried.set()

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
            self._is_urgent = True
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
        is_marked = self.durable_mark >= self._reserved or not self.keeps_marks
        return not self._queue.parts and not self._unsynced.parts and is_marked

    @property
    def is_due(self) -> bool:
        """Commit thread, lock held: whether a frozen segment is to be written now, however young."""
        return self._is_urgent or self.is_closed or self._queue.sums.size_bytes >= self._backlog.group_bytes

    def cut_group(self) -> None:
        """Commit thread, lock held: everything queued so far, and the mark, join what has to be written."""
        self._is_urgent = False
        if not self.keeps_marks and self._appender is not None:
            # The bytes of this segment may be on their way still: they stay as they are.
            return
        group, self._queue = self._queue, Group()
        self.group_count = group.sums.count
        if self.keeps_marks and self._reserved > self._unsynced.mark:
            self._unsynced.mark = self._reserved
            group.parts.append(header(self._seed, self._reserved, RecordKind.MARK, NO_USAGE, b""))
            group.sums.size_bytes += HEADER_BYTES
            self._backlog.bytes += HEADER_BYTES
        self._unsynced.parts += group.parts
        self._unsynced.lines += group.lines
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

    def write_frozen(self) -> BatchrunnerError | None:
        """Any thread of the journal's: make the group durable as a segment of its own; else the error. After one, the
        same bytes are written again under the same name.
        """
        try:
            if self._unsynced.parts and self._appender is None:
                self._open_segment()
                self._append()
            if self._appender is not None:
                self._appender.sync()
        except BatchrunnerError as error:
            self._is_urgent = True
            return error
        return None

    def _write_once(self) -> None:
        if not self._unsynced.parts:
            return
        self._open_segment()
        self._append()
        assert self._appender is not None
        self._appender.sync()

    def _open_segment(self) -> None:
        while self._appender is None:
            try:
                self._appender = self._blobs.create_segment(self._segment.blob)
            except NameTaken:
                self._segment = replace(self._segment, number=self._segment.number + 1)

    def _append(self) -> None:
        assert self._appender is not None
        for chunk in _chunks(self._unsynced.parts):
            self._appender.append(chunk)

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
        group, self._unsynced = self._unsynced, Group(mark=self._unsynced.mark)
        sums = group.sums
        if sums.size_bytes:
            last = self._ranges[-1] if self._ranges else None
            if last is None or last.segment != self._segment.number:
                last = Range(self._segment.number, self._length, Sums())
                self._ranges.append(last)
            last.sums.absorb(sums)
            last.lines += group.lines
            self._length += sums.size_bytes
        self._backlog.settle(sums)
        if self.keeps_marks:
            self.durable_mark = group.mark
        elif self._appender is not None:
            self._next_segment()
        if self.is_closed and self._is_durable():
            self.let_go()

    def _next_segment(self) -> None:
        """Begin anew behind a frozen segment; what was kept back while it was tried again has waited long enough."""
        self.let_go()
        self._segment = replace(self._segment, number=self._segment.number + 1)
        self._length = 0
        if self._queue.parts and self not in self._backlog.dirty:
            self._is_urgent = True
            self._backlog.stir(self)
            self._backlog.hurry()

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
        if size_bytes + len(part) > WRITE_BYTES and small:
            yield b"".join(small)
            small, size_bytes = [], 0
        small.append(part)
        size_bytes += len(part)
    yield b"".join(small)
