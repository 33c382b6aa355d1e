"""The end of a run: OUTPUT, errors file and manifest appear whole, and may be written again by any later run."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shlex
import shutil
from collections import Counter, defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import BinaryIO

import msgspec
import orjson

from batchrunner import __version__, crash
from batchrunner.app import Runner
from batchrunner.blobs.s3_address import S3Address, is_s3
from batchrunner.choosing import read_error_line
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.folding import Folded, fold
from batchrunner.cli.places import Places
from batchrunner.cli.preparing import Prepared
from batchrunner.cli.run_folder import Fingerprint, fingerprint
from batchrunner.cli.run_request import RunRequest
from batchrunner.cli.summary import ErrorGroup, Outcome, Summary, counts_of, exit_code_for, given_up_because, usage_of
from batchrunner.durable import FULL, sync_folder, write_whole
from batchrunner.errors import BlobsUnavailable, DiskFull
from batchrunner.lifecycle import TERMINAL
from batchrunner.models import Batch, File
from batchrunner.ports import TenantScope
from batchrunner.room import Room

_SAMPLES = 3
_TOP = 5
_COPY_BYTES = 1 << 22
_KERNEL_BYTES = 1 << 30
# What the file system itself may need for a file.
_MARGIN_BYTES = 1 << 16
# The kernel, the file system or the pair of file systems cannot.
_NO_KERNEL_COPY = frozenset({errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.EPERM})
_NONE: Mapping[Path, File] = {}


def finish(
    request: RunRequest, prepared: Prepared, runner: Runner, scope: TenantScope, outcome: Outcome, *, room: Room
) -> Summary:
    """Export what a batch that has ended holds, write the manifest, remember the end. Blocks.

    Raises:
        DiskFull: there was no room, and nobody waits any more; the next run does it.
    """
    batch = outcome.batch
    if batch.status not in TERMINAL or given_up_because(batch) is not None:
        # What the next run needs of it was written when this one began.
        with contextlib.suppress(DiskFull):
            prepared.folder.save(prepared.record)
        return _summary(request, prepared, outcome, batch, None, code=outcome.code or ExitCode.TROUBLE)
    folded = room.until_done(partial(fold, runner, scope, prepared.record.batches, prepared.folder.path))
    batch = folded.batch
    code = exit_code_for(batch)
    if batch.total_count:
        _export(request, prepared, runner, folded, _sealed_files(prepared, scope, folded), room=room)
        prepared.record.finished_exit_code = int(code)
    summary = _summary(request, prepared, outcome, batch, folded, code=code)
    prepared.record.summary = orjson.dumps(msgspec.to_builtins(summary)).decode()
    room.until_done(partial(prepared.folder.save, prepared.record))
    return summary


def is_untouched(prepared: Prepared) -> bool:
    """Tell whether a finished run's files are still those that it wrote; one that streams may have written none."""
    wanted = prepared.record.exported
    return (bool(wanted) or str(prepared.output_path) == "-") and all(
        prepared.places.is_as_written(path, mark)
        if is_s3(path)
        else Path(path).is_file() and fingerprint(Path(path)) == mark
        for path, mark in wanted.items()
    )


# -- files -----------------------------------------------------------------------------------------------------------


def assets_folder(output: Path) -> Path:
    """Where the media answers of a run go."""
    return output.with_name(f"{output.name}.assets")


def _export_assets(prepared: Prepared, runner: Runner, room: Room) -> None:
    """Copy the media answers of all batches of the run beside OUTPUT; none, no folder."""
    blobs, folder = runner.adapters.blobs, assets_folder(prepared.assets_base)
    address = prepared.places.objects.get(prepared.assets_base)
    for batch_id in prepared.record.batches:
        for name in blobs.list(f"assets/{batch_id}/asset_"):
            if address is not None:
                below = address.beside(folder.name).below(Path(name).name)
                room.until_done(partial(_store_asset, prepared.places, blobs.path(name), below), is_there=_never)
                continue
            folder.mkdir(exist_ok=True)
            target = folder / Path(name).name
            if not target.exists():
                _place_in(room, blobs.path(name), target)


def _store_asset(places: Places, source: Path, address: S3Address) -> None:
    """Make a media answer an object, unless it is one: its name tells its bytes."""
    if places.mark(address) is None:
        places.store(source, address)


def _sealed_files(prepared: Prepared, scope: TenantScope, folded: Folded) -> dict[Path, File]:
    """The rows of files that are exported as they were sealed; a fold over retries has none."""
    if len(prepared.record.batches) > 1:
        return {}
    pairs = ((folded.output, folded.batch.output_file_id), (folded.errors, folded.batch.error_file_id))
    return {path: scope.file(file_id) for path, file_id in pairs if path is not None and file_id is not None}


