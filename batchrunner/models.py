"""The nouns: frozen values that the rules, the seams and the steps hand to each other. No behaviour beyond what a
value knows of itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import NewType

import msgspec

from batchrunner.lifecycle import BatchStatus, EndedBy

TenantId = NewType("TenantId", str)
BatchId = NewType("BatchId", str)
FileId = NewType("FileId", str)
TaskId = NewType("TaskId", int)
SessionId = NewType("SessionId", str)

LOCAL_TENANT = TenantId("local")

# The dialects of batches that came over HTTP: OpenAI's with all that we add, what OpenAI itself would take, xAI's, and
# inference.club's.
OPENAI = "openai"
OPENAI_STRICT = "openai-strict"
XAI = "xai"
CLUB = "club"


class TaskKind(StrEnum):
    """What a worker may claim."""

    VALIDATE = "validate"
    SHARD = "shard"
    SEAL = "seal"
    NOTIFY = "notify"


class TaskState(StrEnum):
    """How a task stands. A shard is `sealed` by the fence of its batch and `final` once its tail is salvaged."""

    QUEUED = "queued"
    LEASED = "leased"
    SETTLED = "settled"
    SEALED = "sealed"
    FINAL = "final"
    PARKED = "parked"


class RecordKind(IntEnum):
    """What a journal record says of its line; the number is on disk."""

    SUCCEEDED = 1
    FAILED = 2
    MARK = 3


class OnInvalid(StrEnum):
    """What a bad input line does: fail the batch, or go to the error file while the rest runs."""

    FAIL = "fail"
    SKIP = "skip"


class OnUnknown(StrEnum):
    """What an unknown outcome does: the line is sent again, or it is at most once and ends as `outcome_unknown`."""

    RETRY = "retry"
    FAIL = "fail"


class Order(StrEnum):
    """The order of the lines in the output file."""

    INPUT = "input"
    COMPLETION = "completion"


class LineCode(StrEnum):
    """The `error.code` of a result line that has no usable answer. Source: OpenAI's request output object, and our
    own.
    """

    REQUEST_TIMEOUT = "request_timeout"
    BATCH_EXPIRED = "batch_expired"
    BATCH_CANCELLED = "batch_cancelled"
    CONNECTION_ERROR = "connection_error"
    INVALID_RESPONSE = "invalid_response"
    OUTCOME_UNKNOWN = "outcome_unknown"
    POISON_REQUEST = "poison_request"
    INPUT_LOST = "input_lost"
    MODEL_NOT_SERVED = "model_not_served"


class PauseReason(StrEnum):
    """Why a batch stands still although its status is `in_progress`."""

    OPERATOR = "operator"
    AUTHENTICATION = "authentication"
    MODEL_UNKNOWN = "model_unknown"
    INPUT_CHANGED = "input_changed"


class Usage(msgspec.Struct, frozen=True, gc=False):
    """Tokens, as the upstream reported them; sums are sums of what was reported."""

    input_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.input_tokens + other.input_tokens,
            self.cached_tokens + other.cached_tokens,
            self.output_tokens + other.output_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
        )

    @property
    def total_tokens(self) -> int:
        """Input and output tokens together."""
        return self.input_tokens + self.output_tokens


NO_USAGE = Usage()


class RequestLine(msgspec.Struct, frozen=True, gc=False):
    """One parsed input line. `body` holds the raw bytes as they stood in the file; they are forwarded unchanged."""

    line_number: int
    custom_id: str
    url: str
    body: bytes


class LineProblem(msgspec.Struct, frozen=True, gc=False):
    """Why a line, or with `line_number` None the whole file, was refused.

    Source: the Batch object of the OpenAI API, `errors.data[]`: code, message, param, line.
    """

    code: str
    message: str
    param: str | None
    line_number: int | None
    custom_id: str | None = None


class AttemptError(StrEnum):
    """How an exchange ended without a complete answer."""

    NOT_CONNECTED = "not_connected"
    RESET = "reset"
    TIMEOUT_TOTAL = "timeout_total"
    TIMEOUT_IDLE = "timeout_idle"
    TRUNCATED = "truncated"
    TOO_LARGE = "too_large"
    BAD_ENCODING = "bad_encoding"
    BAD_PROTOCOL = "bad_protocol"
    ABORTED = "aborted"


class Attempt(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """One HTTP exchange. Either `error` is None and `status` and `body` hold the whole answer, or `error` says what
    went wrong. For an answer that was kept as an asset `body` is the JSON that stands for it, and so `content_type`.

    `status` is 0 when no status line came. `started_at_s` is on the monotonic clock.
    `retry_after_s` is what the answer's headers asked for, None without such a header.
    """

    status: int = 0
    body: bytes = b""
    content_type: str = ""
    request_id: str | None = None
    retry_after_s: float | None = None
    error: AttemptError | None = None
    message: str = ""
    started_at_s: float = 0.0
    elapsed_s: float = 0.0


class ShardCut(msgspec.Struct, frozen=True):
    """A shard as validation cuts it: a byte range of the source and what is in it.

    `line_count` counts the requests to run: blank and refused lines are not in it. `first_index` is the number of
    requests before this shard. `skipped` lists the physical numbers of lines refused or not chosen, ascending.
    `checksum` is the CRC-32 of the bytes.
    """

    byte_start: int
    byte_end: int
    first_line: int
    first_index: int
    line_count: int
    checksum: int
    skipped: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """Stored bytes with a purpose. `blob` is their name in Blobs, `validation_blob` that of a report on their lines.

    A file that was deleted has `deleted_at`: only a listing's cursor still finds it.
    """

    id: FileId
    tenant: TenantId
    purpose: str
    filename: str
    size_bytes: int
    sha256: str
    blob: str
    created_at: datetime
    expires_at: datetime | None = None
    deleted_at: datetime | None = None
    line_count: int | None = None
    validation_blob: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewBatch:
    """What a batch is created from. `deadline_at` None means no deadline. `chosen_blob` names a blob of line numbers (8
    bytes each, little endian, ascending) that limits the batch to these lines of its source.

    `input_name` is the input as the caller named it; with `input_file_id` None it is the name of a file that is not
    there, and validation says so. One that `is_open` has no source but those of the lines that join it, is never
    validated as a whole, and closes at `closes_at` if nothing comes. `created_by` is the id of the key that asked. One
    for jobs that come alone `is_intake`, and is shown to nobody.
    """

    id: BatchId
    tenant: TenantId
    dialect: str
    endpoint: str | None
    input_file_id: FileId | None
    source: str
    completion_window: str | None
    deadline_at: datetime | None
    on_invalid: OnInvalid = OnInvalid.FAIL
    on_unknown: OnUnknown = OnUnknown.RETRY
    order: Order = Order.INPUT
    priority: int = 0
    hold_at: int | None = None
    metadata: dict[str, str] = field(default_factory=dict)
    parent_id: BatchId | None = None
    chosen_blob: str | None = None
    input_sha256: str | None = None
    input_name: str | None = None
    output_expires_after_s: int | None = None
    webhook_url: str | None = None
    is_open: bool = False
    closes_at: datetime | None = None
    created_by: str | None = None
    is_intake: bool = False

    @property
    def has_jobs(self) -> bool:
        """Whether each of its lines is a job that is followed and ends by itself, so that there are no files."""
        return self.dialect == CLUB


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(NewBatch):
    """One order as the store knows it: what it was created from, and what became of it. Counts are of registered
    records; what is pending follows from them. From `journal_ended_at` on its extents are gone and only its files have
    the results.
    """

    status: BatchStatus
    version: int
    ended_by: EndedBy | None
    paused_reason: str | None
    paused_at: datetime | None
    blocked_by: str | None
    total_count: int
    succeeded_count: int
    failed_count: int
    refused_count: int
    expired_count: int
    cancelled_count: int
    re_executed_count: int
    retry_count: int
    usage: Usage
    next_sequence: int
    open_shards: int
    model: str | None
    problems_blob: str | None
    problem_count: int
    problems: tuple[LineProblem, ...]
    output_file_id: FileId | None
    error_file_id: FileId | None
    created_at: datetime
    in_progress_at: datetime | None
    finalizing_at: datetime | None
    cancelling_at: datetime | None
    completed_at: datetime | None
    failed_at: datetime | None
    expired_at: datetime | None
    cancelled_at: datetime | None
    journal_ended_at: datetime | None
    deleted_at: datetime | None = None

    @property
    def done_count(self) -> int:
        """Lines that have their final result, refused ones included."""
        return self.succeeded_count + self.failed_count + self.expired_count + self.cancelled_count

    @property
    def pending_count(self) -> int:
        """Lines without a result, derived so that every view sums to the total at every instant."""
        return self.total_count - self.done_count


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskRef:
    """A task under the epoch of a claim: the pair that guards every write of its holder."""

    task_id: TaskId
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Consecutive lines of one source, None for the batch's: the unit of claim, of journal and of resumption.

    `intent_mark` is the highest line whose sending was registered before it happened, 0 if none: under `on_unknown:
    fail`, in quarantine, and wherever journals keep no marks.
    """

    task_id: TaskId
    batch_id: BatchId
    byte_start: int
    byte_end: int
    first_line: int
    first_index: int
    line_count: int
    checksum: int
    skipped: tuple[int, ...]
    intent_mark: int
    deaths: int
    is_quarantined: bool
    state: TaskState
    epoch: int
    source: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """A run of records that exists: a byte range of a segment, registered under its epoch, with its place in the
    batch's sequence.
    """

    batch_id: BatchId
    task_id: TaskId
    sequence_from: int
    count: int
    epoch: int
    session: SessionId
    segment: int
    byte_start: int
    byte_end: int
    succeeded_count: int
    failed_count: int
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class NewExtent:
    """A durable byte range of a segment that asks to be registered. `count` is succeeded plus failed records; marks
    are not counted. `lines` says which lines they are of and how these ended, where somebody follows single ones.
    """

    session: SessionId
    segment: int
    byte_start: int
    byte_end: int
    succeeded_count: int
    failed_count: int
    usage: Usage
    lines: tuple[tuple[int, RecordKind], ...] = ()

    @property
    def count(self) -> int:
        """Records of results in the range."""
        return self.succeeded_count + self.failed_count


