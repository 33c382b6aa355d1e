"""What is written durably is on the disk with its name when the call returns."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchrunner.durable import write_pieces, write_whole
from batchrunner.errors import DiskFull


def test_a_small_file_is_synced_before_it_is_named_and_its_folder_behind_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "note"
    path.write_bytes(b"old")
    synced: list[tuple[str, bytes]] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        real(fd)
        synced.append((Path(f"/proc/self/fd/{fd}").readlink().name, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", fsync)

    write_whole(path, b"new")

    assert synced == [(".note.tmp", b"old"), (tmp_path.name, b"new")]
    assert [each.name for each in tmp_path.iterdir()] == ["note"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_file_without_room_is_told_and_leaves_what_was_there(tmp_path: Path, code: int) -> None:
    def pieces() -> Iterator[bytes]:
        yield b"a part"
        raise OSError(code, os.strerror(code))

    path = tmp_path / "note"
    path.write_bytes(b"old")

    with pytest.raises(DiskFull, match=r"note"):
        write_pieces(path, pieces())

    assert path.read_bytes() == b"old"
    assert [each.name for each in tmp_path.iterdir()] == ["note"]


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "missing" / "note", b"new")
