"""Couriers over every Store: the schedule on a clock that tests move, one hand at a time, nobody waits for others."""

from __future__ import annotations

import asyncio
import base64
import hmac
import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

import pytest

from batchrunner.clock import SystemClock, SystemRng
from batchrunner.courier import LEASE_S, TIMEOUT_S, Courier
from batchrunner.deliveries import Delivery, DeliveryState, EndReason, EventId, EventType, Posted, PostError
from batchrunner.models import SessionId
from batchrunner.store.sqlite import SqliteStore
from batchrunner.webhooks import ATTEMPTS_MAX, LAST_AFTER, WAITS_S, sample_event
from tests.contract.worlds import ANA, World

HOOK = "https://hooks.example/a"
REFUSALS = (
    Posted(status=500),
    Posted(status=302),
    Posted(status=404),
    Posted(error=PostError.TIMEOUT),
    Posted(error=PostError.UNREACHABLE),
    Posted(error=PostError.ADDRESS_REFUSED),
)


@dataclass(slots=True)
class Post:
    """One attempt as a receiver sees it."""

    at: datetime
    url: str
    headers: dict[str, str]
    body: bytes


@dataclass(slots=True)
class ScriptedPoster:
    """A Poster whose receivers answer as a test says, by the number of the attempt."""

    now: Callable[[], datetime]
    answer: Callable[[int, str], Posted | None]
    posts: list[Post] = field(default_factory=list)
    under_way: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    came: asyncio.Event = field(default_factory=asyncio.Event)

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> Posted:
        self.posts.append(Post(self.now(), url, dict(headers), body))
        self.came.set()
        number = len(self.posts)
        key = headers["webhook-id"]
        self.under_way[key] += 1
        self.most[key] = max(self.most[key], self.under_way[key])
        try:
            answer = self.answer(number, url)
            if answer is None:
                await asyncio.Event().wait()
                raise AssertionError
            await asyncio.sleep(0)
            return answer
        finally:
            self.under_way[key] -= 1

    async def close(self) -> None:
        """Nothing is open."""


def courier_of(
    world: World,
    poster: ScriptedPoster,
    *,
    name: str = "courier",
    clock=None,
    each_max: int = 8,
    in_flight_max: int = 1024,
) -> Courier:
    return Courier(
        session=SessionId(name),
        store=world.store,
        poster=poster,
        clock=clock or world.clock,
        rng=SystemRng(),
        each_max=each_max,
        in_flight_max=in_flight_max,
    )


async def turn(courier: Courier) -> None:
    """One round of the courier: take, post, record."""
    await courier._turn()
    await asyncio.gather(*courier._under_way)
    await courier._record()


def tell(world: World, number: int = 1, url: str = HOOK) -> None:
    world.scope.announce(sample_event(EventType.COMPLETED, ANA, EventId(f"evt_{number}"), world.clock.wall), url=url)


def only(world: World) -> Delivery:
    (delivery,) = world.scope.deliveries(limit=10)
    return delivery


def assert_on_schedule(posts: list[Post]) -> None:
    """Every wait is that of its place, give or take a tenth, and the last attempt is at the end."""
    waits_s = [(after.at - before.at).total_seconds() for before, after in itertools.pairwise(posts)]
    for waited_s, planned_s in zip(waits_s, WAITS_S, strict=False):
        assert 0.9 * planned_s <= waited_s <= 1.1 * planned_s
    assert posts[-1].at - posts[0].at <= LAST_AFTER
    if len(posts) == ATTEMPTS_MAX:
        assert posts[-1].at - posts[0].at >= LAST_AFTER - timedelta(hours=3)


def assert_signed_anew(posts: list[Post], secret: str) -> None:
    """One id, and each signature is that of its own time."""
    assert len({post.headers["webhook-id"] for post in posts}) == 1
    assert len({post.body for post in posts}) == 1
    key = base64.b64decode(secret.removeprefix("whsec_"))
    for post in posts:
        assert post.headers["webhook-timestamp"] == str(int(post.at.timestamp()))
        signed = f"{post.headers['webhook-id']}.{post.headers['webhook-timestamp']}.".encode() + post.body
        assert (
            post.headers["webhook-signature"] == "v1," + base64.b64encode(hmac.digest(key, signed, "sha256")).decode()
        )


