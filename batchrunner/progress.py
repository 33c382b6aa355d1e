"""How far a batch is and when it will be through: reckoned from its counts and from what its workers report."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import overload

import msgspec
from msgspec import UNSET, UnsetType

from batchrunner.holdings import LiveShare, UpstreamLive
from batchrunner.lifecycle import TERMINAL, BatchStatus
from batchrunner.models import Batch

# The last minute's rate and that since the start bound the guess; this is what both may be off by.
_MARGIN = 0.1
# Exchanges may be under way then.
_SENDING = (BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING)
# What a pause holds.
_HELD = (BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS)
_FARTHEST_S = 10 * 365 * 86400.0


class UpstreamProgress(msgspec.Struct, frozen=True, kw_only=True):
    """How a batch's requests fare at one upstream."""

    name: str
    in_flight: int
    window: int
    bound_by: str
    is_down: bool


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """The extension `progress` of a batch on the wire. Counts of lines sum to `total` at every instant.

    `rate` is lines a second. The time of the end lies between `eta_earliest_at` and `eta_latest_at`, most likely at
    `eta_at`; all are null while nothing can be said. `deadline_risk` is `none` without a deadline. `upstreams` is there
    while workers send to more than one.
    """

    total: int
    succeeded: int
    failed: int
    refused: int
    expired: int
    cancelled: int
    remaining: int
    in_flight: int
    waiting: int
    rate: float
    eta_at: int | None
    eta_earliest_at: int | None
    eta_latest_at: int | None
    deadline_risk: str | None
    window: int
    bound_by: str | None
    retries: int
    re_executed: int
    tokens: int
    last_sequence: int
    upstreams: tuple[UpstreamProgress, ...] | UnsetType = UNSET


def progress_of(batch: Batch, shares: Sequence[LiveShare], now: datetime) -> Progress:
    """Give the progress of a batch whose workers report `shares`, empty where none works on it."""
    if batch.status not in _SENDING:
        # What they said a second ago no longer holds.
        shares = ()
    rate = sum(share.done_per_s for share in shares)
    ends = _ends(batch, rate, now)
    return Progress(
        total=batch.total_count,
        succeeded=batch.succeeded_count,
        # The store counts refused lines among the failed ones.
        failed=batch.failed_count - batch.refused_count,
        refused=batch.refused_count,
        expired=batch.expired_count,
        cancelled=batch.cancelled_count,
        remaining=batch.pending_count,
        in_flight=sum(share.in_flight for share in shares),
        waiting=sum(share.waiting for share in shares),
        rate=round(rate, 3),
        eta_at=seconds_of(ends[1]) if ends else None,
        eta_earliest_at=seconds_of(ends[0]) if ends else None,
        eta_latest_at=seconds_of(ends[2]) if ends else None,
        deadline_risk=_risk(batch, ends),
        window=sum(share.window for share in shares),
        bound_by=_bound_by(batch, shares),
        retries=batch.retry_count,
        re_executed=batch.re_executed_count,
        tokens=batch.usage.total_tokens,
        last_sequence=max(0, batch.next_sequence - 1),
        upstreams=_upstreams(shares) or UNSET,
    )


def _upstreams(shares: Sequence[LiveShare]) -> tuple[UpstreamProgress, ...]:
    """Sum up what all workers say of each upstream, in the order in which they name them."""
    by_name: dict[str, list[UpstreamLive]] = {}
    for share in shares:
        for each in share.upstreams:
            by_name.setdefault(each.name, []).append(each)
    return tuple(
        UpstreamProgress(
            name=name,
            in_flight=sum(each.in_flight for each in told),
            window=sum(each.window for each in told),
            bound_by=max(told, key=lambda each: each.window).bound_by,
            is_down=any(each.is_down for each in told),
        )
        for name, told in by_name.items()
    )


_Ends = tuple[datetime, datetime, datetime]


def _ends(batch: Batch, rate: float, now: datetime) -> _Ends | None:
    """The earliest, likeliest and latest end; None while it cannot be told."""
    if batch.status is not BatchStatus.IN_PROGRESS or is_paused(batch) or rate <= 0.0:
        return None
    assert batch.in_progress_at is not None
    elapsed_s = (now - batch.in_progress_at).total_seconds()
    done = batch.done_count - batch.refused_count
    average = done / elapsed_s if done > 0 and elapsed_s > 0 else rate
    fastest, slowest = max(rate, average) * (1 + _MARGIN), min(rate, average) * (1 - _MARGIN)
    earliest, likeliest, latest = (_after(now, batch.pending_count / speed) for speed in (fastest, rate, slowest))
    return earliest, likeliest, latest


def _after(now: datetime, wait_s: float) -> datetime:
    return now + timedelta(seconds=min(wait_s, _FARTHEST_S))


def _risk(batch: Batch, ends: _Ends | None) -> str | None:
    """How likely it is that the deadline comes first; None while it cannot be told, or when it is over."""
    if batch.status in TERMINAL:
        return None
    if batch.deadline_at is None:
        return "none"
    if ends is None:
        return None
    _, likeliest, latest = ends
    if latest <= batch.deadline_at:
        return "low"
    return "medium" if likeliest <= batch.deadline_at else "high"


def _bound_by(batch: Batch, shares: Sequence[LiveShare]) -> str | None:
    """What keeps the batch from being faster: its pause, what blocks it, or the word of the largest share."""
    if batch.status in TERMINAL:
        return None
    if is_paused(batch):
        return "paused"
    if batch.blocked_by is not None:
        return code_of(batch.blocked_by)
    return max(shares, key=lambda share: share.window).bound_by if shares else None


def is_paused(batch: Batch) -> bool:
    """Tell whether a pause keeps the batch from going on; one that is ending or over would not."""
    return batch.paused_reason is not None and batch.status in _HELD


def code_of(blocked_by: str | None) -> str | None:
    """Give the code of what keeps a batch from going on; what a disk or a database says behind it is for the log."""
    return blocked_by.partition(":")[0] if blocked_by is not None else None


@overload
def seconds_of(at: datetime) -> int: ...
@overload
def seconds_of(at: datetime | None) -> int | None: ...
def seconds_of(at: datetime | None) -> int | None:
    """Give an instant as it stands on the wire: whole seconds since 1970."""
    return int(at.timestamp()) if at is not None else None
