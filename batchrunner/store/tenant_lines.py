"""A tenant's lines in an SQL store: which transaction answers which method."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from batchrunner.additions import Addition, NewAddition
from batchrunner.holdings import NO_LIMITS, KeyLimits, Replay
from batchrunner.models import BatchId, Extent, Shard, TaskId, TaskKind, TaskState
from batchrunner.store import queries_additions, queries_blobs
from batchrunner.store.queries_batches import batch_of_tenant
from batchrunner.store.rows import addition_of, extent_of, shard_of
from batchrunner.store.tenant_outbox import SqlTenantOutbox


class _Outpaced(Exception):
    """Others have added lines first: nothing of the transaction may stay."""


class SqlTenantLines(SqlTenantOutbox):
    """TenantLines over the statements of this package."""

    def add_lines(
        self, batch_id: BatchId, new: NewAddition, *, replay: Replay | None = None, limits: KeyLimits = NO_LIMITS
    ) -> bool:
        """See TenantLines."""
        try:
            with self._store.writing() as conn:
                moment = self._store.moment()
                if self._made(conn, replay, new.source, moment) != new.source:
                    queries_blobs.abandon_blob(conn, new.source)
                elif not queries_additions.add_lines(conn, self._tenant, batch_id, new, moment, limits=limits):
                    raise _Outpaced
        except _Outpaced:
            return False
        return True

    def additions(self, batch_id: BatchId, *, from_line: int = 1, limit: int = 1000) -> list[Addition]:
        """See TenantLines."""
        with self._store.reading() as conn:
            batch_of_tenant(conn, self._tenant, batch_id)
            found = queries_additions.additions_of_batch(conn, batch_id, from_line=from_line, limit=limit)
            return [addition_of(row) for row in found]

    def close_batch(self, batch_id: BatchId) -> None:
        """See TenantLines."""
        with self._store.writing() as conn:
            queries_additions.close_batch(conn, self._tenant, batch_id, self._store.moment())

    def shards_from(self, batch_id: BatchId, line_number: int, *, limit: int) -> list[Shard]:
        """See TenantLines."""
        with self._store.reading() as conn:
            batch_of_tenant(conn, self._tenant, batch_id)
            return [shard_of(row) for row in queries_additions.shards_from(conn, batch_id, line_number, limit=limit)]

    def shards_of(self, batch_id: BatchId, task_ids: Collection[TaskId]) -> list[Shard]:
        """See TenantLines."""
        with self._store.reading() as conn:
            batch_of_tenant(conn, self._tenant, batch_id)
            return [shard_of(row) for row in queries_additions.shards_of(conn, batch_id, task_ids)]

    def extents_at(self, batch_id: BatchId, line_number: int) -> list[Extent]:
        """See TenantLines."""
        with self._store.reading() as conn:
            return [extent_of(row) for row in queries_additions.extents_at(conn, self._tenant, batch_id, line_number)]

    def task_counts(self, batch_id: BatchId) -> Mapping[TaskKind, Mapping[TaskState, int]]:
        """See TenantLines."""
        with self._store.reading() as conn:
            batch_of_tenant(conn, self._tenant, batch_id)
            return queries_additions.task_counts(conn, batch_id)
