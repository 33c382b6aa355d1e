"""What a claim leaves because of what the session has or wants, and whom it puts first among what is left."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import pytest

from batchrunner.appetite import HUNGRY, LIGHT_BYTES_MAX, LIGHT_LINES_MAX, Appetite
from batchrunner.models import BatchId, FileId, PauseReason, SessionId, TaskKind
from tests.contract.worlds import ANA, BEN, LEASE_S, MOMENT, ONE, STEPS, TWO, World, accepted, file_of, progress

_SHARD = (TaskKind.SHARD,)


def claimed(world: World, appetite: Appetite = HUNGRY, session: SessionId = ONE, *, kinds=_SHARD) -> str | None:
    """Claim, and give the batch's name; asking whether there is work must tell the same."""
    has_work = world.store.has_work(session, kinds=kinds, appetite=appetite)
    claim = world.store.claim(session, lease_s=LEASE_S, kinds=kinds, appetite=appetite)
    assert has_work == (claim is not None)
    return claim.batch.id if claim is not None else None


def running_of(world: World, tenant, name: str, *, shards: int = 1, **changes) -> None:
    world.store.scope(tenant).create_batch(world.new(name, tenant=tenant, **changes))
    claim = world.claim(kinds=(TaskKind.VALIDATE,))
    assert world.store.accept_input(claim.ref, accepted(shards=shards))


# -- what is left ------------------------------------------------------------------------------------------------------


def test_a_sated_batch_is_left(world: World) -> None:
    world.running("b1")
    world.running("b2")

    assert claimed(world, Appetite(sated=frozenset({BatchId("b1")}))) == "b2"
    assert claimed(world, Appetite(sated=frozenset({BatchId("b1")}))) is None


def test_without_room_only_held_batches_and_new_tenants_are_taken(world: World) -> None:
    running_of(world, ANA, "held", shards=2)
    assert claimed(world) == "held"
    running_of(world, ANA, "another")
    running_of(world, BEN, "bens")
    full = Appetite(has_room=False)

    assert claimed(world, full) == "bens"
    assert claimed(world, full) == "held"
    assert claimed(world, full) is None
    assert claimed(world) == "another"


def test_a_breakers_pause_is_claimed_by_those_who_probe_and_once_in_their_time(world: World) -> None:
    world.running(shards=3)
    world.scope.pause(BatchId("b1"), PauseReason.AUTHENTICATION.value)
    probing = Appetite(probe_every_s=60.0)

    world.clock.advance(59.0)
    assert claimed(world, probing) is None
    world.clock.advance(1.0)
    assert claimed(world) is None
    assert claimed(world, probing) == "b1"
    assert claimed(world, probing, TWO) is None
    world.clock.advance(60.0)
    assert claimed(world, probing, TWO) == "b1"


def test_a_clock_that_is_set_back_keeps_no_probe_waiting(world: World) -> None:
    world.running(shards=2)
    world.scope.pause(BatchId("b1"), PauseReason.AUTHENTICATION.value)
    world.clock.wall -= timedelta(hours=3)
    probing = Appetite(probe_every_s=60.0)

    assert claimed(world) is None
    assert claimed(world, probing) == "b1"
    assert claimed(world, probing, TWO) is None


def test_an_operators_pause_is_claimed_by_nobody(world: World) -> None:
    world.running()
    world.scope.pause(BatchId("b1"), PauseReason.OPERATOR.value)
    world.clock.advance(3600.0)

    assert claimed(world, Appetite(probe_every_s=60.0)) is None


# -- light steps -------------------------------------------------------------------------------------------------------


def test_only_light_inputs_are_validated_where_only_those_are_wanted(world: World) -> None:
    for name, size_bytes in (("huge", LIGHT_BYTES_MAX + 1), ("small", LIGHT_BYTES_MAX)):
        world.scope.add_file(replace(file_of(name), size_bytes=size_bytes))
        world.created(name, input_file_id=FileId(name), deadline_at=MOMENT if name == "huge" else None)
    picky = Appetite(light=frozenset({TaskKind.VALIDATE}))

    assert claimed(world, picky, kinds=STEPS) == "small"
    assert claimed(world, picky, kinds=STEPS) is None
    assert claimed(world, Appetite(light=frozenset({TaskKind.SEAL})), kinds=STEPS) == "huge"


@pytest.mark.parametrize(("lines", "is_light"), [(LIGHT_LINES_MAX, True), (LIGHT_LINES_MAX + 1, False)])
def test_only_light_batches_are_sealed_where_only_those_are_wanted(world: World, lines: int, is_light: bool) -> None:
    world.running(lines=lines)
    claim = world.claim()
    world.store.settle(claim.ref, progress(claim, 0, 100, succeeded=lines))

    found = claimed(world, Appetite(light=frozenset({TaskKind.SEAL})), kinds=STEPS)

    assert found == ("b1" if is_light else None)


# -- who is first ------------------------------------------------------------------------------------------------------


def test_a_tenant_with_few_shards_in_anybodys_hands_comes_first(world: World) -> None:
    for number in range(3):
        running_of(world, ANA, f"ana-{number}", priority=5)
    assert claimed(world, session=TWO) == "ana-0"
    running_of(world, BEN, "ben-0")

    assert claimed(world) == "ben-0"


def test_an_hour_of_waiting_is_a_step_of_priority(world: World) -> None:
    world.running("old")
    world.clock.advance(3600.0)
    world.running("young")
    world.running("above", priority=1, deadline_at=world.clock.now() + timedelta(hours=1))
    world.clock.advance(3600.0)

    # Two steps by age against one, and a deadline between equals.
    assert [claimed(world) for _ in range(3)] == ["above", "old", "young"]


# -- whose turn it is --------------------------------------------------------------------------------------------------

_IN_TURN = Appetite(takes_turns=True)


def test_those_who_take_turns_leave_what_is_new_to_those_who_hold_fewer(world: World) -> None:
    for number in range(4):
        world.running(f"b{number}")

    # The other one holds nothing yet, and then as many.
    assert claimed(world, _IN_TURN) == "b0"
    assert claimed(world, _IN_TURN) is None
    assert claimed(world, _IN_TURN, TWO) == "b1"
    assert claimed(world, _IN_TURN, TWO) == "b2"
    assert claimed(world, _IN_TURN, TWO) is None
    assert claimed(world, _IN_TURN) == "b3"


def test_what_nobody_took_in_its_turn_is_anybodys_after_a_moment(world: World) -> None:
    world.running("b0")
    world.running("b1")
    assert claimed(world, _IN_TURN) == "b0"
    world.clock.advance(0.9)
    assert claimed(world, _IN_TURN) is None

    world.clock.advance(0.1)

    assert claimed(world, _IN_TURN) == "b1"


def test_more_of_what_one_holds_is_nobody_elses_turn(world: World) -> None:
    world.running(shards=2)

    assert claimed(world, _IN_TURN) == "b1"
    assert claimed(world, _IN_TURN) == "b1"
