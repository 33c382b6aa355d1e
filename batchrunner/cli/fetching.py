"""`batchrunner results ID`: a batch's lines from its server, to stdout or into files that a later call completes.

While the batch runs, lines come in the order in which they were finished; from its end on, from its own files.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

import msgspec

from batchrunner.cli.console import counted, say
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.remote import tell_end, with_server
from batchrunner.cli.run_folder import errors_path_for
from batchrunner.cli.server_address import Server
from batchrunner.client import BatchClient, Page, RemoteBatch
from batchrunner.durable import sync_folder, write_whole
from batchrunner.errors import AlreadyRunning, BlobsUnavailable, DiskFull, NotFound
from batchrunner.ports import Clock

_LOOK_S = 1.0
_OUTCOMES = ("succeeded", "failed")
_COPY_BYTES = 1 << 20


class _Mark(msgspec.Struct, frozen=True):
    """Beside a file that is not whole yet: which lines it has up to which byte."""

    batch_id: str
    outcome: str
    after: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Target:
    """A file for the lines of one outcome; `is_extra` if it was not asked for by name."""

    path: Path
    outcome: str
    is_extra: bool = False

    @property
    def mark_path(self) -> Path:
        """Where the mark of an unfinished file lies."""
        return self.path.with_name(f".{self.path.name}.mark")


def fetch_results(server: Server, batch_id: str, output: Path | None, outcome: str | None, *, follow: bool) -> NoReturn:
    """Give the lines and end the process."""
    is_streaming = output is None or str(output) == "-"
    again = "the same command again goes on where this one was" if not is_streaming else "the batch goes on"

    async def work(client: BatchClient, clock: Clock) -> ExitCode:
        if is_streaming:
            return await _stream(client, clock, server, batch_id, outcome, follow=follow)
        assert output is not None
        return await _write(client, clock, server, batch_id, _targets(output, outcome), follow=follow)

    with_server(server, work, on_interrupt=lambda: say(f"interrupted; {again}"))


def _targets(output: Path, outcome: str | None) -> Sequence[Target]:
    if outcome is not None:
        return [Target(output, outcome)]
    return [Target(output, "succeeded"), Target(errors_path_for(output), "failed", is_extra=True)]


def _file_of(batch: RemoteBatch, outcome: str) -> str | None:
    """Give the id of the batch's file of that outcome; a server may write "" for none."""
    return (batch.output_file_id if outcome == "succeeded" else batch.error_file_id) or None


# -- to stdout ---------------------------------------------------------------------------------------------------------


async def _stream(
    client: BatchClient, clock: Clock, server: Server, batch_id: str, outcome: str | None, *, follow: bool
) -> ExitCode:
    shown = await client.batch(batch_id)
    sink, count = sys.stdout.buffer, 0
    if shown.batch.is_sealed:
        for each in _OUTCOMES if outcome is None else (outcome,):
            file_id = _file_of(shown.batch, each)
            if file_id is not None:
                await client.download(file_id, sink.write)
        sink.flush()
        tell_end(server, shown.batch, is_fetched=True)
        return ExitCode.OK
    after = "0"
    while True:
        # Asked before the last look: what was finished up to then is in it.
        is_over = (await client.batch(batch_id)).batch.has_ended
        while True:
            page = await _page(client, server, batch_id, after, outcome)
            with page.content:
                shutil.copyfileobj(page.content, sink, _COPY_BYTES)
            after, count = page.last_sequence, count + page.line_count
            if not page.line_count:
                break
        sink.flush()
        if is_over or not follow:
            break
        await clock.sleep(_LOOK_S)
    say(f"{counted(count, 'line')}{'; the batch has ended' if is_over else ' so far; the batch goes on'}")
    return ExitCode.OK


async def _page(client: BatchClient, server: Server, batch_id: str, after: str, outcome: str | None) -> Page:
    page = await client.finished(batch_id, after=after, outcome=outcome)
    if page is None:
        raise NotFound(
            f"this server gives the lines of {batch_id} when it has ended, not before",
            hint=f"Wait for its end: {server.command('status', batch_id, '--wait')}",
        )
    return page


# -- into files --------------------------------------------------------------------------------------------------------


