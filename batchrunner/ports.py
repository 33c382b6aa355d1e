"""The outside world as Protocols; each docstring is the contract that `tests/contract` proves on every implementation.

Store, Blobs and Renewer block: call them from a thread, never from an event loop. Upstream is asynchronous.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from datetime import datetime
from typing import Protocol

from batchrunner.additions import TenantLines
from batchrunner.appetite import HUNGRY, Appetite
from batchrunner.holdings import (
    NO_LIMITS,
    KeyLimits,
    LiveShare,
    OpenCounts,
    Replay,
    Swept,
    Upload,
    UploadId,
    UploadPart,
)
from batchrunner.jobs import TenantJobs
from batchrunner.lifecycle import BatchEvent
from batchrunner.models import (
    Attempt,
    Batch,
    BatchId,
    Claim,
    Extent,
    File,
    FileId,
    NewBatch,
    Order,
    Progress,
    Repair,
    SessionId,
    Shard,
    ShardCut,
    TaskKind,
    TaskRef,
    TenantId,
    Watch,
)
from batchrunner.outbox import Outbox, TenantOutbox
from batchrunner.outcomes import AcceptedInput, Publication, RejectedInput
from batchrunner.upkeep import BlobUpkeep, KeyRing, Upkeep


class Clock(Protocol):
    """All time that the project reads or waits for."""

    def monotonic_s(self) -> float:
        """Seconds that never go back, for durations inside this process."""

    def boot_s(self) -> float:
        """Seconds since this boot, sleep included: comparable between processes of one host."""

    def boot_id(self) -> str:
        """Name of this boot: another one means that `boot_s` values cannot be compared."""

    def now(self) -> datetime:
        """Wall clock, aware, UTC. Only for deadlines and for people."""

    async def sleep(self, duration_s: float) -> None:
        """Wait on the event loop."""


class Rng(Protocol):
    """All randomness that the project uses."""

    def uniform(self) -> float:
        """A number from [0, 1)."""

    def token_hex(self, size_bytes: int) -> str:
        """Fresh unguessable bytes in hex."""


class Appender(Protocol):
    """An open segment. Used by one thread at a time; after any error it must not be used again, only closed."""

    def append(self, chunk: bytes) -> None:
        """Write at the end.

        Raises:
            DiskFull: no space, or a short write: nothing after the last `sync` may be trusted.
            BlobsUnavailable: any other failure, with the same consequence.
        """

    def sync(self) -> None:
        """Return once everything appended is durable. Raises as `append` does."""

    def close(self) -> None:
        """Let go of it; adds no durability. May be called twice."""


class Blobs(BlobUpkeep, Protocol):
    """Named immutable bytes, and segments that grow. Names are relative slash paths of [A-Za-z0-9._-] parts.

    Where `has_frozen_segments`, the first `sync` fixes a segment's bytes: nothing may be appended behind it, and one
    that failed has to be repeated on the same Appender, for the bytes may be on their way still.

    Raises in every method: BlobsUnavailable when the folder or bucket does not answer, NotFound when a name that is
    read is not there, NameTaken when a name that is written exists already, DiskFull when there is no space.
    """

    has_frozen_segments: bool

    def create_segment(self, name: str) -> Appender:
        """Open a new segment; its name is durable before the first `sync` returns."""

    def writer(self, name: str) -> BlobWriter:
        """Open a blob that appears whole under its name at `commit`, or never."""

    def read(self, name: str, start: int, end: int) -> bytes:
        """Read bytes [start, end); fewer come back only where the blob ends."""

    def size_bytes(self, name: str) -> int:
        """Tell the present length; of a segment, what a reader could see now, durable or not."""

    def exists(self, name: str) -> bool:
        """Tell whether the name can be read."""

    def list(self, prefix: str) -> Iterator[str]:
        """Give all names that begin with `prefix`, in name order. For sweepers; correctness never rests on it."""

    def delete(self, name: str) -> None:
        """Remove the name; removing a missing one is no error."""


class BlobWriter(Protocol):
    """A blob on its way. Used by one thread at a time. Exactly one of `commit` and `abort` ends it."""

    def write(self, chunk: bytes) -> None:
        """Add bytes. When this raises, nothing was taken of a chunk of at most 256 KiB: it may be written again.

        Raises:
            DiskFull, BlobsUnavailable: the chunk is not in the blob.
        """

    def commit(self, last_part: str | None = None) -> None:
        """Return once the whole blob is durable and readable under its name.

        `last_part` takes the place of what stands behind the last slash of that name, for whoever knows it only now.

        Raises:
            NameTaken: a blob of that name exists.
            DiskFull: it may be committed again.
            BlobsUnavailable: what was written may be lost; only `abort` may follow.
        """

    def abort(self) -> None:
        """Leave nothing behind. May follow a failed `write` or `commit`; may be called twice."""


class Renewer(Protocol):
    """The thread-bound hand that keeps a session's leases alive over a connection of its own."""

    def renew(self, session: SessionId, lease_s: float) -> None:
        """Extend, in one statement, every lease that the session still holds, even if it has run out.

        Raises:
            StoreUnavailable: nothing was renewed.
        """

    def close(self) -> None:
        """Let go of the connection."""


