"""The life of a batch as a table: which event leads from which status to which.

A terminal status is an empty row. Nothing else in the project decides a transition: the store writes a status only
through `next_status`, as a compare-and-set on the status and version that the sender saw. Losing that race to another
legal event is an ordinary outcome. Only a pair that the table does not hold raises, and then nothing has changed.

Three habits follow from the table. Files are sealed before a terminal status shows, so whoever reads `completed` can
read the files. Cancel and deadline are events, not steps: they may arrive in any status that is not terminal. And
whoever moves a batch into `finalizing` or `cancelling` adds the task that seals it, in the same transaction.

There is one way back: a seal that finds registered results damaged returns the batch to `in_progress`, where their
lines run again.
"""

from __future__ import annotations

from enum import StrEnum

from batchrunner.errors import TransitionRefused


class BatchStatus(StrEnum):
    """What a batch is doing. Source: the Batch object of the OpenAI API, field `status`."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


class BatchEvent(StrEnum):
    """What can happen to a batch."""

    INPUT_ACCEPTED = "input_accepted"
    INPUT_REJECTED = "input_rejected"
    LINES_SETTLED = "lines_settled"
    DEADLINE_PASSED = "deadline_passed"
    CANCEL_REQUESTED = "cancel_requested"
    SEALED_WHOLE = "sealed_whole"
    SEALED_PARTIAL = "sealed_partial"
    RESULTS_DAMAGED = "results_damaged"
    GAVE_UP = "gave_up"


class LineStatus(StrEnum):
    """How one line stands. A line has no row anywhere: its status follows from the extents and, at the end, from the
    seal.
    """

    PENDING = "pending"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"
    REFUSED = "refused"


class JobStatus(StrEnum):
    """How an async job stands. It is QUEUED, and again after a retry, until a worker takes it. Source: inference.club's
    job statuses.
    """

    QUEUED = "QUEUED"
    PROCESSING = "PROCESSING"
    PROCESSED = "PROCESSED"
    FAILED = "FAILED"
    CANCELED = "CANCELED"


ACTIVE_JOBS = frozenset({JobStatus.QUEUED, JobStatus.PROCESSING})
RETRYABLE_JOBS = frozenset({JobStatus.FAILED, JobStatus.CANCELED})


class EndedBy(StrEnum):
    """Why a batch stopped taking answers. Set once; it decides the code of the lines without one."""

    SETTLED = "settled"
    DEADLINE = "deadline"
    CANCEL = "cancel"


_S, _E = BatchStatus, BatchEvent

TRANSITIONS: dict[BatchStatus, dict[BatchEvent, BatchStatus]] = {
    _S.VALIDATING: {
        _E.INPUT_ACCEPTED: _S.IN_PROGRESS,
        _E.INPUT_REJECTED: _S.FAILED,
        _E.DEADLINE_PASSED: _S.FINALIZING,
        _E.CANCEL_REQUESTED: _S.CANCELLING,
        _E.GAVE_UP: _S.FAILED,
    },
    _S.IN_PROGRESS: {
        _E.LINES_SETTLED: _S.FINALIZING,
        _E.DEADLINE_PASSED: _S.FINALIZING,
        _E.CANCEL_REQUESTED: _S.CANCELLING,
        _E.GAVE_UP: _S.FAILED,
    },
    _S.FINALIZING: {
        _E.CANCEL_REQUESTED: _S.CANCELLING,
        _E.SEALED_WHOLE: _S.COMPLETED,
        _E.SEALED_PARTIAL: _S.EXPIRED,
        _E.RESULTS_DAMAGED: _S.IN_PROGRESS,
        _E.GAVE_UP: _S.FAILED,
    },
    _S.CANCELLING: {
        _E.SEALED_WHOLE: _S.CANCELLED,
        _E.SEALED_PARTIAL: _S.CANCELLED,
        _E.GAVE_UP: _S.FAILED,
    },
    _S.COMPLETED: {},
    _S.FAILED: {},
    _S.EXPIRED: {},
    _S.CANCELLED: {},
}

TERMINAL: frozenset[BatchStatus] = frozenset(status for status, row in TRANSITIONS.items() if not row)

ENDED_BY: dict[BatchEvent, EndedBy] = {
    _E.LINES_SETTLED: EndedBy.SETTLED,
    _E.DEADLINE_PASSED: EndedBy.DEADLINE,
    _E.CANCEL_REQUESTED: EndedBy.CANCEL,
}

SEALING: frozenset[BatchStatus] = frozenset({_S.FINALIZING, _S.CANCELLING})


def next_status(status: BatchStatus, event: BatchEvent) -> BatchStatus:
    """Give the status that `event` leads to.

    Raises:
        TransitionRefused: the table has no such pair.
    """
    try:
        return TRANSITIONS[status][event]
    except KeyError:
        raise TransitionRefused(f"a batch that is {status} cannot take the event {event}") from None


def allows(status: BatchStatus, event: BatchEvent) -> bool:
    """Tell whether the table has a row for `event` in `status`; senders look before they send."""
    return event in TRANSITIONS[status]


def mermaid() -> str:
    """Draw the table as a Mermaid state diagram, the one that the README shows."""
    rows = [
        f"    {status} --> {target}: {event}" for status, row in TRANSITIONS.items() for event, target in row.items()
    ]
    ends = [f"    {status} --> [*]" for status in BatchStatus if status in TERMINAL]
    return "\n".join(["stateDiagram-v2", "    [*] --> validating", *rows, *ends])
