"""What a run ends with: totals, rate, retries, tokens, top errors, files and the next command; or one JSON object."""

from __future__ import annotations

import click
import msgspec
import orjson

from batchrunner.cli.console import count_text, counted, duration_text, say
from batchrunner.cli.exits import ExitCode
from batchrunner.errors import BatchrunnerError, OwnError
from batchrunner.lifecycle import TERMINAL, BatchStatus
from batchrunner.models import NO_USAGE, Batch, Usage
from batchrunner.supervisor import Live


class ErrorGroup(msgspec.Struct, frozen=True):
    """Failed lines of one code, with a few of their ids; without ids, failed attempts of a run that has not ended."""

    code: str
    count: int
    custom_ids: list[str]


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """How an invocation ended; `code` is set when it ended before its batch."""

    batch: Batch
    live: Live
    elapsed_s: float
    done_before: int
    code: ExitCode | None
    reason: str
    error: BatchrunnerError | None = None


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """The object that --json prints. Its shape is published as schemas/summary.json."""

    status: str
    exit_code: int
    batch_id: str | None
    counts: dict[str, int]
    usage: dict[str, int]
    elapsed_s: float
    requests_per_s: float
    retries: int
    re_executed: int
    top_errors: list[ErrorGroup]
    output: str | None
    errors: str | None
    manifest: str | None
    error: dict[str, str] | None
    next_command: str | None


def failure_summary(code: ExitCode, *, error_code: str, message: str, hint: str, next_command: str | None) -> Summary:
    """Give the object for a command that ended before it had a batch to tell of."""
    return Summary(
        status=BatchStatus.FAILED.value,
        exit_code=int(code),
        batch_id=None,
        counts=dict.fromkeys(("total", "succeeded", "failed", "refused", "expired", "cancelled", "pending"), 0),
        usage=_usage_of(NO_USAGE),
        elapsed_s=0.0,
        requests_per_s=0.0,
        retries=0,
        re_executed=0,
        top_errors=[],
        output=None,
        errors=None,
        manifest=None,
        error={"code": error_code, "message": message, "hint": hint},
        next_command=next_command,
    )


def print_json(summary: Summary) -> None:
    """Print the object of --json on stdout."""
    click.echo(orjson.dumps(msgspec.to_builtins(summary)).decode())


def exit_code_for(batch: Batch) -> ExitCode:
    """The exit code that a finished batch stands for."""
    if batch.status is BatchStatus.FAILED:
        return ExitCode.INPUT_INVALID if _is_input_invalid(batch) else ExitCode.TROUBLE
    if batch.status is BatchStatus.EXPIRED:
        return ExitCode.DEADLINE
    if batch.failed_count or batch.cancelled_count:
        return ExitCode.SOME_FAILED
    return ExitCode.OK


def given_up_because(batch: Batch) -> str | None:
    """Why a batch was given up that we could not bring to its end; None for any other."""
    if batch.status is not BatchStatus.FAILED:
        return None
    return next((problem.message for problem in batch.problems if problem.code == OwnError.code), None)


def _is_input_invalid(batch: Batch) -> bool:
    """Whether the input failed the batch, and not we who gave it up."""
    is_failed = batch.status is BatchStatus.FAILED and batch.problem_count > 0
    return is_failed and given_up_because(batch) is None


def counts_of(batch: Batch) -> dict[str, int]:
    """Lines by how they ended; the parts sum to the total."""
    return {
        "total": batch.total_count,
        "succeeded": batch.succeeded_count,
        "failed": batch.failed_count - batch.refused_count,
        "refused": batch.refused_count,
        "expired": batch.expired_count,
        "cancelled": batch.cancelled_count,
        "pending": batch.pending_count,
    }


def usage_of(batch: Batch) -> dict[str, int]:
    """Tokens as the upstream reported them."""
    return _usage_of(batch.usage)


def _usage_of(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.input_tokens,
        "cached_tokens": usage.cached_tokens,
        "output_tokens": usage.output_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "total_tokens": usage.total_tokens,
    }


def report(summary: Summary, *, batch: Batch | None, reason: str, is_json: bool) -> None:
    """Print the summary: JSON on stdout, or a few lines on stderr."""
    if is_json:
        print_json(summary)
        return
    counts, usage = summary.counts, summary.usage
    if batch is not None and _is_input_invalid(batch):
        _say_problems(batch)
        say(f"input invalid: {counted(batch.problem_count, 'problem')}, nothing was sent")
        say(f"  next: {summary.next_command}")
        return
    is_over = summary.status in set(TERMINAL)
    head = summary.status if is_over else f"stopped: {reason}"
    parts = [f"{count:,} {word}" for word, count in counts.items() if count and word != "total"]
    say(f"{head}: {counted(counts['total'], 'line')}, {', '.join(parts) or 'none done'}")
    say(
        f"  {duration_text(summary.elapsed_s)}, {summary.requests_per_s:.1f} lines/s, {_retries(summary.retries)}, "
        f"{count_text(usage['total_tokens'])} tokens ({count_text(usage['output_tokens'])} out)"
    )
    if summary.re_executed:
        again = counted(summary.re_executed, "line")
        say(f"  re-executed: at most {again} (under way when a process died or was stopped at once)")
    for group in summary.top_errors:
        say(f"  {group.code}: {_of_what(group)}")
    for word, path in (("output", summary.output), ("errors", summary.errors), ("manifest", summary.manifest)):
        if path is not None:
            say(f"  {word}: {path}")
    if summary.error is not None:
        if summary.error["message"] != reason:
            say(f"  error: {summary.error['message']}")
        say(f"  hint: {summary.error['hint']}")
    if summary.next_command is not None:
        say(f"  next: {summary.next_command}")


def _of_what(group: ErrorGroup) -> str:
    if not group.custom_ids:
        return counted(group.count, "attempt")
    return f"{counted(group.count, 'line')}, such as {', '.join(group.custom_ids)}"


def _retries(count: int) -> str:
    return "1 retry" if count == 1 else f"{count:,} retries"


def _say_problems(batch: Batch) -> None:
    for problem in batch.problems:
        where = f"line {problem.line_number}: " if problem.line_number is not None else ""
        say(f"{where}{problem.code}: {problem.message}")
