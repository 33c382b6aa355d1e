"""Finds the custom_ids of a whole input that occur twice: first by 9 bytes a line, then by the ids themselves."""

from __future__ import annotations

from array import array
from itertools import pairwise

# Repeated ids are held for this many hashes at a time, so that memory stays bounded in a file appended to itself.
_TOLD_AT_ONCE = 1 << 18
# The hashes of one bucket are compared at a time: a set of all would take ten times their bytes, and leave the caches.
_BUCKETS = 64
# Where a range begins is noted, in 4 bytes a bucket, once so many ids or bytes have come since the last that was noted:
# a shard of usual lines, or an eighth of one of long lines.
_IDS_PER_MARK = 500
_BYTES_PER_MARK = 1 << 20
# As long as a hash on every POSIX system, and faster to fill than "q".
_HASH = "l"


class Repeats:
    """The ids of one input, which come range by range: `begin_range`, then `note`, again and again; then `close`.

    After that, until `is_told`: `next_places` gives the ranges to go through once more, which are those that hold an id
    that repeats and what is short beside them, and `is_again` is asked for every id in them, in their order.
    """

    def __init__(self) -> None:
        self._buckets = [array(_HASH) for _ in range(_BUCKETS)]
        self._appends = [bucket.append for bucket in self._buckets]
        self._range_count = 0
        # Ranges, and the sizes of the buckets before them.
        self._marks: list[tuple[int, array[int]]] = []
        self._unmarked_count = 0
        self._marked_bytes = 0
        self._repeated = array(_HASH)
        self._told_count = 0
        self._telling: set[int] = set()
        self._seen: set[str] = set()

    def begin_range(self, byte_start: int) -> None:
        """Begin the next range, the first being 0, at that place in the input."""
        is_far = self._unmarked_count >= _IDS_PER_MARK or byte_start - self._marked_bytes >= _BYTES_PER_MARK
        if is_far or not self._marks:
            self._marks.append(self._mark())
            self._unmarked_count, self._marked_bytes = 0, byte_start
        self._range_count += 1

    def note(self, custom_ids: list[str]) -> None:
        """Take the next ids of the range."""
        self._unmarked_count += len(custom_ids)
        appends, low_bits = self._appends, _BUCKETS - 1
        for custom_id in custom_ids:
            value = hash(custom_id)
            appends[value & low_bits](value)

    def close(self) -> None:
        """Compare the hashes, all ids having come."""
        for bucket in self._buckets:
            if len(bucket) > 1 and len(set(bucket)) < len(bucket):
                once: set[int] = set()
                twice = {value for value in bucket if value in once or once.add(value)}  # type: ignore[func-returns-value]
                self._repeated.extend(twice)

    @property
    def is_told(self) -> bool:
        """Whether every hash that occurs twice was told."""
        return self._told_count == len(self._repeated)

    def next_places(self) -> list[int]:
        """Turn to the next hashes that occur twice, and give the ranges that may hold them; none when all were told."""
        hashes = self._repeated[self._told_count : self._told_count + _TOLD_AT_ONCE]
        self._told_count += len(hashes)
        self._telling = set(hashes)
        self._seen = set()
        places: list[int] = []
        buckets = [(low, self._buckets[low]) for low in {value & (_BUCKETS - 1) for value in hashes}]
        for (first, starts), (end, ends) in pairwise([*self._marks, self._mark()]):
            if any(not self._telling.isdisjoint(bucket[starts[low] : ends[low]]) for low, bucket in buckets):
                places += range(first, end)
        return places

    def is_again(self, custom_id: str) -> bool:
        """Tell whether this id was asked for before, in the ranges given last."""
        if hash(custom_id) not in self._telling:
            return False
        if custom_id in self._seen:
            return True
        self._seen.add(custom_id)
        return False

    def _mark(self) -> tuple[int, array[int]]:
        return self._range_count, array("I", map(len, self._buckets))