class TenantScope(TenantOutbox, TenantLines, TenantJobs, Protocol):
    """The only way to a tenant's rows. Ids of other tenants are answered like missing ones."""

    def add_file(self, file: File, *, replay: Replay | None = None) -> File:
        """Make the file's row; its blob is live from then on. May be repeated. `replay` as in `create_batch`.

        Raises:
            NameTaken: the id is another file's.
            BlobsUnavailable: the blob was given up meanwhile.
        """

    def file(self, file_id: FileId) -> File:
        """Raises: NotFound; also for a file that was deleted or is past its `expires_at`."""

    def files(
        self, *, limit: int, after: FileId | None = None, purpose: str | None = None, newest_first: bool = True
    ) -> list[File]:
        """Those behind `after`, by (created_at, id). `after` may be a deleted one. Raises: NotFound."""

    def note_lines(self, file_id: FileId, *, line_count: int, validation_blob: str | None) -> None:
        """Keep what a validation of the file found. Raises: NotFound."""

    def delete_file(self, file_id: FileId) -> None:
        """Hide it at once; the bytes stay while something reads them. Raises: NotFound."""

    def add_upload(self, upload: Upload, *, replay: Replay | None = None) -> Upload:
        """Make a pending upload. May be repeated."""

    def upload(self, upload_id: UploadId) -> Upload:
        """Raises: NotFound. A pending one past its `expires_at` is `expired`."""

    def add_part(self, part: UploadPart, *, replay: Replay | None = None) -> UploadPart:
        """Keep a part; its blob is live from then on. May be repeated.

        Raises:
            NotFound: no such upload.
            TransitionRefused: it is not pending; the message names the status. So in the next two.
        """

    def parts(self, upload_id: UploadId) -> list[UploadPart]:
        """All parts, oldest first. Raises: NotFound."""

    def complete_upload(self, upload_id: UploadId, file: File) -> Upload:
        """Make the file and end the upload in one transaction."""

    def cancel_upload(self, upload_id: UploadId) -> Upload:
        """End the upload; its parts are dropped. Repeating it is no error."""

    def create_batch(
        self,
        new: NewBatch,
        *,
        replay: Replay | None = None,
        limits: KeyLimits = NO_LIMITS,
        file: File | None = None,
        family: Collection[BatchId] | None = None,
    ) -> Batch:
        """Make the batch, its validate task and its input `file`, if given, in one transaction, if limits let it. One
        that is open is in progress at once. A retry names the `family` that it has seen.

        With `replay` (its `object_id` and `body` do not matter) the id is noted as the answer of that key. Where one
        is noted already for the same fingerprint nothing is made, and that object comes back.

        Raises:
            NotFound: the input or parent is not there; of a retry, the parent's input was freed.
            TransitionRefused: the parent's family has a member that is not in `family`.
            QuotaExceeded.
            IdempotencyMismatch: the key belongs to another request.
        """

    def batch(self, batch_id: BatchId) -> Batch:
        """Raises: NotFound; also for a deleted one. So in all that follow."""

    def batches(self, *, limit: int, after: BatchId | None = None) -> list[Batch]:
        """Newest first, those older than `after`, which may be a deleted one."""

    def family(self, batch_id: BatchId) -> list[Batch]:
        """The batch that was first and all retries below it, oldest first; here, deleted ones keep their places."""

    def delete_batch(self, batch_id: BatchId) -> None:
        """Hide it; its files stay. Raises: NotFound, TransitionRefused when it is not over."""

    def live(self, batch_id: BatchId) -> list[LiveShare]:
        """What workers reported for the batch within the last 5 s. Raises: NotFound."""

    def open_counts(self) -> OpenCounts:
        """What is unfinished."""

    def begin_idempotent(self, route: str, key: str, fingerprint: str | None, *, lease_s: float) -> Replay | None:
        """Take the key for a request: None means go on, and renew, finish or drop it. Otherwise the answer of the first
        request; where either fingerprint is None it is the caller's to compare them. Answers are kept for 24 h.

        Raises:
            IdempotencyRunning: another request holds the key, and its lease has not run out.
            IdempotencyMismatch: the key belongs to another request.
        """

    def renew_idempotent(self, route: str, key: str, *, lease_s: float) -> None:
        """Extend the lease of a key that is held."""

    def finish_idempotent(self, replay: Replay) -> None:
        """Keep the answer, unless one is kept already; an object noted by a create stays the one it was."""

    def drop_idempotent(self, route: str, key: str) -> None:
        """Forget a request that made nothing, so that it may be sent again."""

    def send(self, batch_id: BatchId, event: BatchEvent) -> bool:
        """Move the batch by compare-and-set on the status and version seen now; False when somebody else was first.

        The move into finalizing or cancelling adds the seal task in the same transaction.

        Raises:
            NotFound: no such batch.
            TransitionRefused: the table has no such pair.
        """

    def pause(self, batch_id: BatchId, reason: str) -> None:
        """Keep claims away from the batch; its holders give their shards back. The deadline goes on."""

    def resume(self, batch_id: BatchId, *, only_if: Collection[str] = ()) -> None:
        """Undo `pause`, with reasons only one of these; also puts parked tasks of the batch back in the queue."""

    def adjust(self, batch_id: BatchId, *, hold_at: int | None, order: Order) -> None:
        """Let only the first `hold_at` requests run, None for all; lay out files that are not sealed yet in `order`."""

    def extents(self, batch_id: BatchId, *, after: int = 0, limit: int = 1000) -> list[Extent]:
        """Registered extents that hold a sequence number above `after`, in sequence order (numbers begin at 1)."""

    def shards(self, batch_id: BatchId) -> list[Shard]:
        """All shards of the batch by first_line."""


