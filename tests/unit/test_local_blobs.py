"""Blobs in a folder when the file system fails, fills up or holds a user's own file."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from batchrunner.blobs.local import LocalBlobs
from batchrunner.errors import BlobsUnavailable, DiskFull, NameTaken, NotFound, OwnError
from batchrunner.ports import BlobWriter


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    return LocalBlobs(tmp_path / "state" / "blobs")


def fails(code: int):
    """A system call that fails."""

    def call(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    return call


# -- durability ------------------------------------------------------------------------------------------------


def test_every_folder_on_the_way_is_synced_before_a_segment_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linux tells what a descriptor stands for, so the test sees which folders were synced."""
    synced: list[Path] = []
    real = os.fsync

    def fsync(fd: int) -> None:
        synced.append(Path(f"/proc/self/fd/{fd}").readlink())
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    root = tmp_path / "new" / "root"

    LocalBlobs(root).create_segment("journal/b/1.seg").close()

    assert synced[-1] == root / "journal" / "b"
    assert {tmp_path, tmp_path / "new", root, root / "journal"} <= set(synced)


def test_a_segment_whose_name_cannot_be_made_durable_does_not_stay(
    blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs.create_segment("journal/first.seg").close()
    monkeypatch.setattr(os, "fsync", fails(errno.EIO))

    with pytest.raises(BlobsUnavailable):
        blobs.create_segment("journal/second.seg")

    assert list(blobs.list("")) == ["journal/first.seg"]


def test_a_folder_that_was_removed_is_made_again(blobs: LocalBlobs, tmp_path: Path) -> None:
    blobs.create_segment("journal/b/1.seg").close()
    blobs.delete("journal/b/1.seg")
    (tmp_path / "state" / "blobs" / "journal" / "b").rmdir()

    blobs.create_segment("journal/b/2.seg").close()

    assert list(blobs.list("")) == ["journal/b/2.seg"]


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (errno.ENOSPC, DiskFull),
        (errno.EDQUOT, DiskFull),
        (errno.EFBIG, DiskFull),
        (errno.EIO, BlobsUnavailable),
        (errno.EROFS, BlobsUnavailable),
        (errno.ENOENT, BlobsUnavailable),
    ],
)
def test_errors_of_writing_are_ours_and_end_the_appender(
    blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception]
) -> None:
    appender = blobs.create_segment("a.seg")
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", fails(code))
        with pytest.raises(error):
            appender.append(b"x")

    with pytest.raises(BlobsUnavailable, match="ended"):
        appender.append(b"x")
    with pytest.raises(BlobsUnavailable, match="ended"):
        appender.sync()
    appender.close()


