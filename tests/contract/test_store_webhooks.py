"""What every Store promises of webhooks: events with the status, one hand at a time, guarded records, a log to keep."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from datetime import timedelta

import msgspec
import pytest

from batchrunner.deliveries import (
    DEFAULT_TYPES,
    Appointments,
    Delivery,
    DeliveryFilter,
    DeliveryId,
    DeliveryState,
    Dispatch,
    EndpointId,
    EndReason,
    EventId,
    EventType,
    Posted,
    PostError,
    Recorded,
    Secrets,
    WebhookEndpoint,
)
from batchrunner.errors import NotFound, QuotaExceeded, TransitionRefused
from batchrunner.holdings import Replay
from batchrunner.lifecycle import TERMINAL, BatchEvent, BatchStatus
from batchrunner.models import BatchId, SessionId, TenantId
from batchrunner.webhooks import judge, sample_event
from tests.contract.worlds import ANA, BEN, ONE, TWO, World, bring_to

HOOK = "https://hooks.example/a"
LEASE_S = 30.0


def endpoint_of(world: World, name: str = "we_1", **changes) -> WebhookEndpoint:
    plain = WebhookEndpoint(
        id=EndpointId(name),
        tenant=ANA,
        name="mine",
        url=f"https://{name.replace('_', '-')}.example/hook",
        event_types=DEFAULT_TYPES,
        secrets=Secrets(secret=f"whsec_{name}"),
        created_at=world.clock.wall,
        updated_at=world.clock.wall,
    )
    return replace(plain, **changes)


def take(world: World, session: SessionId = ONE, *, each: int = 8, room: int = 100, **more) -> list[Dispatch]:
    wanted = Appointments(session=session, lease_s=LEASE_S, each_max=each, room=room, **more)
    return world.store.claim_deliveries(wanted)


def finish(world: World, dispatch: Dispatch, posted: Posted, *, chance: float = 0.5) -> Recorded:
    recorded = judge(dispatch, posted, world.clock.wall, chance=chance)
    world.store.record_attempts([recorded])
    return recorded


def finish_next(world: World, posted: Posted) -> Recorded:
    (dispatch,) = take(world, each=1)
    return finish(world, dispatch, posted)


def tell(world: World, number: int = 1, *, url: str | None = None, kind: EventType = EventType.COMPLETED) -> EventId:
    event = sample_event(kind, ANA, EventId(f"evt_{number}"), world.clock.wall)
    world.scope.announce(event, url=url)
    return event.id


def only(world: World) -> Delivery:
    (delivery,) = world.scope.deliveries(limit=10)
    return delivery


TAKEN, BUSY, GONE = Posted(status=200), Posted(status=500), Posted(status=410)


# -- events ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", sorted(TERMINAL))
def test_each_end_is_told_once_with_the_whole_batch(world: World, status: BatchStatus) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    bring_to(world, status)

    (event,) = world.scope.events(after=0, limit=10)
    (dispatch,) = take(world)
    body = msgspec.json.decode(dispatch.body)

    assert event.type == f"batch.{status}"
    assert dispatch.body.decode() == event.body
    assert list(body) == ["id", "object", "type", "created_at", "data"]
    assert (body["id"], body["object"], body["type"]) == (event.id, "event", event.type)
    assert (body["data"]["id"], body["data"]["object"], body["data"]["status"]) == ("b1", "batch", status)
    assert body["data"]["request_counts"]["total"] == world.batch().total_count
    assert body["created_at"] == body["data"][f"{status}_at"]


def test_nothing_is_told_before_the_status_is_true(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    world.sealing()

    assert world.scope.events(after=0, limit=10) == []
    assert take(world) == []


def test_a_batch_tells_its_own_url_beside_the_endpoints_that_want_it(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world, "we_1"))
    world.scope.add_endpoint(endpoint_of(world, "we_2", event_types=(EventType.FAILED,)))
    world.store.scope(BEN).add_endpoint(endpoint_of(world, "we_3", tenant=BEN))
    world.scope.create_batch(world.new(webhook_url=HOOK))
    world.scope.send(BatchId("b1"), BatchEvent.GAVE_UP)

    found = world.scope.deliveries(limit=10)

    assert {each.endpoint_id for each in found} == {"we_1", "we_2", None}
    assert {each.url for each in found if each.endpoint_id is None} == {HOOK}
    assert len({each.id for each in found}) == 3
    assert world.store.scope(BEN).deliveries(limit=10) == []
    assert world.store.scope(BEN).events(after=0, limit=10) == []


def test_the_beginning_is_told_only_to_those_who_asked(world: World) -> None:
    world.running(webhook_url=HOOK)
    assert world.scope.events(after=0, limit=10) == []

    world.scope.add_endpoint(endpoint_of(world, "we_1"))
    world.scope.add_endpoint(endpoint_of(world, "we_2", event_types=(EventType.IN_PROGRESS,)))
    world.running("b2", webhook_url=HOOK)

    assert [(each.endpoint_id, each.type) for each in world.scope.deliveries(limit=9)] == [
        ("we_2", "batch.in_progress")
    ]


def test_an_event_is_announced_once(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    for _ in range(2):
        tell(world, url=HOOK)

    assert len(world.scope.deliveries(limit=10)) == 2
    assert len(world.scope.events(after=0, limit=9)) == 1


def test_events_are_in_order_behind_a_serial(world: World) -> None:
    names = [tell(world, number) for number in range(5)]

    first = world.scope.events(after=0, limit=2)
    rest = world.scope.events(after=first[-1].serial, limit=10)

    assert [each.id for each in (*first, *rest)] == names
    assert world.scope.last_event() == rest[-1]
    assert world.store.scope(BEN).last_event() is None
    assert [world.scope.event_serial(each) for each in names] == [each.serial for each in (*first, *rest)]


# -- one hand at a time ------------------------------------------------------------------------------------------------


def test_two_couriers_never_hold_one_delivery(world: World) -> None:
    for number in range(10):
        tell(world, number, url=HOOK)

    mine, theirs = take(world, ONE, each=6), take(world, TWO, each=6)

    assert len(mine) == 6
    assert len(theirs) == 4
    assert not {each.id for each in mine} & {each.id for each in theirs}
    assert take(world, TWO) == []


def test_a_claim_is_on_record_before_anything_is_sent(world: World) -> None:
    tell(world, url=HOOK)

    (dispatch,) = take(world)

    attempt = only(world).attempts[-1]
    assert (attempt.number, attempt.started_at, attempt.elapsed_s) == (1, world.clock.wall, None)
    assert (dispatch.epoch, dispatch.attempt_count, dispatch.first_at) == (1, 1, world.clock.wall)


@pytest.mark.parametrize("how", ["lease", "session", "give", "reboot"])
def test_what_a_dead_courier_held_is_due_again_under_the_same_id(world: World, how: str) -> None:
    tell(world, url=HOOK)
    (lost,) = take(world)
    match how:
        case "lease":
            world.clock.advance(LEASE_S)
        case "session":
            world.store.release_session(ONE, died=True)
        case "give":
            assert world.store.give_deliveries_back(ONE) == 1
        case _:
            world.clock.reboot()
            world.store = world.backend.open()

    (again,) = take(world, TWO)

    assert (again.id, again.body, again.epoch) == (lost.id, lost.body, lost.epoch + 1)
    assert again.attempt_count == 1, "what its courier's death cut short is no failure of the receiver"
    assert [each.error for each in world.store.scope(ANA).deliveries(limit=1)[0].attempts] == [PostError.UNKNOWN, None]


def test_a_record_of_an_older_epoch_changes_nothing(world: World) -> None:
    tell(world, url=HOOK)
    (lost,) = take(world)
    world.clock.advance(LEASE_S)
    (held,) = take(world, TWO)
    before = world.backend.dump()

    finish(world, lost, BUSY)

    assert world.backend.dump() == before
    finish(world, held, TAKEN)
    assert only(world).state is DeliveryState.DELIVERED


def test_each_receiver_gets_its_part_and_no_more(world: World) -> None:
    for number in range(6):
        tell(world, number, url="https://slow.example/x")
        tell(world, 10 + number, url="https://fast.example/y")

    first = take(world, each=4, busy={"ana https://slow.example": 4})
    second = take(world, each=4, room=12, busy={"ana https://fast.example": 2})

    assert {each.receiver for each in first} == {"ana https://fast.example"}
    assert len(first) == 4
    assert [each.receiver for each in second] == ["ana https://slow.example"] * 3


def test_whoever_hangs_leaves_as_much_free_as_it_takes(world: World) -> None:
    """Receivers that hang fill no courier: not of one tenant, and not of several."""
    busy: dict[str, int] = {}
    for tenant in (ANA, TenantId("a b"), BEN):
        for number in range(10):
            event = sample_event(EventType.COMPLETED, tenant, EventId(f"evt_{tenant}_{number}"), world.clock.wall)
            scope = world.store.scope(tenant)
            for copy in range(2):
                scope.announce(replace(event, id=EventId(f"{event.id}_{copy}")), url=f"https://{number}.example/")
        found = Counter(each.receiver for each in take(world, each=2, room=30 - sum(busy.values()), busy=busy))
        busy |= found
        held = [count for receiver, count in busy.items() if receiver.startswith(f"{tenant} ")]
        assert len(held) >= 3
        assert 3 <= sum(held) <= 1 + 30 - sum(busy.values())

    assert take(world, each=2, room=0, busy=busy) == []


def test_one_that_is_idle_goes_before_those_that_are_busy(world: World) -> None:
    for number in range(3):
        tell(world, number, url="https://slow.example/x")
        tell(world, 10 + number, url="https://fast.example/y")

    taken = take(world, room=5, busy={"ana https://slow.example": 1})

    assert [each.receiver for each in taken] == ["ana https://fast.example"]


def test_a_courier_holds_no_more_bytes_than_it_has_room_for(world: World) -> None:
    for number in range(4):
        tell(world, number, url=HOOK)
    size_bytes = len(world.scope.events(after=0, limit=1)[0].body)

    first = take(world, bytes_max=2 * size_bytes)
    second = take(world, bytes_max=1)

    assert [len(first), len(second)] == [2, 1], "one goes always"


def test_the_longest_due_goes_first(world: World) -> None:
    for number in range(3):
        tell(world, number, url=HOOK)
        world.clock.advance(1)

    taken = take(world, each=2)

    assert [each.attempt_count for each in taken] == [1, 1]
    assert [msgspec.json.decode(each.body)["id"] for each in taken] == ["evt_0", "evt_1"]


def test_what_is_not_due_is_left(world: World) -> None:
    tell(world, url=HOOK)
    (first,) = take(world)
    finish(world, first, BUSY)

    assert take(world) == []
    world.clock.advance(4.99)
    assert take(world) == []
    world.clock.advance(0.01)
    (second,) = take(world)

    assert (second.id, second.attempt_count, second.first_at) == (first.id, 2, first.first_at)


# -- what signs --------------------------------------------------------------------------------------------------------


def test_endpoints_sign_with_their_own_secrets_and_urls_with_the_tenants(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    tell(world, url=HOOK)

    before = {each.endpoint_id: each.secrets for each in take(world)}
    assert before == {"we_1": Secrets(secret="whsec_we_1"), None: None}
    world.scope.signing_secrets("whsec_fresh")
    world.clock.advance(LEASE_S)
    after = {each.endpoint_id: each.secrets for each in take(world)}

    assert after[None] == Secrets(secret="whsec_fresh")


def test_the_tenants_secret_is_made_once(world: World) -> None:
    first = world.scope.signing_secrets("whsec_one")

    assert world.scope.signing_secrets("whsec_two") == first == Secrets(secret="whsec_one")
    assert world.store.scope(BEN).signing_secrets("whsec_ben").secret == "whsec_ben"


def test_rotated_secrets_sign_beside_the_new_ones_until_their_time(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    world.scope.signing_secrets("whsec_one")
    until = world.clock.wall + timedelta(hours=24)

    rotated = world.scope.rotate_endpoint_secret(EndpointId("we_1"), "whsec_new", old_until=until)
    own = world.scope.rotate_signing_secret("whsec_two", old_until=until)

    assert rotated.secrets.valid(world.clock.wall) == ("whsec_new", "whsec_we_1")
    assert rotated.secrets.valid(until) == ("whsec_new",)
    assert own.valid(world.clock.wall) == ("whsec_two", "whsec_one")
    at_once = world.scope.rotate_endpoint_secret(EndpointId("we_1"), "whsec_last", old_until=None)
    assert at_once.secrets.valid(world.clock.wall) == ("whsec_last",)


def test_a_second_rotation_cuts_short_no_secret_that_was_to_be_kept(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    world.scope.signing_secrets("whsec_we_1")
    day = timedelta(hours=24)
    first_until = until = world.clock.wall + day
    made = world.scope.endpoint(EndpointId("we_1")).secrets
    for secret in ("whsec_new", "whsec_newer"):
        until = world.clock.wall + day
        made = world.scope.rotate_endpoint_secret(EndpointId("we_1"), secret, old_until=until).secrets
        assert world.scope.rotate_signing_secret(secret, old_until=until) == made
        world.clock.advance(3600)
    tell(world, url=HOOK)

    both = [each.secrets for each in take(world)]

    assert both == [made, made]
    assert made.valid(world.clock.wall) == ("whsec_newer", "whsec_new", "whsec_we_1")
    assert made.valid(first_until) == ("whsec_newer", "whsec_new")
    assert made.valid(until) == ("whsec_newer",)


def test_there_is_an_end_to_old_secrets(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    until = world.clock.wall + timedelta(hours=24)
    for number in range(20):
        world.scope.rotate_endpoint_secret(EndpointId("we_1"), f"whsec_{number}", old_until=until)

    made = world.scope.endpoint(EndpointId("we_1"))
    assert made.secrets.valid(world.clock.wall) == tuple(f"whsec_{number}" for number in range(19, 8, -1))


# -- endpoints ---------------------------------------------------------------------------------------------------------


def test_endpoints_are_listed_newest_first_behind_a_cursor_that_may_be_deleted(world: World) -> None:
    for name in ("we_1", "we_2", "we_3", "we_4"):
        world.scope.add_endpoint(endpoint_of(world, name))
    world.scope.delete_endpoint(EndpointId("we_3"))

    assert [each.id for each in world.scope.endpoints(limit=9)] == ["we_4", "we_2", "we_1"]
    assert [each.id for each in world.scope.endpoints(limit=1, after=EndpointId("we_3"))] == ["we_2"]


@pytest.mark.parametrize(
    "ask",
    [
        lambda scope: scope.endpoint(EndpointId("we_1")),
        lambda scope: scope.change_endpoint(EndpointId("we_1"), name="x"),
        lambda scope: scope.delete_endpoint(EndpointId("we_1")),
        lambda scope: scope.rotate_endpoint_secret(EndpointId("we_1"), "s", old_until=None),
        lambda scope: scope.endpoints(limit=1, after=EndpointId("we_1")),
        lambda scope: scope.event_serial(EventId("evt_1")),
        lambda scope: scope.delivery(DeliveryId("wh_1")),
        lambda scope: scope.resend(DeliveryId("wh_1")),
        lambda scope: scope.deliveries(limit=1, after=DeliveryId("wh_1")),
    ],
)
def test_what_is_another_tenants_is_not_there(world: World, ask) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    tell(world)
    world.backend.change("update webhook_deliveries set id = 'wh_1'")
    before = world.backend.dump()

    with pytest.raises(NotFound):
        ask(world.store.scope(BEN))

    assert world.backend.dump() == before


def test_an_idempotent_create_makes_one_endpoint(world: World) -> None:
    replay = Replay(route="POST /v1/webhook_endpoints", key="k", fingerprint="same")

    first = world.scope.add_endpoint(endpoint_of(world, "we_1"), replay=replay)
    again = world.scope.add_endpoint(endpoint_of(world, "we_2"), replay=replay)

    assert first == again
    assert len(world.scope.endpoints(limit=9)) == 1


def test_there_is_an_end_to_endpoints(world: World) -> None:
    for number in range(100):
        world.scope.add_endpoint(endpoint_of(world, f"we_{number}"))

    with pytest.raises(QuotaExceeded):
        world.scope.add_endpoint(endpoint_of(world, "we_100"))


def test_a_change_of_the_url_takes_what_waits_along(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    tell(world)

    changed = world.scope.change_endpoint(EndpointId("we_1"), url=HOOK, event_types=[EventType.FAILED])
    (dispatch,) = take(world)

    assert (changed.url, changed.event_types, changed.name) == (HOOK, (EventType.FAILED,), "mine")
    assert (dispatch.url, dispatch.receiver) == (HOOK, "ana https://hooks.example")


def test_an_unchanged_update_is_no_update(world: World) -> None:
    made = world.scope.add_endpoint(endpoint_of(world))
    world.clock.advance(60)

    assert world.scope.change_endpoint(made.id, name=made.name, url=made.url) == made


def test_a_deleted_endpoint_is_told_nothing_more(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    tell(world, 1)
    (held,) = take(world)
    tell(world, 2)

    world.scope.delete_endpoint(EndpointId("we_1"))
    tell(world, 3)
    finish(world, held, BUSY)

    found = world.scope.deliveries(limit=9)
    assert {(each.state, each.reason) for each in found} == {(DeliveryState.UNDELIVERED, EndReason.ENDPOINT_DELETED)}
    assert len(found) == 2
    assert take(world) == []
    with pytest.raises(TransitionRefused):
        world.scope.resend(found[0].id)


def test_no_secret_of_a_deleted_endpoint_is_kept_and_its_place_in_lists_only_for_a_month(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world, "we_1"))
    world.scope.add_endpoint(endpoint_of(world, "we_2"))
    until = world.clock.wall + timedelta(hours=24)
    world.scope.rotate_endpoint_secret(EndpointId("we_2"), "whsec_rotated", old_until=until)
    tell(world)
    world.scope.delete_endpoint(EndpointId("we_2"))
    assert not {"whsec_we_2", "whsec_rotated"} & set(_words(world.backend.dump()))
    assert [each.id for each in world.scope.endpoints(limit=9, after=EndpointId("we_2"))] == ["we_1"]

    world.clock.advance(30 * 86400)
    world.store.expire()

    with pytest.raises(NotFound):
        world.scope.endpoints(limit=9, after=EndpointId("we_2"))
    assert [each.id for each in world.scope.endpoints(limit=9)] == ["we_1"]


def _words(found: object) -> list[str]:
    return re.findall(r"whsec_\w+", repr(found))


# -- ends --------------------------------------------------------------------------------------------------------------


def test_410_disables_an_endpoint_and_a_change_enables_it_again(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    tell(world, 1)
    tell(world, 2)
    first, second = take(world)

    finish(world, first, GONE)
    disabled = world.scope.endpoint(EndpointId("we_1"))
    tell(world, 3)

    assert disabled.disabled_at == world.clock.wall
    assert disabled.disabled_reason == "it answered 410 Gone"
    assert {each.id: each.reason for each in world.scope.deliveries(limit=9)} == {
        first.id: EndReason.GONE,
        second.id: EndReason.ENDPOINT_DISABLED,
    }
    with pytest.raises(TransitionRefused):
        world.scope.resend(second.id)
    enabled = world.scope.change_endpoint(EndpointId("we_1"))
    assert (enabled.disabled_at, enabled.disabled_reason, enabled.failing_since) == (None, None, None)
    assert world.scope.resend(second.id).state is DeliveryState.PENDING


@pytest.mark.parametrize("how", ["deleted", "disabled"])
def test_what_was_under_way_when_its_endpoint_ended_is_told_as_it_came(world: World, how: str) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    for number in range(3):
        tell(world, number)
    taken, refused, gone = take(world)
    if how == "deleted":
        world.scope.delete_endpoint(EndpointId("we_1"))
    else:
        finish(world, gone, GONE)

    finish(world, taken, TAKEN)
    finish(world, refused, BUSY)

    told, lost = world.scope.delivery(taken.id), world.scope.delivery(refused.id)
    assert (told.state, told.reason, told.attempts[-1].status) == (DeliveryState.DELIVERED, None, 200)
    assert (lost.state, lost.reason) == (DeliveryState.UNDELIVERED, f"endpoint_{how}")
    assert (lost.attempts[-1].status, lost.due_at) == (500, None)
    assert take(world) == []


def test_what_is_resent_while_its_last_attempt_is_under_way_waits_for_it(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    for number in range(2):
        tell(world, number)
    gone, held = take(world)
    finish(world, gone, GONE)
    world.scope.change_endpoint(EndpointId("we_1"))

    again = world.scope.resend(held.id)

    assert again.state is DeliveryState.PENDING
    assert take(world, TWO) == []
    finish(world, held, BUSY)
    world.clock.advance(5)
    (later,) = take(world, TWO)
    assert (later.id, later.attempt.number) == (held.id, 2)


def test_410_ends_the_delivery_of_a_url_and_of_no_other(world: World) -> None:
    tell(world, 1, url=HOOK)
    tell(world, 2, url=HOOK)
    first, _ = take(world)

    finish(world, first, GONE)

    states = {each.id: each.state for each in world.scope.deliveries(limit=9)}
    assert states.pop(first.id) is DeliveryState.UNDELIVERED
    assert list(states.values()) == [DeliveryState.PENDING]


def test_an_endpoint_that_fails_for_five_days_is_disabled(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    since = world.clock.wall
    for day in range(5):
        tell(world, day)
        for dispatch in take(world):
            finish(world, dispatch, BUSY)
        assert world.scope.endpoint(EndpointId("we_1")).failing_since == since
        world.clock.advance(86400)
    waiting = take(world)
    assert world.scope.endpoint(EndpointId("we_1")).disabled_at is None

    for dispatch in waiting:
        finish(world, dispatch, BUSY)

    assert world.scope.endpoint(EndpointId("we_1")).disabled_reason == "it has failed for 5 days"
    assert take(world) == []


def test_a_single_failure_after_a_long_silence_disables_nothing(world: World) -> None:
    """Whoever was told nothing for weeks may have been mended meanwhile."""
    world.scope.add_endpoint(endpoint_of(world))
    tell(world, 1)
    first = finish_next(world, BUSY)
    world.clock.advance(5)
    finish_next(world, BUSY)
    world.backend.change(f"update webhook_deliveries set state = 'undelivered' where id = '{first.id}'")
    world.clock.advance(20 * 86400)
    tell(world, 2)
    for _ in range(2):
        finish_next(world, BUSY)
        assert world.scope.endpoint(EndpointId("we_1")).disabled_at is None
        world.clock.advance(6)
    world.clock.advance(300)

    finish_next(world, BUSY)

    assert world.scope.endpoint(EndpointId("we_1")).disabled_reason == "it has failed for 5 days"


def test_one_success_ends_the_failing(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    tell(world)
    finish_next(world, BUSY)
    world.clock.advance(6)

    finish_next(world, TAKEN)

    assert world.scope.endpoint(EndpointId("we_1")).failing_since is None


def test_the_log_tells_each_attempt(world: World) -> None:
    tell(world, url=HOOK)
    finish_next(world, Posted(status=503, elapsed_s=0.25, retry_after_s=60.0))
    due_at = only(world).due_at
    world.clock.advance(60)
    finish_next(world, Posted(error=PostError.TIMEOUT, message="no answer within 15 s", elapsed_s=15.0))
    world.clock.advance(400)
    finish_next(world, TAKEN)

    told = only(world)

    assert due_at == told.created_at + timedelta(seconds=60)
    assert [(each.number, each.status, each.error) for each in told.attempts] == [
        (1, 503, None),
        (2, None, PostError.TIMEOUT),
        (3, 200, None),
    ]
    assert told.attempts[1].message == "no answer within 15 s"
    assert (told.state, told.attempt_count, told.due_at, told.ended_at) == ("delivered", 3, None, world.clock.wall)


def test_resend_begins_anew_under_the_same_id(world: World) -> None:
    tell(world, url=HOOK)
    finish_next(world, TAKEN)
    world.clock.advance(100)

    again = world.scope.resend(only(world).id)
    (dispatch,) = take(world)

    assert (again.state, again.attempt_count, again.due_at) == (DeliveryState.PENDING, 0, world.clock.wall)
    assert (dispatch.id, dispatch.attempt_count, dispatch.attempt.number) == (again.id, 1, 2)
    assert dispatch.first_at == world.clock.wall


def test_resend_of_one_under_way_leaves_it_alone(world: World) -> None:
    tell(world, url=HOOK)
    (held,) = take(world)

    world.scope.resend(held.id)

    assert take(world, TWO) == []
    finish(world, held, TAKEN)
    assert only(world).state is DeliveryState.DELIVERED


def test_deliveries_are_listed_by_what_is_asked(world: World) -> None:
    world.scope.add_endpoint(endpoint_of(world))
    tell(world, 1, url=HOOK)
    tell(world, 2, kind=EventType.FAILED)
    world.store.record_attempts([judge(each, TAKEN, world.clock.wall, chance=0) for each in take(world, each=1)])

    everything = world.scope.deliveries(limit=9)

    def found(**narrowed) -> int:
        return len(world.scope.deliveries(limit=9, only=DeliveryFilter(**narrowed)))

    assert len(everything) == 3
    assert [each.id for each in world.scope.deliveries(limit=9, after=everything[0].id)] == [
        each.id for each in everything[1:]
    ]
    assert found(state=DeliveryState.DELIVERED) == 2
    assert found(type=EventType.FAILED) == 1
    assert found(endpoint_id=EndpointId("we_1")) == 2
    assert found(batch_id=BatchId("batch_test")) == 3
    assert found(batch_id=BatchId("b1")) == 0
    assert world.store.delivery_counts() == {"pending": 1, "delivered": 2, "undelivered": 0}


def test_what_has_been_over_for_thirty_days_is_dropped_and_nothing_else(world: World) -> None:
    tell(world, 1, url=HOOK)
    finish_next(world, TAKEN)
    tell(world, 2, url=HOOK)
    world.clock.advance(30 * 86400 - 1)
    world.store.expire()
    assert len(world.scope.deliveries(limit=9)) == 2

    world.clock.advance(1)
    world.store.expire()

    assert [each.state for each in world.scope.deliveries(limit=9)] == [DeliveryState.PENDING]
    assert [each.id for each in world.scope.events(after=0, limit=9)] == ["evt_2"]
