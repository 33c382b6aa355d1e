"""The journal over a faulty disk: what is acknowledged is there, once; what is damaged is not taken for whole."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import fields, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrunner.errors import (
    BatchrunnerError,
    BlobsUnavailable,
    DiskFull,
    JournalCorrupt,
    NameTaken,
    NotFound,
    OwnError,
    ReconciliationError,
)
from batchrunner.frames import (
    HEADER_BYTES,
    Damage,
    Record,
    read_payload,
    read_records,
    salvage,
    scan_tail,
)
from batchrunner.journal import Journal, copy_salvaged
from batchrunner.models import (
    NO_USAGE,
    Batch,
    BatchId,
    Claim,
    Extent,
    NewExtent,
    RecordKind,
    SegmentRef,
    SessionId,
    TaskId,
    TaskKind,
    TaskRef,
    Usage,
)
from batchrunner.ports import Blobs, BlobWriter
from batchrunner.shard_journal import ShardJournal

BATCH = BatchId("batch_1")
TASK = TaskId(7)
SESSION = SessionId("0123456789abcdef")
OK, FAILED, MARK = RecordKind.SUCCEEDED, RecordKind.FAILED, RecordKind.MARK
NEVER_S = 3600.0
WAIT_S = 20.0


class Disk(Blobs):
    """Blobs in memory. `plan` is asked before each operation and may answer with a fault."""

    has_frozen_segments = False

    def __init__(self, plan: Callable[[str], str | None] = lambda operation: None) -> None:
        self.written: dict[str, bytearray] = {}
        self.synced: dict[str, int] = {}
        self.open_count = 0
        self.created_count = 0
        self.free: int | None = None
        self.plan = plan

    def create_segment(self, name: str) -> Segment:
        fault(self.plan("create"))
        if name in self.written:
            raise NameTaken(name)
        self.written[name], self.synced[name] = bytearray(), 0
        self.open_count += 1
        self.created_count += 1
        return Segment(self, name)

    def read(self, name: str, start: int, end: int) -> bytes:
        if name not in self.written:
            raise NotFound(name)
        return bytes(self.written[name][start:end])

    def size_bytes(self, name: str) -> int:
        if name not in self.written:
            raise NotFound(name)
        return len(self.written[name])

    def delete(self, name: str) -> None:
        fault(self.plan("delete"))
        self.written.pop(name, None)

    def drop_unfinished(self, *, dead: Collection[str] = ()) -> int:
        raise AssertionError("a journal is no sweeper")

    def free_bytes(self) -> int | None:
        return self.free

    def writer(self, name: str) -> BlobWriter:
        raise AssertionError(f"a journal writes no blob: {name}")

    def exists(self, name: str) -> bool:
        return name in self.written

    def list(self, prefix: str) -> Iterator[str]:
        return iter(sorted(name for name in self.written if name.startswith(prefix)))

    def keep_reserve(self, size_bytes: int) -> None:
        raise AssertionError(f"a journal keeps no reserve: {size_bytes}")

    def release_reserve(self) -> None:
        raise AssertionError("a journal keeps no reserve")

    def drop_begun(self) -> int:
        raise AssertionError("a journal drops nothing")

    def download_url(self, name: str, *, expires_s: float, filename: str) -> str | None:
        raise AssertionError(f"a journal is not downloaded: {name}")

    def crash(self) -> None:
        """Lose what was not synced."""
        for name, content in self.written.items():
            del content[self.synced[name] :]


class Segment:
    """An Appender over the disk."""

    def __init__(self, disk: Disk, name: str) -> None:
        self.disk, self.name, self.is_open, self.is_broken = disk, name, True, False

    def append(self, chunk: bytes) -> None:
        assert self.is_open
        assert not self.is_broken
        content = self.disk.written[self.name]
        kind = self.disk.plan("append")
        if kind is not None:
            self.is_broken = True
            content += chunk[: len(chunk) // 2] if kind == "short" else b""
            fault(kind)
        content += chunk

    def sync(self) -> None:
        assert self.is_open
        assert not self.is_broken
        kind = self.disk.plan("sync")
        if kind is not None:
            self.is_broken = True
            fault(kind)
        self.disk.synced[self.name] = len(self.disk.written[self.name])

    def close(self) -> None:
        self.disk.open_count -= self.is_open
        self.is_open = False


def fault(kind: str | None) -> None:
    if kind is None:
        return
    if kind == "bug":
        raise ZeroDivisionError
    raise BlobsUnavailable(kind) if kind == "io" else DiskFull(kind)


class Told:
    """The listener of a journal; `wait` returns after the next group."""

    def __init__(self, then: Callable[[], None] = lambda: None) -> None:
        self._groups = threading.Semaphore(0)
        self._then = then

    def __call__(self) -> None:
        try:
            self._then()
        finally:
            self._groups.release()

    def wait(self) -> None:
        assert self._groups.acquire(timeout=WAIT_S)


def journal_on(
    disk: Disk, told: Callable[[], None] = lambda: None, *, session: SessionId = SESSION, **knobs
) -> Journal:
    """A journal that writes when it is asked to."""
    knobs = {"tick_s": NEVER_S, "retry_s": NEVER_S, "wake_records": 10**6, **knobs}
    return Journal(disk, session, on_durable=told, **knobs)


def open_shard(journal: Journal, *, epoch: int = 1) -> ShardJournal:
    return journal.open(BATCH, TaskRef(task_id=TASK, epoch=epoch), first_mark=0)


def payload_of(line_number: int, size: int = 30) -> bytes:
    return b'{"line":%d,"text":"%s"}\n' % (line_number, b"x" * size)


def segment_ref(number: int = 1, *, epoch: int = 1, session: SessionId = SESSION) -> SegmentRef:
    return SegmentRef(batch_id=BATCH, task_id=TASK, epoch=epoch, session=session, number=number)


def written_segment(sizes: Iterable[int], *, mark_every: int = 2) -> tuple[Disk, list[Record]]:
    """A disk with one segment of lines 1, 2... and all its frames, marks too."""
    disk = Disk()
    journal = journal_on(disk)
    shard = open_shard(journal)
    for line_number, size in enumerate(sizes, start=1):
        if line_number % mark_every == 1:
            shard.reserve(line_number + mark_every)
        shard.add(
            line_number,
            FAILED if line_number % 3 == 0 else OK,
            Usage(line_number, 0, 2, 1),
            payload_of(line_number, size),
        )
        if line_number % mark_every == 0:
            shard.flush()
    journal.close()
    return disk, list(scan_tail(disk, segment_ref(), 0))


def as_extent(new: NewExtent, *, epoch: int = 1, sequence_from: int = 1) -> Extent:
    return Extent(
        batch_id=BATCH, task_id=TASK, epoch=epoch, sequence_from=sequence_from, count=new.count, session=new.session,
        segment=new.segment, byte_start=new.byte_start, byte_end=new.byte_end, succeeded_count=new.succeeded_count,
        failed_count=new.failed_count, usage=new.usage,
    )  # fmt: skip


def claim_after(earlier: Iterable[tuple[int, SessionId]], extents: Iterable[Extent] = ()) -> Claim:
    unset: dict[str, Any] = dict.fromkeys(each.name for each in fields(Batch))
    batch = Batch(**unset | {"id": BATCH})
    return Claim(
        ref=TaskRef(task_id=TASK, epoch=99), kind=TaskKind.SHARD, session=SessionId("claimer"), batch=batch, shard=None,
        earlier=tuple(earlier), extents=tuple(extents), attempts=0, orphaned_by_death=True,
    )  # fmt: skip


def read_extents(disk: Disk, extents: Iterable[NewExtent]) -> Iterator[Record]:
    for extent in extents:
        for record in read_records(disk, segment_ref(extent.segment), extent.byte_start, extent.byte_end):
            assert isinstance(record, Record)
            yield record


def durable_marks(disk: Disk) -> list[int]:
    """The marks that a crash now would leave."""
    marks = []
    for number in range(1, 100):
        segment = segment_ref(number)
        if segment.blob in disk.written:
            frames = scan_tail(disk, segment, 0)
            marks += [
                each.line_number for each in frames if each.kind is MARK and each.end <= disk.synced[segment.blob]
            ]
    return marks


# -- group commit --------------------------------------------------------------------------------------------


def test_nothing_counts_before_its_sync_has_returned() -> None:
    in_sync, may_return = threading.Semaphore(0), threading.Semaphore(0)

    def plan(operation: str) -> None:
        if operation == "sync":
            in_sync.release()
            assert may_return.acquire(timeout=WAIT_S)

    disk, told = Disk(plan), Told()
    journal = journal_on(disk, told)
    shard = open_shard(journal)
    shard.add(1, OK, NO_USAGE, payload_of(1))
    shard.reserve(9)
    assert in_sync.acquire(timeout=WAIT_S)
    shard.add(2, OK, NO_USAGE, payload_of(2))
    shard.reserve(20)

    seen = []
    for _ in range(2):
        counts = [extent.count for extent in shard.take_registrable()]
        seen.append((shard.waiting_records, journal.waiting_records, counts, shard.durable_mark))
        may_return.release()
        told.wait()
    journal.close()

    assert seen == [(2, 2, [], 0), (1, 1, [1], 9)]
    assert shard.take_registrable()[0].count == 1
    assert shard.durable_mark == 20


def test_a_waiting_group_wakes_the_thread_before_its_tick() -> None:
    disk, told = Disk(), Told()
    journal = journal_on(disk, told, wake_records=3)
    shard = open_shard(journal)

    for line_number in (1, 2, 3):
        shard.add(line_number, OK, NO_USAGE, payload_of(line_number))
    told.wait()

    assert shard.waiting_records == 0
    journal.close()


def test_many_bytes_wake_the_thread_before_its_tick() -> None:
    disk, told = Disk(), Told()
    journal = journal_on(disk, told, wake_bytes=1000)
    shard = open_shard(journal)

    shard.add(1, OK, NO_USAGE, payload_of(1, 1000))
    told.wait()

    assert journal.waiting_bytes == 0
    journal.close()


def test_a_lone_record_is_durable_after_the_tick() -> None:
    disk, told = Disk(), Told()
    journal = journal_on(disk, told, tick_s=0.001)
    shard = open_shard(journal)

    shard.add(1, OK, NO_USAGE, payload_of(1))
    told.wait()

    assert shard.take_registrable()[0].count == 1
    journal.close()


def test_a_reservation_does_not_wait_for_the_tick() -> None:
    disk, told = Disk(), Told()
    journal = journal_on(disk, told)
    shard = open_shard(journal)

    shard.reserve(16)
    told.wait()

    assert (shard.durable_mark, shard.wanted_mark) == (16, 16)
    journal.close()


def test_an_early_reservation_goes_with_the_next_group() -> None:
    disk, told = Disk(), Told()
    journal = journal_on(disk, told, wake_records=2)
    shard = open_shard(journal)

    shard.reserve(16, is_early=True)
    shard.add(1, OK, NO_USAGE, payload_of(1))
    before = (shard.durable_mark, shard.wanted_mark)
    shard.add(2, OK, NO_USAGE, payload_of(2))
    told.wait()

    assert before == (0, 16)
    assert (shard.durable_mark, shard.group_count, durable_marks(disk)) == (16, 2, [16])
    journal.close()


def test_an_early_reservation_alone_is_durable_after_the_tick() -> None:
    disk, told = Disk(), Told()
    journal = journal_on(disk, told, tick_s=0.001)
    shard = open_shard(journal)

    shard.reserve(16, is_early=True)
    told.wait()

    assert shard.durable_mark == 16
    journal.close()


def test_who_waits_for_a_mark_that_was_reserved_early_hurries_it() -> None:
    disk, told = Disk(), Told()
    journal = journal_on(disk, told)
    shard = open_shard(journal)

    shard.reserve(64, is_early=True)
    shard.reserve(16)
    told.wait()

    assert shard.durable_mark == 64
    journal.close()


def test_one_group_syncs_the_segments_of_all_dirty_shards() -> None:
    disk, told = Disk(), Told()
    journal = journal_on(disk, told)
    shards = [journal.open(BATCH, TaskRef(task_id=TaskId(number), epoch=1), first_mark=0) for number in range(3)]

    for shard in shards[:2]:
        shard.add(1, OK, NO_USAGE, payload_of(1))
    journal.request_sync()
    told.wait()

    assert [len(shard.take_registrable()) for shard in shards] == [1, 1, 0]
    assert disk.created_count == 2
    journal.close()


def test_hand_out_must_stop_when_records_or_bytes_wait() -> None:
    journal = journal_on(Disk(), records_max=2, bytes_max=1000)
    shard = open_shard(journal)
    seen = [journal.is_full]

    shard.add(1, OK, NO_USAGE, payload_of(1))
    seen.append(journal.is_full)
    shard.add(2, OK, NO_USAGE, payload_of(2))
    seen.append(journal.is_full)
    shard.flush()
    seen.append(journal.is_full)
    shard.add(3, OK, NO_USAGE, payload_of(3, 1000))
    seen.append(journal.is_full)
    journal.close()

    assert seen == [False, False, True, False, True]


def test_close_makes_the_rest_durable_and_takes_nothing_more() -> None:
    disk = Disk()
    journal = journal_on(disk)
    shard = open_shard(journal)
    shard.add(1, OK, NO_USAGE, payload_of(1))

    journal.close()

    assert shard.take_registrable()[0].count == 1
    assert disk.open_count == 0
    with pytest.raises(OwnError, match="line 2"):
        shard.add(2, OK, NO_USAGE, payload_of(2))
    with pytest.raises(OwnError, match="closed"):
        open_shard(journal)


def test_a_closed_shard_lets_its_file_go_once_it_is_durable() -> None:
    disk, told = Disk(), Told()
    journal = journal_on(disk, told)
    shard = open_shard(journal)
    shard.add(1, OK, NO_USAGE, payload_of(1))

    shard.close()
    journal.request_sync()
    told.wait()

    assert (disk.open_count, shard.take_registrable()[0].count) == (0, 1)
    journal.close()


def test_a_listener_that_fails_keeps_nothing_from_the_disk(caplog: pytest.LogCaptureFixture) -> None:
    def gone() -> None:
        raise RuntimeError("loop is closed")

    told = Told(gone)
    journal = journal_on(Disk(), told)
    shard = open_shard(journal)

    for line_number in (1, 2):
        shard.add(line_number, OK, NO_USAGE, payload_of(line_number))
        shard.flush()
    journal.close()

    assert sum(each.count for each in shard.take_registrable()) == 2
    assert "listener failed" in caplog.text


def test_a_dead_commit_thread_is_trouble_for_good(caplog: pytest.LogCaptureFixture) -> None:
    told = Told()
    journal = journal_on(Disk(lambda operation: "bug" if operation == "sync" else None), told)
    shard = open_shard(journal)
    shard.add(1, OK, NO_USAGE, payload_of(1))
    journal.request_sync()
    told.wait()

    assert journal.is_full
    assert shard.take_registrable() == ()
    with pytest.raises(OwnError, match="died"):
        shard.flush()
    assert "ZeroDivisionError" in caplog.text
    journal.close()


# -- ranges to register --------------------------------------------------------------------------------------


def test_ranges_meet_and_marks_alone_are_none() -> None:
    disk = Disk()
    journal = journal_on(disk)
    shard = open_shard(journal)
    taken: list[NewExtent] = []
    shard.reserve(5)
    shard.flush()
    alone = shard.take_registrable()
    for line_number in (1, 2, 3):
        shard.add(line_number, FAILED if line_number == 2 else OK, Usage(line_number, 1, 2, 0), payload_of(line_number))
        shard.flush()
        if line_number != 1:
            taken += shard.take_registrable()
        shard.reserve(5 + line_number)
        shard.flush()
    journal.close()

    assert alone == ()
    assert [(each.succeeded_count, each.failed_count) for each in taken] == [(1, 1), (1, 0)]
    assert taken[0].byte_start == 0
    assert taken[0].byte_end == taken[1].byte_start
    assert taken[0].usage == Usage(3, 2, 4, 0)
    assert shard.take_registrable() == ()


def test_usage_beyond_32_bits_is_clipped() -> None:
    disk = Disk()
    journal = journal_on(disk)
    shard = open_shard(journal)

    shard.add(1, OK, Usage(1 << 40, -5, 3, 4), payload_of(1))
    journal.close()

    (extent,) = shard.take_registrable()
    (record,) = read_extents(disk, [extent])
    assert record.usage == extent.usage == Usage(0xFFFF_FFFF, 0, 3, 4)


# -- a disk that fails ---------------------------------------------------------------------------------------


def is_flushed(shard: ShardJournal) -> bool:
    try:
        shard.flush()
    except (DiskFull, BlobsUnavailable):
        return False
    return True


FAULTS = st.dictionaries(st.integers(0, 25), st.sampled_from(["full", "short", "io"]), max_size=8)


@settings(max_examples=150, deadline=None)
@given(faults=FAULTS, groups=st.lists(st.lists(st.integers(0, 300), max_size=4), min_size=1, max_size=6))
def test_a_failing_disk_neither_loses_nor_doubles_what_was_acknowledged(faults: dict[int, str], groups) -> None:
    step = iter(range(10**6))
    disk = Disk(lambda operation: faults.get(next(step)))
    ahead: list[tuple[int, list[int]]] = []

    def look() -> None:
        if shard.durable_mark > max(durable_marks(disk), default=0):
            ahead.append((shard.durable_mark, durable_marks(disk)))
        for extent in shard.take_registrable():
            assert extent.byte_end <= disk.synced[segment_ref(extent.segment).blob]
            acknowledged.append(extent)

    acknowledged: list[NewExtent] = []
    told = Told(look)
    journal = journal_on(disk, told)
    shard = open_shard(journal)
    line_number, expected = 0, []
    for sizes in groups:
        for size in sizes:
            line_number += 1
            shard.add(line_number, OK, Usage(line_number), payload_of(line_number, size))
            expected.append((line_number, payload_of(line_number, size)))
        shard.reserve(line_number + 1)
        while not is_flushed(shard):
            journal.request_sync()
            told.wait()
    journal.close()
    disk.crash()

    records = list(read_extents(disk, acknowledged))
    assert [(each.line_number, read_payload(disk, each)) for each in records] == expected
    assert sum(each.usage.input_tokens for each in acknowledged) == line_number * (line_number + 1) // 2
    assert ahead == []
    assert disk.open_count == 0


@settings(max_examples=100, deadline=None)
@given(faults=FAULTS, sizes=st.lists(st.integers(0, 300), min_size=1, max_size=12))
def test_after_a_crash_amid_faults_registered_and_salvaged_hold_each_line_once(faults: dict[int, str], sizes) -> None:
    """Every other acknowledgement is registered; the machine then dies and another claim looks."""
    step = iter(range(10**6))
    disk, told = Disk(lambda operation: faults.get(next(step))), Told()
    journal = journal_on(disk, told)
    shard = open_shard(journal)
    registered: list[Extent] = []
    acknowledged = 0
    for line_number, size in enumerate(sizes, start=1):
        shard.add(line_number, OK, NO_USAGE, payload_of(line_number, size))
        journal.request_sync()
        told.wait()
        acknowledged = line_number if shard.waiting_records == 0 else acknowledged
        if line_number % 2 == 0:
            registered += [as_extent(each) for each in shard.take_registrable()]
    disk.crash()
    disk.plan = lambda operation: None

    found = salvage(disk, claim_after([(1, SESSION)], registered))
    journal.close()

    lines = Counter(found.registered) + Counter(record.line_number for record in found.records)
    assert set(lines.values()) <= {1}
    assert set(lines) >= set(range(1, acknowledged + 1))
    for record in found.records:
        assert read_payload(disk, record) == payload_of(record.line_number, sizes[record.line_number - 1])
    assert found.damages == ()


def test_a_failed_group_goes_whole_to_the_next_segment() -> None:
    failing = iter([None, None, None, None, "io"])  # create, append, sync, append, sync
    disk = Disk(lambda operation: next(failing, None))
    journal = journal_on(disk)
    shard = open_shard(journal)
    shard.add(1, OK, NO_USAGE, payload_of(1))
    shard.flush()

    shard.add(2, OK, NO_USAGE, payload_of(2))
    shard.add(3, OK, NO_USAGE, payload_of(3))
    shard.flush()
    journal.close()

    first, second = shard.take_registrable()
    assert (first.segment, first.count, second.segment, second.count) == (1, 1, 2, 2)
    assert first.byte_end == disk.synced[segment_ref(1).blob] < len(disk.written[segment_ref(1).blob])
    assert second.byte_start == 0


def test_a_full_disk_is_not_tried_before_there_is_space() -> None:
    disk, told = Disk(lambda operation: "full" if operation == "append" else None), Told()
    disk.free = 10
    journal = journal_on(disk, told, retry_s=0.001)
    shard = open_shard(journal)
    shard.add(1, OK, NO_USAGE, payload_of(1))
    journal.request_sync()
    told.wait()
    tries = disk.created_count
    with pytest.raises(DiskFull):
        shard.flush()
    is_full = journal.is_full

    disk.plan = lambda operation: None
    assert disk.written == {}
    disk.free = 10**6
    told.wait()
    well = (journal.trouble, shard.take_registrable()[0].segment, disk.created_count - tries)
    journal.close()

    assert is_full
    assert well == (None, 1, 1)


def test_a_segment_that_cannot_be_removed_keeps_its_number() -> None:
    """A gap in the numbers would hide later segments from salvage."""
    first = iter([None, "short", "io"])  # create, append, delete
    disk = Disk(lambda operation: next(first, None))
    journal = journal_on(disk)
    shard = open_shard(journal)

    shard.add(1, OK, NO_USAGE, payload_of(1))
    shard.flush()
    journal.close()

    assert [segment_ref(number).blob in disk.written for number in (1, 2, 3)] == [True, True, False]
    found = salvage(disk, claim_after([(1, SESSION)]))
    assert [each.line_number for each in found.records] == [1]


def test_what_trouble_kept_back_is_not_durable_after_close() -> None:
    disk = Disk(lambda operation: "full" if operation == "sync" else None)
    journal = journal_on(disk)
    shard = open_shard(journal)
    shard.add(1, OK, NO_USAGE, payload_of(1))

    journal.close()

    assert isinstance(journal.trouble, DiskFull)
    assert (shard.take_registrable(), shard.waiting_records, disk.open_count) == ((), 1, 0)


# -- reading back --------------------------------------------------------------------------------------------

SIZES = st.lists(st.integers(0, 200), min_size=1, max_size=8)


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, buffer_bytes=st.integers(1, 400))
def test_records_read_the_same_through_any_buffer(sizes: list[int], buffer_bytes: int) -> None:
    disk, frames = written_segment(sizes)
    end = disk.size_bytes(segment_ref().blob)

    records = list(read_records(disk, segment_ref(), 0, end, buffer_bytes=buffer_bytes))

    assert records == [each for each in frames if each.kind is not MARK]
    payloads = [read_payload(disk, each) for each in records if isinstance(each, Record)]
    assert payloads == [payload_of(line_number, size) for line_number, size in enumerate(sizes, start=1)]
    assert list(scan_tail(disk, segment_ref(), 0, buffer_bytes=buffer_bytes)) == frames
    assert all(earlier.end == later.payload_offset - HEADER_BYTES for earlier, later in pairwise(frames))


@settings(max_examples=100, deadline=None)
@given(sizes=SIZES, cut=st.floats(0, 1))
def test_a_truncated_segment_loses_its_tail_only(sizes: list[int], cut: float) -> None:
    disk, frames = written_segment(sizes)
    content = disk.written[segment_ref().blob]
    length = int(len(content) * cut)
    del content[length:]

    left = list(scan_tail(disk, segment_ref(), 0))

    assert left == [each for each in frames if each.end <= length]


@settings(max_examples=300, deadline=None)
@given(
    sizes=SIZES, place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255), buffer_bytes=st.integers(50, 3000)
)
def test_a_flipped_byte_costs_the_record_it_lies_in_and_no_other(
    sizes: list[int], place: float, flip: int, buffer_bytes: int
) -> None:
    disk, frames = written_segment(sizes)
    content = disk.written[segment_ref().blob]
    at = int(len(content) * place)
    content[at] ^= flip
    hit = next(each for each in frames if at < each.end)

    found = list(read_records(disk, segment_ref(), 0, len(content), buffer_bytes=buffer_bytes))

    intact = [each for each in frames if each is not hit and each.kind is not MARK]
    assert [each for each in found if isinstance(each, Record)] == intact
    assert [each for each in found if isinstance(each, Damage)] == [
        Damage(segment_ref(), hit.payload_offset - HEADER_BYTES, hit.end)
    ]
    assert list(scan_tail(disk, segment_ref(), 0)) == frames[: frames.index(hit)]
    if hit.kind is not MARK:
        with pytest.raises(JournalCorrupt):
            read_payload(disk, hit)


def test_damage_is_logged_as_an_error_and_a_torn_tail_is_not(caplog: pytest.LogCaptureFixture) -> None:
    disk, frames = written_segment([10, 10])
    content = disk.written[segment_ref().blob]
    del content[-5:]

    tail = list(scan_tail(disk, segment_ref(), 0))
    quiet = list(caplog.records)
    damages = list(read_records(disk, segment_ref(), frames[-1].payload_offset - HEADER_BYTES, frames[-1].end))

    assert len(tail) == len(frames) - 1
    assert quiet == []
    assert len(damages) == 1
    assert [each.levelno for each in caplog.records] == [logging.ERROR]


def test_a_registered_segment_that_is_gone_is_damage() -> None:
    disk = Disk()

    found = list(read_records(disk, segment_ref(), 0, 500))

    assert found == [Damage(segment_ref(), 0, 500)]


@pytest.mark.parametrize(
    "other", [{"batch_id": "batch_2"}, {"task_id": 8}, {"epoch": 2}, {"session": "fedcba9876543210"}], ids=str
)
def test_frames_of_another_batch_shard_epoch_or_session_do_not_verify(other: dict) -> None:
    disk, frames = written_segment([10, 20, 30])
    foreign = replace(segment_ref(), **other)
    disk.written[foreign.blob] = disk.written[segment_ref().blob]

    assert len(frames) > 3
    assert list(scan_tail(disk, foreign, 0)) == []
    assert all(isinstance(each, Damage) for each in read_records(disk, foreign, 0, frames[-1].end))


# -- taking over ---------------------------------------------------------------------------------------------


def leave_behind(
    disk: Disk,
    records: Iterable[tuple[int, RecordKind]],
    *,
    epoch: int = 1,
    session: SessionId = SESSION,
    registered_count: int = 0,
    mark: int = 0,
) -> list[Extent]:
    """Play a holder that registered its first records and then died."""
    journal = journal_on(disk, session=session)
    shard = open_shard(journal, epoch=epoch)
    extents: tuple[NewExtent, ...] = ()
    shard.reserve(mark)
    for index, (line_number, kind) in enumerate(records, start=1):
        shard.add(line_number, kind, NO_USAGE, payload_of(line_number, epoch))
        shard.flush()
        if index == registered_count:
            extents = shard.take_registrable()
    journal.close()
    return [as_extent(each, epoch=epoch) for each in extents]


def test_salvage_finds_durable_successes_that_were_not_registered() -> None:
    disk = Disk()
    extents = leave_behind(disk, [(1, OK), (2, FAILED), (3, OK), (4, FAILED), (5, OK)], registered_count=2, mark=40)

    found = salvage(disk, claim_after([(1, SESSION)], extents))

    assert found.registered == {1, 2}
    assert [each.line_number for each in found.records] == [3, 5]
    assert found.mark == 40


def test_salvage_keeps_failures_when_asked() -> None:
    disk = Disk()
    leave_behind(disk, [(1, OK), (2, FAILED)])

    found = salvage(disk, claim_after([(1, SESSION)]), keep_failures=True)

    assert [(each.line_number, each.kind) for each in found.records] == [(1, OK), (2, FAILED)]


def test_salvage_takes_the_first_record_of_a_line_and_none_of_a_registered_one() -> None:
    disk, second = Disk(), SessionId("second")
    leave_behind(disk, [(1, OK), (2, OK)], epoch=1)
    extents = leave_behind(disk, [(1, OK), (2, OK)], epoch=2, session=second, registered_count=1)

    found = salvage(disk, claim_after([(1, SESSION), (2, second)], extents))

    assert found.registered == {1}
    assert [(each.line_number, each.segment.epoch) for each in found.records] == [(2, 1)]


def test_salvage_leaves_lines_that_the_shard_no_longer_has() -> None:
    disk = Disk()
    leave_behind(disk, [(1, OK), (800, OK)])

    found = salvage(disk, claim_after([(1, SESSION)]), lines=range(1, 501))

    assert [each.line_number for each in found.records] == [1]


def test_marks_are_told_by_epoch_and_a_claim_that_reserved_nothing_leaves_the_last_one() -> None:
    disk, second, third = Disk(), SessionId("second"), SessionId("third")
    extents = leave_behind(disk, [(1, OK)], epoch=1, mark=16, registered_count=1)
    leave_behind(disk, [], epoch=2, session=second, mark=64)

    found = salvage(disk, claim_after([(1, SESSION), (2, second)], extents))
    later = salvage(disk, claim_after([(1, SESSION), (2, second), (3, third)], extents))

    assert (found.marks, found.mark) == ({1: 16, 2: 64}, 64)
    assert later.mark == 64


def test_a_line_in_two_extents_is_never_merged() -> None:
    disk, second = Disk(), SessionId("second")
    extents = leave_behind(disk, [(1, OK)], epoch=1, registered_count=1)
    extents += leave_behind(disk, [(1, OK)], epoch=2, session=second, registered_count=1)
    claim = claim_after([(1, SESSION), (2, second)], extents)

    with pytest.raises(ReconciliationError, match="line 1"):
        salvage(disk, claim)


def test_a_damaged_registered_record_runs_again_alone() -> None:
    disk = Disk()
    extents = leave_behind(disk, [(1, OK), (2, OK), (3, OK)], registered_count=3)
    second = next(each for each in scan_tail(disk, segment_ref(), 0) if each.line_number == 2)
    disk.written[segment_ref().blob][second.payload_offset + 3] ^= 1

    found = salvage(disk, claim_after([(1, SESSION)], extents))

    assert found.registered == {1, 3}
    assert found.damages == (Damage(segment_ref(), second.payload_offset - HEADER_BYTES, second.end),)


def test_copied_records_are_durable_under_the_new_claim() -> None:
    disk, mine = Disk(), SessionId("mine")
    leave_behind(disk, [(1, OK), (2, OK), (3, OK)])
    found = salvage(disk, claim_after([(1, SESSION)]))
    journal = journal_on(disk, session=mine)
    shard = open_shard(journal, epoch=2)

    copy_salvaged(disk, found.records, shard)

    (extent,) = shard.take_registrable()
    segment = segment_ref(epoch=2, session=mine)
    copies = [
        each for each in read_records(disk, segment, extent.byte_start, extent.byte_end) if isinstance(each, Record)
    ]
    assert [read_payload(disk, each) for each in copies] == [payload_of(n, 1) for n in (1, 2, 3)]
    journal.close()


def test_copying_stops_with_the_journals_trouble() -> None:
    disk = Disk()
    leave_behind(disk, [(1, OK)])
    found = salvage(disk, claim_after([(1, SESSION)]))
    disk.plan = lambda operation: "io" if operation == "append" else None
    journal = journal_on(disk, session=SessionId("mine"))

    with pytest.raises(BatchrunnerError):
        copy_salvaged(disk, found.records, open_shard(journal, epoch=2))
    journal.close()