async def carry_to_the_end(world: World, courier: Courier) -> None:
    while (delivery := only(world)).state is DeliveryState.PENDING:
        assert delivery.due_at is not None
        world.clock.advance(max(0.0, (delivery.due_at - world.clock.wall).total_seconds()))
        await turn(courier)


@pytest.mark.parametrize("refused", range(ATTEMPTS_MAX))
async def test_a_receiver_that_takes_the_next_after_k_refusals_gets_it(world: World, refused: int) -> None:
    answers = [*(REFUSALS[number % len(REFUSALS)] for number in range(refused)), Posted(status=200)]
    poster = ScriptedPoster(world.clock.now, lambda number, _url: answers[number - 1])
    secret = world.scope.signing_secrets("whsec_" + base64.b64encode(b"s" * 32).decode()).secret
    tell(world)

    await carry_to_the_end(world, courier_of(world, poster))

    assert (only(world).state, only(world).attempt_count) == (DeliveryState.DELIVERED, refused + 1)
    assert len(poster.posts) == refused + 1
    assert_on_schedule(poster.posts)
    assert_signed_anew(poster.posts, secret)


async def test_a_receiver_that_refuses_all_is_undelivered_and_resend_works(world: World) -> None:
    answers = [Posted(status=500)] * ATTEMPTS_MAX + [Posted(status=200)]
    poster = ScriptedPoster(world.clock.now, lambda number, _url: answers[number - 1])
    courier = courier_of(world, poster)
    tell(world)

    await carry_to_the_end(world, courier)

    lost = only(world)
    assert (lost.state, lost.reason, lost.due_at) == (DeliveryState.UNDELIVERED, EndReason.ATTEMPTS_USED_UP, None)
    assert [each.status for each in lost.attempts] == [500] * ATTEMPTS_MAX
    assert_on_schedule(poster.posts)
    world.clock.advance(86400)
    await turn(courier)
    assert len(poster.posts) == ATTEMPTS_MAX

    world.scope.resend(lost.id)
    await turn(courier)

    assert only(world).state is DeliveryState.DELIVERED
    assert len({post.headers["webhook-id"] for post in poster.posts}) == 1


async def test_a_busy_receiver_is_left_alone_for_as_long_as_it_asks(world: World) -> None:
    answers = [Posted(status=503, retry_after_s=3600.0), Posted(status=200)]
    poster = ScriptedPoster(world.clock.now, lambda number, _url: answers[number - 1])
    tell(world)

    await carry_to_the_end(world, courier_of(world, poster))

    assert poster.posts[1].at - poster.posts[0].at == timedelta(hours=1)


async def test_a_server_that_was_down_for_a_week_still_has_every_attempt(world: World) -> None:
    poster = ScriptedPoster(world.clock.now, lambda _number, _url: Posted(status=500))
    tell(world)
    world.clock.advance(7 * 86400)

    await carry_to_the_end(world, courier_of(world, poster))

    assert len(poster.posts) == ATTEMPTS_MAX


async def test_one_slow_receiver_delays_no_other(world: World) -> None:
    poster = ScriptedPoster(world.clock.now, lambda _number, url: None if "slow" in url else Posted(status=200))
    for number in range(200):
        tell(world, number, "https://slow.example/")
        tell(world, 1000 + number, "https://fast.example/")
    courier = courier_of(world, poster, clock=SystemClock())

    async with asyncio.timeout(30):
        running = asyncio.create_task(courier.run())
        while (count := world.store.delivery_counts()[DeliveryState.DELIVERED]) < 200:  # noqa: ASYNC110 - a database
            await asyncio.sleep(0)
        courier.stop(grace_s=0.0)
        await running

    assert count == 200
    assert Counter(post.url for post in poster.posts) == {"https://fast.example/": 200, "https://slow.example/": 8}
    cut = [each for each in world.scope.deliveries(limit=500) if each.attempts and each.state is DeliveryState.PENDING]
    assert len(cut) == 8
    assert all(each.attempt_count == 1 for each in cut)


