"""Which ids repeat: none where they ascend, and as a count would find where their hashes are compared."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrunner import repeats
from batchrunner.repeats import Order, repeated_hashes


def is_ascending(ids: list[str], sizes: list[int]) -> bool:
    """Note the ids in parts of the sizes given, in turn."""
    order = Order()
    start = turn = 0
    while start < len(ids):
        size = sizes[turn % len(sizes)]
        order.note(ids[start : start + size])
        start += size
        turn += 1
    return order.is_ascending


@pytest.mark.parametrize("name", ["request-{}", "{:06}", "{:x}-of-a-run"])
def test_counted_ids_ascend_however_they_are_padded(name: str) -> None:
    ids = [name.format(number) for number in range(1200)]

    for sizes in ([1], [7], [290], [5000]):
        assert is_ascending(ids, sizes)
        assert not is_ascending([*ids, ids[0]], sizes)
        assert not is_ascending([*ids, ids[-1]], sizes)


def test_ids_of_mixed_lengths_that_ascend_as_texts_alone_do_not_count() -> None:
    assert not is_ascending(["a1", "a10", "a2", "a10"], [4])
    assert not is_ascending(["a1", "a10", "a2", "a10"], [3, 1])


@given(st.lists(st.text("ab1", min_size=1, max_size=4)), st.lists(st.integers(1, 5), min_size=1))
def test_ids_that_ascend_are_all_different(ids: list[str], sizes: list[int]) -> None:
    assert is_ascending(ids, sizes) == (ids == sorted(set(ids), key=lambda each: (len(each), each)))


@given(st.lists(st.integers(-(2**63), 2**63 - 1) | st.integers(-3, 3)), st.integers(1, 5))
def test_repeated_hashes_are_those_a_count_finds(values: list[int], width: int) -> None:
    parts = [array("q", values[start : start + width]) for start in range(0, len(values), width)]
    expected = sorted({value for value in values if values.count(value) > 1})

    assert sorted(repeated_hashes(parts)) == expected
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "_HASHES_PER_TURN", 3)
        assert sorted(repeated_hashes(parts)) == expected