def test_a_failed_sync_ends_the_appender(blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    appender = blobs.create_segment("a.seg")
    appender.append(b"x")
    with monkeypatch.context() as patched:
        patched.setattr(os, "fdatasync", fails(errno.EIO))
        with pytest.raises(BlobsUnavailable):
            appender.sync()

    with pytest.raises(BlobsUnavailable, match="ended"):
        appender.sync()
    appender.close()


def test_a_short_write_is_a_full_disk(blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.write
    monkeypatch.setattr(os, "write", lambda fd, chunk: real(fd, chunk[:3]))
    appender = blobs.create_segment("a.seg")

    with pytest.raises(DiskFull, match="3 of 5 bytes"):
        appender.append(b"12345")

    appender.close()


def commit_on_a_full_disk(writer: BlobWriter, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """Try to commit while one call of the system finds no space."""
    with monkeypatch.context() as patched:
        patched.setattr(os, call, fails(errno.ENOSPC))
        with pytest.raises(DiskFull):
            writer.commit()


@pytest.mark.parametrize("call", ["fsync", "link"])
def test_a_commit_that_fails_leaves_no_name_and_abort_no_file(
    blobs: LocalBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    writer = blobs.writer("a")
    writer.write(b"x")
    commit_on_a_full_disk(writer, monkeypatch, call)

    writer.abort()

    assert list((tmp_path / "state" / "blobs").iterdir()) == []


def test_a_folder_that_cannot_be_made_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")

    with pytest.raises(BlobsUnavailable):
        LocalBlobs(tmp_path / "file" / "blobs")


def test_a_file_in_the_way_of_a_folder_is_no_name_taken(blobs: LocalBlobs) -> None:
    """A journal would otherwise try one segment number after the other for ever."""
    blobs.create_segment("a").close()

    with pytest.raises(BlobsUnavailable):
        blobs.create_segment("a/below")
    with pytest.raises(BlobsUnavailable):
        blobs.writer("a/below")


def test_a_failing_read_is_unavailable(blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs.create_segment("a.seg").close()
    monkeypatch.setattr(os, "pread", fails(errno.EIO))

    with pytest.raises(BlobsUnavailable):
        blobs.read("a.seg", 0, 1)


def test_eight_mebibytes_are_one_read(blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    appender = blobs.create_segment("a.seg")
    appender.append(bytes(9 << 20))
    appender.close()
    calls: list[int] = []
    real = os.pread

    def pread(fd: int, size: int, at: int) -> bytes:
        calls.append(size)
        return real(fd, size, at)

    monkeypatch.setattr(os, "pread", pread)

    assert len(blobs.read("a.seg", 0, 8 << 20)) == 8 << 20
    assert calls == [8 << 20]


def test_a_read_that_comes_in_pieces_is_put_together(blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    appender = blobs.create_segment("a.seg")
    appender.append(b"0123456789")
    appender.close()
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, size, at: real(fd, min(size, 3), at))

    assert blobs.read("a.seg", 1, 9) == b"12345678"


def test_the_reserve_takes_real_space(blobs: LocalBlobs, tmp_path: Path) -> None:
    blobs.keep_reserve(300_000)

    reserve = (tmp_path / "state" / "blobs" / "reserve~").stat()

    assert reserve.st_blocks * 512 >= 300_000


def test_a_reserve_that_does_not_fit_leaves_nothing(
    blobs: LocalBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "posix_fallocate", fails(errno.ENOSPC))

    with pytest.raises(DiskFull):
        blobs.keep_reserve(300_000)

    assert list((tmp_path / "state" / "blobs").iterdir()) == []


# -- adopted files ---------------------------------------------------------------------------------------------


def test_an_adopted_file_is_read_in_place(blobs: LocalBlobs, tmp_path: Path) -> None:
    source = tmp_path / "my input.jsonl"
    source.write_bytes(b"line\n")

    blobs.adopt("input/source", source)

    assert blobs.read("input/source", 0, 5) == b"line\n"
    assert blobs.size_bytes("input/source") == 5
    assert list(blobs.list("")) == ["input/source"]


def test_adopting_again_follows_a_file_that_moved(blobs: LocalBlobs, tmp_path: Path) -> None:
    for name in ("old", "new"):
        (tmp_path / name).write_bytes(name.encode())
    blobs.adopt("source", tmp_path / "old")
    (tmp_path / "old").unlink()
    is_dangling = not blobs.exists("source")

    blobs.adopt("source", tmp_path / "new")

    assert is_dangling
    assert blobs.read("source", 0, 3) == b"new"


def test_deleting_an_adopted_file_leaves_the_users_own(blobs: LocalBlobs, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"x")
    blobs.adopt("source", tmp_path / "mine")

    blobs.delete("source")

    assert not blobs.exists("source")
    assert (tmp_path / "mine").exists()


def test_adoption_refuses_what_it_cannot_mean(blobs: LocalBlobs, tmp_path: Path) -> None:
    (tmp_path / "mine").write_bytes(b"x")
    blobs.create_segment("ours.seg").close()

    with pytest.raises(OwnError, match="absolute"):
        blobs.adopt("source", Path("mine"))
    with pytest.raises(NotFound):
        blobs.adopt("source", tmp_path / "missing")
    with pytest.raises(NameTaken):
        blobs.adopt("ours.seg", tmp_path / "mine")
    assert list(blobs.list("")) == ["ours.seg"]


# -- a real short write ----------------------------------------------------------------------------------------

LIMITED = textwrap.dedent(
    """
    import resource, sys
    from pathlib import Path

    from batchrunner.blobs.local import LocalBlobs
    from batchrunner.frames import read_payload, read_records
    from batchrunner.journal import Journal
    from batchrunner.models import BatchId, NO_USAGE, RecordKind, SegmentRef, SessionId, TaskId, TaskRef

    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    blobs = LocalBlobs(Path(sys.argv[1]))
    journal = Journal(blobs, SessionId("s"), on_durable=lambda: None)
    ref = TaskRef(task_id=TaskId(1), epoch=1)
    shard = journal.open(BatchId("b"), ref, first_mark=0)
    payloads = {number: b'{"line":%d,"text":"%s"}' % (number, b"x" * 700) + bytes([10]) for number in range(1, 101)}
    for number, payload in payloads.items():
        shard.add(number, RecordKind.SUCCEEDED, NO_USAGE, payload)
        if number % 3 == 0:
            shard.flush()
    journal.close()
    seen = {}
    extents = shard.take_registrable()
    for extent in extents:
        segment = SegmentRef(
            batch_id=BatchId("b"), task_id=TaskId(1), epoch=1, session=SessionId("s"), number=extent.segment
        )
        for record in read_records(blobs, segment, extent.byte_start, extent.byte_end):
            assert record.line_number not in seen
            seen[record.line_number] = read_payload(blobs, record)
    assert seen == payloads, sorted(set(payloads) - set(seen))
    torn = sum(blobs.size_bytes(name) == 10_000 for name in blobs.list(""))
    print(len(extents), torn, journal.trouble)
    """
)


def test_short_writes_of_a_real_file_system_lose_and_double_nothing(tmp_path: Path) -> None:
    """A limit on the size of files makes the kernel write short in the middle of a frame."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", LIMITED, str(tmp_path / "blobs")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        cwd=Path(__file__).parents[2],
    )

    assert ran.returncode == 0, ran.stderr
    extents, torn, trouble = ran.stdout.split()
    assert int(extents) > 8
    assert int(torn) == int(extents) - 1
    assert trouble == "None"


REPEATED = textwrap.dedent(
    """
    import hashlib, resource, sys
    from pathlib import Path

    from batchrunner.blobs.local import LocalBlobs
    from batchrunner.errors import DiskFull

    def allow(size_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, resource.RLIM_INFINITY))

    blobs = LocalBlobs(Path(sys.argv[1]))
    writer = blobs.writer("long")
    pieces = [bytes([number]) * (100_000 + 9_973 * number % 150_000) for number in range(40)]
    allowed, refusals = 1_000, 0

    def patiently(function):
        global allowed, refusals
        while True:
            allow(allowed)
            try:
                return function()
            except DiskFull:
                refusals += 1
                allowed += 77_777

    for piece in pieces:
        patiently(lambda: writer.write(piece))
    patiently(writer.commit)
    whole = b"".join(pieces)
    assert blobs.size_bytes("long") == len(whole)
    assert blobs.read("long", 0, len(whole)) == whole
    print(refusals)
    """
)


def test_what_a_full_disk_refused_is_written_again_without_a_hole_or_a_repeat(tmp_path: Path) -> None:
    """The space comes back bit by bit, and each time the kernel writes short."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", REPEATED, str(tmp_path / "blobs")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert ran.stderr == ""
    assert int(ran.stdout) > 20


def test_a_blob_whose_sync_failed_is_never_committed(
    blobs: LocalBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = blobs.writer("a")
    writer.write(b"sound")
    commit_on_a_full_disk(writer, monkeypatch, "fsync")

    with pytest.raises(BlobsUnavailable, match="has ended"):
        writer.commit()
    writer.abort()

    assert not blobs.exists("a")


# -- what the dead leave behind ------------------------------------------------------------------------------------


def test_a_sweep_removes_what_a_killed_writer_left_and_nothing_else(blobs: LocalBlobs, tmp_path: Path) -> None:
    root = tmp_path / "state" / "blobs"
    program = """
        import os, signal, sys
        from pathlib import Path
        from batchrunner.blobs.local import LocalBlobs
        LocalBlobs(Path(sys.argv[1])).writer("assets/b/line_1").write(b"half" * 100_000)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program), str(root)], check=False)
    living = blobs.writer("assets/b/line_2")
    living.write(b"whole")
    whole = blobs.writer("assets/b/3.png")
    whole.commit()
    (left,) = [path for path in (root / "assets" / "b").iterdir() if path.name.startswith("line_1~")]

    swept = LocalBlobs(root).drop_unfinished()
    living.commit()

    assert swept == 1
    assert not left.exists()
    assert list(blobs.list("")) == ["assets/b/3.png", "assets/b/line_2"]
    assert blobs.drop_unfinished() == 0


def test_a_writer_that_a_sweep_mistook_for_a_dead_one_begins_again(
    blobs: LocalBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.flock
    swept: list[int | None] = []

    def flock(fd: int, how: int) -> None:
        if not swept:
            swept.append(None)
            swept.append(blobs.drop_unfinished())
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    writer = blobs.writer("files/x")
    writer.write(b"kept")
    writer.commit()

    assert swept == [None, 1]
    assert blobs.read("files/x", 0, 9) == b"kept"


def test_a_sweep_leaves_the_reserve_and_a_users_file(blobs: LocalBlobs, tmp_path: Path) -> None:
    own = tmp_path / "in~1-0123456789abcdef"
    own.write_bytes(b"mine")
    blobs.adopt("input", own)
    blobs.keep_reserve(4096)

    assert blobs.drop_unfinished() == 0
    assert blobs.read("input", 0, 9) == b"mine"
    assert (tmp_path / "state" / "blobs" / "reserve~").stat().st_size == 4096


def test_adopting_anew_removes_the_link_that_a_killed_run_left(blobs: LocalBlobs, tmp_path: Path) -> None:
    own = tmp_path / "in.jsonl"
    own.write_bytes(b"mine")
    left = tmp_path / "state" / "blobs" / "input~12-0123456789abcdef"
    left.symlink_to(own)

    blobs.adopt("input", own)

    assert not left.is_symlink()
    assert blobs.read("input", 0, 9) == b"mine"