async def test_two_couriers_make_one_attempt_at_a_time(world: World) -> None:
    poster = ScriptedPoster(world.clock.now, lambda number, _url: Posted(status=200 if number % 3 else 500))
    for number in range(60):
        tell(world, number)
    couriers = [courier_of(world, poster, name=name, each_max=5) for name in ("one", "two")]
    while world.store.delivery_counts()[DeliveryState.PENDING]:
        async with asyncio.TaskGroup() as group:
            for each in couriers:
                group.create_task(turn(each))
        world.clock.advance(5)

    assert set(poster.most.values()) == {1}
    assert world.store.delivery_counts()[DeliveryState.DELIVERED] == 60
    taken = Counter(post.headers["webhook-id"] for post in poster.posts)
    assert len(taken) == 60
    assert taken.total() == sum(each.attempt_count for each in world.scope.deliveries(limit=100))


async def test_an_attempt_that_could_not_be_signed_is_none(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchrunner.errors import StoreUnavailable

    poster = ScriptedPoster(world.clock.now, lambda _number, _url: Posted(status=200))
    courier = courier_of(world, poster)
    tell(world)

    def gone(_self: object, _fresh: str) -> None:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(type(world.scope), "signing_secrets", gone)
        await turn(courier)
    assert (poster.posts, only(world).state) == ([], DeliveryState.PENDING)
    world.clock.advance(LEASE_S)
    await turn(courier)

    assert (only(world).state, only(world).attempt_count) == (DeliveryState.DELIVERED, 1)


async def test_a_process_that_was_stopped_after_its_claim_sends_no_more(world: World) -> None:
    """Its hold may end while it sends, and then somebody else sends, too."""
    poster = ScriptedPoster(world.clock.now, lambda _number, _url: Posted(status=200))
    courier = courier_of(world, poster)
    tell(world)
    await courier._turn()
    world.clock.advance(LEASE_S - TIMEOUT_S)
    await asyncio.gather(*courier._under_way)
    await courier._record()
    assert (poster.posts, only(world).state) == ([], DeliveryState.PENDING)

    world.clock.advance(TIMEOUT_S)
    await turn(courier)

    assert (only(world).state, only(world).attempt_count) == (DeliveryState.DELIVERED, 1)
    assert [each.error for each in only(world).attempts] == [PostError.UNKNOWN, None]


async def test_attempts_under_way_are_bounded(world: World) -> None:
    poster = ScriptedPoster(world.clock.now, lambda _number, _url: None)
    for number in range(8):
        tell(world, number, f"https://{number}.example/")
    courier = courier_of(world, poster, in_flight_max=4)

    for _ in range(5):
        await courier._turn()
        while len(poster.posts) < len(courier._under_way):
            poster.came.clear()
            await poster.came.wait()
    under_way = len(poster.posts)
    courier.stop(grace_s=0.0)
    await courier.run()

    assert 1 <= under_way <= 4


async def test_bodies_in_memory_are_bounded(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchrunner.courier._BODY_BYTES_MAX", 5000)
    under_way: list[int] = []

    def answer(_number: int, _url: str) -> Posted:
        under_way.append(poster.under_way.total())
        return Posted(status=200)

    poster = ScriptedPoster(world.clock.now, answer)
    for number in range(20):
        tell(world, number)
    size_bytes = len(world.scope.events(after=0, limit=1)[0].body)
    courier = courier_of(world, poster, each_max=100)
    while world.store.delivery_counts()[DeliveryState.PENDING]:
        await turn(courier)

    assert max(under_way) == max(1, 5000 // size_bytes) < 20
    assert len(poster.posts) == 20


async def test_a_store_that_is_away_loses_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchrunner.errors import StoreUnavailable

    poster = ScriptedPoster(world.clock.now, lambda _number, _url: Posted(status=200))
    courier = courier_of(world, poster)
    tell(world)
    await courier._turn()
    await asyncio.gather(*courier._under_way)
    assert isinstance(world.store, SqliteStore)

    def gone(_wanted: object, _recorded: object) -> None:
        raise StoreUnavailable("away")

    with monkeypatch.context() as patch:
        patch.setattr(world.store, "claim_deliveries", gone)
        await courier._turn()
        assert only(world).state is DeliveryState.PENDING
    await courier._turn()

    assert only(world).state is DeliveryState.DELIVERED
    assert len(poster.posts) == 1
