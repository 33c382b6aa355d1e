"""What is written durably is on the disk with its name when the call returns."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from batchrunner.durable import write_whole


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