class Store(KeyRing, Upkeep, Outbox, Protocol):
    """Batches, tasks, extents and sessions. No row per line. All times of leases are the Store's own.

    Guarded methods take a TaskRef and first update that task's row where id and epoch match; where none does they raise
    Fenced and have no effect. Every method is one transaction. StoreUnavailable in any of them: no effect is promised
    either way for that transaction, and repeating it is safe.
    """

    def scope(self, tenant: TenantId) -> TenantScope:
        """Give the tenant's view."""

    def renewer(self) -> Renewer:
        """Open a Renewer; the caller closes it, in the thread that uses it."""

    def open_session(self, session: SessionId, *, host: str, pid: int) -> None:
        """Make a worker session known."""

    def sessions(self, *, host: str) -> list[SessionId]:
        """Sessions of a host that hold or may hold leases."""

    def release_session(self, session: SessionId, *, died: bool) -> int:
        """End the session and all its leases at once; with `died` each shard among them counts a death. Gives the
        number of leases.
        """

    def claim(
        self,
        session: SessionId,
        *,
        lease_s: float,
        kinds: Sequence[TaskKind],
        quarantined: bool = False,
        appetite: Appetite = HUNGRY,
    ) -> Claim | None:
        """Take one task that is due: queued, or leased with the lease run out; bump its epoch; record the claim.

        Order: seal, notify and validate before shards; batches that the session holds no shard of before others;
        tenants with few shards in anybody's hands before others; then priority, one step higher for each hour since the
        batch was made, deadline, first line. Shards of paused batches, those beyond the hold, those that the appetite
        leaves, and tasks of other statuses than theirs are left: shard in_progress, validate validating, seal
        finalizing or cancelling and only while no shard or validate task of the batch has a live lease.
        `quarantined` asks for quarantined shards only; otherwise they are left.
        A claim over a live row whose lease ran out counts as a death of the former holder. The claim of a paused
        batch's shard, which an appetite with `probe_every_s` may bring, is noted as a probe of the batch.
        """

    def has_work(
        self,
        session: SessionId,
        *,
        kinds: Sequence[TaskKind],
        quarantined: bool = False,
        appetite: Appetite = HUNGRY,
    ) -> bool:
        """Tell whether `claim` would take anything now, without waiting for a writer."""

    def report_live(self, session: SessionId, shares: Sequence[LiveShare]) -> None:
        """Say what the session does now, in place of what it said before."""

    def register(self, ref: TaskRef, progress: Progress) -> None:
        """Guarded. Make extents exist: sequence numbers are drawn from the batch's row, counts and usage of shard and
        batch move by the same difference, the last row grows when the new bytes are contiguous. Progress resets
        attempts and deaths. Repairs take damaged bytes out of the extents of earlier epochs, and what was in them out
        of the counts; numbers once given are not given again. Repeating a repair changes nothing.
        """

    def settle(self, ref: TaskRef, progress: Progress) -> bool:
        """Guarded. Register, then end the shard. The settle that leaves no open shard of a batch that is in_progress
        and not open moves it by lines_settled, which adds the seal task. True when it moved the batch.
        """

    def give_back(self, ref: TaskRef, progress: Progress) -> None:
        """Guarded. Register, then put the task back in the queue: no death, no attempt counted. Progress that is whole
        makes this epoch the task's `whole_epoch`, and its intent mark stands even if it is lower.
        """

    def fail_task(self, ref: TaskRef, message: str, *, progressed: bool, is_hopeless: bool = False) -> bool:
        """Guarded. Put the task back with backoff (1 s doubling to 5 min); after 10 failures without progress, or at
        once if it is hopeless, park it and set the batch's `blocked_by`. True when parked.
        """

    def split(self, ref: TaskRef, head: ShardCut, tail: ShardCut) -> None:
        """Guarded. Shrink the shard to `head` and queue `tail` as a new shard; open_shards grows by one."""

    def quarantine(self, ref: TaskRef) -> None:
        """Guarded. Mark the shard quarantined and put it back in the queue; where lines may be sent again, without the
        intent mark that it had.
        """

    def watch(self, session: SessionId) -> Watch:
        """One statement: how each task of the session stands, and whether another session is hungry."""

    def set_hungry(self, session: SessionId, *, is_hungry: bool) -> None:
        """Say that the session found nothing to claim although it could take more."""

    def accept_input(self, ref: TaskRef, accepted: AcceptedInput) -> bool:
        """Guarded. Shards, counts and input_accepted in one transaction; the task is settled. A batch without any
        request to run goes on to finalizing at once. False: the batch had moved (cancelled, expired), nothing but the
        task was changed.
        """

    def reject_input(self, ref: TaskRef, rejected: RejectedInput) -> bool:
        """Guarded. Problems and input_rejected; the task is settled. False as in `accept_input`."""

    def fence(self, ref: TaskRef) -> list[Claim]:
        """Guarded by the seal task. Mark every shard of the batch sealed and bump its epoch, once per seal epoch; give
        each as a claim under the new epoch (by first_line, with earlier claims and extents), so that the sealer may
        salvage into it.
        """

    def salvage_sealed(self, ref: TaskRef, shard: TaskRef, progress: Progress) -> None:
        """Guarded by both. Register what the sealer salvaged for a sealed shard and mark that shard final."""

    def repair_sealed(self, ref: TaskRef, repairs: Sequence[tuple[TaskRef, Sequence[Repair]]]) -> Batch:
        """Guarded by the seal task and each final shard named. Cut damage out of their extents; counts follow. If every
        line had been settled, the shards that lack one now go back to the queue with the batch (results_damaged) and
        the seal task waits; if a cancel came meanwhile, `ended_by` becomes cancel. Gives the batch as it is then.
        """

    def publish(self, ref: TaskRef, publication: Publication) -> Batch:
        """Guarded. One transaction: file rows, counts, usage, the status by the event that the batch's status asks for
        now (sealed_whole, or sealed_partial when ended_by is not settled), the outbox row; the seal task is settled.
        """

    def block(self, ref: TaskRef, blocked_by: str | None) -> None:
        """Guarded. Show why the task's batch does not move on, None when it does again."""

    def sweep(self) -> Swept:
        """Idempotent repair: deadlines that passed, batches that are still blocked 24 h after theirs (gave_up),
        in_progress without open shards, open ones past their `closes_at`, finalizing or cancelling without a seal task,
        leases of another boot. Every process may call it at any time.
        """

    def close(self) -> None:
        """Let go of all connections."""


