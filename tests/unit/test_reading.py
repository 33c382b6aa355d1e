"""Registered records by sequence number: from any place on, while extents grow, and around damage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchrunner.blobs.local import LocalBlobs
from batchrunner.frames import Damage, header, read_payload, seed
from batchrunner.models import NO_USAGE, BatchId, Extent, RecordKind, SegmentRef, SessionId, TaskId
from batchrunner.reading import LineNumbers, Reader, registered_numbers

BATCH = BatchId("batch_1")


class Scope:
    """Only what a reader asks of a TenantScope."""

    def __init__(self) -> None:
        self.rows: list[Extent] = []

    def extents(self, batch_id, *, after=0, limit=1000):
        assert batch_id == BATCH
        return [row for row in self.rows if row.sequence_from + row.count - 1 > after][:limit]


class Desk:
    """A journal that is written by hand."""

    def __init__(self, folder: Path) -> None:
        self.blobs = LocalBlobs(folder)
        self.folder = folder
        self.scope = Scope()

    def write(self, task: int, lines: list[int], *, is_growth: bool = False) -> None:
        """Append records of lines and register them, as a new extent or as growth of the last."""
        name = SegmentRef(batch_id=BATCH, task_id=TaskId(task), epoch=1, session=SessionId("s"), number=1)
        path = self.folder / name.blob
        path.parent.mkdir(parents=True, exist_ok=True)
        start = path.stat().st_size if path.exists() else 0
        with path.open("ab") as stream:
            for line in lines:
                kind = RecordKind.FAILED if line % 10 == 0 else RecordKind.SUCCEEDED
                payload = b'{"line": %d}\n' % line
                stream.write(header(seed(name), line, kind, NO_USAGE, payload) + payload)
        end = path.stat().st_size
        rows = self.scope.rows
        if is_growth:
            rows[-1] = replace(rows[-1], count=rows[-1].count + len(lines), byte_end=end)
            return
        rows.append(
            Extent(
                batch_id=BATCH,
                task_id=TaskId(task),
                sequence_from=rows[-1].sequence_from + rows[-1].count if rows else 1,
                count=len(lines),
                epoch=1,
                session=SessionId("s"),
                segment=1,
                byte_start=start,
                byte_end=end,
                succeeded_count=len(lines),
                failed_count=0,
                usage=NO_USAGE,
            )
        )

    def damage(self, line: int) -> None:
        """Flip a byte in the record of a line."""
        for path in self.folder.rglob("*.seg"):
            content = bytearray(path.read_bytes())
            place = content.find(b'{"line": %d}' % line)
            if place >= 0:
                content[place + 3] ^= 1
                path.write_bytes(bytes(content))

    def reader(self, after: int = 0, **given) -> Reader:
        return Reader(self.blobs, self.scope, BATCH, after=after, **given)  # type: ignore[arg-type]


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def found(reader: Reader) -> list[tuple[int, int]]:
    return [(sequence, record.line_number) for sequence, record in reader.fresh()]


@pytest.mark.parametrize("after", range(8))
def test_reading_begins_behind_any_number(desk, after):
    desk.write(1, [5, 1, 3])
    desk.write(2, [11, 10])
    desk.write(1, [2, 4])

    assert found(desk.reader(after)) == list(enumerate([5, 1, 3, 11, 10, 2, 4], start=1))[after:]


def test_what_was_given_is_not_given_again_when_an_extent_grows(desk):
    reader = desk.reader()
    desk.write(1, [1, 2])
    first = found(reader)
    desk.write(1, [3], is_growth=True)
    second = found(reader)
    desk.write(1, [4], is_growth=True)
    desk.write(2, [9])

    assert (first, second) == ([(1, 1), (2, 2)], [(3, 3)])
    assert found(reader) == [(4, 4), (5, 9)]
    assert found(reader) == []
    assert found(desk.reader(1)) == [(2, 2), (3, 3), (4, 4), (5, 9)]


def test_damage_is_told_and_does_not_swallow_what_comes_later(desk):
    told: list[Damage] = []
    reader = desk.reader(on_damage=told.append)
    desk.write(1, [1, 2, 3])
    desk.damage(2)
    first = found(reader)
    desk.write(1, [4], is_growth=True)

    assert [line for _, line in first] == [1, 3]
    assert found(reader) == [(4, 4)]
    assert len(told) == 1


def test_payloads_are_the_finished_lines(desk):
    desk.write(1, [7])

    (entry,) = desk.reader().fresh()

    assert read_payload(desk.blobs, entry.record) == b'{"line": 7}\n'


def test_numbers_of_a_batch_know_their_members(desk):
    desk.write(1, [5, 300, 2])

    numbers = registered_numbers(desk.blobs, desk.scope, BATCH)

    assert [each for each in (1, 2, 3, 5, 300, 301) if each in numbers] == [2, 5, 300]
    assert (len(numbers), list(numbers)) == (3, [2, 5, 300])
    assert None not in LineNumbers(iter(()))
