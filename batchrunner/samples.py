"""Batches that never were, to try receivers with."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta

from batchrunner.lifecycle import BatchStatus, EndedBy
from batchrunner.models import NO_USAGE, OPENAI, Batch, BatchId, LineProblem, OnInvalid, OnUnknown, Order, TenantId

_ALWAYS: Mapping[str, object] = {
    "id": BatchId("batch_test"),
    "dialect": OPENAI,
    "endpoint": "/v1/chat/completions",
    "input_file_id": None,
    "input_name": "file-test",
    "source": "",
    "completion_window": "24h",
    "on_invalid": OnInvalid.FAIL,
    "on_unknown": OnUnknown.RETRY,
    "order": Order.INPUT,
    "metadata": {"test": "true"},
    "version": 3,
    "paused_reason": None,
    "paused_at": None,
    "blocked_by": None,
    "model": None,
    "failed_count": 0,
    "refused_count": 0,
    "re_executed_count": 0,
    "retry_count": 0,
    "usage": NO_USAGE,
    "open_shards": 0,
    "problems_blob": None,
    "error_file_id": None,
    "journal_ended_at": None,
}
_PROBLEM = LineProblem("invalid_json_line", "This line is not parseable as valid JSON.", None, 1)
_ENDED_BY = {
    BatchStatus.COMPLETED: EndedBy.SETTLED,
    BatchStatus.EXPIRED: EndedBy.DEADLINE,
    BatchStatus.CANCELLED: EndedBy.CANCEL,
}
# Of two lines, those that have a result.
_DONE = {BatchStatus.COMPLETED: 2, BatchStatus.EXPIRED: 1, BatchStatus.CANCELLED: 1}


def sample_batch(status: BatchStatus, tenant: TenantId, at: datetime) -> Batch:
    """Make a batch that has reached a status."""
    is_failed, done = status is BatchStatus.FAILED, _DONE.get(status, 0)
    values: dict[str, object] = {
        "tenant": tenant,
        "status": status,
        "deadline_at": at + timedelta(hours=24),
        "created_at": at,
        "ended_by": _ENDED_BY.get(status),
        "total_count": 0 if is_failed else 2,
        "succeeded_count": done,
        "expired_count": int(status is BatchStatus.EXPIRED),
        "cancelled_count": int(status is BatchStatus.CANCELLED),
        "next_sequence": done + 1,
        "problem_count": int(is_failed),
        "problems": (_PROBLEM,) if is_failed else (),
        "output_file_id": "file-test-output" if done else None,
    }
    moments = {f"{each}_at": at if each is status else None for each in BatchStatus}
    del moments[f"{BatchStatus.VALIDATING}_at"]
    return Batch(**_ALWAYS, **values, **moments)  # type: ignore[arg-type]
