"""inference.club's words: what a refusal is called, and how a batch of another dialect stands in its words."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

from batchrunner.api.club_words import STATUSES, ClubError, club_batch, counts_of, failure_of
from batchrunner.api.envelope import Refusal, unparseable_json
from batchrunner.batch_object import RequestCounts
from batchrunner.lifecycle import BatchStatus, JobStatus
from batchrunner.models import CLUB, LOCAL_TENANT, NO_USAGE, OPENAI, Batch, BatchId, LineCode
from batchrunner.results import ResultLines

NOW = datetime(2026, 6, 13, 12, tzinfo=UTC)


def batch(status: BatchStatus, **changes: Any) -> Batch:
    """A batch that stands so, with no line done."""
    given: dict[str, Any] = {
        each.name: None for each in dataclasses.fields(Batch) if each.default is dataclasses.MISSING
    }
    given |= {name: 0 for name in given if name.endswith("_count")} | {
        "id": BatchId("batch_1"),
        "tenant": LOCAL_TENANT,
        "dialect": OPENAI,
        "metadata": {},
        "status": status,
        "usage": NO_USAGE,
        "created_at": NOW,
    }
    return Batch(**given | changes)


def shown(status: BatchStatus, *, in_flight: int = 0, **changes: Any) -> tuple[str, list[int]]:
    found = batch(status, **changes)
    seen = club_batch(found, counts_of(found, in_flight=in_flight))
    counts = [seen.queued, seen.processing, seen.processed, seen.failed, seen.canceled]
    assert sum(counts) == seen.total
    return seen.status, counts


@pytest.mark.parametrize(
    ("refusal", "body"),
    [
        (Refusal("m"), b'{"error":{"message":"m","type":"invalid_request"}}'),
        (Refusal("m", code="too_large"), b'{"error":{"message":"m","type":"too_large"}}'),
        (Refusal("m", status=401), b'{"detail":"m"}'),
        (Refusal("m", status=403), b'{"error":{"message":"m","type":"forbidden"}}'),
        (Refusal("m", status=404), b'{"error":{"message":"m","type":"not_found"}}'),
        (Refusal("m", status=404, code="model_not_found"), b'{"error":{"message":"m","type":"no_provider"}}'),
        (Refusal("m", status=409), b'{"error":{"message":"m","type":"conflict"}}'),
        (Refusal("m", status=413), b'{"error":{"message":"m","type":"too_large"}}'),
        (Refusal("m", status=422), b'{"error":{"message":"m","type":"invalid_request"}}'),
        (Refusal("m", status=429), b'{"error":{"message":"m","type":"rate_limited"}}'),
        (Refusal("m", status=500), b'{"error":{"message":"m","type":"server_error"}}'),
        (Refusal("m", status=502), b'{"error":{"message":"m","type":"upstream_error"}}'),
        (Refusal("m", status=503, code="async_disabled"), b'{"error":{"message":"m","type":"async_disabled"}}'),
        (Refusal("m", status=503, code="store_unavailable"), b'{"error":{"message":"m","type":"unavailable"}}'),
        (Refusal("m", status=504), b'{"error":{"message":"m","type":"upstream_error"}}'),
    ],
)
def test_a_refusal_has_inference_clubs_shape(refusal: Refusal, body: bytes) -> None:
    assert refusal.body(ClubError) == body


def test_what_is_no_json_is_a_detail() -> None:
    assert unparseable_json().body(ClubError).startswith(b'{"detail":"We could not parse')


def test_every_status_of_a_batch_has_a_word() -> None:
    assert set(STATUSES) == set(BatchStatus)


@pytest.mark.parametrize(
    ("status", "in_flight", "counts", "expected"),
    [
        (BatchStatus.VALIDATING, 0, {}, ("PENDING", [0, 0, 0, 0, 0])),
        (BatchStatus.IN_PROGRESS, 0, {"total_count": 5}, ("PENDING", [5, 0, 0, 0, 0])),
        (BatchStatus.IN_PROGRESS, 2, {"total_count": 5}, ("PROCESSING", [3, 2, 0, 0, 0])),
        (BatchStatus.IN_PROGRESS, 9, {"total_count": 5, "succeeded_count": 4}, ("PROCESSING", [0, 1, 4, 0, 0])),
        (BatchStatus.IN_PROGRESS, 0, {"total_count": 5, "failed_count": 5}, ("PROCESSING", [0, 0, 0, 5, 0])),
        (BatchStatus.FINALIZING, 0, {"total_count": 5, "succeeded_count": 5}, ("DONE", [0, 0, 5, 0, 0])),
        (BatchStatus.FINALIZING, 0, {"total_count": 5, "succeeded_count": 4}, ("PROCESSING", [1, 0, 4, 0, 0])),
        (BatchStatus.CANCELLING, 0, {"total_count": 5}, ("PROCESSING", [5, 0, 0, 0, 0])),
        (BatchStatus.CANCELLED, 0, {"total_count": 5, "cancelled_count": 5}, ("DONE", [0, 0, 0, 0, 5])),
        (BatchStatus.EXPIRED, 0, {"total_count": 5, "expired_count": 5}, ("DONE", [0, 0, 0, 5, 0])),
        (BatchStatus.FAILED, 0, {"total_count": 5, "succeeded_count": 1}, ("DONE", [0, 0, 1, 4, 0])),
        (BatchStatus.COMPLETED, 0, {"total_count": 5, "succeeded_count": 5}, ("DONE", [0, 0, 5, 0, 0])),
    ],
)
def test_a_batch_of_another_dialect_is_counted_as_if_of_jobs(
    status: BatchStatus, in_flight: int, counts: dict[str, int], expected: tuple[str, list[int]]
) -> None:
    assert shown(status, in_flight=in_flight, **counts) == expected


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        ({JobStatus.QUEUED: 2}, "PENDING"),
        ({JobStatus.QUEUED: 1, JobStatus.PROCESSED: 1}, "PROCESSING"),
        ({JobStatus.PROCESSING: 2}, "PROCESSING"),
        ({JobStatus.PROCESSED: 1, JobStatus.FAILED: 1}, "DONE"),
        ({JobStatus.CANCELED: 2}, "DONE"),
    ],
)
def test_a_batch_stands_as_its_jobs_do(counts: dict[JobStatus, int], expected: str) -> None:
    found = club_batch(batch(BatchStatus.IN_PROGRESS, dialect=CLUB), dict.fromkeys(JobStatus, 0) | counts)

    assert found.status == expected


def test_request_counts_are_those_of_the_other_views() -> None:
    found = batch(BatchStatus.EXPIRED, total_count=4, succeeded_count=1, failed_count=1, expired_count=2)

    seen = club_batch(found, counts_of(found, in_flight=0))

    assert seen.failed == 3
    assert seen.request_counts == RequestCounts(total=4, completed=1, failed=1)


def test_a_failure_says_whose_it_is() -> None:
    lines = ResultLines(BatchId("7"))
    told = [
        lines.answered(1, "a", 400, None, b'{"error":{"message":"no such voice"}}'),
        lines.answered(1, "a", 500, None, b""),
        lines.failed(1, "a", code=LineCode.MODEL_NOT_SERVED, message="nobody serves it"),
        lines.failed(1, "a", code=LineCode.REQUEST_TIMEOUT, message="too slow"),
    ]

    assert [msgspec.structs.astuple(failure_of(each)) for each in told] == [
        ("no such voice", "upstream_error"),
        ("The upstream answered HTTP 500.", "upstream_error"),
        ("nobody serves it", "no_provider"),
        ("too slow", "request_timeout"),
    ]
