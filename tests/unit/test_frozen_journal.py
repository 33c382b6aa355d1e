"""A journal whose segments are written in one request each: when, how large, and what a failure changes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from batchrunner.errors import BlobsUnavailable
from batchrunner.frames import Record, read_records
from batchrunner.journal import Journal
from batchrunner.models import NO_USAGE, BatchId, RecordKind, SegmentRef, SessionId, TaskId, TaskRef
from batchrunner.ports import Appender
from batchrunner.shard_journal import Frozen, ShardJournal
from tests.contract.conftest import ManualClock
from tests.unit.test_journal import BATCH, SESSION, Disk

WAIT_S = 20.0
NEVER_S = 3600.0


class Bucket(Disk):
    """Objects in memory: a segment is there whole after its sync. `plan` may fail the sync."""

    has_frozen_segments = True

    def __init__(self, plan: Callable[[str], bool] = lambda name: False) -> None:
        super().__init__()
        self.puts: list[tuple[str, int]] = []
        self.fails = plan

    def create_segment(self, name: str) -> Appender:  # type: ignore[override]
        return Pending(self, name)


class Pending(Appender):
    def __init__(self, bucket: Bucket, name: str) -> None:
        self.bucket = bucket
        self.name = name
        self.content = bytearray()

    def append(self, chunk: bytes) -> None:
        assert (self.name, len(self.content)) not in self.bucket.puts, "a frozen segment grew"
        self.content += chunk

    def sync(self) -> None:
        self.bucket.puts.append((self.name, len(self.content)))
        if self.bucket.fails(self.name):
            raise BlobsUnavailable(self.name)
        self.bucket.written[self.name] = bytearray(self.content)

    def close(self) -> None:
        """Nothing to let go of."""


class Scene:
    def __init__(self, bucket: Bucket, *, segment_s: float = NEVER_S, segment_bytes: int = 1 << 20) -> None:
        self.bucket = bucket
        self.durable = threading.Semaphore(0)
        self.clock = ManualClock()
        frozen = Frozen(clock=self.clock, segment_s=segment_s, segment_bytes=segment_bytes, writers=2)
        self.journal = Journal(
            bucket,
            SESSION,
            on_durable=self.durable.release,
            tick_s=0.01,
            retry_s=0.01,
            records_max=1 << 30,
            frozen=frozen,
        )

    def open(self, task: int = 7) -> ShardJournal:
        return self.journal.open(BATCH, TaskRef(task_id=TaskId(task), epoch=1), first_mark=0)

    def await_durable(self, shard: ShardJournal) -> None:
        while shard.waiting_records:
            assert self.durable.acquire(timeout=WAIT_S)


@pytest.fixture
def scene() -> Iterator[Scene]:
    made = Scene(Bucket())
    yield made
    made.journal.close()


def add(shard: ShardJournal, *numbers: int, size_bytes: int = 10) -> None:
    for number in numbers:
        shard.add(number, RecordKind.SUCCEEDED, NO_USAGE, b"x" * size_bytes + b"\n")


def lines_of(bucket: Bucket, number: int, task: int = 7) -> list[int]:
    segment = SegmentRef(
        batch_id=BatchId(BATCH), task_id=TaskId(task), epoch=1, session=SessionId(SESSION), number=number
    )
    records = read_records(bucket, segment, 0, bucket.size_bytes(segment.blob))
    return [each.line_number for each in records if isinstance(each, Record)]


def test_group_waits_for_its_time_and_then_is_one_segment() -> None:
    made = Scene(Bucket(), segment_s=2.0)
    shard = made.open()
    add(shard, 1, 2, 3)
    for _ in range(3):
        assert made.durable.acquire(timeout=WAIT_S), "a tick without a word"
    before = list(made.bucket.puts)

    made.clock.advance(2.0)
    made.await_durable(shard)

    assert before == []
    assert lines_of(made.bucket, 1) == [1, 2, 3]
    assert len(made.bucket.puts) == 1
    made.journal.close()


def test_group_that_is_large_enough_does_not_wait() -> None:
    made = Scene(Bucket(), segment_bytes=100)
    shard = made.open()

    add(shard, 1, size_bytes=200)
    made.await_durable(shard)

    assert lines_of(made.bucket, 1) == [1]
    made.journal.close()


def test_shard_that_asks_is_written_alone_and_each_group_has_a_segment_of_its_own(scene: Scene) -> None:
    shard, other = scene.open(), scene.open(8)
    add(other, 1)
    for number in (1, 2):
        add(shard, number)
        shard.request_sync()
        scene.await_durable(shard)

    assert [name.rpartition("/")[2] for name, _ in scene.bucket.puts] == [f"1-{SESSION}-1.seg", f"1-{SESSION}-2.seg"]
    assert (lines_of(scene.bucket, 1), lines_of(scene.bucket, 2)) == ([1], [2])
    assert [(each.segment, each.byte_start) for each in shard.take_registrable()] == [(1, 0), (2, 0)]
    assert other.waiting_records == 1


def test_failed_segment_is_written_again_with_the_same_bytes_before_the_next_one() -> None:
    failures = iter([True, True])
    tried = threading.Semaphore(0)

    def fails(_name: str) -> bool:
        tried.release()
        return next(failures, False)

    made = Scene(Bucket(fails))
    shard = made.open()
    add(shard, 1, 2)
    shard.request_sync()
    assert tried.acquire(timeout=WAIT_S)
    add(shard, 3)

    shard.request_sync()
    made.await_durable(shard)

    first = [size for name, size in made.bucket.puts if name.endswith("-1.seg")]
    assert len(first) == 3
    assert len(set(first)) == 1
    assert (lines_of(made.bucket, 1), lines_of(made.bucket, 2)) == ([1, 2], [3])
    made.journal.close()


def test_marks_are_not_written_but_registered_elsewhere(scene: Scene) -> None:
    shard = scene.open()

    shard.reserve(16)
    add(shard, 1)
    shard.request_sync()
    scene.await_durable(shard)
    before = shard.durable_mark
    shard.mark_registered(64)

    assert not shard.keeps_marks
    assert (before, shard.durable_mark, shard.wanted_mark) == (0, 64, 64)
    assert lines_of(scene.bucket, 1) == [1]


def test_write_that_takes_too_long_keeps_lines_back() -> None:
    reached, release = threading.Event(), threading.Event()

    def hangs(_name: str) -> bool:
        reached.set()
        assert release.wait(WAIT_S)
        return False

    made = Scene(Bucket(hangs))
    shard = made.open()
    add(shard, 1)
    shard.request_sync()
    assert reached.wait(WAIT_S)
    before = made.journal.is_full

    made.clock.advance(1.5)

    assert not before
    assert made.journal.is_full
    release.set()
    made.await_durable(shard)
    assert not made.journal.is_full
    made.journal.close()
