"""The Store over an SQL database: which transaction answers which method; how one begins or fails is the adapter's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager

from sqlalchemy import Connection

from batchrunner.lifecycle import BatchEvent
from batchrunner.models import (
    AcceptedInput,
    Batch,
    BatchId,
    Claim,
    Extent,
    File,
    FileId,
    NewBatch,
    Order,
    Progress,
    Publication,
    RejectedInput,
    SessionId,
    Shard,
    ShardCut,
    Swept,
    TaskKind,
    TaskRef,
    TenantId,
    Watch,
)
from batchrunner.ports import Clock, Renewer
from batchrunner.store import queries_batches, queries_claims, queries_progress, queries_seal
from batchrunner.store.moments import Availability, Moment, WallWatch
from batchrunner.store.rows import batch_of, extent_of, file_of, shard_of


class SqlStore(ABC):
    """Store over the statements of this package; see the Protocol for what each method promises."""

    def __init__(self, clock: Clock) -> None:
        self.availability = Availability(clock)
        self._clock = clock
        # A process lives in one boot, and asking the kernel costs more than a statement.
        self._boot_id = clock.boot_id()
        self._wall = WallWatch()

    @abstractmethod
    def writing(self) -> AbstractContextManager[Connection]:
        """Open a transaction that may write; it commits at the block's end and has no effect after an exception."""

    @abstractmethod
    def reading(self) -> AbstractContextManager[Connection]:
        """Open a connection for reading that waits for no writer."""

    @abstractmethod
    def renewer(self) -> Renewer:
        """See Store."""

    @abstractmethod
    def close(self) -> None:
        """See Store."""

    def moment(self) -> Moment:
        """Read the clocks."""
        return Moment(wall=self._clock.now(), boot_s=self._clock.boot_s(), boot_id=self._boot_id)

    def scope(self, tenant: TenantId) -> SqlTenantScope:
        """See Store."""
        return SqlTenantScope(self, tenant)

    def open_session(self, session: SessionId, *, host: str, pid: int) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_claims.open_session(conn, session, self.moment(), host=host, pid=pid)

    def sessions(self, *, host: str) -> list[SessionId]:
        """See Store."""
        with self.reading() as conn:
            return queries_claims.sessions_of_host(conn, host)

    def release_session(self, session: SessionId, *, died: bool) -> int:
        """See Store."""
        with self.writing() as conn:
            return queries_claims.release_session(conn, session, died=died)

    def claim(
        self, session: SessionId, *, lease_s: float, kinds: Sequence[TaskKind], quarantined: bool = False
    ) -> Claim | None:
        """See Store."""
        with self.writing() as conn:
            return queries_claims.claim(
                conn,
                session,
                self.moment(),
                lease_s=lease_s,
                kinds=frozenset(kinds),
                quarantined=quarantined,
                is_steady=self.availability.is_steady(),
            )

    def register(self, ref: TaskRef, progress: Progress) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_progress.register(conn, ref, progress)

    def settle(self, ref: TaskRef, progress: Progress) -> bool:
        """See Store."""
        with self.writing() as conn:
            return queries_progress.settle(conn, ref, progress, self.moment())

    def give_back(self, ref: TaskRef, progress: Progress) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_progress.give_back(conn, ref, progress)

    def fail_task(self, ref: TaskRef, message: str, *, progressed: bool, is_hopeless: bool = False) -> bool:
        """See Store."""
        with self.writing() as conn:
            return queries_progress.fail_task(
                conn, ref, message, self.moment(), progressed=progressed, is_hopeless=is_hopeless
            )

    def split(self, ref: TaskRef, head: ShardCut, tail: ShardCut) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_progress.split(conn, ref, head, tail)

    def quarantine(self, ref: TaskRef) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_progress.quarantine(conn, ref)

    def watch(self, session: SessionId) -> Watch:
        """See Store."""
        with self.reading() as conn:
            return queries_claims.watch(conn, session, self.moment())

    def set_hungry(self, session: SessionId, *, is_hungry: bool) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_claims.set_hungry(conn, session, is_hungry=is_hungry)

    def accept_input(self, ref: TaskRef, accepted: AcceptedInput) -> bool:
        """See Store."""
        with self.writing() as conn:
            return queries_seal.accept_input(conn, ref, accepted, self.moment())

    def reject_input(self, ref: TaskRef, rejected: RejectedInput) -> bool:
        """See Store."""
        with self.writing() as conn:
            return queries_seal.reject_input(conn, ref, rejected, self.moment())

    def fence(self, ref: TaskRef) -> list[Claim]:
        """See Store."""
        with self.writing() as conn:
            return queries_seal.fence(conn, ref)

    def salvage_sealed(self, ref: TaskRef, shard: TaskRef, progress: Progress) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_seal.salvage_sealed(conn, ref, shard, progress)

    def publish(self, ref: TaskRef, publication: Publication) -> Batch:
        """See Store."""
        with self.writing() as conn:
            return queries_seal.publish(conn, ref, publication, self.moment())

    def block(self, ref: TaskRef, blocked_by: str | None) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_progress.block(conn, ref, blocked_by)

    def sweep(self) -> Swept:
        """See Store."""
        with self.writing() as conn:
            moment = self.moment()
            return queries_seal.sweep(conn, moment, expires=self._wall.is_trusted(moment))


