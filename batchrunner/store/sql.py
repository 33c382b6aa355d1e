"""The Store over an SQL database: which transaction answers which method; how one begins or fails is the adapter's."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager
from datetime import datetime

from sqlalchemy import Connection

from batchrunner.appetite import HUNGRY, Appetite
from batchrunner.deliveries import Appointments, DeliveryState, Dispatch, Recorded
from batchrunner.holdings import ApiKey, Expired, KeyId, LiveShare, Swept
from batchrunner.lifecycle import BatchStatus
from batchrunner.models import (
    Batch,
    BatchId,
    Claim,
    Progress,
    Repair,
    SessionId,
    ShardCut,
    TaskKind,
    TaskRef,
    TenantId,
    Watch,
)
from batchrunner.outcomes import AcceptedInput, Publication, RejectedInput
from batchrunner.ports import Clock, Renewer
from batchrunner.store import (
    queries_blobs,
    queries_claims,
    queries_deliveries,
    queries_expiry,
    queries_keys,
    queries_live,
    queries_progress,
    queries_seal,
    schema,
)
from batchrunner.store.moments import Availability, Moment, WallWatch
from batchrunner.store.rows import key_of
from batchrunner.store.scope import SqlTenantScope


class SqlStore(ABC):
    """Store over the statements of this package; see the Protocol for what each method promises."""

    def __init__(self, clock: Clock) -> None:
        self.availability = Availability(clock)
        self._clock = clock
        # A process lives in one boot, and asking the kernel costs more than a statement.
        self._boot_id = clock.boot_id()
        self._wall = WallWatch()
        self._expiry_wall = WallWatch()

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
            queries_deliveries.give_back(conn, session)
            return queries_claims.release_session(conn, session, died=died)

    def claim(
        self,
        session: SessionId,
        *,
        lease_s: float,
        kinds: Sequence[TaskKind],
        quarantined: bool = False,
        appetite: Appetite = HUNGRY,
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
                appetite=appetite,
                is_steady=self.availability.is_steady(),
            )

    def has_work(
        self,
        session: SessionId,
        *,
        kinds: Sequence[TaskKind],
        quarantined: bool = False,
        appetite: Appetite = HUNGRY,
    ) -> bool:
        """See Store."""
        with self.reading() as conn:
            return queries_claims.has_work(
                conn,
                session,
                self.moment(),
                kinds=frozenset(kinds),
                quarantined=quarantined,
                appetite=appetite,
                is_steady=self.availability.is_steady(),
            )

    def register(self, ref: TaskRef, progress: Progress) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_progress.register(conn, ref, progress, self.moment())

    def settle(self, ref: TaskRef, progress: Progress) -> bool:
        """See Store."""
        with self.writing() as conn:
            return queries_progress.settle(conn, ref, progress, self.moment())

    def give_back(self, ref: TaskRef, progress: Progress) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_progress.give_back(conn, ref, progress, self.moment())

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
            queries_seal.salvage_sealed(conn, ref, shard, progress, self.moment())

    def repair_sealed(self, ref: TaskRef, repairs: Sequence[tuple[TaskRef, Sequence[Repair]]]) -> Batch:
        """See Store."""
        with self.writing() as conn:
            return queries_seal.repair_sealed(conn, ref, repairs, self.moment())

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

    def claim_deliveries(self, wanted: Appointments, recorded: Sequence[Recorded] = ()) -> list[Dispatch]:
        """See Store."""
        with self.reading() as conn:
            receivers = queries_deliveries.receivers_due(conn, self.moment())
        turns = queries_deliveries.turns_of(receivers, wanted)
        if not turns and not recorded:
            return []
        with self.writing() as conn:
            moment = self.moment()
            queries_deliveries.record(conn, recorded, moment)
            return queries_deliveries.take(conn, wanted, turns, moment)

    def record_attempts(self, recorded: Sequence[Recorded]) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_deliveries.record(conn, recorded, self.moment())

    def give_deliveries_back(self, session: SessionId) -> int:
        """See Store."""
        with self.writing() as conn:
            return queries_deliveries.give_back(conn, session)

    def delivery_counts(self) -> dict[DeliveryState, int]:
        """See Store."""
        with self.reading() as conn:
            return queries_deliveries.counts_by_state(conn)

    def report_live(self, session: SessionId, shares: Sequence[LiveShare]) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_live.report_live(conn, session, shares, self.moment())

    def add_key(self, key: ApiKey) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_keys.add_key(conn, key)

    def find_key(self, digest: str) -> ApiKey | None:
        """See Store."""
        with self.reading() as conn:
            row = queries_keys.find_key(conn, digest, self.moment())
            return None if row is None else key_of(row)

    def keys(self, *, tenant: TenantId | None = None) -> list[ApiKey]:
        """See Store."""
        with self.reading() as conn:
            return [key_of(row) for row in queries_keys.all_keys(conn, tenant)]

    def has_keys(self) -> bool:
        """See Store."""
        with self.reading() as conn:
            return queries_keys.has_keys(conn)

    def revoke_key(self, key_id: KeyId, *, at: datetime) -> ApiKey:
        """See Store."""
        with self.writing() as conn:
            return key_of(queries_keys.revoke_key(conn, key_id, at))

    def register_blob(self, name: str, *, owner: str) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_blobs.register_blob(conn, name, self.moment(), owner=owner)

    def abandon_blob(self, name: str) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_blobs.abandon_blob(conn, name)

    def check(self) -> None:
        """See Store."""
        with self.reading() as conn:
            schema.check(conn)

    def unfinished_counts(self) -> dict[BatchStatus, int]:
        """See Store."""
        with self.reading() as conn:
            return queries_expiry.unfinished_counts(conn)

    def expire(self) -> Expired:
        """See Store."""
        with self.writing() as conn:
            moment = self.moment()
            return queries_expiry.expire(conn, moment, is_wall_trusted=self._expiry_wall.is_trusted(moment))

    def forget_journals(self, batch_ids: Collection[BatchId]) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_expiry.forget_journals(conn, batch_ids, self.moment())

    def freeable_blobs(self, *, limit: int, in_use: Collection[str] = ()) -> list[str]:
        """See Store."""
        with self.writing() as conn:
            return queries_blobs.freeable_blobs(conn, self.moment(), limit=limit, in_use=in_use)

    def forget_blobs(self, names: Collection[str]) -> None:
        """See Store."""
        with self.writing() as conn:
            queries_blobs.forget_blobs(conn, names)
