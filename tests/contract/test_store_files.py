"""What every Store promises of files and uploads: lists, hiding, parts, and the way of every blob to its end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest

from batchrunner.errors import BlobsUnavailable, NameTaken, NotFound, QuotaExceeded, TransitionRefused
from batchrunner.holdings import KeyLimits, PartId, Upload, UploadId, UploadPart, UploadStatus
from batchrunner.lifecycle import BatchEvent, BatchStatus
from batchrunner.models import BatchId, File, FileId, TaskKind
from batchrunner.ports import TenantScope
from batchrunner.store import queries_expiry, queries_uploads
from tests.contract.worlds import ANA, BEN, NOTHING, REJECTED, STEPS, World, accepted, bring_to, file_of, progress


def upload_of(world: World, name: str = "u1") -> Upload:
    return Upload(
        id=UploadId(name),
        tenant=ANA,
        filename="in.jsonl",
        purpose="batch",
        mime_type="text/jsonl",
        size_bytes=6,
        status=UploadStatus.PENDING,
        created_at=world.clock.wall,
        expires_at=world.clock.wall + timedelta(hours=1),
        expires_after_s=3600,
    )


def part_of(world: World, name: str, upload: str = "u1") -> UploadPart:
    return UploadPart(
        id=PartId(name), upload_id=UploadId(upload), size_bytes=3, blob=f"parts/{name}", created_at=world.clock.wall
    )


def fresh_file(world: World, name: str, **changes) -> File:
    return replace(file_of(name), created_at=world.clock.wall, **changes)


def ids(files: list[File]) -> list[str]:
    return [each.id for each in files]


def freed(world: World, **kwargs) -> list[str]:
    return world.store.freeable_blobs(limit=100, **kwargs)


# -- files -------------------------------------------------------------------------------------------------------------


def test_files_are_listed_in_pages_from_either_end(world: World) -> None:
    for name in ("a", "b", "c", "d"):
        world.scope.add_file(fresh_file(world, name))
        world.clock.advance(0 if name == "b" else 1)

    assert ids(world.scope.files(limit=10)) == ["d", "c", "b", "a"]
    assert ids(world.scope.files(limit=2)) == ["d", "c"]
    assert ids(world.scope.files(limit=10, after=FileId("c"))) == ["b", "a"]
    assert ids(world.scope.files(limit=10, newest_first=False)) == ["a", "b", "c", "d"]
    assert ids(world.scope.files(limit=2, after=FileId("b"), newest_first=False)) == ["c", "d"]


def test_files_are_listed_by_purpose_of_one_tenant_only(world: World) -> None:
    world.scope.add_file(fresh_file(world, "a", purpose="batch"))
    world.scope.add_file(fresh_file(world, "b"))
    world.store.scope(BEN).add_file(replace(file_of("c", BEN), purpose="batch"))

    assert ids(world.scope.files(limit=10, purpose="batch")) == ["a"]
    assert ids(world.scope.files(limit=10)) == ["b", "a"]


def test_deleted_file_is_gone_at_once_and_still_a_place_in_lists(world: World) -> None:
    for name in ("a", "b", "c"):
        world.scope.add_file(fresh_file(world, name))
        world.clock.advance(1)

    world.scope.delete_file(FileId("b"))

    assert ids(world.scope.files(limit=10)) == ["c", "a"]
    assert ids(world.scope.files(limit=10, after=FileId("b"))) == ["a"]
    for call in (world.scope.file, world.scope.delete_file):
        with pytest.raises(NotFound):
            call(FileId("b"))


def test_file_is_gone_from_the_instant_that_it_expires(world: World) -> None:
    world.scope.add_file(fresh_file(world, "a", expires_at=world.clock.wall + timedelta(seconds=10)))

    world.clock.advance(9)
    assert world.scope.file(FileId("a")).deleted_at is None
    world.clock.advance(1)

    with pytest.raises(NotFound):
        world.scope.file(FileId("a"))
    assert world.scope.files(limit=10) == []
    assert world.store.expire().files == 1
    assert world.store.expire().files == 0


def test_what_a_validation_found_stays_with_the_file(world: World) -> None:
    world.scope.add_file(file_of("a"))
    for name in ("reports/1", "reports/2"):
        world.store.register_blob(name, owner="api")

    world.scope.note_lines(FileId("a"), line_count=7, validation_blob="reports/1")
    world.scope.note_lines(FileId("a"), line_count=7, validation_blob="reports/2")

    file = world.scope.file(FileId("a"))
    assert (file.line_count, file.validation_blob) == (7, "reports/1")


def test_deleted_file_cannot_become_an_input(world: World) -> None:
    world.scope.add_file(file_of("a"))
    world.scope.delete_file(FileId("a"))

    with pytest.raises(NotFound):
        world.created(input_file_id=FileId("a"))


# -- the end of their bytes --------------------------------------------------------------------------------------------


def test_bytes_of_a_deleted_file_are_named_until_they_are_forgotten(world: World) -> None:
    world.scope.add_file(replace(file_of("a"), validation_blob="reports/a"))
    world.scope.add_file(file_of("b"))
    assert freed(world) == []

    world.scope.delete_file(FileId("a"))

    assert sorted(freed(world)) == sorted(freed(world)) == ["files/a", "reports/a"]
    world.store.forget_blobs(["files/a", "reports/a", "files/b"])
    assert freed(world) == []


def test_bytes_that_are_being_downloaded_stay(world: World) -> None:
    world.scope.add_file(file_of("a"))
    world.scope.delete_file(FileId("a"))

    assert freed(world, in_use={"files/a"}) == []
    assert freed(world) == ["files/a"]
    assert freed(world, in_use={"files/a"}) == []


@pytest.mark.parametrize("reads", ["input_file_id = 'a'", "source = 'files/a'"])
@pytest.mark.parametrize("status", list(BatchStatus))
def test_bytes_stay_while_a_batch_that_is_not_over_reads_them(world: World, status: BatchStatus, reads: str) -> None:
    world.scope.add_file(file_of("a"))
    bring_to(world, status)
    # The walk to a status makes its batch without an input.
    world.backend.change(f"UPDATE batches SET {reads}")

    world.scope.delete_file(FileId("a"))

    is_over = status in (BatchStatus.COMPLETED, BatchStatus.FAILED, BatchStatus.EXPIRED, BatchStatus.CANCELLED)
    assert freed(world) == (["files/a"] if is_over else [])


def test_retry_of_a_deleted_input_keeps_its_bytes_while_they_are_there(world: World) -> None:
    world.scope.add_file(file_of("a"))
    bring_to(world, BatchStatus.COMPLETED)
    world.backend.change("UPDATE batches SET input_file_id = 'a', source = 'files/a'")
    world.scope.delete_file(FileId("a"))

    child = world.created("b2", parent_id=BatchId("b1"), input_file_id=FileId("a"), source="files/a")
    kept = freed(world)
    world.scope.send(child.id, BatchEvent.GAVE_UP)

    assert kept == []
    assert freed(world) == ["files/a"]
    with pytest.raises(NotFound):
        world.created("b3", parent_id=BatchId("b1"), input_file_id=FileId("a"), source="files/a")
    assert [each.id for each in world.scope.family(BatchId("b1"))] == ["b1", "b2"]


def test_published_files_live_as_long_as_their_batch_asks_for(world: World) -> None:
    world.running(output_expires_after_s=3600)
    claim = world.claim()
    world.store.settle(claim.ref, progress(claim, 0, 100, succeeded=10))
    file = fresh_file(world, "out")

    world.store.publish(world.claim(kinds=STEPS).ref, replace(NOTHING, output=file))

    assert world.scope.file(FileId("out")).expires_at == file.created_at + timedelta(hours=1)


def test_media_answers_go_with_the_output_file_that_names_them(world: World) -> None:
    world.store.publish(world.sealing().ref, replace(NOTHING, output=file_of("out")))
    world.clock.advance(24 * 3600)
    world.store.expire()
    assert freed(world) == []

    world.scope.delete_file(FileId("out"))

    assert sorted(freed(world)) == ["assets/b1/", "files/out"]
    world.store.forget_blobs(freed(world))
    assert freed(world) == []


def test_media_answers_of_a_batch_without_an_output_file_go_with_its_journal(world: World) -> None:
    bring_to(world, BatchStatus.CANCELLED)
    world.store.expire()
    assert freed(world) == []

    world.clock.advance(24 * 3600)
    world.store.expire()

    assert freed(world) == ["assets/b1/"]


# -- names of blobs ----------------------------------------------------------------------------------------------------


def test_blob_name_is_given_to_one_owner_until_a_row_needs_it(world: World) -> None:
    world.store.register_blob("files/a", owner="api")
    world.store.register_blob("files/a", owner="api")

    with pytest.raises(NameTaken):
        world.store.register_blob("files/a", owner="another")
    world.scope.add_file(file_of("a"))
    with pytest.raises(NameTaken):
        world.store.register_blob("files/a", owner="api")


@pytest.mark.parametrize("blob", ["chosen/b2", "problems/b1"])
def test_what_a_batch_needs_is_not_dropped(world: World, blob: str) -> None:
    world.store.register_blob(blob, owner="api")

    world.created("b2", chosen_blob="chosen/b2")
    world.store.reject_input(world.claim(kinds=STEPS).ref, REJECTED)
    world.clock.advance(24 * 3600)
    world.store.expire()

    assert freed(world) == []


def test_files_of_a_seal_that_died_are_dropped_and_those_of_the_next_stay(world: World) -> None:
    for epoch in (1, 2):
        world.store.register_blob(f"files/out-{epoch}", owner="a session")
    world.store.publish(world.sealing().ref, replace(NOTHING, output=replace(file_of("out"), blob="files/out-2")))

    world.clock.advance(24 * 3600)
    world.store.expire()

    assert freed(world) == ["files/out-1"]


def test_blob_that_nothing_came_to_need_is_dropped_after_a_day(world: World) -> None:
    world.store.register_blob("files/a", owner="api")
    world.store.register_blob("files/lost", owner="api")
    world.scope.add_file(file_of("a"))

    world.clock.advance(24 * 3600 - 1)
    world.store.expire()
    assert freed(world) == []
    world.clock.advance(1)
    world.store.expire()

    assert freed(world) == ["files/lost"]
    with pytest.raises(BlobsUnavailable):
        world.scope.add_file(file_of("lost"))
    with pytest.raises(NotFound):
        world.scope.file(FileId("lost"))


def test_abandoned_blob_is_dropped_unless_a_row_needs_it(world: World) -> None:
    for name in ("files/a", "files/lost"):
        world.store.register_blob(name, owner="api")
    world.scope.add_file(file_of("a"))

    for name in ("files/a", "files/lost"):
        world.store.abandon_blob(name)

    assert freed(world) == ["files/lost"]


# -- uploads -----------------------------------------------------------------------------------------------------------


def test_upload_keeps_its_parts_in_the_order_of_arrival(world: World) -> None:
    upload = world.scope.add_upload(upload_of(world))

    parts = [world.scope.add_part(part_of(world, name)) for name in ("p2", "p1")]
    world.scope.add_part(parts[0])

    assert world.scope.upload(upload.id) == upload
    assert world.scope.parts(upload.id) == parts


def test_complete_makes_the_file_and_drops_the_parts(world: World) -> None:
    world.scope.add_upload(upload_of(world))
    for name in ("p1", "p2"):
        world.scope.add_part(part_of(world, name))

    done = world.scope.complete_upload(UploadId("u1"), file_of("f1"))

    assert (done.status, done.file_id) == (UploadStatus.COMPLETED, "f1")
    assert world.scope.complete_upload(UploadId("u1"), file_of("f1")) == world.scope.upload(UploadId("u1")) == done
    assert world.scope.file(FileId("f1")) == file_of("f1")
    assert world.scope.parts(UploadId("u1")) == []
    assert freed(world) == ["parts/p1", "parts/p2"]


def test_file_may_take_over_the_blob_of_a_part(world: World) -> None:
    world.scope.add_upload(upload_of(world))
    world.scope.add_part(part_of(world, "p1"))

    world.scope.complete_upload(UploadId("u1"), replace(file_of("f1"), blob="parts/p1"))

    assert freed(world) == []
    world.scope.delete_file(FileId("f1"))
    assert freed(world) == ["parts/p1"]


def test_cancelled_upload_drops_its_parts(world: World) -> None:
    world.scope.add_upload(upload_of(world))
    world.scope.add_part(part_of(world, "p1"))

    cancelled = world.scope.cancel_upload(UploadId("u1"))

    assert cancelled.status is UploadStatus.CANCELLED
    assert world.scope.cancel_upload(UploadId("u1")) == world.scope.upload(UploadId("u1")) == cancelled
    assert freed(world) == ["parts/p1"]


def test_upload_ends_by_its_time_before_any_sweep(world: World) -> None:
    world.scope.add_upload(upload_of(world))
    world.scope.add_part(part_of(world, "p1"))

    world.clock.advance(3600)

    assert world.scope.upload(UploadId("u1")).status is UploadStatus.EXPIRED
    assert freed(world) == []
    assert world.store.expire().uploads == 1
    assert world.store.expire().uploads == 0
    assert world.scope.upload(UploadId("u1")).status is UploadStatus.EXPIRED
    assert freed(world) == ["parts/p1"]


@pytest.mark.parametrize("status", [each for each in UploadStatus if each is not UploadStatus.PENDING])
def test_upload_that_is_over_takes_nothing_more(world: World, status: UploadStatus) -> None:
    world.scope.add_upload(upload_of(world))
    match status:
        case UploadStatus.COMPLETED:
            world.scope.complete_upload(UploadId("u1"), file_of("f1"))
        case UploadStatus.CANCELLED:
            world.scope.cancel_upload(UploadId("u1"))
        case UploadStatus.EXPIRED:
            world.clock.advance(3600)
    before = world.backend.dump()
    calls: list[Callable[[], object]] = [
        lambda: world.scope.add_part(part_of(world, "late")),
        lambda: world.scope.complete_upload(UploadId("u1"), file_of("late")),
    ]
    if status is not UploadStatus.CANCELLED:
        calls.append(lambda: world.scope.cancel_upload(UploadId("u1")))

    for call in calls:
        with pytest.raises(TransitionRefused, match=status):
            call()

    assert world.backend.dump() == before


# -- strangers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call",
    [
        lambda scope, _: scope.file(FileId("f1")),
        lambda scope, _: scope.files(limit=1, after=FileId("f1")),
        lambda scope, _: scope.note_lines(FileId("f1"), line_count=1, validation_blob=None),
        lambda scope, _: scope.delete_file(FileId("f1")),
        lambda scope, _: scope.upload(UploadId("u1")),
        lambda scope, world: scope.add_part(part_of(world, "mine")),
        lambda scope, _: scope.parts(UploadId("u1")),
        lambda scope, _: scope.complete_upload(UploadId("u1"), file_of("mine", BEN)),
        lambda scope, _: scope.cancel_upload(UploadId("u1")),
        lambda scope, _: scope.family(BatchId("b1")),
        lambda scope, _: scope.delete_batch(BatchId("b1")),
        lambda scope, _: scope.live(BatchId("b1")),
    ],
)
def test_another_tenants_files_and_uploads_are_like_missing_ones(
    world: World, call: Callable[[TenantScope, World], object]
) -> None:
    world.scope.add_file(file_of("f1"))
    world.scope.add_upload(upload_of(world))
    world.scope.add_part(part_of(world, "p1"))
    bring_to(world, BatchStatus.COMPLETED)
    before = world.backend.dump()

    with pytest.raises(NotFound):
        call(world.store.scope(BEN), world)

    assert world.store.scope(BEN).files(limit=10) == []
    assert world.backend.dump() == before


def test_names_of_another_tenant_are_taken(world: World) -> None:
    world.scope.add_file(file_of("f1"))
    world.scope.add_upload(upload_of(world))
    ben = world.store.scope(BEN)
    before = world.backend.dump()

    with pytest.raises(NameTaken):
        ben.add_file(file_of("f1", BEN))
    with pytest.raises(NameTaken):
        ben.add_upload(replace(upload_of(world), tenant=BEN))

    assert world.backend.dump() == before


def test_validate_task_of_a_missing_input_is_there(world: World) -> None:
    batch = world.created(input_name="file-missing", source="")

    claim = world.claim(kinds=(TaskKind.VALIDATE,))

    assert (claim.batch, batch.input_name, batch.input_file_id) == (batch, "file-missing", None)
    assert world.store.accept_input(claim.ref, accepted())


def test_retry_is_refused_when_its_maker_has_not_seen_the_whole_family(world: World) -> None:
    world.created("b1")
    seen = [each.id for each in world.scope.family(BatchId("b1"))]
    world.created("b2", parent_id=BatchId("b1"))

    with pytest.raises(TransitionRefused, match="retried meanwhile, as b2"):
        world.scope.create_batch(world.new("b3", parent_id=BatchId("b1")), family=seen)
    made = world.scope.create_batch(world.new("b3", parent_id=BatchId("b2")), family=[*seen, BatchId("b2")])

    assert [each.id for each in world.scope.family(BatchId("b2"))] == ["b1", "b2", "b3"]
    assert world.scope.create_batch(world.new("b3", parent_id=BatchId("b2")), family=[]).id == made.id


def test_batch_and_its_file_are_made_together_or_not_at_all(world: World) -> None:
    world.store.register_blob("files/in", owner="api")
    file = replace(file_of("in"), purpose="batch")

    with pytest.raises(QuotaExceeded):
        world.scope.create_batch(world.new(input_file_id=file.id), file=file, limits=KeyLimits(open_batches_max=0))
    with pytest.raises(NotFound):
        world.scope.file(file.id)
    made = world.scope.create_batch(world.new(input_file_id=file.id), file=file)

    assert world.scope.file(file.id) == file
    assert made.input_file_id == file.id


def test_upload_takes_no_more_parts_than_can_be_named(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries_uploads, "PARTS_MAX", 2)
    world.scope.add_upload(upload_of(world))
    for name in ("p1", "p2"):
        world.scope.add_part(part_of(world, name))

    with pytest.raises(QuotaExceeded, match="2 parts"):
        world.scope.add_part(part_of(world, "p3"))

    assert world.scope.add_part(part_of(world, "p2")).id == "p2"


def test_any_number_of_late_uploads_is_ended_by_and_by(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries_uploads, "_EXPIRED_MAX", 2)
    for name in ("u1", "u2", "u3"):
        world.scope.add_upload(upload_of(world, name))
    world.clock.advance(3600)

    assert [world.store.expire().uploads for _ in range(3)] == [2, 1, 0]


def test_any_number_of_late_files_is_hidden_by_and_by(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries_expiry, "_FILES_MAX", 2)
    for name in ("f1", "f2", "f3"):
        world.scope.add_file(fresh_file(world, name, expires_at=world.clock.wall + timedelta(hours=1)))
    world.clock.advance(3600)

    assert [world.store.expire().files for _ in range(3)] == [2, 1, 0]


def test_journals_of_huge_batches_end_one_at_a_time(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries_expiry, "_LINES_MAX", 15)
    for name in ("b1", "b2"):
        world.store.publish(world.sealing(name).ref, NOTHING)
    world.clock.advance(24 * 3600)

    assert [len(world.store.expire().journals) for _ in range(3)] == [1, 2, 2]
