"""What time has ended leaves the disk, in any order of crashes, and nothing else does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from batchrunner import app, housekeeping
from batchrunner.app import open_adapters, reap
from batchrunner.blobs.local import LocalBlobs
from batchrunner.errors import BatchrunnerError, BlobsUnavailable, DiskFull, NotFound, StoreUnavailable
from batchrunner.housekeeping import Cleared, clear
from batchrunner.models import BatchId, FileId
from batchrunner.session_locks import SessionLocks
from batchrunner.settings import Settings
from tests.contract.conftest import ManualClock, SqliteBackend
from tests.contract.worlds import NOTHING, World, file_of

DAY_S = 24 * 3600.0
OF_THE_BATCH = ("assets/b1/1.png", "assets/b1/2.png", "files/out", "journal/b1/2/1-s-1.seg")
OF_OTHERS = ("assets/b10/1.png", "files/else", "journal/b10/2/1-s-1.seg")


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    clock = ManualClock()
    backend = SqliteBackend(tmp_path / "state.db", clock)
    made = World(backend, clock)
    made.store.publish(made.sealing().ref, replace(NOTHING, output=file_of("out")))
    yield made
    backend.close()


@pytest.fixture
def blobs(tmp_path: Path) -> LocalBlobs:
    kept = LocalBlobs(tmp_path / "blobs")
    for name in (*OF_THE_BATCH, *OF_OTHERS):
        writer = kept.writer(name)
        writer.write(b"x")
        writer.commit()
    return kept


def names(blobs: LocalBlobs) -> list[str]:
    return list(blobs.list(""))


def test_nothing_goes_before_its_time(world: World, blobs: LocalBlobs) -> None:
    before = names(blobs)

    assert clear(world.store, blobs, in_use=tuple) == Cleared()
    assert names(blobs) == before


def test_journal_goes_after_a_day_and_media_with_the_output_file(world: World, blobs: LocalBlobs) -> None:
    world.clock.advance(DAY_S)

    assert clear(world.store, blobs, in_use=tuple) == Cleared(journals=1)
    assert names(blobs) == sorted([*OF_OTHERS, "assets/b1/1.png", "assets/b1/2.png", "files/out"])
    world.scope.delete_file(FileId("out"))
    assert clear(world.store, blobs, in_use=lambda: {"files/out"}) == Cleared()
    assert clear(world.store, blobs, in_use=tuple) == Cleared(blobs=2)

    assert names(blobs) == sorted(OF_OTHERS)
    assert clear(world.store, blobs, in_use=tuple) == Cleared()


class Failing(LocalBlobs):
    """Blobs whose folder goes away at the nth deletion."""

    deletions_left = 0

    def delete(self, name: str) -> None:
        if self.deletions_left == 0:
            raise BlobsUnavailable("the folder is gone")
        self.deletions_left -= 1
        super().delete(name)


@pytest.mark.parametrize("deletions", range(4))
def test_sweep_that_broke_off_is_finished_by_the_next(
    world: World, blobs: LocalBlobs, tmp_path: Path, deletions: int
) -> None:
    failing = Failing(tmp_path / "blobs")
    failing.deletions_left = deletions
    world.clock.advance(DAY_S)
    world.scope.delete_file(FileId("out"))
    world.scope.delete_batch(BatchId("b1"))

    assert clear(world.store, failing, in_use=tuple).failed > 0
    clear(world.store, blobs, in_use=tuple)

    assert names(blobs) == sorted(OF_OTHERS)


def test_blob_that_cannot_be_deleted_keeps_no_other_from_going(
    world: World, blobs: LocalBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(housekeeping, "_BLOBS_MAX", 1)
    (tmp_path / "blobs" / "files" / "stubborn" / "a").mkdir(parents=True)
    for number, name in enumerate(("files/stubborn", "files/lost", "assets/b1/1.png")):
        world.store.register_blob(name, owner=f"o{number}")
        world.store.abandon_blob(name)

    cleared = clear(world.store, blobs, in_use=tuple)

    assert cleared == Cleared(blobs=2, failed=1)
    assert "assets/b1/1.png" not in names(blobs)
    assert world.store.freeable_blobs(limit=9) == ["files/stubborn"]


def test_what_a_dead_session_left_half_written_goes_when_it_is_reaped(tmp_path: Path) -> None:
    adapters = open_adapters(tmp_path)
    (tmp_path / "sessions" / "0123456789abcdef").touch()
    left = tmp_path / "blobs" / "assets" / "b1" / "line_1~99-0123456789abcdef"
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")

    reap(adapters, SessionLocks(tmp_path))

    assert not left.exists()
    adapters.store.close()


@pytest.mark.parametrize("error", [BlobsUnavailable("the folder is gone"), DiskFull("no space"), NotFound("not there")])
def test_half_written_blobs_that_cannot_be_swept_keep_nobody_from_reaping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BatchrunnerError
) -> None:
    adapters = open_adapters(tmp_path)
    (tmp_path / "sessions" / "0123456789abcdef").touch()

    def fail(_self: LocalBlobs, *, dead: object) -> int:
        raise error

    monkeypatch.setattr(LocalBlobs, "drop_unfinished", fail)

    assert reap(adapters, SessionLocks(tmp_path)) == 0
    assert not list((tmp_path / "sessions").iterdir())
    adapters.store.close()


@pytest.mark.parametrize("error", [DiskFull("no space"), StoreUnavailable("locked")])
async def test_worker_that_cannot_be_buried_ends_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BatchrunnerError
) -> None:
    adapters = open_adapters(tmp_path)
    settings = Settings(base_url="http://127.0.0.1:9/v1")
    crew = app.process_crew(adapters, tmp_path, settings, {}, 1, is_server=True)

    def fail(*_: object) -> int:
        raise error

    monkeypatch.setattr(app, "reap", fail)

    await crew._children[0].mourn()

    adapters.store.close()
