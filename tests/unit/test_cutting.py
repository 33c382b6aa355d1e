"""Cutting bytes into blocks: everything is covered, limits hold, and how the bytes arrive makes no difference."""

from __future__ import annotations

from collections.abc import Iterator
from io import BytesIO
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from batchrunner.cutting import Block, Cutter, LongLine, split_lines

MARK = b"\xef\xbb\xbf"


def cut(
    content: bytes, sizes: list[int], *, lines_max=3, bytes_max=20, line_bytes_max=30, is_counted=False
) -> list[Block | LongLine]:
    """Feed the content in chunks of the sizes given, in turn."""
    cutter = Cutter(lines_max=lines_max, bytes_max=bytes_max, line_bytes_max=line_bytes_max)
    cuts: list[Block | LongLine] = []

    def take(runs: Iterator[bytes | LongLine]) -> None:
        for run in runs:
            if isinstance(run, LongLine):
                cuts.append(run)
            else:
                cuts.extend(cutter.blocks(run, len(BytesIO(run).readlines()) if is_counted else None))

    start = turn = 0
    while start < len(content):
        size = sizes[turn % len(sizes)]
        take(cutter.feed(content[start : start + size]))
        start += size
        turn += 1
    take(cutter.finish())
    return cuts


def shards(cuts: list[Block | LongLine]) -> list[Block | LongLine]:
    """Put the blocks of each shard together again."""
    found: list[Block | LongLine] = []
    for each in cuts:
        if isinstance(each, LongLine) or each.is_first:
            found.append(each)
            continue
        before = found[-1]
        assert isinstance(before, Block)
        assert (before.byte_end, before.first_line + before.line_count) == (each.byte_start, each.first_line)
        content, line_count = before.content + each.content, before.line_count + each.line_count
        found[-1] = Block(content, before.byte_start, before.first_line, line_count, True)
    return found


def blocks(content: bytes, **limits: int) -> list[tuple[int, int, bytes]]:
    found = shards(cut(content, [1 << 20], **limits))
    assert all(isinstance(each, Block) for each in found)
    return [(each.first_line, each.byte_start, each.content) for each in found if isinstance(each, Block)]


def test_a_block_ends_after_its_last_allowed_line() -> None:
    assert blocks(b"1\n2\n3\n4\n") == [(1, 0, b"1\n2\n3\n"), (4, 6, b"4\n")]


def test_a_block_ends_before_the_line_that_would_not_fit() -> None:
    assert blocks(b"a" * 9 + b"\n" + b"b" * 9 + b"\nc") == [(1, 0, b"a" * 9 + b"\n" + b"b" * 9 + b"\n"), (3, 20, b"c")]
    assert blocks(b"a" * 9 + b"\n" + b"b" * 10 + b"\n") == [(1, 0, b"a" * 9 + b"\n"), (2, 10, b"b" * 10 + b"\n")]


def test_a_line_longer_than_a_block_is_a_block() -> None:
    assert blocks(b"1\n" + b"x" * 25 + b"\n2") == [(1, 0, b"1\n"), (2, 2, b"x" * 25 + b"\n"), (3, 28, b"2")]


def test_a_line_that_is_too_long_is_told_and_lies_in_no_block() -> None:
    for sizes in ([1], [7], [1000]):
        found = shards(cut(b"1\n" + b"x" * 31 + b"\n2\n" + b"y" * 40, sizes))

        assert [each if isinstance(each, LongLine) else each.byte_start for each in found] == [
            0,
            LongLine(2, 31),
            34,
            LongLine(4, 40),
        ]


def test_a_line_without_end_is_never_held_whole() -> None:
    cutter = Cutter(lines_max=10, bytes_max=1000, line_bytes_max=2000)

    for _ in range(1000):
        assert list(cutter.feed(b"x" * 1000)) == []
        assert len(cutter._buffer) <= 3000

    assert list(cutter.finish()) == [LongLine(1, 1_000_000)]


def test_a_byte_order_mark_is_left_out_at_the_start_only() -> None:
    for sizes in ([1], [2], [100]):
        found = shards(cut(MARK + b"1\n" + MARK + b"2", sizes))

        assert found == [Block(b"1\n" + MARK + b"2", 3, 1, 2, True)]


def test_an_input_without_lines_gives_no_block() -> None:
    assert blocks(b"") == []
    assert blocks(MARK) == []
    assert blocks(b"\n") == [(1, 0, b"\n")]
    assert blocks(b"{") == [(1, 0, b"{")]


LINE = st.sampled_from([b"", b"{}", b"{}\r", b" ", b"{" + b"x" * 8 + b"}", b"y" * 19, b"y" * 20, b"z" * 30, b"z" * 31])
CONTENT = st.builds(
    lambda mark, lines, end: mark + b"\n".join(lines) + end,
    st.sampled_from([b"", MARK, MARK[:2]]),
    st.lists(LINE, max_size=12),
    st.sampled_from([b"", b"\n"]),
)


@given(CONTENT | st.binary(max_size=200), st.lists(st.integers(1, 40), min_size=1, max_size=5))
def test_cuts_cover_the_input_whatever_the_chunks(content: bytes, sizes: list[int]) -> None:
    found = shards(cut(content, sizes))

    assert found == shards(cut(content, [1 << 20]))
    assert found == shards(cut(content, sizes, is_counted=True))
    body = content.removeprefix(MARK)
    number, position = 1, len(content) - len(body)
    for each in found:
        if isinstance(each, LongLine):
            assert (each.line_number, each.size_bytes > 30) == (number, True)
            number, position = number + 1, position + each.size_bytes + 1
            continue
        assert (each.first_line, each.byte_start) == (number, position)
        assert content[each.byte_start : each.byte_end] == each.content
        assert each.line_count <= 3
        assert len(each.content) <= 20 or each.line_count == 1
        assert each.line_count == len(list(split_lines(each.content, 1)))
        number, position = number + each.line_count, each.byte_end
    assert number - 1 == len(list(split_lines(body, 1)))
    assert position >= len(content)


@given(CONTENT | st.binary(max_size=200))
def test_lines_are_split_at_newlines_only(content: bytes) -> None:
    lines = list(split_lines(content, 5))

    assert b"\n".join(raw for _, raw in lines) == content.removesuffix(b"\n") or content == b"\n"
    assert all(after == before + 1 for (before, _), (after, _) in pairwise(lines))
    assert [number for number, _ in lines[:1]] in ([], [5])
