"""`batchrunner results`: the finished lines of a run, while it goes on or after it died, from registered extents alone.

It takes no lock and writes nothing into the run's folder; a batch on a server is fetched elsewhere.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

import click

from batchrunner.blobs.s3_address import is_s3
from batchrunner.cli.console import say
from batchrunner.cli.run_folder import RunFolder, RunRecord
from batchrunner.cli.server_address import is_batch_id, server_of, server_option
from batchrunner.cli.server_folder import open_store_to_read
from batchrunner.errors import NotFound, UsageError
from batchrunner.frames import Damage, read_payload
from batchrunner.lifecycle import TERMINAL
from batchrunner.models import LOCAL_TENANT, BatchId, RecordKind
from batchrunner.ports import Blobs, TenantScope
from batchrunner.reading import Reader, registered_numbers

_LOOK_S = 0.5


@click.command("results")
@click.argument("run", metavar="RUN_FOLDER|ID", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    type=click.Path(path_type=Path),
    help="Write there instead of to stdout; of a batch, its failed lines go beside it.",
)
@click.option("--failed", "which", flag_value="failed", help="Only lines that failed.")
@click.option("--succeeded", "which", flag_value="succeeded", help="Only lines that succeeded.")
@click.option("--follow", is_flag=True, help="Go on with new lines until the run or batch ends.")
@server_option
def results(*, run: Path, output: Path | None, which: str | None, follow: bool, server_address: str | None) -> None:
    """Give the finished lines of a run, OUTPUT.run, or of a batch on a server, an ID such as batch_1f2e or 7.

    A run may be going on, stopped or killed: its lines come in the order in which they were finished. Lines that were
    refused, or that a deadline left unfinished, are in the run's own errors file only.

    Of a batch that runs, too, the lines finished so far are given; when it has ended, its own files are. With -o OUTPUT
    the succeeded lines go there and the failed ones into OUTPUT with .errors, as `run` writes them, and the same
    command again goes on where the last one was.
    """
    if output is not None and (output.is_dir() or not output.parent.is_dir()):
        raise UsageError(f"-o {output}: no file can be there", hint="Name a file, in a folder that is there.")
    if is_batch_id(run):
        from batchrunner.cli.fetching import fetch_results

        fetch_results(server_of(server_address), str(run), output, which, follow=follow)
    kind = {None: None, "failed": RecordKind.FAILED, "succeeded": RecordKind.SUCCEEDED}[which]
    with ExitStack() as stack:
        opened = stack.enter_context(open_run(run))
        sink = _sink(opened, output, stack)
        count = _copy(opened.lines(kind), sink)
        if follow:
            count += _follow(opened, kind, sink)
        _tell(opened, count)


def _sink(opened: OpenRun, output: Path | None, stack: ExitStack) -> BinaryIO:
    """Open what is written to; the run's own files are not for this command to write."""
    if output is None or str(output) == "-":
        return sys.stdout.buffer
    own = {Path(each).resolve() for each in (opened.record.input, opened.record.output, opened.record.errors)}
    if output.resolve() in own:
        raise UsageError(f"{output} is a file of the run itself", hint="Name another file with -o.")
    return stack.enter_context(output.open("wb"))


def _copy(lines: Iterator[bytes], sink: BinaryIO) -> int:
    count = 0
    for line in lines:
        sink.write(line)
        count += 1
    sink.flush()
    return count


def _follow(opened: OpenRun, kind: RecordKind | None, sink: BinaryIO) -> int:
    """Copy what is registered from now on, until the batch has ended or nobody works on it."""
    count, pause = 0, threading.Event()
    while True:
        # Asked before the last look: what was registered up to then is in it.
        is_over = opened.has_ended() or not opened.is_worked_on()
        count += _copy(opened.lines(kind), sink)
        if is_over:
            return count
        pause.wait(_LOOK_S)


def _tell(opened: OpenRun, count: int) -> None:
    if opened.has_ended():
        there = [path for path in (opened.record.output, opened.record.errors) if is_s3(path) or Path(path).is_file()]
        say(f"{count:,} lines; the run has ended; its files: {', '.join(there) or 'not written yet'}")
    elif opened.is_worked_on():
        say(f"{count:,} lines so far; the run goes on")
    else:
        say(f"{count:,} lines so far; no process works on this run: the same `batchrunner run` again continues it")


# -- a run's folder ----------------------------------------------------------------------------------------------------


@contextmanager
def open_run(path: Path) -> Iterator[OpenRun]:
    """Open the run in a folder, OUTPUT.run, or the one that belongs to OUTPUT.

    Raises:
        NotFound: there is no run.
    """
    folder = RunFolder(folder_of(path))
    record = folder.load()
    if record is None:
        raise NotFound(f"{folder.record_path} is not there: {path} is no run folder", hint="Name OUTPUT.run of a run.")
    if not (folder.path / "state.db").is_file():
        raise NotFound(f"{folder.path / 'state.db'} is not there: this run has not started")
    with open_store_to_read(folder.path) as adapters:
        yield OpenRun(folder, record, adapters.blobs, adapters.store.scope(LOCAL_TENANT))


def folder_of(path: Path) -> Path:
    """Give the run folder that belongs to an OUTPUT; a path that is none as it is."""
    if path.is_dir():
        return path
    beside = path.with_name(f"{path.name}.run")
    return beside if path.is_file() and beside.is_dir() else path


class OpenRun:
    """A run whose finished lines are read while others may work on it."""

    def __init__(self, folder: RunFolder, record: RunRecord, blobs: Blobs, scope: TenantScope) -> None:
        self.record = record
        self._folder = folder
        self._blobs = blobs
        self._scope = scope
        self._readers: list[Reader] = []

    def lines(self, kind: RecordKind | None) -> Iterator[bytes]:
        """Give finished lines that were not given before, in sequence order; those of a kind, or all.

        In a run whose failed lines were tried again, the last result of a line stands for it.
        """
        self._look_for_batches()
        for place, reader in enumerate(self._readers):
            later = [] if reader.has_begun else self.record.batches[place + 1 :]
            again = [registered_numbers(self._blobs, self._scope, BatchId(each)) for each in later]
            for _, record in reader.fresh():
                if kind in (None, record.kind) and not any(record.line_number in numbers for numbers in again):
                    yield read_payload(self._blobs, record)

    def has_ended(self) -> bool:
        """Tell whether the last batch of the run has ended."""
        self._look_for_batches()
        batches = self.record.batches
        return bool(batches) and self._scope.batch(BatchId(batches[-1])).status in TERMINAL

    def is_worked_on(self) -> bool:
        """Tell whether the process that locked the folder last still lives. Its lock is not touched."""
        try:
            pid = int((self._folder.path / "lock").read_text())
            os.kill(pid, 0)
        except (FileNotFoundError, ValueError, ProcessLookupError):
            return False
        except PermissionError:
            return True
        return True

    def _look_for_batches(self) -> None:
        self.record = self._folder.load() or self.record
        for batch_id in self.record.batches[len(self._readers) :]:
            self._readers.append(Reader(self._blobs, self._scope, BatchId(batch_id), on_damage=_tell_damage))


def _tell_damage(damage: Damage) -> None:
    say(f"{damage.segment.blob}: bytes {damage.start:,} to {damage.end:,} are damaged; their lines will run again")
