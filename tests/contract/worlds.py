"""Short ways to bring a store to where a test of the contract begins."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from batchrunner.lifecycle import BatchEvent, BatchStatus
from batchrunner.models import (
    Batch,
    BatchId,
    Claim,
    File,
    FileId,
    LineProblem,
    NewBatch,
    NewExtent,
    Progress,
    SessionId,
    Shard,
    ShardCut,
    TaskKind,
    TenantId,
    Usage,
)
from batchrunner.outcomes import AcceptedInput, Publication, RejectedInput
from batchrunner.ports import Store, TenantScope

ANA, BEN = TenantId("ana"), TenantId("ben")
ONE, TWO = SessionId("session-one"), SessionId("session-two")
LEASE_S = 15.0
MOMENT = datetime(2026, 1, 1, 1, 2, 3, 456789, tzinfo=UTC)
STEPS = (TaskKind.SEAL, TaskKind.NOTIFY, TaskKind.VALIDATE)
ANY = (*STEPS, TaskKind.SHARD)
USAGE = Usage(10, 1, 5, 2)
NOTHING = Publication(output=None, error=None, expired_count=0, cancelled_count=0)


class World:
    """A store with two sessions in it, and short ways to bring batches where a test begins."""

    def __init__(self, backend, clock) -> None:
        self.backend = backend
        self.clock = clock
        self.store: Store = backend.open()
        self.scope: TenantScope = self.store.scope(ANA)
        for session in (ONE, TWO):
            self.store.open_session(session, host="here", pid=1)
        # Old enough to take what others have lost.
        clock.advance(5.0)

    def new(self, name: str = "b1", **changes) -> NewBatch:
        plain = NewBatch(
            id=BatchId(name),
            tenant=ANA,
            dialect="openai",
            endpoint="/v1/chat/completions",
            input_file_id=None,
            source="input.jsonl",
            completion_window=None,
            deadline_at=None,
        )
        return replace(plain, **changes)

    def created(self, name: str = "b1", **changes) -> Batch:
        return self.scope.create_batch(self.new(name, **changes))

    def running(self, name: str = "b1", *, shards: int = 1, lines: int = 10, **changes) -> Batch:
        batch = self.created(name, **changes)
        claim = self.claim(kinds=(TaskKind.VALIDATE,))
        assert claim.batch.id == batch.id
        assert self.store.accept_input(claim.ref, accepted(shards=shards, lines=lines))
        return self.batch(name)

    def sealing(self, name: str = "b1", *, shards: int = 1) -> Claim:
        """Bring a batch to its seal with all lines done; give the claim of the seal."""
        self.running(name, shards=shards)
        for _ in range(shards):
            claim = self.claim()
            self.store.settle(claim.ref, progress(claim, 0, 100, succeeded=10))
        return self.claim(kinds=(TaskKind.SEAL,))

    def claim(self, session: SessionId = ONE, *, kinds=(TaskKind.SHARD,), quarantined: bool = False) -> Claim:
        found = self.store.claim(session, lease_s=LEASE_S, kinds=kinds, quarantined=quarantined)
        assert found is not None
        return found

    def claims_nothing(self, session: SessionId = ONE, *, kinds=ANY, quarantined: bool = False) -> bool:
        return self.store.claim(session, lease_s=LEASE_S, kinds=kinds, quarantined=quarantined) is None

    def batch(self, name: str = "b1") -> Batch:
        return self.scope.batch(BatchId(name))

    def extents(self, name: str = "b1", **page):
        return self.scope.extents(BatchId(name), **page)

    def shards(self, name: str = "b1"):
        return self.scope.shards(BatchId(name))


def cuts(*, shards: int, lines: int) -> tuple[ShardCut, ...]:
    return tuple(
        ShardCut(
            byte_start=number * 100,
            byte_end=number * 100 + 100,
            first_line=number * lines + 1,
            first_index=number * lines,
            line_count=lines,
            checksum=number,
        )
        for number in range(shards)
    )


def accepted(*, shards: int = 1, lines: int = 10, refused: int = 0) -> AcceptedInput:
    return AcceptedInput(
        shards=cuts(shards=shards, lines=lines) if lines else (),
        total_count=shards * lines + refused,
        refused_count=refused,
        problems_blob=None,
        problem_count=0,
        problems=(),
        input_sha256="aa",
        model="m",
    )


REJECTED = RejectedInput(
    problems=(LineProblem("invalid_json", "line 3: no JSON", None, 3, "id-3"),),
    problem_count=1,
    problems_blob="problems/b1",
    input_sha256="aa",
)


def extent(
    session: SessionId, start: int, end: int, *, succeeded: int = 1, failed: int = 0, segment: int = 1
) -> NewExtent:
    return NewExtent(
        session=session,
        segment=segment,
        byte_start=start,
        byte_end=end,
        succeeded_count=succeeded,
        failed_count=failed,
        usage=USAGE,
    )


def shard_in(claim: Claim) -> Shard:
    """Give the shard of a claim that must have one."""
    assert claim.shard is not None
    return claim.shard


def progress(claim: Claim, start: int, end: int, **counts) -> Progress:
    return Progress(extents=(extent(claim.session, start, end, **counts),))


def file_of(name: str, tenant: TenantId = ANA) -> File:
    return File(
        id=FileId(name),
        tenant=tenant,
        purpose="batch_output",
        filename=f"{name}.jsonl",
        size_bytes=3,
        sha256="bb",
        blob=f"files/{name}",
        created_at=MOMENT,
    )


def bring_to(world: World, status: BatchStatus) -> None:
    match status:
        case BatchStatus.VALIDATING:
            world.created()
        case BatchStatus.IN_PROGRESS:
            world.running()
        case BatchStatus.FINALIZING | BatchStatus.COMPLETED:
            world.running()
            claim = world.claim()
            world.store.settle(claim.ref, progress(claim, 0, 100, succeeded=10))
            if status is BatchStatus.COMPLETED:
                world.store.publish(world.claim(kinds=STEPS).ref, NOTHING)
        case BatchStatus.CANCELLING | BatchStatus.CANCELLED:
            world.running()
            world.scope.send(BatchId("b1"), BatchEvent.CANCEL_REQUESTED)
            if status is BatchStatus.CANCELLED:
                world.store.publish(world.claim(kinds=STEPS).ref, replace(NOTHING, cancelled_count=10))
        case BatchStatus.EXPIRED:
            world.running()
            world.scope.send(BatchId("b1"), BatchEvent.DEADLINE_PASSED)
            world.store.publish(world.claim(kinds=STEPS).ref, replace(NOTHING, expired_count=10))
        case BatchStatus.FAILED:
            world.running()
            world.scope.send(BatchId("b1"), BatchEvent.GAVE_UP)