async def _write(
    client: BatchClient, clock: Clock, server: Server, batch_id: str, targets: Sequence[Target], *, follow: bool
) -> ExitCode:
    while True:
        batch = (await client.batch(batch_id)).batch
        if batch.is_sealed:
            paths = [str(each.path) for each in targets if await _complete(client, batch, each)]
            tell_end(server, batch, is_fetched=True)
            say(f"  written: {', '.join(paths) or 'nothing, it has no lines'}")
            return ExitCode.OK
        counts = [await _append(client, server, batch_id, each) for each in targets]
        if batch.has_ended:
            tell_end(server, batch, is_fetched=True)
            return ExitCode.OK
        if not follow:
            break
        await clock.sleep(_LOOK_S)
    say(f"{counted(sum(counts), 'new line')}; the batch goes on, and the same command adds what comes")
    return ExitCode.OK


async def _append(client: BatchClient, server: Server, batch_id: str, target: Target) -> int:
    """Add what was finished since the last call, a page at a time; gives how many lines that was."""
    mark = _read_mark(target, batch_id)
    count = 0
    if mark.size_bytes == 0 and target.is_extra and not (await _has_any(client, server, batch_id, target)):
        return 0
    with _locked(target.path, "r+b" if target.path.exists() else "w+b") as stream:
        if target.path.stat().st_size < mark.size_bytes:
            mark = _Mark(batch_id, target.outcome, "0", 0)
        stream.truncate(mark.size_bytes)
        stream.seek(mark.size_bytes)
        while True:
            page = await _page(client, server, batch_id, mark.after, target.outcome)
            with page.content:
                shutil.copyfileobj(page.content, stream, _COPY_BYTES)
            stream.flush()
            os.fsync(stream.fileno())
            mark = _Mark(batch_id, target.outcome, page.last_sequence, stream.tell())
            write_whole(target.mark_path, msgspec.json.encode(mark))
            count += page.line_count
            if not page.line_count:
                return count


async def _has_any(client: BatchClient, server: Server, batch_id: str, target: Target) -> bool:
    """Tell whether there is a line for a file that nobody asked for by name."""
    page = await _page(client, server, batch_id, "0", target.outcome)
    page.content.close()
    return page.line_count > 0


async def _complete(client: BatchClient, batch: RemoteBatch, target: Target) -> bool:
    """Put the batch's own file at the target, whole or not at all; tells whether there is one.

    What an earlier call has downloaded is not asked for again.
    """
    is_ours = target.mark_path.exists()
    file_id = _file_of(batch, target.outcome)
    if file_id is None and target.is_extra:
        if is_ours:
            target.path.unlink(missing_ok=True)
    else:
        part = target.path.with_name(f".{target.path.name}.{file_id or 'none'}.part")
        with _locked(part, "ab") as stream:
            if file_id is not None:
                await client.download(file_id, stream.write, start=stream.tell())
            stream.flush()
            os.fsync(stream.fileno())
            part.replace(target.path)
        sync_folder(target.path.parent)
    target.mark_path.unlink(missing_ok=True)
    return file_id is not None or not target.is_extra


def _read_mark(target: Target, batch_id: str) -> _Mark:
    """Read how far the file is; one of another batch begins anew."""
    new = _Mark(batch_id, target.outcome, "0", 0)
    try:
        mark = msgspec.json.decode(target.mark_path.read_bytes(), type=_Mark)
    except (FileNotFoundError, msgspec.DecodeError):
        return new
    return mark if (mark.batch_id, mark.outcome) == (batch_id, target.outcome) else new


@contextmanager
def _locked(path: Path, mode: str) -> Iterator[IO[bytes]]:
    """Open a file that one command at a time may write.

    Raises:
        AlreadyRunning: another one does.
        DiskFull, BlobsUnavailable: it cannot be opened or written.
    """
    try:
        with path.open(mode) as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise AlreadyRunning(f"another `batchrunner results` writes {path} just now") from error
            yield stream
    except OSError as error:
        kind = DiskFull if error.errno == errno.ENOSPC else BlobsUnavailable
        hint = "Mend that, then run the same command again: it goes on where this one was."
        raise kind(f"{path} cannot be written: {error.strerror or error}", hint=hint) from error
