"""What a step of a batch hands to the Store when it is done: what validation found, and what a seal publishes."""

from __future__ import annotations

from dataclasses import dataclass

from batchrunner.models import File, LineProblem, ShardCut


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptedInput:
    """The outcome of a validation that lets the batch run."""

    shards: tuple[ShardCut, ...]
    total_count: int
    refused_count: int
    problems_blob: str | None
    problem_count: int
    problems: tuple[LineProblem, ...]
    input_sha256: str
    model: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RejectedInput:
    """The outcome of a validation that fails the batch; `problems` is capped, `problem_count` and the blob are not."""

    problems: tuple[LineProblem, ...]
    problem_count: int
    problems_blob: str | None
    input_sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Publication:
    """What a seal publishes in one transaction. A file that would be empty is None."""

    output: File | None
    error: File | None
    expired_count: int = 0
    cancelled_count: int = 0
