"""The wire object of a batch: a total mapping, its keys in OpenAI's order, and a progress that sums."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from batchrunner.batch_object import STATUSES, batch_object, strict_object, told_problems
from batchrunner.holdings import LiveShare
from batchrunner.lifecycle import BatchStatus
from batchrunner.models import (
    LOCAL_TENANT,
    Batch,
    BatchId,
    FileId,
    LineProblem,
    OnInvalid,
    OnUnknown,
    Order,
    Usage,
)
from batchrunner.progress import progress_of

START = datetime(2026, 11, 21, 12, 0, 0, 900_000, UTC)
# Source: the Batch object as the OpenAI API prints it.
OPENAI_KEYS = [
    "id",
    "object",
    "endpoint",
    "model",
    "errors",
    "input_file_id",
    "completion_window",
    "status",
    "output_file_id",
    "error_file_id",
    "created_at",
    "in_progress_at",
    "expires_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
    "request_counts",
    "usage",
    "metadata",
]
BATCH = Batch(
    id=BatchId("batch_1"),
    tenant=LOCAL_TENANT,
    dialect="openai",
    endpoint="/v1/embeddings",
    input_file_id=FileId("file-1"),
    input_name="file-1",
    source="files/1",
    completion_window="24h",
    deadline_at=START + timedelta(hours=24),
    on_invalid=OnInvalid.FAIL,
    on_unknown=OnUnknown.RETRY,
    order=Order.INPUT,
    priority=2,
    hold_at=None,
    metadata={"a": "b"},
    parent_id=None,
    chosen_blob=None,
    input_sha256=None,
    status=BatchStatus.IN_PROGRESS,
    version=2,
    ended_by=None,
    paused_reason=None,
    paused_at=None,
    blocked_by=None,
    total_count=1000,
    succeeded_count=380,
    failed_count=20,
    refused_count=5,
    expired_count=0,
    cancelled_count=0,
    re_executed_count=3,
    retry_count=7,
    usage=Usage(10, 4, 20, 5),
    next_sequence=396,
    open_shards=1,
    model="m",
    problems_blob=None,
    problem_count=0,
    problems=(),
    output_file_id=None,
    error_file_id=None,
    created_at=START,
    in_progress_at=START + timedelta(seconds=1),
    finalizing_at=None,
    cancelling_at=None,
    completed_at=None,
    failed_at=None,
    expired_at=None,
    cancelled_at=None,
    journal_ended_at=None,
)
NOW = START + timedelta(seconds=101)


def share(**given: object) -> LiveShare:
    usual = {"batch_id": BATCH.id, "in_flight": 4, "waiting": 1, "done_per_s": 2.0, "window": 8, "bound_by": "latency"}
    return msgspec.convert(usual | given, LiveShare)


def test_keys_stand_in_the_order_of_openai_and_ours_behind_them():
    raw = msgspec.json.encode(batch_object(BATCH, [], NOW))
    strict = msgspec.json.encode(strict_object(batch_object(BATCH, [], NOW)))

    assert list(msgspec.json.decode(raw))[: len(OPENAI_KEYS)] == OPENAI_KEYS
    assert list(msgspec.json.decode(raw))[-1] == "progress"
    assert list(msgspec.json.decode(strict)) == OPENAI_KEYS


def test_values_are_openais():
    shown = msgspec.to_builtins(strict_object(batch_object(BATCH, [], NOW)))

    assert shown["created_at"] == 1795262400
    assert shown["expires_at"] == 1795262400 + 86400
    assert shown["completed_at"] is None
    assert shown["request_counts"] == {"total": 1000, "completed": 380, "failed": 20}
    assert shown["usage"] == {
        "input_tokens": 10,
        "input_tokens_details": {"cached_tokens": 4},
        "output_tokens": 20,
        "output_tokens_details": {"reasoning_tokens": 5},
        "total_tokens": 30,
    }
    assert (shown["object"], shown["model"], shown["metadata"]) == ("batch", "m", {"a": "b"})


@pytest.mark.parametrize("status", BatchStatus)
def test_every_status_has_a_word(status):
    assert batch_object(replace(BATCH, status=status), [], NOW).status == STATUSES[status] == str(status)


@pytest.mark.parametrize("created_us", [0, 400, 999_999])
def test_a_window_is_as_long_as_was_asked_for_wherever_the_second_turns(created_us: int) -> None:
    created_at = START + timedelta(microseconds=created_us)
    batch = replace(BATCH, created_at=created_at, deadline_at=created_at + timedelta(hours=24, microseconds=-600))

    shown = batch_object(batch, [], NOW)

    assert shown.expires_at == shown.created_at + 86_400


def test_only_a_failed_batch_has_errors():
    problem = LineProblem("invalid_json_line", "No.", None, 3, "a")
    with_problem = replace(BATCH, problems=(problem,), problem_count=1)

    failed = batch_object(replace(with_problem, status=BatchStatus.FAILED), [], NOW).errors
    given_up = batch_object(replace(BATCH, status=BatchStatus.FAILED), [], NOW).errors

    assert batch_object(with_problem, [], NOW).errors is None
    assert msgspec.json.decode(msgspec.json.encode(failed)) == {
        "object": "list",
        "data": [{"code": "invalid_json_line", "message": "No.", "param": None, "line": 3}],
    }
    assert given_up is not None
    assert given_up.data[0].code == "internal_error"


def test_input_is_named_as_the_caller_named_it():
    assert batch_object(replace(BATCH, input_file_id=None, input_name="file-x"), [], NOW).input_file_id == "file-x"


@pytest.mark.parametrize("status", BatchStatus)
def test_counts_of_progress_sum(status):
    is_sending = status in (BatchStatus.IN_PROGRESS, BatchStatus.CANCELLING)
    found = progress_of(replace(BATCH, status=status), [share()], NOW)

    parts = (found.succeeded, found.failed, found.refused, found.expired, found.cancelled, found.remaining)
    assert sum(parts) == found.total == 1000
    assert (found.failed, found.refused, found.remaining) == (15, 5, 600)
    assert (found.in_flight, found.waiting, found.window) == ((4, 1, 8) if is_sending else (0, 0, 0))


def test_end_is_guessed_between_the_rate_of_now_and_that_since_the_start():
    found = progress_of(BATCH, [share(done_per_s=2.0), share(done_per_s=4.0, window=16, bound_by="rpm")], NOW)

    now_s = int(NOW.timestamp())
    assert (found.rate, found.window, found.bound_by) == (6.0, 24, "rpm")
    assert found.eta_at == now_s + 100
    # 395 lines in 100 s, and a tenth off either way.
    assert found.eta_earliest_at == int((NOW + timedelta(seconds=600 / 6.6)).timestamp())
    assert found.eta_latest_at == int((NOW + timedelta(seconds=600 / (3.95 * 0.9))).timestamp())


@pytest.mark.parametrize(
    ("deadline_s", "risk"), [(None, "none"), (86_400, "low"), (500, "low"), (420, "medium"), (300, "high")]
)
def test_risk_of_the_deadline_follows_the_guess(deadline_s, risk):
    deadline = START + timedelta(seconds=deadline_s) if deadline_s is not None else None

    # 600 lines: 300 s at the rate of now, 169 s at the rate so far; the slowest guess is 333 s.
    found = progress_of(replace(BATCH, deadline_at=deadline), [share()], NOW)

    assert found.deadline_risk == risk


@pytest.mark.parametrize(
    "batch",
    [
        replace(BATCH, paused_reason="operator"),
        replace(BATCH, status=BatchStatus.VALIDATING),
        replace(BATCH, status=BatchStatus.FINALIZING),
        replace(BATCH, status=BatchStatus.COMPLETED),
    ],
)
def test_nothing_is_guessed_of_what_does_not_run(batch):
    found = progress_of(batch, [share()], NOW)

    assert (found.eta_at, found.eta_earliest_at, found.eta_latest_at, found.deadline_risk) == (None, None, None, None)


def test_nothing_is_guessed_without_workers():
    found = progress_of(BATCH, [], NOW)

    assert (found.rate, found.eta_at, found.deadline_risk, found.bound_by) == (0.0, None, None, None)


def test_what_holds_a_batch_is_what_bounds_it():
    assert progress_of(replace(BATCH, paused_reason="operator"), [share()], NOW).bound_by == "paused"
    assert progress_of(replace(BATCH, blocked_by="disk_full"), [share()], NOW).bound_by == "disk_full"


def test_tenants_are_told_codes_and_no_paths():
    stuck = replace(BATCH, blocked_by="blobs_unavailable: /srv/data/blobs/files/x: Input/output error")
    problem = LineProblem("internal_error", "stuck at /srv/data", None, None)
    given_up = replace(stuck, status=BatchStatus.FAILED, problems=(problem,), problem_count=1)

    for batch in (stuck, given_up):
        assert b"/srv" not in msgspec.json.encode(batch_object(batch, [share()], NOW))
    assert batch_object(stuck, [share()], NOW).blocked_by == "blobs_unavailable"
    assert progress_of(stuck, [share()], NOW).bound_by == "blobs_unavailable"
    assert [each.code for each in told_problems(given_up)] == ["internal_error"]


def test_a_guess_far_away_is_still_a_date():
    found = progress_of(replace(BATCH, total_count=10**7), [share(done_per_s=1e-12)], NOW)

    assert found.eta_at is not None
    assert found.eta_latest_at is not None
    assert found.eta_at <= found.eta_latest_at


def test_progress_names_upstreams_only_where_there_are_several():
    here = {"name": "box", "window": 5, "bound_by": "growing", "in_flight": 3}
    there = {"name": "box", "window": 7, "bound_by": "rate", "in_flight": 1}
    other = {"name": "cloud", "window": 2, "bound_by": "failures", "in_flight": 0, "is_down": True}

    found = progress_of(BATCH, [share(upstreams=[here, other]), share(upstreams=[there, other])], NOW)
    one = msgspec.json.encode(progress_of(BATCH, [share()], NOW))
    over = progress_of(replace(BATCH, status=BatchStatus.COMPLETED), [share(upstreams=[here, other])], NOW)

    assert msgspec.to_builtins(found.upstreams) == (
        {"name": "box", "in_flight": 4, "window": 12, "bound_by": "rate", "is_down": False},
        {"name": "cloud", "in_flight": 0, "window": 4, "bound_by": "failures", "is_down": True},
    )
    assert b"upstreams" not in one
    assert over.upstreams is msgspec.UNSET


@pytest.mark.parametrize("status", list(BatchStatus))
def test_pause_is_told_of_what_would_go_on_without_it(status: BatchStatus) -> None:
    paused = replace(BATCH, status=status, paused_reason="operator", paused_at=START, in_progress_at=START)

    told = batch_object(paused, [], NOW)

    is_held = status in {BatchStatus.VALIDATING, BatchStatus.IN_PROGRESS}
    assert (told.paused_reason, told.paused_at) == (("operator", int(START.timestamp())) if is_held else (None, None))
    assert (told.progress.bound_by == "paused") == is_held
