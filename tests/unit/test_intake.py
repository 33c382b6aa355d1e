"""Lines are counted alike however the bytes are cut; the first line decides what a file is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrunner.blobs.local import LocalBlobs
from batchrunner.intake import Intake, LineCounter

PIECES = [b'{"custom_id":1}\n', b'{"custom_id":2', b"{", b"\n", b"\r\n", b" ", b"x", b"\n             ", b"\t"]


@settings(max_examples=400, deadline=None)
@given(
    parts=st.lists(st.sampled_from(PIECES) | st.just(PIECES[0] * 5), max_size=60),
    cuts=st.lists(st.integers(1, 200), min_size=1),
)
def test_lines_are_counted_however_the_bytes_are_cut(parts: list[bytes], cuts: list[int]) -> None:
    content = b"".join(parts)
    counter, start, turn = LineCounter(), 0, 0

    while start < len(content):
        size = cuts[turn % len(cuts)]
        counter.feed(content[start : start + size])
        start, turn = start + size, turn + 1

    assert counter.count() == sum(not line.isspace() and line != b"" for line in content.split(b"\n"))


@pytest.mark.parametrize("size", [1, 7, 10_000])
@pytest.mark.parametrize(
    ("content", "is_json_lines"),
    [
        (b'{"a":1}\nno json\n', True),
        (b'\xef\xbb\xbf{"a":1}', True),
        (b'\xef\xbb\xbf\n\r\n  \n{"a":1}\n', True),
        (b"[1]", True),
        (b"", False),
        (b"\n\n \n", False),
        (b"\xef\xbb\xbf", False),
        (b"\nno json\n{}\n", False),
        (b'{"a":"\xff"}\n', False),
        (b"[" * 5000 + b"]" * 5000, False),
        (b'{"a":' + b" " * 6000 + b"1}", False),
    ],
    ids=[
        "first only",
        "bom",
        "blank lines",
        "no object",
        "empty",
        "blank",
        "bom alone",
        "second",
        "utf8",
        "deep",
        "long",
    ],
)
def test_the_first_line_that_is_not_blank_decides(
    tmp_path: Path, content: bytes, size: int, *, is_json_lines: bool
) -> None:
    intake = Intake(LocalBlobs(tmp_path), "files/a", line_bytes_max=5_000 if b" " * 6000 in content else 20_000)

    for start in range(0, len(content), size):
        intake.feed(content[start : start + size])
    taken = intake.finish()

    assert taken.is_json_lines is is_json_lines
    assert taken.size_bytes == len(content)
    assert (tmp_path / "files/a").read_bytes() == content


def test_another_digest_sees_the_same_bytes(tmp_path: Path) -> None:
    seen: list[bytes] = []
    intake = Intake(LocalBlobs(tmp_path), "files/a", line_bytes_max=100, digest=seen.append)

    intake.feed(b"ab")
    intake.feed(b"c")
    intake.finish()

    assert b"".join(seen) == b"abc"


def test_an_aborted_intake_leaves_nothing(tmp_path: Path) -> None:
    intake = Intake(LocalBlobs(tmp_path), "files/a", line_bytes_max=100)
    intake.feed(b"abc")

    intake.abort()
    intake.abort()

    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
