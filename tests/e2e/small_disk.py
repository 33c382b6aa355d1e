"""A file system of a few megabytes, to fill up and to empty again."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk takes root"
)
_STEP_BYTES = 64 * 1024


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """Mount one where that may be done."""
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no small disk can be mounted: {mounted.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_up(ballast: Path) -> None:
    """Take all space that is left, to the last page."""
    for step in (_STEP_BYTES, 1):
        with contextlib.suppress(_Full), ballast.open("ab", buffering=0) as stream:
            while True:
                _add(stream.fileno(), step)


class _Full(Exception):
    """There is no space."""


def _add(fd: int, size_bytes: int) -> None:
    try:
        if os.write(fd, bytes(size_bytes)) < size_bytes:
            raise _Full
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise _Full from None
