"""One `run` from its first line on stderr to its exit code: prepare, start or resume, watch, export, sum up."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import NoReturn

import click

from batchrunner import crash
from batchrunner.app import Crew, Runner
from batchrunner.child import arm_crash_point
from batchrunner.cli import export
from batchrunner.cli.choosing import choose_failed, not_finished
from batchrunner.cli.console import counted, say
from batchrunner.cli.ending import Ending
from batchrunner.cli.exits import MEANINGS, ExitCode
from batchrunner.cli.panel import Panel
from batchrunner.cli.preparing import Prepared, prepare
from batchrunner.cli.run_folder import RunFolder
from batchrunner.cli.run_request import RunRequest, check_request, state_path
from batchrunner.cli.streaming import LineStream
from batchrunner.cli.summary import Outcome, Summary, given_up_because, report
from batchrunner.errors import (
    AuthenticationRefused,
    BatchrunnerError,
    DiskFull,
    ModelUnknown,
    NotFound,
    TaskParked,
    UpstreamUnreachable,
)
from batchrunner.lifecycle import TERMINAL, BatchStatus
from batchrunner.models import LOCAL_TENANT, Batch, BatchId, NewBatch, OnInvalid, OnUnknown, Order, PauseReason
from batchrunner.ports import TenantScope
from batchrunner.room import Room
from batchrunner.settings import Settings, parse_duration, targets_of
from batchrunner.supervisor import Live
from batchrunner.tuning import tune_process

_LOOK_S = 0.2
_AUTO_LINES = 10_000
_ABANDONED = "nobody reads stdout any more"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def run_to_end(request: RunRequest, settings: Settings, api_keys: Mapping[str, str], ending: Ending) -> ExitCode:
    """Do everything that one invocation of `run` does; gives its exit code.

    Raises:
        BatchrunnerError: whatever keeps the run from starting or going on; its state is kept.
        KeyboardInterrupt: it was interrupted where nothing was in flight; `ending` knows how to go on, if it had begun.
    """
    arm_crash_point()
    check_request(request)
    if not request.is_fresh and RunFolder(state_path(request)).record_path.is_file():
        ending.next_command = request.same_command
    prepared = prepare(request, settings)
    ending.next_command = request.same_command
    try:
        with asyncio.Runner(loop_factory=tune_process()) as loop:
            return loop.run(_end_of(request, prepared, settings, api_keys, ending))
    finally:
        prepared.folder.unlock()


async def _end_of(
    request: RunRequest, prepared: Prepared, settings: Settings, api_keys: Mapping[str, str], ending: Ending
) -> ExitCode:
    """Run what is left of a run, or answer that nothing is."""
    if prepared.record.finished_exit_code is not None and request.retry_failed is None:
        is_untouched = export.is_untouched(prepared)
        if is_untouched and not request.is_streaming:
            await _tell(prepared, BatchId(prepared.record.batches[-1]), settings)
            return _already_done(request, prepared)
        if not is_untouched:
            say("the files of this finished run are missing or changed; writing them again")
    run = _Run(request, prepared, settings, api_keys, ending)
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, run.interrupt, number)
    try:
        return await run.run()
    finally:
        for number in _SIGNALS:
            loop.remove_signal_handler(number)


@dataclass(slots=True)
class _Stop:
    """Whether and why the run ends before its batch does."""

    code: ExitCode | None = None
    reason: str = ""
    error: BatchrunnerError | None = None

    @property
    def is_hopeless(self) -> bool:
        """Whether nothing that is in flight can come to anything."""
        return isinstance(self.error, UpstreamUnreachable | TaskParked)


class _Run:
    """One invocation that has work to do."""

    def __init__(
        self,
        request: RunRequest,
        prepared: Prepared,
        settings: Settings,
        api_keys: Mapping[str, str],
        ending: Ending,
    ) -> None:
        self._request = request
        self._prepared = prepared
        self._settings = replace(settings, assets_url=export.assets_folder(prepared.assets_base).name)
        self._api_keys = api_keys
        self._stop = _Stop()
        self._interrupts = 0
        self._interrupted = threading.Event()
        self._waits_for_room = False
        self._panel = Panel(is_json=request.is_json)
        self._ending = ending
        self._crew: Crew | None = None
        self._is_crew_working = False

    async def run(self) -> ExitCode:
        """Start or resume the batch, watch it to an end, write its files, sum up."""
        folder = self._prepared.folder
        async with Runner(self._settings, folder.path, api_keys=self._api_keys) as runner:
            scope = runner.store.scope(LOCAL_TENANT)
            await asyncio.to_thread(runner.adapters.blobs.adopt, "input", self._prepared.source)
            batch = await asyncio.to_thread(self._start_or_resume, runner, scope)
            self._crew = runner.crew(self._worker_count())
            stream = self._stream(runner, scope)
            began_s = runner.adapters.clock.monotonic_s()
            say(self._opening(batch))
            done_before = batch.done_count
            if batch.status not in TERMINAL and self._stop.code is None:
                with self._panel as panel:
                    batch = await self._watch(scope, batch.id, panel, stream)
            if stream is not None:
                await stream.advance()
            if (cause := given_up_because(batch)) is not None:
                self._stop = _given_up(cause, folder.path)
            outcome = Outcome(
                batch=batch,
                live=self._crew.live(),
                elapsed_s=runner.adapters.clock.monotonic_s() - began_s,
                done_before=done_before,
                code=self._stop.code,
                reason=self._stop.reason,
                error=self._stop.error,
            )
            summary = await self._finish(runner, scope, outcome)
        if summary is None:
            return self._ending.interrupted()
        if batch.status in TERMINAL:
            await _tell(self._prepared, batch.id, self._settings)
        report(summary, batch=batch, reason=outcome.reason, is_json=self._request.is_json)
        if stream is not None and stream.is_abandoned and batch.status in TERMINAL:
            say(f"{_ABANDONED}; all lines are printed again by the next command")
            say(f"  next: {self._request.same_command}")
            return ExitCode.TROUBLE
        return ExitCode(summary.exit_code)

    async def _finish(self, runner: Runner, scope: TenantScope, outcome: Outcome) -> Summary | None:
        """Write the files, waiting for room where there is none; None when that was interrupted."""
        room = Room(pause=self._interrupted.wait, tell=self._tell_room)
        finish = partial(export.finish, self._request, self._prepared, runner, scope, outcome, room=room)
        try:
            return await asyncio.to_thread(finish)
        except DiskFull:
            if not self._interrupts:
                raise
            return None

    def _tell_room(self, error: DiskFull | None) -> None:
        """Say once what is waited for, and once that it is there."""
        if error is not None and not self._waits_for_room:
            self._panel.say(f"waiting: {error.code}: {error}")
        elif error is None and self._waits_for_room and not self._interrupts:
            self._panel.say("going on")
        self._waits_for_room = error is not None

    def _stream(self, runner: Runner, scope: TenantScope) -> LineStream | None:
        if not self._request.is_streaming:
            return None
        return LineStream(runner.adapters.blobs, scope, self._prepared.record.batches)

    # -- start -------------------------------------------------------------------------------------------------------

    def _start_or_resume(self, runner: Runner, scope: TenantScope) -> Batch:
        """Go on with the batch of the last try, or make one. Its id is in the record before it is in the store."""
        record, request = self._prepared.record, self._request
        if record.batches and (request.retry_failed is None or record.finished_exit_code is None):
            batch = _find(scope, BatchId(record.batches[-1]))
            if batch is not None and given_up_because(batch) is not None:
                # What it has is paid: nothing is begun anew unless somebody says so.
                return batch
            if batch is not None and batch.status is not BatchStatus.FAILED:
                if request.retry_failed is not None and batch.parent_id is None:
                    raise not_finished()
                scope.resume(batch.id)
                scope.adjust(batch.id, hold_at=request.limit, order=self._order(is_retry=batch.parent_id is not None))
                return scope.batch(batch.id)
            record.batches.pop()
        new = self._new_batch(runner)
        if request.retry_failed is not None:
            chosen = choose_failed(runner, scope, self._prepared, request.retry_failed)
            parent_id = BatchId(record.batches[-1])
            new = replace(new, parent_id=parent_id, chosen_blob=chosen, order=self._order(is_retry=True))
        record.batches.append(new.id)
        record.finished_exit_code = None
        self._prepared.folder.save(record)
        batch = scope.create_batch(new)
        crash.point("batch.created")
        return batch

    def _order(self, *, is_retry: bool) -> Order:
        """A retry's lines are folded into those of the first batch, whose order is the one that shows."""
        return Order.INPUT if is_retry else Order(self._request.order)

    def _new_batch(self, runner: Runner) -> NewBatch:
        request, now = self._request, runner.adapters.clock.now()
        window = request.completion_window
        return NewBatch(
            id=BatchId(f"batch_{runner.adapters.rng.token_hex(16)}"),
            tenant=LOCAL_TENANT,
            dialect="run",
            endpoint=request.endpoint,
            input_file_id=None,
            source="input",
            completion_window=window,
            deadline_at=now + timedelta(seconds=parse_duration(window, what="--window")) if window else None,
            on_invalid=OnInvalid(request.on_invalid),
            on_unknown=OnUnknown(request.on_unknown),
            order=Order(request.order),
            hold_at=request.limit,
            input_sha256=self._prepared.record.input_sha256,
        )

    def _worker_count(self) -> int:
        wanted = self._settings.workers
        if wanted is None:
            wanted = 1 if self._prepared.line_count_up_to <= _AUTO_LINES else len(os.sched_getaffinity(0))
        windows = [target.window for target in targets_of(self._settings)]
        pinned = [window for window in windows if window is not None]
        if len(pinned) == len(windows):
            wanted = min(wanted, sum(pinned))
        return wanted

    def _opening(self, batch: Batch) -> str:
        done = (
            f"continuing with {batch.done_count:,} of {batch.total_count:,} lines done"
            if batch.total_count
            else "starting"
        )
        folder = shlex.quote(str(self._prepared.folder.path))
        return f"{done}; finished lines until the end: batchrunner results {folder}"

    # -- watch -------------------------------------------------------------------------------------------------------

    async def _watch(self, scope: TenantScope, batch_id: BatchId, panel: Panel, stream: LineStream | None) -> Batch:
        """Follow the batch until it has ended or the run has to stop; then drain the crew."""
        assert self._crew is not None
        self._is_crew_working = True
        working = asyncio.create_task(self._crew.run())
        try:
            while not working.done():
                batch = await asyncio.to_thread(scope.batch, batch_id)
                live = self._crew.live()
                panel.show(batch, live)
                if stream is not None:
                    await stream.advance()
                is_read = stream is None or not stream.is_abandoned
                if batch.status in TERMINAL or self._stops_now(batch, live, is_read=is_read):
                    self._crew.stop(grace_s=0.0 if self._stop.is_hopeless else self._settings.drain_grace_s)
                await asyncio.wait([working], timeout=_LOOK_S)
            await working
        finally:
            working.cancel()
            self._is_crew_working = False
        batch = await asyncio.to_thread(scope.batch, batch_id)
        panel.show(batch, self._crew.live())
        return batch

    def interrupt(self, number: int) -> None:
        """Take in SIGINT or SIGTERM: drain and sum up, or at the second one end at once."""
        self._interrupts += 1
        self._interrupted.set()
        self._stop = _Stop(ExitCode.INTERRUPTED, "interrupted")
        is_first, word = self._interrupts == 1, signal.Signals(number).name
        if self._crew is None or not self._is_crew_working:
            if not is_first:
                self._leave()
            self._panel.say(f"{word}: ending with what is being read or written now; again to stop at once")
            return
        grace_s = self._settings.drain_grace_s if is_first else 0.0
        if is_first:
            count = counted(self._crew.live().in_flight, "request")
            self._panel.say(f"{word}: waiting up to {grace_s:.0f} s for {count} in flight; again to stop at once")
        self._crew.stop(grace_s=grace_s)

    def _leave(self) -> NoReturn:
        """End this process now. A thread of it may have much to read or write yet, and nothing can stop that; of what
        it writes nothing counts that is not renamed, as at a kill.
        """
        code = self._ending.interrupted()
        sys.stdout.flush()
        os._exit(code)

    def _stops_now(self, batch: Batch, live: Live, *, is_read: bool) -> bool:
        """Whether the run has to end although its batch has not."""
        if self._stop.code is not None:
            return self._interrupts == 0
        if not is_read:
            self._stop = _Stop(ExitCode.TROUBLE, _ABANDONED)
        elif live.lost:
            self._stop = _lost_stop(live.lost, self._settings)
        elif batch.paused_reason is not None:
            self._stop = _pause_stop(batch.paused_reason, self._settings)
        elif batch.blocked_by is not None and batch.blocked_by != "disk_full":
            self._stop = _Stop(ExitCode.TROUBLE, "parked", TaskParked(f"a task failed too often: {batch.blocked_by}"))
        elif batch.hold_at is not None and batch.status is BatchStatus.IN_PROGRESS and _is_held(batch):
            self._stop = _Stop(ExitCode.STOPPED, f"stopped after --limit {batch.hold_at}")
        return self._stop.code is not None


