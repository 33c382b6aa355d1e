"""Files and renames that outlive a power cut."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from batchrunner.errors import DiskFull

# EFBIG comes from a limit on the size of files, which is as good as full: another file may still fit.
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


@contextlib.contextmanager
def telling_full(path: Path) -> Iterator[None]:
    """Have a full disk told in our own words, by the file that is written and does not stay when that fails.

    Raises:
        DiskFull: there is no room for it.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        path.unlink(missing_ok=True)
        raise DiskFull(f"{path} cannot be written: {error.strerror}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a small file, as `write_pieces` does."""
    write_pieces(path, (content,))


def write_pieces(path: Path, pieces: Iterable[bytes]) -> None:
    """Write a file durably, whole or not at all: temp, fsync, rename, fsync the folder.

    Raises:
        DiskFull: there is no room for it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with telling_full(temporary):
        with temporary.open("wb") as stream:
            stream.writelines(pieces)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
        sync_folder(path.parent)


def sync_folder(path: Path) -> None:
    """Make the names in a folder durable."""
    handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
