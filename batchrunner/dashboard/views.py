"""What the pages show, read from a tenant's part of the Store and put into words. Everything here blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from urllib.parse import urlsplit

from batchrunner.batch_object import told_problems
from batchrunner.dashboard.graph import Graph, graph_of
from batchrunner.dashboard.steps import SHARDS_SHOWN_MAX, Facts, Step, steps_of
from batchrunner.deliveries import Delivery, DeliveryFilter
from batchrunner.jobs import JOBS_MAX, Job
from batchrunner.lifecycle import ACTIVE_JOBS, RETRYABLE_JOBS, TERMINAL, BatchEvent, BatchStatus, JobStatus, allows
from batchrunner.models import Batch, BatchId, LineProblem, TaskKind
from batchrunner.ports import TenantScope
from batchrunner.progress import Progress, code_of, is_paused, progress_of
from batchrunner.shared_object import label_of

SHOWN_MAX = 40
_PROBLEMS_SHOWN_MAX = 20
# All that one batch can have: two events to 100 endpoints and to its own URL.
_DELIVERIES_MAX = 250
_ENDPOINTS_MAX = 100
_NAME_CHARS_MAX = 80


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """An instant, and how long it is away from now."""

    at: datetime
    distance: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchRow:
    """A batch in a list."""

    id: BatchId
    name: str
    status: str
    lines: str
    made: Moment
    can_cancel: bool
    can_retry: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRow:
    """A job in a list; `batch_id` is None for one that came alone."""

    number: int
    type: str
    model: str
    status: str
    batch_id: BatchId | None
    made: Moment
    can_cancel: bool
    can_retry: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """The queue page: `badges` count, `is_stalled` where there is work and nobody to do it."""

    badges: tuple[str, ...]
    is_stalled: bool
    jobs: tuple[JobRow, ...]
    batches: tuple[BatchRow, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryRow:
    """A notification in a list; of its receiver only the origin is shown, for the rest of a URL may be a secret."""

    type: str
    receiver: str
    state: str
    attempt_count: int
    outcome: str
    made: Moment


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchPage:
    """The page of one batch. `troubles` say why it does not move on, `figures` are terms with what is to be said. There
    are `jobs` where each of its lines is one.
    """

    row: BatchRow
    troubles: tuple[str, ...]
    steps: tuple[Step, ...]
    graph: Graph
    figures: tuple[tuple[str, str], ...]
    problems: tuple[LineProblem, ...]
    problem_count: int
    deliveries: tuple[DeliveryRow, ...]
    jobs: tuple[JobRow, ...]


def queue_of(scope: TenantScope, now: datetime, *, is_silent: bool) -> Queue:
    """Look up what the queue page shows; `is_silent` says that no worker was heard of for long."""
    found = scope.batches(limit=SHOWN_MAX)
    counts = scope.job_counts()
    active_count = sum(counts[each] for each in ACTIVE_JOBS)
    return Queue(
        badges=(
            f"{active_count:,} active",
            f"{counts[JobStatus.PROCESSED]:,} done",
            f"{counts[JobStatus.FAILED]:,} failed",
            f"{counts[JobStatus.CANCELED]:,} canceled",
        ),
        is_stalled=is_silent and (active_count > 0 or any(map(_needs_worker, found))),
        jobs=_job_rows(scope.jobs(limit=SHOWN_MAX), found, now),
        batches=tuple(_row(each, now) for each in found),
    )


def batch_page_of(scope: TenantScope, batch_id: BatchId, now: datetime) -> BatchPage:
    """Look up what the page of a batch shows. Raises: NotFound."""
    batch = scope.batch(batch_id)
    shares = scope.live(batch_id) if batch.status not in TERMINAL else []
    deliveries = scope.deliveries(limit=_DELIVERIES_MAX, only=DeliveryFilter(batch_id=batch_id))
    steps = steps_of(_facts(scope, batch, deliveries))
    return BatchPage(
        row=_row(batch, now),
        troubles=_troubles(batch),
        steps=steps,
        graph=graph_of(steps),
        figures=_figures(batch, progress_of(batch, shares, now), now),
        problems=_problems(batch),
        problem_count=batch.problem_count,
        deliveries=tuple(_delivery_row(each, now) for each in deliveries[:SHOWN_MAX]),
        jobs=_job_rows(scope.jobs(limit=JOBS_MAX, batch_id=batch_id), [batch], now) if batch.has_jobs else (),
    )


def _needs_worker(batch: Batch) -> bool:
    """Tell whether a worker has something to do for it; an open batch may have nothing for hours."""
    return batch.status not in TERMINAL and (batch.status is not BatchStatus.IN_PROGRESS or batch.pending_count > 0)


def _row(batch: Batch, now: datetime) -> BatchRow:
    is_cancelled = batch.status is BatchStatus.CANCELLING
    failed = f", {batch.failed_count:,} failed" if batch.failed_count else ""
    return BatchRow(
        id=batch.id,
        name=_cut(label_of(batch)),
        status=batch.status.replace("_", " "),
        lines=f"{batch.done_count:,} of {batch.total_count:,}{failed}",
        made=_moment(batch.created_at, now),
        can_cancel=not is_cancelled and allows(batch.status, BatchEvent.CANCEL_REQUESTED),
        can_retry=_is_retryable(batch) and batch.failed_count + batch.cancelled_count > 0,
    )


def _is_retryable(batch: Batch) -> bool:
    """Tell whether jobs of a batch that fail may run again: until its time is over it is open for that."""
    return batch.has_jobs and batch.is_open and batch.status is not BatchStatus.FAILED


def _job_rows(jobs: Sequence[Job], batches: Sequence[Batch], now: datetime) -> tuple[JobRow, ...]:
    """Give rows of jobs, which are in these batches or in others of which nothing is known."""
    ended = {each.id for each in batches if not _is_retryable(each)}
    return tuple(
        JobRow(
            number=each.number,
            type=each.inference_type,
            model=_cut(each.model or ""),
            status=each.status.lower(),
            batch_id=None if each.is_single else each.batch_id,
            made=_moment(each.created_at, now),
            can_cancel=each.status in ACTIVE_JOBS,
            can_retry=each.status in RETRYABLE_JOBS and each.batch_id not in ended,
        )
        for each in jobs
    )


def _cut(name: str) -> str:
    return name if len(name) <= _NAME_CHARS_MAX else f"{name[: _NAME_CHARS_MAX - 1]}…"


def _facts(scope: TenantScope, batch: Batch, deliveries: Sequence[Delivery]) -> Facts:
    tasks = scope.task_counts(batch.id)
    shard_count = sum(tasks.get(TaskKind.SHARD, {}).values())
    return Facts(
        batch=batch,
        tasks=tasks,
        shards=scope.shards_from(batch.id, 1, limit=shard_count) if 0 < shard_count <= SHARDS_SHOWN_MAX else (),
        told=Counter(each.state for each in deliveries),
        has_receivers=batch.webhook_url is not None
        or any(each.disabled_at is None for each in scope.endpoints(limit=_ENDPOINTS_MAX)),
    )


def _troubles(batch: Batch) -> tuple[str, ...]:
    paused = (f"It is paused: {batch.paused_reason}.",) if is_paused(batch) else ()
    is_blocked = batch.blocked_by is not None and batch.status not in TERMINAL
    return (*paused, *((f"It is blocked: {code_of(batch.blocked_by)}.",) if is_blocked else ()))


def _figures(batch: Batch, progress: Progress, now: datetime) -> tuple[tuple[str, str], ...]:
    """Give what there is to say in numbers; what there is none of is left out."""
    counts = {
        "Lines": progress.total,
        "Succeeded": progress.succeeded,
        "Failed": progress.failed,
        "Refused": progress.refused,
        "Expired": progress.expired,
        "Cancelled": progress.cancelled,
        "Remaining": progress.remaining,
        "In flight": progress.in_flight,
        "Sent again": progress.retries,
        "Tokens": progress.tokens,
    }
    figures = [(term, f"{count:,}") for term, count in counts.items() if count]
    if progress.rate:
        figures.append(("Rate", f"{progress.rate:,.1f} lines a second"))
    if progress.eta_at is not None:
        figures.append(("Ready", f"in {distance_text(progress.eta_at - now.timestamp())}"))
    if batch.deadline_at is not None and batch.status not in TERMINAL:
        figures.append(("Deadline", f"in {distance_text((batch.deadline_at - now).total_seconds())}"))
    words = {"Model": batch.model, "Endpoint": batch.endpoint, "Dialect": batch.dialect, "Retry of": batch.parent_id}
    return (*figures, *((term, _cut(word)) for term, word in words.items() if word))


def _problems(batch: Batch) -> tuple[LineProblem, ...]:
    """Give the first ones; bad lines that were only skipped are problems too."""
    told = told_problems(batch) if batch.status is BatchStatus.FAILED else batch.problems
    return told[:_PROBLEMS_SHOWN_MAX]


def _delivery_row(delivery: Delivery, now: datetime) -> DeliveryRow:
    url = urlsplit(delivery.url)
    last = delivery.attempts[-1] if delivery.attempts else None
    outcome = (last.error or last.status) if last is not None else None
    return DeliveryRow(
        type=delivery.type,
        receiver=f"{url.scheme}://{url.hostname or ''}",
        state=delivery.state,
        attempt_count=delivery.attempt_count,
        outcome=str(delivery.reason or outcome or ""),
        made=_moment(delivery.created_at, now),
    )


def _moment(at: datetime, now: datetime) -> Moment:
    return Moment(at=at, distance=distance_text((now - at).total_seconds()))


def distance_text(seconds: float) -> str:
    """Say how far away something is: 42 s, 3 min, 2 h 5 min, 6 days. What has not come yet, by a clock that differs, is
    0 s away.
    """
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min"
    if whole < 48 * 3600:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} days"
