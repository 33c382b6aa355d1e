"""Reading the results of a whole registered range from memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from batchrunner.errors import JournalCorrupt
from batchrunner.frames import header, results_within, seed
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
