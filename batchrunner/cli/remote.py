"""What the commands share that talk to a batch server: how a batch is followed, and what its end means."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import NoReturn, TypeVar

import click

from batchrunner.cli.console import count_text, counted, duration_text, is_terminal, say
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.server_address import Server
from batchrunner.client import BatchClient, RemoteBatch, Shown
from batchrunner.clock import SystemClock, SystemRng
from batchrunner.errors import OwnError
from batchrunner.ports import Clock

_Client = TypeVar("_Client", bound=BatchClient)

_LOOK_S, _LOOK_MAX_S = 0.2, 5.0
_LINE_EVERY_S = 30.0
_PROBLEMS_SHOWN = 10


def with_server(
    server: Server, work: Callable[[BatchClient, Clock], Awaitable[ExitCode]], *, on_interrupt: Callable[[], object]
) -> NoReturn:
    """Do some work on a server and end the process with what it gives; Ctrl-C says what goes on without us."""
    with_client(BatchClient, server, work, on_interrupt=on_interrupt)


def with_client(
    kind: type[_Client],
    server: Server,
    work: Callable[[_Client, Clock], Awaitable[ExitCode]],
    *,
    on_interrupt: Callable[[], object],
) -> NoReturn:
    """Do some work on a server, as `with_server`, through a client that can do more."""

    async def connected() -> ExitCode:
        clock = SystemClock()
        key = os.environ.get("BATCHRUNNER_API_KEY") or None
        async with kind(server.base_url, key, clock=clock, rng=SystemRng(), tell=say) as client:
            return await work(client, clock)

    try:
        with asyncio.Runner() as runner:
            code = runner.run(connected())
    except KeyboardInterrupt:
        on_interrupt()
        code = ExitCode.INTERRUPTED
    sys.exit(int(code))


async def follow(client: BatchClient, clock: Clock, batch_id: str, *, is_quiet: bool) -> Shown:
    """Wait for the end of a batch; meanwhile one line tells how far it is, unless told to be quiet."""
    line = _ProgressLine(clock, is_quiet=is_quiet)
    pause_s = _LOOK_S
    try:
        while True:
            shown = await client.batch(batch_id)
            if shown.batch.has_ended:
                return shown
            line.show(shown.batch)
            await clock.sleep(pause_s)
            pause_s = min(_LOOK_MAX_S, pause_s * 1.3)
    finally:
        line.clear()


class _ProgressLine:
    """One line that is written over on a terminal; elsewhere a line every 30 s, and one for each new status."""

    def __init__(self, clock: Clock, *, is_quiet: bool) -> None:
        self._clock = clock
        self._is_quiet = is_quiet
        self._is_terminal = is_terminal()
        self._said_s = float("-inf")
        self._status = ""

    def show(self, batch: RemoteBatch) -> None:
        """Tell where the batch is now."""
        if self._is_quiet:
            return
        text = status_text(batch, now=self._clock.now())
        if self._is_terminal:
            click.echo(f"\r\033[K{text}", err=True, nl=False)
        elif self._status != batch.status or self._clock.monotonic_s() - self._said_s >= _LINE_EVERY_S:
            self._said_s = self._clock.monotonic_s()
            say(text)
        self._status = batch.status

    def clear(self) -> None:
        """Leave the terminal as it was."""
        if self._is_terminal and self._status:
            click.echo("\r\033[K", err=True, nl=False)


def status_text(batch: RemoteBatch, *, now: datetime) -> str:
    """Say in one line where a batch is."""
    counts, live = batch.counts, batch.progress
    done = counts.completed + counts.failed
    parts = [f"{done:,} of {counted(counts.total, 'line')} done"] if counts.total else []
    if counts.failed:
        parts.append(f"{counts.failed:,} failed")
    if live is not None and not batch.has_ended:
        parts += [f"{live.in_flight:,} in flight"] if live.in_flight else []
        parts += [f"{count_text(live.rate)} lines/s"] if live.rate >= 1 else []
        parts += [_end_text(live.eta_earliest_at, live.eta_latest_at, now)] if live.eta_latest_at else []
    if batch.paused_reason:
        parts.append(f"paused: {batch.paused_reason}")
    if batch.blocked_by:
        parts.append(f"blocked: {batch.blocked_by}")
    return f"{batch.id} {batch.status}{': ' if parts else ''}{', '.join(parts)}"


def _end_text(earliest_at: int | None, latest_at: int, now: datetime) -> str:
    most = duration_text(max(0.0, (datetime.fromtimestamp(latest_at, UTC) - now).total_seconds()))
    if earliest_at is None:
        return f"ends within {most}"
    least = duration_text(max(0.0, (datetime.fromtimestamp(earliest_at, UTC) - now).total_seconds()))
    return f"ends in {least}" if least == most else f"ends in {least} to {most}"


def exit_code_of_batch(batch: RemoteBatch) -> ExitCode:
    """The exit code that the end of a batch stands for, the same as that of a run."""
    match batch.status:
        case "completed" | "DONE":
            return ExitCode.OK if batch.counts.completed == batch.counts.total else ExitCode.SOME_FAILED
        case "expired":
            return ExitCode.DEADLINE
        case "cancelled":
            return ExitCode.SOME_FAILED
        case "failed":
            problems = batch.errors.data if batch.errors is not None else []
            is_given_up = any(each.code == OwnError.code for each in problems)
            return ExitCode.INPUT_INVALID if problems and not is_given_up else ExitCode.TROUBLE
        case _:
            return ExitCode.TROUBLE


def tell_end(server: Server, batch: RemoteBatch, *, is_fetched: bool = False) -> None:
    """Say how a batch ended, why, and what to type next unless its lines are fetched already."""
    counts = batch.counts
    parts = [f"{counts.completed:,} succeeded"] + ([f"{counts.failed:,} failed"] if counts.failed else [])
    rest = counts.total - counts.completed - counts.failed
    if rest:
        parts.append(f"{rest:,} {'expired' if batch.status == 'expired' else 'not finished'}")
    nothing = "nothing was sent" if batch.status == "failed" else "nothing was known of its lines"
    lines = f"{counted(counts.total, 'line')}, {', '.join(parts)}"
    say(f"{batch.status}: {lines if counts.total else nothing}")
    problems = batch.errors.data if batch.errors is not None else []
    for problem in problems[:_PROBLEMS_SHOWN]:
        where = f"line {problem.line}: " if problem.line is not None else ""
        say(f"  {where}{problem.code}: {problem.message}")
    if len(problems) > _PROBLEMS_SHOWN:
        say(f"  and {len(problems) - _PROBLEMS_SHOWN:,} more")
    if not is_fetched and (batch.output_file_id or batch.error_file_id):
        say(f"  next: {server.command('results', batch.id, '-o', 'OUTPUT')}")
    if batch.error_file_id or problems:
        say(f"  why lines failed: {server.command('errors', batch.id)}")
