"""Requests that are answered at once: what they are counted as, and who is chosen for one."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrunner.holdings import LiveUse, UpstreamLive
from batchrunner.live import DOWN_S, KEPT_S, Asked, Live, LivePlace, body_for, read_asked
from batchrunner.members import without_member
from batchrunner.settings import Settings, targets_of
from batchrunner.targets import Target


class Hand:
    """A clock that only a test moves."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


NOBODY: Any = object()


def live_of(*targets: Target, **settings: Any) -> tuple[Live, Hand]:
    hand = Hand()
    found = targets or targets_of(Settings(base_url="http://a/v1", **settings))
    return Live(found, [NOBODY] * len(found), hand), hand


def target(name: str, **fields: Any) -> Target:
    return Target(name=name, base_url=f"http://{name}/v1", **fields)


def chosen(live: Live, model: str | None = "m", *tried: int) -> str | None:
    route = live.route(model)
    assert route is not None
    place = live.choose(route, set(tried))
    return None if place is None else place.target.name


# -- what is left to them ------------------------------------------------------------------------------------------


def test_a_place_is_kept_for_a_moment_after_a_request_and_taken_by_the_next() -> None:
    live, hand = live_of()
    (place,) = live.places
    for _ in range(5):
        place.begin(0)
        place.end()

    assert live.uses() == (LiveUse(places=1),)
    place.begin(0)
    place.begin(0)
    assert live.uses() == (LiveUse(places=2),)
    place.end()
    hand.seconds += KEPT_S - 0.01
    assert live.uses() == (LiveUse(places=2),)
    hand.seconds += 0.01
    assert live.uses() == (LiveUse(places=1),)


def test_a_minute_of_requests_counts_where_there_is_a_rate() -> None:
    live, hand = live_of(rpm=10, tpm=1000)
    (place,) = live.places
    place.begin(40)
    hand.seconds += 30.0
    place.begin(2)

    assert live.uses() == (LiveUse(places=2, requests=2, tokens=42),)
    hand.seconds += 30.0
    assert live.uses() == (LiveUse(places=2, requests=1, tokens=2),)


def test_refusals_are_told_once() -> None:
    live, _ = live_of()
    for status in (429, 503, 529, 500, 200):
        live.places[0].note_answer(status)

    assert [use.refused for use in (*live.uses(), *live.uses())] == [3, 0]


@pytest.mark.parametrize(("limits", "tokens"), [({"concurrency": 2}, 0), ({"rpm": 2}, 0), ({"tpm": 10}, 5)])
def test_a_limit_that_is_set_holds_for_them_alone(limits: dict[str, Any], tokens: int) -> None:
    live, hand = live_of(**limits)
    (place,) = live.places
    route = live.route("m")
    assert route is not None
    for _ in range(2):
        assert chosen(live) == "default"
        place.begin(tokens)

    assert chosen(live) is None
    assert live.wait_s(route) == (1.0 if "concurrency" in limits else 60.0)
    place.end()
    hand.seconds += live.wait_s(route)
    assert chosen(live) == "default"


# -- who is chosen -------------------------------------------------------------------------------------------------


def test_who_was_not_reached_comes_last_for_a_while() -> None:
    live, hand = live_of(target("a", weight=5), target("b"))
    live.places[0].note_unreached()

    assert {chosen(live) for _ in range(9)} == {"b"}
    hand.seconds += DOWN_S
    assert {chosen(live) for _ in range(9)} == {"a", "b"}


def test_an_answer_ends_the_rest_at_once() -> None:
    live, _ = live_of(target("a"), target("b", weight=0))
    live.places[0].note_unreached()
    assert chosen(live) == "b"

    live.places[0].note_answer(500)

    assert chosen(live) == "a"


def test_what_workers_found_down_comes_last_too() -> None:
    live, _ = live_of(target("a"), target("b"))
    told = UpstreamLive(name="a", window=1, bound_by="growing", in_flight=0, is_down=True)

    live.hear([told, msgspec.structs.replace(told, name="b", is_down=False)])

    assert {chosen(live) for _ in range(5)} == {"b"}


def test_while_all_are_down_somebody_is_asked_all_the_same() -> None:
    live, _ = live_of(target("a"), target("b"))
    for place in live.places:
        place.note_unreached()

    assert chosen(live) == "a"
    assert chosen(live, "m", 0) == "b"
    assert chosen(live, "m", 0, 1) is None


def test_a_full_upstream_leaves_its_requests_to_others() -> None:
    live, _ = live_of(target("a", window=1), target("b"))
    live.places[0].begin(0)

    assert {chosen(live) for _ in range(5)} == {"b"}
    assert chosen(live, "m", 1) is None


# -- what a body asks for --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "model", "is_async", "left"),
    [
        (b'{"model":"m"}', "m", False, b'{"model":"m"}'),
        (b'{"async":true}', None, True, b"{}"),
        (b' { "async" : false , "model" : "m" } ', "m", False, b' { "model" : "m" } '),
        (b'{"model":7, "async": "yes"}', None, True, b'{"model":7}'),
        (b'{"a":[{"async":1}],"async":{"x":[1,"}"]}}', None, False, b'{"a":[{"async":1}]}'),
        (b'{"async":null,"b":"\\"async\\":,"}', None, False, b'{"b":"\\"async\\":,"}'),
        (b'{"as\\u0079nc":null,"async":true,"model":null}', None, True, b'{"model":null}'),
    ],
)  # fmt: skip
def test_a_body_is_read_and_async_cut_out(body: bytes, model: str | None, is_async: bool, left: bytes) -> None:
    assert read_asked(body) == Asked(model, is_async, left)


@pytest.mark.parametrize("body", [b"[]", b"1", b'"a"', b"null"])
def test_what_is_no_object_is_refused(body: bytes) -> None:
    with pytest.raises(msgspec.ValidationError):
        read_asked(body)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=30)
@given(
    st.dictionaries(st.sampled_from(["async", "model", "a,b", 'c"{}', "[é]"]) | st.text(), JSON),
    st.sampled_from([None, 1]),
)
def test_only_the_member_is_cut_out(members: dict[str, Any], indent: int | None) -> None:
    body = json.dumps(members, indent=indent, ensure_ascii=bool(indent)).encode()

    left = without_member(body, "async")

    assert json.loads(left) == {name: value for name, value in members.items() if name != "async"}
    if "async" not in members:
        assert left == body


def test_an_alias_is_the_upstreams_name_for_a_model() -> None:
    place = LivePlace(0, target("a", aliases={"fast": "big"}), NOBODY, Hand())

    assert body_for(place, read_asked(b'{"model":"fast","async":false,"n":1}')) == b'{"model":"big","n":1}'
    assert body_for(place, read_asked(b'{"model":"big"}')) == b'{"model":"big"}'
