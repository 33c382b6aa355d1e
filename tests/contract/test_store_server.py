"""What every Store promises to a server: keys, Idempotency-Keys, limits, live reports, and what ends by time."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from threading import Barrier

import pytest

from batchrunner.errors import (
    IdempotencyMismatch,
    IdempotencyRunning,
    NameTaken,
    NotFound,
    QuotaExceeded,
    SchemaNewer,
    TransitionRefused,
)
from batchrunner.holdings import ApiKey, KeyId, KeyLimits, KeyScope, LiveShare, OpenCounts, Replay
from batchrunner.lifecycle import TERMINAL, BatchEvent, BatchStatus
from batchrunner.models import BatchId, FileId
from tests.contract.worlds import ANA, BEN, NOTHING, ONE, REJECTED, STEPS, TWO, World, bring_to, file_of, progress

DAY_S = 24 * 3600.0
B1 = BatchId("b1")
ROUTE = "POST /v1/batches"
MADE = Replay(route=ROUTE, key="k", fingerprint="same")


def key_of(world: World, name: str = "k1", **changes) -> ApiKey:
    key = ApiKey(
        id=KeyId(name),
        tenant=ANA,
        name="laptop",
        digest=f"digest-{name}",
        shown="br_abc",
        scopes=(KeyScope.READ, KeyScope.WRITE),
        limits=KeyLimits(open_batches_max=2, rpm=60),
        created_at=world.clock.wall,
    )
    return replace(key, **changes)


# -- keys --------------------------------------------------------------------------------------------------------------


def test_key_is_found_by_its_digest(world: World) -> None:
    key = key_of(world)
    assert not world.store.has_keys()

    world.store.add_key(key)
    world.store.add_key(key)

    assert world.store.find_key("digest-k1") == key
    assert world.store.find_key("digest-k2") is None
    assert world.store.has_keys()


@pytest.mark.parametrize(("name", "digest"), [("k1", "other"), ("k2", "digest-k1")])
def test_key_id_and_digest_name_one_key(world: World, name: str, digest: str) -> None:
    world.store.add_key(key_of(world))

    with pytest.raises(NameTaken):
        world.store.add_key(key_of(world, name, digest=digest))


def test_keys_are_listed_oldest_first_valid_or_not(world: World) -> None:
    for name, tenant in (("k2", ANA), ("k1", BEN)):
        world.store.add_key(key_of(world, name, tenant=tenant))
        world.clock.advance(1)
    world.store.revoke_key(KeyId("k2"), at=world.clock.wall)

    everybody, ben = world.store.keys(), world.store.keys(tenant=BEN)

    assert [each.id for each in everybody] == ["k2", "k1"]
    assert [each.id for each in ben] == ["k1"]


def test_key_is_valid_until_it_expires(world: World) -> None:
    world.store.add_key(key_of(world, expires_at=world.clock.wall + timedelta(seconds=10)))

    world.clock.advance(9)
    assert world.store.find_key("digest-k1") is not None
    world.clock.advance(1)

    assert world.store.find_key("digest-k1") is None


def test_revoked_key_ends_at_its_time_which_is_never_put_off(world: World) -> None:
    world.store.add_key(key_of(world))
    soon = world.clock.wall + timedelta(seconds=10)

    assert world.store.revoke_key(KeyId("k1"), at=soon).revoked_at == soon
    assert world.store.revoke_key(KeyId("k1"), at=soon + timedelta(days=1)).revoked_at == soon

    assert world.store.find_key("digest-k1") is not None
    world.clock.advance(10)
    assert world.store.find_key("digest-k1") is None
    assert world.store.has_keys(), "a server whose keys are revoked is not open again"
    with pytest.raises(NotFound):
        world.store.revoke_key(KeyId("k2"), at=soon)


# -- limits ------------------------------------------------------------------------------------------------------------


def test_open_counts_are_of_unfinished_batches_of_one_tenant(world: World) -> None:
    bring_to(world, BatchStatus.COMPLETED)
    world.running("b2", shards=2)
    claim = world.claim()
    world.store.settle(claim.ref, progress(claim, 0, 100, succeeded=10))
    world.created("b3")

    assert world.scope.open_counts() == OpenCounts(batches=2, lines=10)
    assert world.store.scope(BEN).open_counts() == OpenCounts(batches=0, lines=0)


def test_batch_beyond_the_open_batches_of_a_key_is_refused(world: World) -> None:
    limits = KeyLimits(open_batches_max=1)
    world.scope.create_batch(world.new("b1"), limits=limits)
    before = world.backend.dump()

    with pytest.raises(QuotaExceeded, match="at most 1"):
        world.scope.create_batch(world.new("b2"), limits=limits, replay=MADE)

    assert world.backend.dump() == before
    assert world.scope.create_batch(world.new("b1"), limits=limits).id == "b1"
    world.scope.send(B1, BatchEvent.GAVE_UP)
    assert world.scope.create_batch(world.new("b2"), limits=limits).id == "b2"


def test_batch_beyond_the_queued_lines_of_a_key_is_refused(world: World) -> None:
    world.running(lines=10)

    with pytest.raises(QuotaExceeded, match="10 lines"):
        world.scope.create_batch(world.new("b2"), limits=KeyLimits(queued_lines_max=10))

    assert world.scope.create_batch(world.new("b2"), limits=KeyLimits(queued_lines_max=11)).id == "b2"


def test_lines_of_a_file_count_before_they_are_validated(world: World) -> None:
    world.scope.add_file(replace(file_of("in"), line_count=6))
    limits = KeyLimits(queued_lines_max=10)

    with pytest.raises(QuotaExceeded, match="0 lines wait for their results and this batch has 6, at most 5"):
        world.scope.create_batch(world.new("b1", input_file_id=FileId("in")), limits=KeyLimits(queued_lines_max=5))
    world.scope.create_batch(world.new("b1", input_file_id=FileId("in")), limits=limits)

    with pytest.raises(QuotaExceeded, match="6 lines"):
        world.scope.create_batch(world.new("b2", input_file_id=FileId("in")), limits=limits)
    inline = replace(file_of("inline"), line_count=4)
    made = world.scope.create_batch(world.new("b3", input_file_id=inline.id), file=inline, limits=limits)
    assert world.scope.open_counts() == OpenCounts(batches=2, lines=10)
    assert made.id == "b3"


# -- Idempotency-Keys --------------------------------------------------------------------------------------------------


def begin(world: World, fingerprint: str | None = "same", *, key: str = "k", route: str = ROUTE) -> Replay | None:
    return world.scope.begin_idempotent(route, key, fingerprint, lease_s=15)


def test_answer_of_the_first_request_comes_back(world: World) -> None:
    answer = replace(MADE, status=200, body=b'{"id":"b1"}', object_id="b1")
    assert begin(world) is None

    world.scope.finish_idempotent(answer)
    world.scope.finish_idempotent(replace(answer, body=b"{}"))

    assert begin(world) == begin(world, None) == answer


def test_key_stands_for_one_tenant_and_route(world: World) -> None:
    assert begin(world) is None

    assert begin(world, route="POST /v1/files") is None
    assert begin(world, key="other") is None
    assert world.store.scope(BEN).begin_idempotent(ROUTE, "k", "same", lease_s=15) is None


@pytest.mark.parametrize("is_done", [False, True])
def test_key_used_for_another_request_is_refused(world: World, is_done: bool) -> None:
    begin(world)
    if is_done:
        world.scope.finish_idempotent(replace(MADE, body=b"{}"))
    before = world.backend.dump()

    with pytest.raises(IdempotencyMismatch):
        begin(world, "different")

    assert world.backend.dump() == before


@pytest.mark.parametrize("fingerprint", ["same", None])
def test_second_request_waits_while_the_first_renews_its_lease(world: World, fingerprint: str | None) -> None:
    begin(world, fingerprint)

    for _ in range(3):
        world.clock.advance(14)
        with pytest.raises(IdempotencyRunning):
            begin(world)
        world.scope.renew_idempotent(ROUTE, "k", lease_s=15)
    world.clock.advance(15.5)

    assert begin(world) is None
    with pytest.raises(IdempotencyRunning):
        begin(world)


def test_key_of_a_request_before_the_reboot_is_free(world: World) -> None:
    begin(world)

    world.clock.reboot()
    again = replace_store(world)

    assert again.scope(ANA).begin_idempotent(ROUTE, "k", "same", lease_s=15) is None


def replace_store(world: World):
    return world.backend.open()


def test_request_that_made_nothing_is_forgotten(world: World) -> None:
    begin(world)

    world.scope.drop_idempotent(ROUTE, "k")

    assert begin(world, "different") is None


def test_answer_is_not_dropped(world: World) -> None:
    world.scope.finish_idempotent(replace(MADE, body=b"{}"))

    world.scope.drop_idempotent(ROUTE, "k")

    assert begin(world) == replace(MADE, body=b"{}")


def test_batch_and_its_key_are_one_transaction(world: World) -> None:
    begin(world)

    batch = world.scope.create_batch(world.new("b1"), replay=MADE)

    assert begin(world) == replace(MADE, object_id="b1")
    world.scope.finish_idempotent(replace(MADE, body=b'{"id":"b1"}'))
    assert begin(world) == replace(MADE, object_id="b1", body=b'{"id":"b1"}')
    assert world.scope.create_batch(world.new("b1"), replay=MADE) == batch


def test_create_that_fails_leaves_the_key_with_its_holder(world: World) -> None:
    begin(world)
    before = world.backend.dump()

    with pytest.raises(NotFound):
        world.scope.create_batch(world.new("b1", input_file_id=FileId("missing")), replay=MADE)

    assert world.backend.dump() == before


def test_of_two_requests_with_one_key_the_first_to_commit_makes_the_batch(world: World) -> None:
    """One lost its lease while it stood still, and another took the key over."""
    together = Barrier(4)

    def create(number: int) -> str:
        together.wait(timeout=30)
        return world.scope.create_batch(world.new(f"b{number}"), replay=MADE).id

    with ThreadPoolExecutor(4) as pool:
        made = set(pool.map(create, range(4)))

    assert len(made) == 1
    assert [each.id for each in world.scope.batches(limit=10)] == list(made)
    with pytest.raises(IdempotencyMismatch):
        world.scope.create_batch(world.new("b9"), replay=replace(MADE, fingerprint="different"))


def test_second_upload_with_one_key_gives_the_first_file_and_drops_its_own_bytes(world: World) -> None:
    for name in ("f1", "f2"):
        world.store.register_blob(f"files/{name}", owner="api")
    begin(world, None)

    first = world.scope.add_file(file_of("f1"), replay=MADE)
    second = world.scope.add_file(file_of("f2"), replay=MADE)

    assert first == second == file_of("f1")
    assert world.scope.files(limit=10) == [first]
    assert world.store.freeable_blobs(limit=10) == ["files/f2"]


def test_answers_are_kept_for_a_day(world: World) -> None:
    world.scope.finish_idempotent(replace(MADE, body=b"{}"))

    world.clock.advance(DAY_S - 1)
    assert begin(world) is not None
    assert world.store.expire().replays == 0
    world.clock.advance(1)

    assert world.store.expire().replays == 1
    assert begin(world, "different") is None


def test_key_is_free_after_a_day_before_any_sweep(world: World) -> None:
    world.scope.finish_idempotent(replace(MADE, body=b"{}"))

    world.clock.advance(DAY_S)

    assert world.scope.create_batch(world.new("b1"), replay=replace(MADE, fingerprint="different")).id == "b1"


# -- live reports ------------------------------------------------------------------------------------------------------


def share(batch_id: str, in_flight: int) -> LiveShare:
    return LiveShare(
        batch_id=BatchId(batch_id), in_flight=in_flight, waiting=1, done_per_s=2.5, window=8, bound_by="rpm"
    )


def test_live_gives_what_each_session_said_last_of_the_batch(world: World) -> None:
    world.created("b1")
    world.created("b2")

    world.store.report_live(ONE, [share("b1", 1), share("b2", 2)])
    world.store.report_live(ONE, [share("b1", 3), share("b2", 4)])
    world.store.report_live(TWO, [share("b1", 5)])

    assert world.scope.live(B1) == [share("b1", 3), share("b1", 5)]
    assert world.scope.live(BatchId("b2")) == [share("b2", 4)]


@pytest.mark.parametrize(
    "end", [lambda world: world.clock.advance(5.5), lambda world: world.store.report_live(ONE, [])]
)
def test_live_forgets_what_is_not_said_again(world: World, end: Callable[[World], None]) -> None:
    world.created("b1")
    world.store.report_live(ONE, [share("b1", 1)])
    world.clock.advance(4.5)
    assert world.scope.live(B1) == [share("b1", 1)]

    end(world)

    assert world.scope.live(B1) == []


# -- deleted batches ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", list(BatchStatus))
def test_only_a_batch_that_is_over_can_be_deleted(world: World, status: BatchStatus) -> None:
    bring_to(world, status)
    before = world.backend.dump()

    if status not in TERMINAL:
        with pytest.raises(TransitionRefused, match=status):
            world.scope.delete_batch(B1)
        assert world.backend.dump() == before
        return
    world.scope.delete_batch(B1)

    with pytest.raises(NotFound):
        world.scope.batch(B1)
    with pytest.raises(NotFound):
        world.scope.delete_batch(B1)
    assert world.scope.batches(limit=10) == []


def test_deleted_batch_is_still_a_place_in_lists(world: World) -> None:
    for name in ("b0", "b1", "b2"):
        world.created(name)
    world.scope.send(B1, BatchEvent.GAVE_UP)

    world.scope.delete_batch(B1)

    assert [each.id for each in world.scope.batches(limit=10)] == ["b2", "b0"]
    assert [each.id for each in world.scope.batches(limit=10, after=B1)] == ["b0"]


def test_deleted_batch_drops_its_report_and_keeps_its_files(world: World) -> None:
    seal = world.sealing()
    world.store.publish(seal.ref, replace(NOTHING, output=file_of("out")))
    world.created("b2", chosen_blob="chosen/b2")
    world.store.reject_input(world.claim(kinds=STEPS).ref, REJECTED)

    for name in ("b1", "b2"):
        world.scope.delete_batch(BatchId(name))

    assert sorted(world.store.freeable_blobs(limit=10)) == ["chosen/b2", "problems/b1"]
    assert world.scope.file(FileId("out")) == file_of("out")


# -- journals ----------------------------------------------------------------------------------------------------------


def test_extents_stay_for_a_day_after_the_end(world: World) -> None:
    seal = world.sealing(shards=2)
    world.store.publish(seal.ref, NOTHING)
    kept = world.extents()

    world.clock.advance(DAY_S - 1)
    assert world.store.expire().journals == ()
    assert world.extents() == kept
    world.clock.advance(1)

    assert world.store.expire().journals == (B1,)
    assert (world.extents(), world.shards()) == ([], [])
    batch = world.batch()
    assert (batch.journal_ended_at, batch.succeeded_count) == (world.clock.wall, 20)


def test_journals_are_named_until_they_are_forgotten(world: World) -> None:
    world.store.publish(world.sealing().ref, NOTHING)
    world.running("b2")
    world.clock.advance(DAY_S)

    assert world.store.expire().journals == world.store.expire().journals == (B1,)
    world.store.forget_journals([B1, BatchId("b2")])

    assert world.store.expire().journals == ()
    assert len(world.shards("b2")) == 1


def test_journals_of_a_batch_that_was_given_up_stay_until_it_is_deleted(world: World) -> None:
    bring_to(world, BatchStatus.FAILED)
    world.clock.advance(30 * DAY_S)

    assert world.store.expire().journals == ()
    world.scope.delete_batch(B1)

    assert world.store.expire().journals == (B1,)


def test_nothing_ends_by_a_wall_clock_that_jumped(world: World) -> None:
    world.scope.add_file(replace(file_of("a"), expires_at=world.clock.wall + timedelta(hours=1)))
    world.store.expire()

    world.clock.wall += timedelta(days=400)

    assert world.store.expire().files == 0
    assert world.store.expire().files == 1


# -- how it stands -----------------------------------------------------------------------------------------------------


def test_store_of_this_version_answers(world: World) -> None:
    world.store.check()


def test_store_of_another_version_is_refused(world: World) -> None:
    world.backend.change("UPDATE alembic_version SET version_num = '9999'")

    with pytest.raises(SchemaNewer, match="9999"):
        world.store.check()


def test_unfinished_batches_of_all_tenants_are_counted_by_status(world: World) -> None:
    world.sealing("b4")
    world.running("b1")
    world.created("b2")
    world.store.scope(BEN).create_batch(world.new("b3", tenant=BEN))

    assert world.store.unfinished_counts() == {
        BatchStatus.VALIDATING: 2,
        BatchStatus.IN_PROGRESS: 1,
        BatchStatus.FINALIZING: 1,
        BatchStatus.CANCELLING: 0,
    }