def _export(
    request: RunRequest, prepared: Prepared, runner: Runner, folded: Folded, sealed: dict[Path, File], *, room: Room
) -> None:
    """Put the files at their places, OUTPUT last: whoever sees it sees the errors and the manifest too."""
    crash.point("export.before")
    _export_assets(prepared, runner, room)
    exported: dict[str, Fingerprint] = {}
    if folded.errors is None:
        _clear(prepared, prepared.errors_path)
    else:
        exported |= _put(prepared, folded.errors, prepared.errors_path, sealed, room)
    crash.point("export.errors_placed")
    room.until_done(partial(_write_manifest, prepared, runner, folded, sealed))
    crash.point("export.manifest_written")
    if not request.is_streaming:
        exported |= _put(prepared, folded.output, prepared.output_path, sealed, room)
        crash.point("export.output_placed")
    prepared.record.exported = exported


def _clear(prepared: Prepared, target: Path) -> None:
    """Have no file at a place."""
    address = prepared.places.objects.get(target)
    if address is None:
        target.unlink(missing_ok=True)
    else:
        prepared.places.remove(address)


def _put(
    prepared: Prepared, source: Path | None, target: Path, sealed: Mapping[Path, File], room: Room
) -> dict[str, Fingerprint]:
    """Have the bytes of `source` at a place, on this disk or in a bucket. Raises as `_place`."""
    address = prepared.places.objects.get(target)
    if address is None:
        return _place_in(room, source, target, sealed)
    if source is not None and source.stat().st_size != (wanted := _size_bytes(source, sealed)):
        raise BlobsUnavailable(f"{source} has {source.stat().st_size:,} bytes, {wanted:,} were sealed")
    return room.until_done(partial(prepared.places.store, source, address), is_there=_never)


def _place_in(
    room: Room, source: Path | None, target: Path, sealed: Mapping[Path, File] = _NONE
) -> dict[str, Fingerprint]:
    """Place a file as soon as there is room for it."""

    def is_there() -> bool:
        space = os.statvfs(target.parent)
        needed = source.stat().st_size if source is not None else 0
        return space.f_bavail * space.f_frsize >= needed + _MARGIN_BYTES

    return room.until_done(partial(_place, source, target, sealed), is_there=is_there)


def _never() -> bool:
    """Stands where nothing tells of room, and trying is dear."""
    return False


def _place(source: Path | None, target: Path, sealed: Mapping[Path, File] = _NONE) -> dict[str, Fingerprint]:
    """Make `target` a file of its own with the bytes of `source`, empty without one: temp, fsync, rename, fsync the
    folder.

    Raises:
        DiskFull, BlobsUnavailable: it is not there, or `source` is not as long as it was sealed.
    """
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with temporary.open("wb") as writing:
            if source is not None:
                with source.open("rb") as reading:
                    _copy(reading, writing)
            writing.flush()
            os.fsync(writing.fileno())
            size_bytes = os.fstat(writing.fileno()).st_size
        if source is not None and size_bytes != (wanted := _size_bytes(source, sealed)):
            temporary.unlink()
            raise BlobsUnavailable(f"{source} has {size_bytes:,} bytes, {wanted:,} were sealed")
        temporary.replace(target)
        sync_folder(target.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        kind = DiskFull if error.errno in FULL else BlobsUnavailable
        hint = "Every result is kept. Make room, or mend the folder, then run the same command again."
        raise kind(f"{target} cannot be written: {error.strerror}", hint=hint) from error
    return {str(target.resolve()): fingerprint(target)}


def _size_bytes(source: Path, sealed: Mapping[Path, File]) -> int:
    return sealed[source].size_bytes if source in sealed else source.stat().st_size


def _copy(reading: BinaryIO, writing: BinaryIO) -> None:
    """Copy a whole file inside the kernel, which on some file systems shares its blocks, or else through memory."""
    copied = 0
    try:
        while count := os.copy_file_range(reading.fileno(), writing.fileno(), _KERNEL_BYTES):
            copied += count
    except (OSError, AttributeError) as error:
        if copied or (isinstance(error, OSError) and error.errno not in _NO_KERNEL_COPY):
            raise
    if not copied:
        shutil.copyfileobj(reading, writing, _COPY_BYTES)


def _write_manifest(prepared: Prepared, runner: Runner, folded: Folded, sealed: Mapping[Path, File]) -> None:
    record, batch, places = prepared.record, folded.batch, prepared.places
    ended_at = batch.completed_at or batch.expired_at or batch.cancelled_at or batch.failed_at or batch.created_at
    manifest = {
        "manifest_version": 1,
        "batchrunner_version": __version__,
        "batch_id": batch.id,
        "status": batch.status.value,
        "created_at": batch.created_at.isoformat(),
        "ended_at": ended_at.isoformat(),
        "input": {"path": record.input, "bytes": record.input_bytes, "sha256": record.input_sha256},
        "endpoint": record.endpoint,
        "on_invalid": record.on_invalid,
        "on_unknown": record.on_unknown,
        "settings": msgspec.to_builtins(runner.settings),
        "counts": counts_of(batch),
        "usage": usage_of(batch),
        "retries": batch.retry_count,
        "re_executed": batch.re_executed_count,
        "output": _file_entry(folded.output, places.shown(prepared.output_path), batch.succeeded_count, sealed),
        "errors": _file_entry(
            folded.errors, places.shown(prepared.errors_path), batch.total_count - batch.succeeded_count, sealed
        ),
    }
    write_whole(prepared.folder.path / "manifest.json", orjson.dumps(manifest, option=orjson.OPT_INDENT_2) + b"\n")


def _file_entry(
    source: Path | None, target: Path | str, lines: int, sealed: Mapping[Path, File]
) -> dict[str, object] | None:
    """Describe one file. What was sealed was hashed while it was written, so that its bytes are not read again."""
    if source is None:
        return None
    if source in sealed:
        sha256 = sealed[source].sha256
    else:
        with source.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"path": str(target), "bytes": _size_bytes(source, sealed), "sha256": sha256, "lines": lines}


