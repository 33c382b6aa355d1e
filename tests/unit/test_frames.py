"""Reading the results of a registered range: all of them from memory, or a single one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from batchrunner.blobs.local import LocalBlobs
from batchrunner.errors import JournalCorrupt
from batchrunner.frames import find_record, header, read_payload, results_within, seed
from batchrunner.models import NO_USAGE, BatchId, RecordKind, SegmentRef, SessionId, TaskId, Usage

SEGMENT = SegmentRef(batch_id=BatchId("b"), task_id=TaskId(1), epoch=2, session=SessionId("s"), number=1)
USAGE = Usage(1, 2, 3, 4)


def frame(line_number: int, kind: RecordKind, payload: bytes, usage: Usage = NO_USAGE) -> bytes:
    return header(seed(SEGMENT), line_number, kind, usage, payload) + payload


CONTENT = (
    frame(7, RecordKind.SUCCEEDED, b'{"a":1}\n', USAGE)
    + frame(64, RecordKind.MARK, b"")
    + frame(3, RecordKind.FAILED, b'{"b":2}\n')
)


def read(content: bytes) -> list[tuple[int, RecordKind, bytes]]:
    return [(number, kind, bytes(payload)) for number, kind, payload in results_within(content, SEGMENT)]


def test_results_come_in_the_order_of_their_bytes_without_marks():
    assert read(CONTENT) == [(7, RecordKind.SUCCEEDED, b'{"a":1}\n'), (3, RecordKind.FAILED, b'{"b":2}\n')]
    assert read(b"") == []


@pytest.mark.parametrize("bit", [0x01, 0x80])
@pytest.mark.parametrize("index", range(len(CONTENT)))
def test_any_flipped_bit_is_detected(index: int, bit: int):
    damaged = bytearray(CONTENT)
    damaged[index] ^= bit

    with pytest.raises(JournalCorrupt):
        read(bytes(damaged))


def test_a_range_that_ends_inside_a_frame_is_detected():
    whole = {0, len(CONTENT)}
    for end in range(1, len(CONTENT)):
        try:
            read(CONTENT[:end])
        except JournalCorrupt:
            continue
        whole.add(end)

    first = len(frame(7, RecordKind.SUCCEEDED, b'{"a":1}\n'))
    assert whole == {0, first, first + len(frame(64, RecordKind.MARK, b"")), len(CONTENT)}


def test_frames_of_another_segment_do_not_verify():
    with pytest.raises(JournalCorrupt):
        list(results_within(CONTENT, replace(SEGMENT, epoch=3)))


class CountingBlobs(LocalBlobs):
    """A folder that counts what is read of it."""

    read_bytes = 0

    def read(self, name: str, start: int, end: int) -> bytes:
        found = super().read(name, start, end)
        self.read_bytes += len(found)
        return found


def stored(folder: Path, content: bytes) -> CountingBlobs:
    path = folder / SEGMENT.blob
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    return CountingBlobs(folder)


class TestOneRecord:
    def test_each_result_is_found_by_its_line_and_no_mark_is(self, tmp_path):
        blobs = stored(tmp_path, CONTENT)

        found = {number: find_record(blobs, SEGMENT, 0, len(CONTENT), number) for number in (3, 7, 8, 64)}

        assert {number: record and read_payload(blobs, record) for number, record in found.items()} == {
            3: b'{"b":2}\n',
            7: b'{"a":1}\n',
            8: None,
            64: None,
        }

    def test_nothing_is_found_beyond_the_registered_bytes(self, tmp_path):
        blobs = stored(tmp_path, CONTENT)

        assert find_record(blobs, SEGMENT, 0, len(frame(7, RecordKind.SUCCEEDED, b'{"a":1}\n', USAGE)), 3) is None

    @pytest.mark.parametrize("index", range(len(CONTENT)))
    def test_damage_hides_one_result_at_most(self, tmp_path, index):
        damaged = bytearray(CONTENT)
        damaged[index] ^= 0x80
        blobs = stored(tmp_path, bytes(damaged))

        found = {number: find_record(blobs, SEGMENT, 0, len(CONTENT), number) for number in (3, 7)}

        payloads = {number: record and read_payload(blobs, record) for number, record in found.items()}
        assert payloads[7] in (None, b'{"a":1}\n')
        assert payloads[3] in (None, b'{"b":2}\n')
        assert payloads[7] or payloads[3]

    def test_of_long_results_before_it_the_heads_are_read_only(self, tmp_path):
        long = b'"' + b"x" * 1_000_000 + b'"\n'
        content = b"".join(frame(number, RecordKind.SUCCEEDED, long) for number in range(11, 19)) + CONTENT
        blobs = stored(tmp_path, content)

        assert find_record(blobs, SEGMENT, 0, len(content), 3) is not None
        assert blobs.read_bytes < len(content) / 8
