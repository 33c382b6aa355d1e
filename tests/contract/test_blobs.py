"""What every implementation of the Blobs port has to do; a new one joins in `IMPLEMENTATIONS` and `reopen`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from batchrunner.blobs.local import LocalBlobs
from batchrunner.blobs.s3 import S3Blobs
from batchrunner.blobs.s3_address import S3Address
from batchrunner.clock import SystemClock
from batchrunner.errors import BlobsUnavailable, NameTaken, NotFound, OwnError
from batchrunner.ports import Blobs
from batchrunner.settings import Settings

IMPLEMENTATIONS = [
    "folder",
    "moto",
    pytest.param("seaweedfs", marks=pytest.mark.real),
    # It ignores preconditions, keeps no order in its lists, and its tags are no checksums.
    pytest.param("juicefs", marks=pytest.mark.real),
]


@pytest.fixture(params=IMPLEMENTATIONS)
def reopen(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Blobs]]:
    """Open the same blobs, the way another process would."""
    if request.param == "folder":
        yield lambda: LocalBlobs(tmp_path / "blobs")
        return
    service = request.getfixturevalue("s3_service")(request.param)
    address = S3Address("batches", f"contract/{uuid4().hex}")
    opened: list[S3Blobs] = []

    def reopen() -> Blobs:
        settings = Settings(s3_endpoint_url=service.url, s3_addressing="path")
        opened.append(S3Blobs(address, settings, SystemClock()))
        return opened[-1]

    yield reopen
    for each in opened:
        each.close()


@pytest.fixture
def blobs(reopen: Callable[[], Blobs]) -> Blobs:
    return reopen()


def put(blobs: Blobs, name: str, content: bytes) -> None:
    writer = blobs.writer(name)
    writer.write(content)
    writer.commit()


def test_a_segment_reads_back_what_was_synced(blobs: Blobs, reopen: Callable[[], Blobs]) -> None:
    appender = blobs.create_segment("journal/b/1/1-s-1.seg")
    for chunk in (b"one", b"", b"two"):
        appender.append(chunk)
    appender.sync()
    appender.append(b"three")
    appender.sync()

    other = reopen()

    assert other.size_bytes("journal/b/1/1-s-1.seg") == 11
    assert other.read("journal/b/1/1-s-1.seg", 0, 11) == b"onetwothree"
    appender.close()


def test_an_existing_segment_is_never_opened_again(blobs: Blobs, reopen: Callable[[], Blobs]) -> None:
    first = blobs.create_segment("journal/x.seg")
    first.append(b"kept")
    first.sync()
    first.close()

    with pytest.raises(NameTaken):
        reopen().create_segment("journal/x.seg")
    assert blobs.read("journal/x.seg", 0, 4) == b"kept"


def test_a_closed_appender_takes_no_more_and_closes_twice(blobs: Blobs) -> None:
    appender = blobs.create_segment("x.seg")
    appender.close()

    appender.close()

    with pytest.raises(BlobsUnavailable):
        appender.append(b"late")
    with pytest.raises(BlobsUnavailable):
        appender.sync()


def test_a_blob_appears_whole_at_commit(blobs: Blobs) -> None:
    writer = blobs.writer("files/a.jsonl")
    writer.write(b"x" * 1_000_000)
    writer.write(b"y")

    before = (blobs.exists("files/a.jsonl"), list(blobs.list("")))
    writer.commit()

    assert before == (False, [])
    assert blobs.size_bytes("files/a.jsonl") == 1_000_001
    assert blobs.read("files/a.jsonl", 999_999, 1_000_001) == b"xy"


def test_an_empty_blob_exists(blobs: Blobs) -> None:
    put(blobs, "empty", b"")

    assert blobs.exists("empty")
    assert blobs.read("empty", 0, 10) == b""


def test_an_aborted_blob_leaves_nothing(blobs: Blobs) -> None:
    writer = blobs.writer("a")
    writer.write(b"half")

    writer.abort()
    writer.abort()

    assert not blobs.exists("a")
    assert list(blobs.list("")) == []


def test_commit_never_replaces_a_blob(blobs: Blobs) -> None:
    late = blobs.writer("a")
    late.write(b"late")
    put(blobs, "a", b"first")

    with pytest.raises(NameTaken):
        late.commit()
    late.abort()

    assert blobs.read("a", 0, 5) == b"first"


def test_commit_may_name_the_last_part_that_was_not_known_before(blobs: Blobs) -> None:
    put(blobs, "assets/b/taken.mp3", b"first")
    writer = blobs.writer("assets/b/line_7")
    writer.write(b"sound")
    with pytest.raises(NameTaken):
        writer.commit("taken.mp3")
    writer.abort()
    writer = blobs.writer("assets/b/line_7")
    writer.write(b"sound")

    writer.commit("asset_7.mp3")

    assert list(blobs.list("")) == ["assets/b/asset_7.mp3", "assets/b/taken.mp3"]
    assert blobs.read("assets/b/asset_7.mp3", 0, 10) == b"sound"
    assert blobs.read("assets/b/taken.mp3", 0, 10) == b"first"


def test_reading_stops_where_the_blob_ends(blobs: Blobs) -> None:
    put(blobs, "a", b"0123456789")

    assert blobs.read("a", 3, 5) == b"34"
    assert blobs.read("a", 8, 1 << 50) == b"89"
    assert blobs.read("a", 10, 20) == b""
    assert blobs.read("a", 30, 40) == b""
    assert blobs.read("a", 5, 5) == b""


@pytest.mark.parametrize("name", ["missing", "a/below", "folder"])
def test_what_is_not_there_is_not_found(blobs: Blobs, name: str) -> None:
    put(blobs, "a", b"x")
    put(blobs, "folder/b", b"x")

    with pytest.raises(NotFound):
        blobs.read(name, 0, 1)
    with pytest.raises(NotFound):
        blobs.size_bytes(name)
    assert not blobs.exists(name)


def test_names_come_in_order_and_by_prefix(blobs: Blobs) -> None:
    names = ["a-b", "a.c", "a/x", "a/y/1", "a0", "journal/b1/1.seg", "journal/b10/1.seg", "z"]
    for name in reversed(names):
        put(blobs, name, b"x")

    assert list(blobs.list("")) == names
    assert list(blobs.list("a")) == names[:5]
    assert list(blobs.list("a/")) == ["a/x", "a/y/1"]
    assert list(blobs.list("journal/b1")) == ["journal/b1/1.seg", "journal/b10/1.seg"]
    assert list(blobs.list("journal/b1/")) == ["journal/b1/1.seg"]
    assert list(blobs.list("nothing/here")) == []


def test_delete_removes_a_name_and_does_not_mind_a_missing_one(blobs: Blobs) -> None:
    put(blobs, "folder/a", b"x")

    blobs.delete("folder/a")
    blobs.delete("folder/a")
    blobs.delete("never/was")

    assert not blobs.exists("folder/a")
    put(blobs, "folder/a", b"new")
    assert blobs.read("folder/a", 0, 3) == b"new"


@pytest.mark.parametrize(
    "name", ["", "/a", "a/", "a//b", "..", "../a", "a/../b", "./a", "a b", "a~b", "a\n", "ä", "a\\b"]
)
def test_a_name_outside_the_rules_is_our_error(blobs: Blobs, name: str) -> None:
    with pytest.raises(OwnError) as caught:
        blobs.create_segment(name)
    with pytest.raises(OwnError):
        blobs.writer(name)
    with pytest.raises(OwnError):
        blobs.read(name, 0, 1)
    with pytest.raises(OwnError):
        blobs.delete(name)
    assert type(caught.value) is OwnError


@pytest.mark.parametrize("name", ["...", "a..b", ".hidden", "A-Z_0.9"])
def test_dots_inside_a_name_are_fine(blobs: Blobs, name: str) -> None:
    put(blobs, name, b"x")

    assert list(blobs.list("")) == [name]


def test_the_reserve_is_no_blob_and_can_be_taken_again(blobs: Blobs) -> None:
    blobs.keep_reserve(100_000)
    blobs.keep_reserve(100_000)
    names = list(blobs.list(""))
    blobs.release_reserve()
    blobs.release_reserve()
    blobs.keep_reserve(100_000)
    blobs.release_reserve()

    assert names == []


def test_free_space_is_a_number_or_has_no_meaning(blobs: Blobs) -> None:
    free = blobs.free_bytes()

    assert free is None or free > 0