# -- summary ---------------------------------------------------------------------------------------------------------


def _summary(
    request: RunRequest, prepared: Prepared, outcome: Outcome, batch: Batch, folded: Folded | None, *, code: ExitCode
) -> Summary:
    done = max(0, batch.done_count - outcome.done_before)
    errors = prepared.errors_path if folded is not None and folded.errors is not None else None
    has_files = folded is not None and batch.total_count > 0
    output = prepared.places.shown(prepared.output_path) if has_files and not request.is_streaming else None
    error = outcome.error
    return Summary(
        status=batch.status.value,
        exit_code=int(code),
        batch_id=batch.id,
        counts=counts_of(batch),
        usage=usage_of(batch),
        elapsed_s=round(outcome.elapsed_s, 3),
        requests_per_s=round(done / outcome.elapsed_s, 1) if outcome.elapsed_s > 0 else 0.0,
        retries=batch.retry_count,
        re_executed=batch.re_executed_count,
        top_errors=_top_errors(folded.errors if folded is not None else None, outcome),
        output=output,
        errors=prepared.places.shown(errors) if errors is not None else None,
        manifest=str(prepared.folder.path / "manifest.json") if has_files else None,
        error={"code": error.code, "message": error.message, "hint": error.advice} if error is not None else None,
        next_command=_next_command(request, prepared, batch, code),
    )


def _top_errors(errors: Path | None, outcome: Outcome) -> list[ErrorGroup]:
    """Group the failed lines by code; before the end, the failed attempts so far stand in."""
    if errors is None and outcome.batch.status in TERMINAL:
        return []
    if errors is None:
        return [ErrorGroup(code, count, []) for code, count in outcome.live.tally.failures.most_common(_TOP)]
    counts: Counter[str] = Counter()
    samples: dict[str, list[str]] = defaultdict(list)
    with errors.open("rb") as stream:
        for raw in stream:
            line = read_error_line(raw)
            counts[line.code] += 1
            if len(samples[line.code]) < _SAMPLES:
                samples[line.code].append(line.custom_id or "(no custom_id)")
    return [ErrorGroup(code, count, samples[code]) for code, count in counts.most_common(_TOP)]


def _next_command(request: RunRequest, prepared: Prepared, batch: Batch, code: ExitCode) -> str | None:
    """What to type next, None when there is nothing to do."""
    match code:
        case ExitCode.OK | ExitCode.USAGE:
            return None
        case ExitCode.SOME_FAILED | ExitCode.DEADLINE:
            # Refused lines would be refused again, and who has just retried wants to know why it failed once more.
            if request.retry_failed is not None or batch.refused_count == batch.total_count - batch.succeeded_count:
                return f"batchrunner errors {shlex.quote(str(prepared.folder.path))}"
            return f"{request.same_command} --retry-failed"
        case ExitCode.INPUT_INVALID if batch.status in TERMINAL:
            # What was on stdin or in a bucket cannot be named there, but the run has a copy.
            has_name = not request.is_from_stdin and request.places.source is None
            source = prepared.record.input if has_name else str(prepared.folder.path / prepared.source.name)
            rules = [] if request.endpoint is None else ["--endpoint", request.endpoint]
            return f"batchrunner validate {shlex.join([source, *rules])}"
        case _:
            return request.same_command