async def _tell(prepared: Prepared, batch_id: BatchId, settings: Settings) -> None:
    if settings.webhook_url is not None:
        from batchrunner.cli.telling import tell_end

        await tell_end(prepared.folder.path, batch_id, settings.webhook_url, settings)


def _find(scope: TenantScope, batch_id: BatchId) -> Batch | None:
    """The batch, None if the last try died before it was made."""
    try:
        return scope.batch(batch_id)
    except NotFound:
        return None


def _already_done(request: RunRequest, prepared: Prepared) -> ExitCode:
    """Answer a finished run without doing anything."""
    code = ExitCode(prepared.record.finished_exit_code or 0)
    if request.is_json and prepared.record.summary is not None:
        click.echo(prepared.record.summary)
    else:
        say(f"already done: {prepared.places.shown(prepared.output_path)} ({MEANINGS[code]}); --fresh starts over")
    return code


def _given_up(cause: str, folder: Path) -> _Stop:
    hint = (
        f"See what is done with `batchrunner results {shlex.quote(str(folder))}`; --fresh starts over and keeps "
        "this folder."
    )
    return _Stop(ExitCode.TROUBLE, "given up", TaskParked(f"this run was given up: {cause}", hint=hint))


def _is_held(batch: Batch) -> bool:
    assert batch.hold_at is not None
    return batch.succeeded_count + batch.failed_count - batch.refused_count >= batch.hold_at


