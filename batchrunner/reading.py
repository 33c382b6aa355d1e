"""The finished lines of a batch, read while others may still write them: registered records by sequence number, from
the extents alone. It takes no lock and writes nothing.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from batchrunner.frames import Damage, Record, read_records, segment_of
from batchrunner.models import BatchId, Extent, SegmentRef
from batchrunner.ports import Blobs, TenantScope

_PAGE = 200


class Numbered(NamedTuple):
    """A registered record with its place in the batch's sequence, which is final."""

    sequence: int
    record: Record


@dataclass(slots=True)
class _Spot:
    """How far the last extent was read; a later look may find it grown."""

    segment: SegmentRef
    byte_start: int
    read_to: int
    sequence: int


class Reader:
    """The registered records of one batch behind a sequence number. Blocks; used by one thread at a time.

    `after` is the highest sequence number that was looked at. Damaged bytes are left out, logged, and told to
    `on_damage`; the records behind them keep an order, though not their numbers. With `lines`, records of other lines
    are left out too, and keep theirs.
    """

    def __init__(
        self,
        blobs: Blobs,
        scope: TenantScope,
        batch_id: BatchId,
        *,
        after: int = 0,
        on_damage: Callable[[Damage], None] | None = None,
        lines: Container[int] | None = None,
    ) -> None:
        self.after = after
        self._lines = lines
        self._blobs = blobs
        self._scope = scope
        self._batch_id = batch_id
        self._on_damage = on_damage
        self._spot: _Spot | None = None

    @property
    def has_begun(self) -> bool:
        """Whether records were given before."""
        return self._spot is not None

    def fresh(self) -> Iterator[Numbered]:
        """Give the records behind those given before, in sequence order, up to the last one registered now."""
        while extents := self._scope.extents(self._batch_id, after=self.after, limit=_PAGE):
            for extent in extents:
                yield from self._read(extent)

    def _read(self, extent: Extent) -> Iterator[Numbered]:
        segment, start, sequence = segment_of(extent), extent.byte_start, extent.sequence_from - 1
        spot = self._spot
        if spot is not None and (spot.segment, spot.byte_start) == (segment, start):
            start, sequence = spot.read_to, spot.sequence
        after = self.after
        for each in read_records(self._blobs, segment, start, extent.byte_end):
            if isinstance(each, Damage):
                if self._on_damage is not None:
                    self._on_damage(each)
                continue
            sequence += 1
            if sequence > after and (self._lines is None or each.line_number in self._lines):
                yield Numbered(sequence, each)
        # Behind damage, what an extent gains later goes on from the number that its row says.
        self.after = extent.sequence_from + extent.count - 1
        self._spot = _Spot(segment, extent.byte_start, extent.byte_end, self.after)


class LineNumbers:
    """Line numbers in 8 bytes each, to ask whether one is among them."""

    def __init__(self, numbers: Iterable[int]) -> None:
        self._numbers = array("Q", sorted(array("Q", numbers)))

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int):
            return False
        place = bisect_left(self._numbers, number)
        return place < len(self._numbers) and self._numbers[place] == number

    def __iter__(self) -> Iterator[int]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)


def registered_numbers(blobs: Blobs, scope: TenantScope, batch_id: BatchId) -> LineNumbers:
    """Give the line numbers of all records that a batch has now. Blocks."""
    return LineNumbers(each.record.line_number for each in Reader(blobs, scope, batch_id).fresh())