class SqlTenantScope:
    """TenantScope over the statements of this package."""

    def __init__(self, store: SqlStore, tenant: TenantId) -> None:
        self._store = store
        self._tenant = tenant

    def add_file(self, file: File) -> None:
        """See TenantScope."""
        if file.tenant != self._tenant:
            raise ValueError(f"the file {file.id} is not of the tenant {self._tenant}")
        with self._store.writing() as conn:
            queries_batches.add_file(conn, file)

    def file(self, file_id: FileId) -> File:
        """See TenantScope."""
        with self._store.reading() as conn:
            return file_of(queries_batches.file_of_tenant(conn, self._tenant, file_id))

    def create_batch(self, new: NewBatch) -> Batch:
        """See TenantScope."""
        if new.tenant != self._tenant:
            raise ValueError(f"the batch {new.id} is not of the tenant {self._tenant}")
        with self._store.writing() as conn:
            return batch_of(queries_batches.create_batch(conn, new, self._store.moment()))

    def batch(self, batch_id: BatchId) -> Batch:
        """See TenantScope."""
        with self._store.reading() as conn:
            return batch_of(queries_batches.batch_of_tenant(conn, self._tenant, batch_id))

    def batches(self, *, limit: int, after: BatchId | None = None) -> list[Batch]:
        """See TenantScope."""
        with self._store.reading() as conn:
            rows = queries_batches.batches_of_tenant(conn, self._tenant, limit=limit, after=after)
            return [batch_of(row) for row in rows]

    def send(self, batch_id: BatchId, event: BatchEvent) -> bool:
        """See TenantScope."""
        with self._store.writing() as conn:
            return queries_batches.send(conn, self._tenant, batch_id, event, self._store.moment())

    def pause(self, batch_id: BatchId, reason: str) -> None:
        """See TenantScope."""
        with self._store.writing() as conn:
            queries_batches.pause(conn, self._tenant, batch_id, reason, self._store.moment())

    def resume(self, batch_id: BatchId) -> None:
        """See TenantScope."""
        with self._store.writing() as conn:
            queries_batches.resume(conn, self._tenant, batch_id)

    def adjust(self, batch_id: BatchId, *, hold_at: int | None, order: Order) -> None:
        """See TenantScope."""
        with self._store.writing() as conn:
            queries_batches.adjust(conn, self._tenant, batch_id, hold_at=hold_at, order=order)

    def extents(self, batch_id: BatchId, *, after: int = 0, limit: int = 1000) -> list[Extent]:
        """See TenantScope."""
        with self._store.reading() as conn:
            queries_batches.batch_of_tenant(conn, self._tenant, batch_id)
            return [extent_of(row) for row in queries_batches.extents_after(conn, batch_id, after=after, limit=limit)]

    def shards(self, batch_id: BatchId) -> list[Shard]:
        """See TenantScope."""
        with self._store.reading() as conn:
            queries_batches.batch_of_tenant(conn, self._tenant, batch_id)
            return [shard_of(row) for row in queries_batches.shards_of_batch(conn, batch_id)]
