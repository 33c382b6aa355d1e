"""A server that grades its clients watches a run through rate limits, outages and refusals: its verdict is clean."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llmock.pytest_plugin import LLMock

from tests.e2e.harness import chat_line, start
from tests.invariants import check_shape

pytestmark = pytest.mark.real

# Each model fails in its own way before it answers; Retry-After in seconds.
FAULTS = [
    ("limited", 429, 2, 0.6),
    ("limited-longer", 429, 1, 1.1),
    ("overloaded", 503, 2, 0.4),
    ("at-capacity", 529, 1, None),
    ("unlucky", 500, 1, None),
    ("behind-a-proxy", 502, 1, None),
    ("slow-proxy", 504, 1, None),
    ("conflicting", 409, 1, None),
    ("timed-out", 408, 1, None),
]
REFUSALS = [("too-long", 400), ("invalid", 422), ("no-such-model", 404), ("forbidden", 403), ("unpaid", 401)]


async def test_verdict_of_llmock_is_clean(tmp_path: Path, llmock: LLMock) -> None:
    names = ["healthy", *(fault[0] for fault in FAULTS), *(refusal[0] for refusal in REFUSALS)]
    for model, status, times, retry_after_s in FAULTS:
        llmock.fail(status, times=times, retry_after=retry_after_s, model=model)
    for model, status in REFUSALS:
        llmock.fail(status, times=None, model=model)
    (tmp_path / "in.jsonl").write_bytes(b"".join(chat_line(number, model=name) for number, name in enumerate(names)))

    # One at a time: the refusals come when the key and the route have proved good.
    flags = ["--concurrency", "1", "--json"]
    command = await start(["run", "in.jsonl", "-o", "out.jsonl", "-u", llmock.base_url(), *flags], tmp_path, {})
    ended = await command.ended()

    assert ended.code == 3, ended.stderr
    llmock.assert_resilient(strict=True)
    verdict = llmock.verdict()
    # After a 504 the upstream is asked for its models: whether it is there at all.
    calls = [call for call in verdict.calls if call.first.method == "POST"]
    assert len(calls) == len(names)
    assert verdict.faults == sum(times for _, _, times, _ in FAULTS) + len(REFUSALS)
    assert sum(len(call.attempts) for call in calls) == len(names) + sum(times for _, _, times, _ in FAULTS)
    check_files(tmp_path, answered=1 + len(FAULTS))


def check_files(folder: Path, *, answered: int) -> None:
    output = [json.loads(raw) for raw in (folder / "out.jsonl").read_bytes().splitlines()]
    errors = [json.loads(raw) for raw in (folder / "out.errors.jsonl").read_bytes().splitlines()]
    for line in output:
        check_shape("output_line", line)
    for line in errors:
        check_shape("error_line", line)

    assert len(output) == answered
    assert [line["response"]["status_code"] for line in errors] == [status for _, status in REFUSALS]


async def test_quota_of_llmock_is_kept_by_waiting(tmp_path: Path, llmock: LLMock) -> None:
    """A real quota refuses what is too much, and tells the true wait."""
    llmock.limits(rpm=120)
    (tmp_path / "in.jsonl").write_bytes(b"".join(chat_line(number, model="any") for number in range(124)))

    command = await start(["run", "in.jsonl", "-o", "out.jsonl", "-u", llmock.base_url()], tmp_path, {})
    ended = await command.ended()

    assert ended.code == 0, ended.stderr
    verdict = llmock.verdict()
    assert [finding.code for finding in verdict.errors] == []
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 124
    assert any(attempt.status == 429 for call in verdict.calls for attempt in call.attempts)
