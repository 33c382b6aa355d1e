"""What a `run` does before it starts the engine: lock its folder, read its input once, and make sure that it is the
same run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from batchrunner.app import was_anything_sent
from batchrunner.cli.console import say
from batchrunner.cli.inputs import PACKED, pieces_of, plain
from batchrunner.cli.places import Places
from batchrunner.cli.run_folder import (
    Fingerprint,
    Hashed,
    RunFolder,
    RunRecord,
    check_free,
    check_same_run,
    differences,
    fingerprint,
    hash_file,
)
from batchrunner.cli.run_request import RunRequest, errors_path, state_path
from batchrunner.durable import write_pieces
from batchrunner.errors import UsageError
from batchrunner.settings import Settings


@dataclass(slots=True, kw_only=True)
class Prepared:
    """A locked folder, the record of the run, and the plain file that is sliced into shards."""

    places: Places
    folder: RunFolder
    record: RunRecord
    source: Path
    line_count_up_to: int
    output_path: Path
    errors_path: Path

    @property
    def assets_base(self) -> Path:
        """The file beside which media answers go: OUTPUT, or the errors file of a run that streams."""
        return self.errors_path if str(self.output_path) == "-" else self.output_path


def prepare(request: RunRequest, settings: Settings) -> Prepared:
    """Lock the folder, find the input, compare identities. Blocks; the caller unlocks the folder.

    Raises:
        AlreadyRunning, RunDiffers, OutputExists, UsageError, DiskFull: as their names say.
    """
    folder = RunFolder(state_path(request))
    folder.lock()
    try:
        if request.is_fresh:
            kept = folder.set_aside()
            if kept is not None:
                say(f"starting over; the old state is kept in {kept}")
        return _prepare_locked(request, folder, settings)
    except BaseException:
        folder.unlock()
        raise


def _prepare_locked(request: RunRequest, folder: RunFolder, settings: Settings) -> Prepared:
    output, errors = request.output_path, errors_path(request)
    old = folder.load()
    kept = folder.path.resolve() / "input.jsonl"
    # Only the input of this very run takes the place of its copy: one that is refused must not.
    offered = kept.with_name(".input.jsonl.new")
    try:
        source, hashed, mark = _source(request, old, kept, offered)
        record = _same_or_new(folder, settings, old, _record(request, hashed, mark))
        if source == offered:
            source = offered.replace(kept)
    finally:
        offered.unlink(missing_ok=True)
    if not record.batches and not request.is_fresh:
        for path, what in ((output, "OUTPUT"), (errors, "the errors file")):
            is_stream = request.is_streaming and what == "OUTPUT"
            if not is_stream and not request.places.check_free(path, what=what):
                check_free(path, what=what)
    folder.save(record)
    return Prepared(
        places=request.places,
        folder=folder,
        record=record,
        source=source,
        line_count_up_to=hashed.line_count_up_to,
        output_path=output,
        errors_path=errors,
    )


def _record(request: RunRequest, hashed: Hashed, mark: Fingerprint | None) -> RunRecord:
    return RunRecord(
        input=_shown_input(request),
        input_sha256=hashed.sha256,
        input_bytes=hashed.size_bytes,
        line_count_up_to=hashed.line_count_up_to,
        fingerprint=mark,
        output=request.places.shown(request.output_path),
        errors=request.places.shown(errors_path(request)),
        endpoint=request.endpoint,
        on_invalid=request.on_invalid,
        on_unknown=request.on_unknown,
    )


def _shown_input(request: RunRequest) -> str:
    if request.places.source is not None:
        return str(request.places.source)
    return str(request.input_path if request.is_from_stdin else request.input_path.resolve())


def _same_or_new(folder: RunFolder, settings: Settings, old: RunRecord | None, new: RunRecord) -> RunRecord:
    """Go on with the old record if it is of the same run; start anew if nothing was ever sent; else refuse.

    Raises:
        RunDiffers: the folder holds results of another run.
    """
    if old is None or not old.batches:
        return new
    if differences(old, new):
        if was_anything_sent(folder.path, settings, old.batches):
            check_same_run(old, new)
        say("nothing was sent before; starting with the input as it is now")
        folder.clear()
        return new
    old.fingerprint, old.input, old.errors = new.fingerprint, new.input, new.errors
    return old


def _source(
    request: RunRequest, old: RunRecord | None, kept: Path, offered: Path
) -> tuple[Path, Hashed, Fingerprint | None]:
    """Find the plain input file; what was hashed before and looks unchanged is not read again.

    One that came packed, from stdin or from a bucket is the copy `kept`, or a new one in `offered`.
    """
    if request.is_from_stdin:
        write_pieces(offered, _piped())
        return offered, hash_file(offered), None
    path, places = request.input_path, request.places
    mark = fingerprint(path) if places.source is None else places.mark(places.source)
    known = old if old is not None and old.fingerprint == mark else None
    is_packed = path.suffix in PACKED
    is_copied = is_packed or places.source is not None
    if is_copied and not (known is not None and kept.is_file()):
        if places.source is not None:
            path = kept.with_name(f"fetched{path.suffix}") if is_packed else offered
            places.fetch_source(path)
        if is_packed:
            write_pieces(offered, plain(path))
        if is_packed and places.source is not None:
            path.unlink()
        return offered, hash_file(offered), mark
    source = kept if is_copied else path.resolve()
    if known is not None:
        return source, Hashed(known.input_sha256, known.input_bytes, known.line_count_up_to), mark
    return source, hash_file(source), mark


def _piped() -> Iterator[bytes]:
    try:
        yield from pieces_of(sys.stdin.buffer)
    except OSError as error:
        raise UsageError(f"INPUT -: stdin cannot be read: {error.strerror or error}") from error
