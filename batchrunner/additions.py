"""The lines of an open batch, which come after it, as a Store keeps them, and where single lines of any batch stand."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Protocol

import msgspec

from batchrunner.holdings import NO_LIMITS, KeyLimits, Replay
from batchrunner.models import BatchId, Extent, Shard, ShardCut, TaskId, TaskKind, TaskState


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAddition:
    """Lines that ask to join an open batch; `source` names the blob that holds them.

    They number from `first_line` on, and so do the `shards`, whose bytes are those of the blob. `id_hashes` has 8 bytes
    for each custom_id, in line order. `closes_at` is when the batch closes if nothing more comes.
    """

    first_line: int
    source: str
    id_hashes: bytes
    shards: tuple[ShardCut, ...]
    model: str | None
    closes_at: datetime | None = None

    @property
    def line_count(self) -> int:
        """Lines that join."""
        return sum(cut.line_count for cut in self.shards)

    def joining_at(self, first_line: int) -> NewAddition:
        """Give the lines other numbers. None is refused or blank, so the index goes with the number."""
        by = first_line - self.first_line
        shards = tuple(
            msgspec.structs.replace(cut, first_line=cut.first_line + by, first_index=cut.first_index + by)
            for cut in self.shards
        )
        return replace(self, first_line=first_line, shards=shards)


@dataclass(frozen=True, slots=True, kw_only=True)
class Addition:
    """Lines that joined a batch together."""

    first_line: int
    line_count: int
    source: str
    id_hashes: bytes
    created_at: datetime


class TenantLines(Protocol):
    """The part of a TenantScope that knows single lines. Raises in every method: NotFound."""

    def add_lines(
        self, batch_id: BatchId, new: NewAddition, *, replay: Replay | None = None, limits: KeyLimits = NO_LIMITS
    ) -> bool:
        """Let lines join an open batch, in one transaction on its locked row; False, with no effect, when others have
        joined since `first_line` was looked up.

        With `replay`, lines that joined under the same key before do not join again, and their number is True.

        Raises:
            TransitionRefused: the batch is not open, or not in progress any more.
            QuotaExceeded.
        """

    def additions(self, batch_id: BatchId, *, from_line: int = 1, limit: int = 1000) -> list[Addition]:
        """What joined, in line order, from that line on. Nothing once the batch's journal has ended."""

    def close_batch(self, batch_id: BatchId) -> None:
        """Let no more lines join; a batch whose lines are settled moves on by lines_settled. Repeating it is no error,
        nor is a batch that never was open.
        """

    def shards_from(self, batch_id: BatchId, line_number: int, *, limit: int) -> list[Shard]:
        """The shard that holds a line, or where none does the next one, and those behind it, by first_line."""

    def shards_of(self, batch_id: BatchId, task_ids: Collection[TaskId]) -> list[Shard]:
        """These shards, by first_line."""

    def extents_at(self, batch_id: BatchId, line_number: int) -> list[Extent]:
        """The registered extents of the shard that holds a line, in sequence order: one at most has its result."""

    def task_counts(self, batch_id: BatchId) -> Mapping[TaskKind, Mapping[TaskState, int]]:
        """Count the batch's tasks by kind and state; what there is none of is left out. No shards are left once the
        batch's journal has ended.
        """
