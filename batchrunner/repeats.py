"""Tells which custom_ids of a whole input may occur twice: none if they ascend, else by 8 bytes of hash a line."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import islice
from operator import lt

_HASHES_PER_TURN = 2_000_000
_BUCKETS = 256


class Order:
    """Whether all ids so far ascend, by length and then by text: as counted ones do, which therefore cannot repeat."""

    def __init__(self) -> None:
        self.is_ascending = True
        self._last = ""

    def note(self, custom_ids: list[str]) -> None:
        """Take the next ids."""
        if not self.is_ascending or not custom_ids:
            return
        if set(map(len, custom_ids)) == {len(self._last)}:
            self.is_ascending = self._last < custom_ids[0] and all(map(lt, custom_ids, islice(custom_ids, 1, None)))
        else:
            keys = [(len(each), each) for each in (self._last, *custom_ids)]
            self.is_ascending = all(map(lt, keys, islice(keys, 1, None)))
        self._last = custom_ids[-1]


def repeated_hashes(hashes: Sequence[array[int]]) -> array[int]:
    """Give each hash that occurs more than once, in no particular order.

    Each bucket of equal low bits is looked at alone, and above 2,000,000 hashes they are filled in several turns, so
    that this takes 8 bytes a hash and never more than 16 MiB or so.
    """
    repeated = array("q")
    turns = 1 + sum(map(len, hashes)) // _HASHES_PER_TURN
    for turn in range(turns):
        buckets = [array("q") for _ in range(_BUCKETS)]
        appends = [bucket.append for bucket in buckets]
        for each in hashes:
            for value in each if turns == 1 else [value for value in each if (value >> 8) % turns == turn]:
                appends[value & 255](value)
        for bucket in buckets:
            if len(set(bucket)) < len(bucket):
                once: set[int] = set()
                twice = {value for value in bucket if value in once or once.add(value)}  # type: ignore[func-returns-value]
                repeated.extend(twice)
    return repeated
