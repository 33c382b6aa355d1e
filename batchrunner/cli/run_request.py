"""What a `run` was asked for, and what of it is refused before anything is touched: files that would be written over,
and places that cannot be read or written.
"""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from batchrunner.blobs.s3_address import S3Address
from batchrunner.cli.places import Places
from batchrunner.cli.run_folder import errors_path_for, is_own_name
from batchrunner.errors import UsageError


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRequest:
    """What the user asked for, as typed; paths may stand for objects in `places`."""

    places: Places
    input_path: Path
    output_path: Path
    errors_path: Path | None
    state_path: Path | None
    endpoint: str | None
    completion_window: str | None
    order: str
    on_invalid: str
    on_unknown: str
    retry_failed: str | None
    limit: int | None
    is_fresh: bool
    is_json: bool
    same_command: str

    @property
    def is_streaming(self) -> bool:
        """Whether finished lines go to stdout."""
        return str(self.output_path) == "-"

    @property
    def is_from_stdin(self) -> bool:
        """Whether the input comes from stdin."""
        return str(self.input_path) == "-"


def state_path(request: RunRequest) -> Path:
    """Give the place of the run folder.

    Raises:
        UsageError: it has none.
    """
    if request.state_path is not None:
        return request.state_path
    if not request.is_streaming:
        return request.output_path.with_name(f"{request.output_path.name}.run")
    if request.is_from_stdin:
        raise UsageError(
            "a run from stdin to stdout has no place for its state", hint="Add --state DIR; it makes the run resumable."
        )
    return request.input_path.with_name(f"{request.input_path.name}.run")


def errors_path(request: RunRequest) -> Path:
    """Give the place of the errors file; a run that streams has it beside its input or in its folder."""
    if request.errors_path is not None:
        return request.errors_path
    if not request.is_streaming:
        return errors_path_for(request.output_path)
    if request.is_from_stdin:
        return state_path(request) / "errors.jsonl"
    return errors_path_for(request.input_path)


def check_request(request: RunRequest) -> None:
    """Refuse what could not end well; the folders of the files to be written are made.

    Raises:
        UsageError: the message names the place.
    """
    if request.is_streaming and request.is_json:
        raise UsageError(
            "-o - and --json: stdout cannot carry the finished lines and the object",
            hint="Write OUTPUT to a file, or leave --json out: the summary is on stderr.",
        )
    _require_input(request)
    targets = _targets(request)
    for what, place in targets.items():
        if isinstance(place, Path):
            _require_writable(what, place)
    folder = state_path(request)
    seen = _look("the state folder", folder)
    if seen is not None and not stat.S_ISDIR(seen.st_mode):
        raise UsageError(f"the state folder {folder} is a file", hint="Name another place with --state DIR.")
    _refuse_writing_over(request, targets, folder)
    for what, place in targets.items():
        if isinstance(place, Path):
            _make_folder(what, place)


# -- what is read ------------------------------------------------------------------------------------------------------


def _require_input(request: RunRequest) -> None:
    path = request.input_path
    request.places.require_source()
    if request.places.source is not None:
        return
    if request.is_from_stdin:
        if sys.stdin is None:
            raise UsageError("INPUT -: stdin is closed", hint="Pipe the requests in.")
        return
    seen = _look("INPUT", path)
    if seen is None:
        raise UsageError(f"INPUT {path} is not there", hint="Check the path.")
    if not stat.S_ISREG(seen.st_mode):
        hint = "Name a file." if stat.S_ISDIR(seen.st_mode) else "Pipe it into `batchrunner run - --state DIR`."
        raise UsageError(f"INPUT {path} is {_kind(seen)}, not a file", hint=hint)
    try:
        path.open("rb").close()
    except OSError as error:
        raise UsageError(f"INPUT {path} cannot be read: {error.strerror}", hint="Check its permissions.") from error


# -- what is written ---------------------------------------------------------------------------------------------------


def _targets(request: RunRequest) -> dict[str, Path | S3Address]:
    """Give the files that the run writes by what they are called, OUTPUT first."""
    objects, targets = request.places.objects, dict[str, Path | S3Address]()
    if not request.is_streaming:
        # Before its errors file is asked for, whose name is made of that of OUTPUT.
        if not request.output_path.name:
            raise UsageError(f"OUTPUT {request.output_path} is a folder", hint="Name a file.")
        targets["OUTPUT"] = objects.get(request.output_path, request.output_path)
    errors = errors_path(request)
    targets["the errors file"] = objects.get(errors, errors)
    return targets


def _require_writable(what: str, path: Path) -> None:
    """Refuse a place that no file can take: it is renamed to there, and would replace whatever that is."""
    seen = _look(what, path)
    if seen is not None and not stat.S_ISREG(seen.st_mode):
        raise UsageError(f"{what} {path} is {_kind(seen)}", hint="Name a file; OUTPUT may be - for stdout.")
    _look(what, path.with_name(f".{path.name}.tmp"))


def _make_folder(what: str, path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{what} {path}: its folder cannot be made: {error.strerror}", hint="Check the path."
        ) from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{what} {path}: nothing can be written into its folder", hint="Check its permissions.")


def _refuse_writing_over(request: RunRequest, targets: dict[str, Path | S3Address], folder: Path) -> None:
    """Refuse targets that are the input, each other or a file of the run folder."""
    source = None if request.is_from_stdin else request.places.source or request.input_path
    for what, place in targets.items():
        if source is not None and _is_same(place, source):
            raise UsageError(f"{what} {place} is INPUT {source}", hint=_other(what))
        if isinstance(place, Path) and _is_own(place, folder):
            raise UsageError(f"{what} {place} belongs to the state folder {folder}", hint=_other(what))
    (last_what, last), (first_what, first) = (*targets.items(),)[-1], (*targets.items(),)[0]
    if last_what != first_what and _is_same(last, first):
        raise UsageError(f"{last_what} {last} is {first_what} {first}", hint=_other(last_what))
    if request.is_fresh and isinstance(source, Path) and _below(source, folder):
        raise UsageError(f"INPUT {source} is in the state folder {folder}, which --fresh sets aside")


def _other(what: str) -> str:
    return "Name another file with -o." if what == "OUTPUT" else "Name another file with --errors."


def _is_same(one: Path | S3Address, other: Path | S3Address) -> bool:
    if isinstance(one, S3Address) or isinstance(other, S3Address):
        return one == other
    try:
        return one.samefile(other)
    except OSError:
        # One is not there, so that neither is a link to the other's file.
        return os.path.realpath(one) == os.path.realpath(other)


def _is_own(path: Path, folder: Path) -> bool:
    below = _below(path, folder)
    return below is not None and (not below.parts or is_own_name(below.parts[0]))


def _below(path: Path, folder: Path) -> Path | None:
    """Give the path from a folder on, None if it is elsewhere."""
    real = Path(os.path.realpath(path))
    root = os.path.realpath(folder)
    return real.relative_to(root) if real.is_relative_to(root) else None


def _look(what: str, path: Path) -> os.stat_result | None:
    """Look at what is at a path, None if nothing is."""
    try:
        return path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"{what} {path}: {error.strerror}", hint="Check the path.") from error
    except ValueError as error:
        raise UsageError(f"{what} {str(path)!r}: {error}", hint="Check the path.") from error


def _kind(seen: os.stat_result) -> str:
    if stat.S_ISDIR(seen.st_mode):
        return "a folder"
    return "a pipe" if stat.S_ISFIFO(seen.st_mode) else "a device"