class AssetSink(Protocol):
    """A media answer on its way into Blobs, used by one coroutine. Exactly one of `finish` and `abort` ends it."""

    async def write(self, chunks: Sequence[bytes]) -> None:
        """Add bytes, at least one; returns once they are taken, which lasts as long as there is no space for them."""

    async def finish(self) -> bytes:
        """Make the asset durable, waiting for space; gives the JSON that stands for it in the result line.

        Raises:
            BlobsUnavailable: it is lost; `abort` has to follow.
        """

    def abort(self) -> None:
        """Leave nothing behind, sooner or later. May be called while `write` or `finish` is being cancelled."""


class AssetOwner(Protocol):
    """A line, as far as its answer may be media."""

    def open_asset(self, content_type: str) -> AssetSink:
        """Begin to keep an answer of that type; writes nothing yet."""


class Upstream(Protocol):
    """The server that answers lines."""

    async def send(
        self,
        url: str,
        body: bytes,
        *,
        idempotency_key: str | None,
        is_at_most_once: bool = False,
        owner: AssetOwner | None = None,
    ) -> Attempt:
        """POST a line's body to `url` (as in the line, with its leading /v1) and read the whole answer, within the
        deadlines and the caps on decoded bytes. Never raises for what the peer or the network does: that is an Attempt
        with `error`. Redirects are not followed. Cancelling the call closes its connection.

        An answer with media goes to its `owner` piece by piece, and its Attempt holds the JSON that stands for it.
        Without an owner it is read like any other.
        """

    async def knock(self) -> Attempt:
        """Ask for what costs nothing, to learn within 5 s whether anybody is there. Never raises, as `send`."""

    def sweep_deadlines(self) -> None:
        """End every exchange that is over its total or idle deadline; called about twice a second, it stands for all
        timers.
        """

    async def close(self) -> None:
        """Close all connections."""