def _lost_stop(why: str, settings: Settings) -> _Stop:
    hint = (
        f"Is the server running, and is -u its base URL? See `{_doctor(settings)}`, then go on with the next command."
    )
    return _Stop(ExitCode.TROUBLE, "upstream unreachable", UpstreamUnreachable(why, hint=hint))


def _pause_stop(reason: str, settings: Settings) -> _Stop:
    match reason:
        case PauseReason.AUTHENTICATION:
            said = "the upstream refused the key for every line"
            return _Stop(ExitCode.AUTHENTICATION, said, AuthenticationRefused(said, hint=_key_hint(settings)))
        case PauseReason.MODEL_UNKNOWN:
            said = "the upstream knows neither model nor route of any line"
            hint = (
                f"See its models with `{_doctor(settings)}`; then have it serve the one of the lines or name another "
                "with -u, and go on with the next command, or mend the lines and start over with --fresh."
            )
            return _Stop(ExitCode.STOPPED, said, ModelUnknown(said, hint=hint))
        case PauseReason.INPUT_CHANGED:
            return _Stop(
                ExitCode.INPUT_INVALID,
                "the input is not the one that was validated; put the original back, then run the same command again",
            )
        case _:
            return _Stop(ExitCode.STOPPED, f"paused: {reason}")


def _key_hint(settings: Settings) -> str:
    places = [target.api_key_file or target.api_key_env for target in targets_of(settings)]
    named = ", ".join(dict.fromkeys(place for place in places if place is not None))
    where = f"Set the key in {named}, or name another variable" if named else "Name the variable that holds the key"
    flag = "with api_key_env in its table" if settings.upstream else "with --api-key-env NAME"
    return f"{where} {flag}; try it with `{_doctor(settings)}`, then go on with the next command."


def _doctor(settings: Settings) -> str:
    """The command that looks at the upstreams of this run."""
    if settings.upstream or settings.base_url is None:
        return "batchrunner doctor"
    variable = settings.api_key_env
    named = [] if variable == Settings().api_key_env else ["--api-key-env", variable]
    return shlex.join(["batchrunner", "doctor", "-u", settings.base_url, *named])
