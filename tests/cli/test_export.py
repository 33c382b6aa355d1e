"""Placing a finished file: in the kernel or through memory, whole or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
from datetime import UTC, datetime
from pathlib import Path

import pytest

from batchrunner.cli.export import _file_entry, _place
from batchrunner.errors import BatchrunnerError, BlobsUnavailable, DiskFull
from batchrunner.models import LOCAL_TENANT, File, FileId

CONTENT = bytes(range(256)) * 5000


def sealed(path: Path, **changes: int) -> dict[Path, File]:
    """The row of a file as its seal wrote it."""
    size_bytes = changes.get("size_bytes", path.stat().st_size)
    row = File(
        id=FileId("file-1"),
        tenant=LOCAL_TENANT,
        purpose="batch_output",
        filename="out.jsonl",
        size_bytes=size_bytes,
        sha256="as sealed",
        blob="files/out",
        created_at=datetime(2030, 1, 1, tzinfo=UTC),
    )
    return {path: row}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "sealed.jsonl"
    path.write_bytes(CONTENT)
    return path


def refuse(code: int):
    def copy_file_range(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    return copy_file_range


@pytest.mark.parametrize("refused", [None, errno.EXDEV, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_is_placed_whole_with_or_without_the_kernels_help(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: int | None
) -> None:
    if refused is not None:
        monkeypatch.setattr(os, "copy_file_range", refuse(refused))
    target = tmp_path / "out.jsonl"
    target.write_bytes(b"of an earlier run")

    _place(source, target, sealed(source))

    assert target.read_bytes() == CONTENT
    assert source.read_bytes() == CONTENT
    assert target.stat().st_ino != source.stat().st_ino
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "sealed.jsonl"]


def test_systems_without_the_call_copy_through_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "copy_file_range")

    _place(source, tmp_path / "out.jsonl")

    assert (tmp_path / "out.jsonl").read_bytes() == CONTENT


@pytest.mark.parametrize(("code", "told"), [(errno.ENOSPC, DiskFull), (errno.EIO, BlobsUnavailable)])
def test_failed_copy_leaves_what_was_there(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, told: type[BatchrunnerError]
) -> None:
    monkeypatch.setattr(os, "copy_file_range", refuse(code))
    target = tmp_path / "out.jsonl"
    target.write_bytes(b"of an earlier run")

    with pytest.raises(told):
        _place(source, target, sealed(source))

    assert target.read_bytes() == b"of an earlier run"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "sealed.jsonl"]


def test_sealed_file_that_lost_bytes_is_not_placed(source: Path, tmp_path: Path) -> None:
    with pytest.raises(BlobsUnavailable, match="were sealed"):
        _place(source, tmp_path / "out.jsonl", sealed(source, size_bytes=len(CONTENT) + 1))

    assert [path.name for path in tmp_path.iterdir()] == ["sealed.jsonl"]


def test_empty_file_is_placed(tmp_path: Path) -> None:
    source = tmp_path / "sealed.jsonl"
    source.write_bytes(b"")

    _place(source, tmp_path / "out.jsonl")
    _place(None, tmp_path / "none.jsonl")

    assert (tmp_path / "out.jsonl").read_bytes() == b""
    assert (tmp_path / "none.jsonl").read_bytes() == b""


def test_manifest_takes_the_hash_of_the_seal_and_makes_its_own_for_a_fold(source: Path) -> None:
    known = _file_entry(source, Path("out.jsonl"), 5, sealed(source))
    made = _file_entry(source, Path("out.jsonl"), 5, {})

    assert known == {"path": "out.jsonl", "bytes": len(CONTENT), "sha256": "as sealed", "lines": 5}
    assert made is not None
    assert made["sha256"] == hashlib.sha256(CONTENT).hexdigest()
    assert _file_entry(None, Path("out.jsonl"), 0, {}) is None
