"""The state folder of a run: who works on it, what it is a run of, and where its files lie."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import msgspec
import orjson

from batchrunner import __version__, crash
from batchrunner.durable import write_whole
from batchrunner.errors import AlreadyRunning, BatchrunnerError, DiskFull, OutputExists, RunDiffers, UsageError

_HASH_BYTES = 1 << 18
_COUNT_MAX = 10_001
_OWN_NAMES = frozenset({"lock", "run.json", "manifest.json", "blobs", "blobs.address", "sessions", "input.jsonl"})
_OWN_BEGINNINGS = (".", "state.db", "folded-", "fetched")


class Fingerprint(msgspec.Struct, frozen=True):
    """What tells, without reading it, that a file is most likely the one that was hashed."""

    size_bytes: int
    modified_ns: int
    inode: int


class RunRecord(msgspec.Struct, kw_only=True):
    """run.json: the identity of the run and what it has come to. The rest of the truth is in the store."""

    format: int = 1
    version: str = __version__
    input: str
    input_sha256: str
    input_bytes: int
    line_count_up_to: int
    fingerprint: Fingerprint | None
    output: str
    errors: str
    endpoint: str | None
    on_invalid: str
    on_unknown: str
    batches: list[str] = []
    finished_exit_code: int | None = None
    exported: dict[str, Fingerprint] = {}
    summary: str | None = None


@dataclass(frozen=True, slots=True)
class Hashed:
    """What one pass over the input tells."""

    sha256: str
    size_bytes: int
    line_count_up_to: int


def fingerprint(path: Path) -> Fingerprint:
    """Look at a file without reading it."""
    status = path.stat()
    return Fingerprint(status.st_size, status.st_mtime_ns, status.st_ino)


def hash_file(path: Path) -> Hashed:
    """Read the input once: sha256, size, and its lines as far as 10,001.

    Raises:
        UsageError: it cannot be read.
    """
    digest, size_bytes, lines = hashlib.sha256(), 0, 0
    buffer = bytearray(_HASH_BYTES)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                digest.update(view[:count])
                size_bytes += count
                if lines < _COUNT_MAX:
                    lines += buffer.count(b"\n", 0, count)
    except OSError as error:
        raise UsageError(
            f"INPUT {path} cannot be read: {error.strerror}", hint="Check the file and its disk."
        ) from error
    return Hashed(digest.hexdigest(), size_bytes, lines)


class RunFolder:
    """OUTPUT.run/, locked for as long as this object lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock: int | None = None

    # -- locking -----------------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Make the folder, and make sure that nobody else works on it.

        Raises:
            AlreadyRunning: somebody does; the message names the process.
            UsageError, DiskFull: it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._unusable(error) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
            os.close(handle)
            raise AlreadyRunning(f"{self.path}: process {pid} is running this already") from None
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
        self._lock = handle

    def _unusable(self, error: OSError) -> BatchrunnerError:
        text = f"the state folder {self.path} cannot be used: {error.strerror}"
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return DiskFull(text)
        return UsageError(text, hint="Name another place with --state DIR.")

    def unlock(self) -> None:
        """Let others in."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    # -- run.json ----------------------------------------------------------------------------------------------------

    @property
    def record_path(self) -> Path:
        """Where the record lies."""
        return self.path / "run.json"

    def load(self) -> RunRecord | None:
        """Read the record, None in a new folder."""
        try:
            return msgspec.json.decode(self.record_path.read_bytes(), type=RunRecord)
        except FileNotFoundError:
            return None
        except (msgspec.DecodeError, OSError) as error:
            raise RunDiffers(f"{self.record_path} cannot be read: {error}") from error

    def save(self, record: RunRecord) -> None:
        """Write the record so that it is there whole, whatever happens."""
        crash.point("run_record.before_save")
        write_whole(self.record_path, orjson.dumps(msgspec.to_builtins(record), option=orjson.OPT_INDENT_2) + b"\n")
        crash.point("run_record.saved")

    def clear(self) -> None:
        """Remove the store and the blobs of a run that never sent anything; the lock stays."""
        for name in ("blobs", "sessions"):
            shutil.rmtree(self.path / name, ignore_errors=True)
        for path in self.path.glob("state.db*"):
            path.unlink()

    def set_aside(self) -> Path | None:
        """Rename the folder to the first free NAME.1, NAME.2...: paid results are never deleted. Ends the lock."""
        if not any(name.name != "lock" for name in self.path.iterdir()):
            return None
        number = 1
        while (target := self.path.with_name(f"{self.path.name}.{number}")).exists():
            number += 1
        self.unlock()
        try:
            self.path.rename(target)
        except OSError as error:
            raise self._unusable(error) from error
        self.lock()
        return target


def is_own_name(name: str) -> bool:
    """Tell whether a name in a run folder is one of its own; others may be put there."""
    return name in _OWN_NAMES or name.startswith(_OWN_BEGINNINGS)


def errors_path_for(output: Path) -> Path:
    """Where the error file goes by default: `.errors` before the suffix."""
    return output.with_name(f"{output.stem}.errors{output.suffix}")


def differences(record: RunRecord, wanted: RunRecord) -> list[str]:
    """What makes two records different runs; empty when they are the same."""
    rows = (
        ("input (sha256)", record.input_sha256[:16], wanted.input_sha256[:16]),
        ("--endpoint", record.endpoint, wanted.endpoint),
        ("--on-invalid", record.on_invalid, wanted.on_invalid),
        ("--on-unknown", record.on_unknown, wanted.on_unknown),
    )
    return [f"{what}: was {old}, is {new}" for what, old, new in rows if old != new]


def check_same_run(record: RunRecord, wanted: RunRecord) -> None:
    """Refuse to go on with another run's state.

    Raises:
        RunDiffers: the message lists what differs.
    """
    different = differences(record, wanted)
    if different:
        hint = "Put the original input back, or use" if record.input_sha256 != wanted.input_sha256 else "Use"
        raise RunDiffers(
            f"{wanted.output} belongs to another run; {'; '.join(different)}",
            hint=f"{hint} another output, or start over with --fresh (the old results are kept beside it).",
        )


def check_free(path: Path, *, what: str) -> None:
    """Refuse to write over something that is not ours.

    Raises:
        OutputExists: there is something.
    """
    if path.exists():
        raise OutputExists(f"{what} {path} exists and was not written by this run")
