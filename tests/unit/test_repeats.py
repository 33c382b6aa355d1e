"""Which ids repeat, and where: as a count would find them."""

from __future__ import annotations

from collections import Counter
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrunner import repeats
from batchrunner.repeats import Repeats


def told(parts: list[list[str]]) -> tuple[list[list[int]], list[str]]:
    """The places that are gone through in each round, and the ids that are found again there."""
    repeats = Repeats()
    byte_start = 0
    for part in parts:
        repeats.begin_range(byte_start)
        repeats.note(part)
        byte_start += sum(map(len, part))
    repeats.close()
    rounds, again = [], []
    while not repeats.is_told:
        rounds.append(repeats.next_places())
        again += [each for place in rounds[-1] for each in parts[place] if repeats.is_again(each)]
    assert repeats.next_places() == []
    return rounds, again


@given(st.lists(st.lists(st.text("ab1", max_size=2), max_size=6)), st.integers(1, 7), st.integers(1, 4))
def test_ids_are_told_again_as_often_as_a_count_finds(parts: list[list[str]], ids_per_mark: int, at_once: int) -> None:
    ids = [each for part in parts for each in part]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "_IDS_PER_MARK", ids_per_mark)
        patch.setattr(repeats, "_TOLD_AT_ONCE", at_once)
        rounds, again = told(parts)

    assert Counter(again) == Counter(ids) - Counter(set(ids))
    assert len(rounds) == ceil(len(set(again)) / at_once)


@given(st.lists(st.lists(st.text("ab1", min_size=1, max_size=2), min_size=1, max_size=6)))
def test_only_ranges_that_hold_an_id_that_repeats_are_gone_through_again(parts: list[list[str]]) -> None:
    counts = Counter(each for part in parts for each in part)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repeats, "_IDS_PER_MARK", 1)
        rounds, _ = told(parts)

    wanted = [place for place, part in enumerate(parts) if any(counts[each] > 1 for each in part)]
    assert rounds == ([wanted] if wanted else [])


def test_short_ranges_are_gone_through_with_what_is_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = [["9"], ["8", "7"], ["6"], ["5", "8"], [], ["4"]]

    monkeypatch.setattr(repeats, "_IDS_PER_MARK", 3)
    assert told(parts) == ([[0, 1, 2, 3]], ["8"])
    monkeypatch.setattr(repeats, "_BYTES_PER_MARK", 1)
    assert told(parts) == ([[1, 3]], ["8"])


def test_nothing_is_gone_through_again_where_nothing_repeats() -> None:
    assert told([]) == ([], [])
    assert told([[str(number) for number in range(5000)]]) == ([], [])
    assert told([["b", "a"], ["c"]]) == ([], [])