@dataclass(frozen=True, slots=True, kw_only=True)
class Repair:
    """A registered extent with damaged bytes, and its intact parts, which keep their sequence numbers."""

    damaged: Extent
    parts: tuple[Extent, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A task in the hands of a worker session, with what it needs to start.

    `earlier` lists (epoch, session) of every claim before this one, oldest first: where unregistered bytes may lie.
    `extents` are the registered ones of a shard, in sequence order. `orphaned_by_death` tells that the previous holder
    died. `whole_epoch` is the last epoch whose holder gave the shard back whole: it and those before leave no doubt
    that has not been counted. `cancelled` lists lines that are not to be sent any more.
    """

    ref: TaskRef
    kind: TaskKind
    session: SessionId
    batch: Batch
    shard: Shard | None
    earlier: tuple[tuple[int, SessionId], ...]
    extents: tuple[Extent, ...]
    attempts: int
    orphaned_by_death: bool
    whole_epoch: int = 0
    cancelled: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What a holder wants to register at one go; `repairs` are of extents of earlier epochs. `is_whole`, of a shard
    given back: every exchange of the holder has ended, what it brought is in here or registered, and the lines of those
    that it broke off are counted as re-executed.
    """

    extents: tuple[NewExtent, ...] = ()
    repairs: tuple[Repair, ...] = ()
    intent_mark: int | None = None
    re_executed_count: int = 0
    retry_count: int = 0
    is_whole: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the control poll tells a worker about one task that it holds; `cancelled` as in its claim."""

    task_id: TaskId
    is_mine: bool
    status: BatchStatus
    paused_reason: str | None
    hold_at: int | None
    cancelled: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Watch:
    """Answer of the control poll: the tasks held, and whether other sessions could use work that this one has not
    touched.
    """

    held: tuple[Held, ...]
    is_anyone_hungry: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentRef:
    """The coordinates of a journal segment; its name carries epoch and session, so it can never be written twice."""

    batch_id: BatchId
    task_id: TaskId
    epoch: int
    session: SessionId
    number: int

    @property
    def blob(self) -> str:
        """The segment's name in Blobs."""
        return f"journal/{self.batch_id}/{self.task_id}/{self.epoch}-{self.session}-{self.number}.seg"
