"""Which upstream gets a line: by model and alias, by weight among those with room, and what is down gets nothing."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrunner.members import renamed
from batchrunner.routing import Route, Router, model_of, router_of
from batchrunner.targets import Target


@dataclass(slots=True)
class Stand:
    """An upstream as a route sees it."""

    is_down: bool = False
    has_room: bool = True


def target(name: str, **keys: Any) -> Target:
    return Target(name=name, base_url="http://h/v1", **keys)


def places(router: Router, model: str | None) -> Sequence[int] | None:
    route = router.route(model)
    return None if route is None else route.places


# -- by model --------------------------------------------------------------------------------------------------------


def test_model_goes_where_it_is_named_matched_or_an_alias() -> None:
    router = Router(
        [
            target("a", models=("llama", "qwen-*")),
            target("b", models=("gpt*",), aliases={"llama": "meta/llama", "odd*name": "x"}),
            target("c"),
        ]
    )

    assert places(router, "llama") == (0, 1)
    assert places(router, "qwen-7b") == (0,)
    assert places(router, "gpt") == places(router, "gpt-4\nx") == (1,)
    assert places(router, "odd*name") == (1,)
    assert places(router, "odd-name") == (2,)
    assert places(router, "llama2") == places(router, "Llama") == places(router, "") == (2,)
    assert places(router, None) == (2,)


def test_model_that_nobody_serves_has_no_route_and_what_is_served_is_told() -> None:
    router = Router([target("a", models=("llama",)), target("b", models=("gpt*",), aliases={"fast": "gpt-4"})])

    assert places(router, "other") is None
    assert places(router, None) == (0, 1)
    assert router.served == "served are llama (a), gpt* fast (b)"


@pytest.mark.parametrize("name", ["a.c", "a+c", "(", "[a]", "a|b", "\\"])
def test_names_are_no_patterns(name: str) -> None:
    router = Router([target("a", models=(name,)), target("b", models=("never",), aliases={name: "x"})])

    assert places(router, name) == (0, 1)
    assert places(router, "abc") is None


@given(st.lists(st.sampled_from("ab*"), max_size=8), st.text("ab", max_size=10))
def test_wildcards_stand_for_any_characters(pattern: list[str], name: str) -> None:
    router = Router([target("a", models=("".join(pattern) or "*",))])
    meant = re.compile("".join(".*" if each == "*" else each for each in pattern) or ".*")

    assert (places(router, name) is not None) == bool(meant.fullmatch(name))


def test_name_of_a_mile_takes_no_time_and_no_memory() -> None:
    router = Router([target("a", models=("*a*a*a*a*a*b",)), target("b")])
    body = json.dumps({"model": "a" * 1_000_000}).encode()

    assert places(router, "a" * 256) == (1,)
    assert places(router, model_of(body)) == (1,)
    assert len(model_of(body) or "") < 300


def test_one_upstream_that_takes_every_line_needs_no_router() -> None:
    assert router_of([target("a")]) is None
    assert router_of([target("a", models=("m",))]) is not None
    assert router_of([target("a", aliases={"m": "n"})]) is not None
    assert router_of([target("a"), target("b")]) is not None


def test_names_of_strangers_do_not_pile_up() -> None:
    router = Router([target("a")])
    for number in range(5000):
        router.route(f"model-{number}")

    assert len(router._found) <= 1024
    assert len(router._routes) == 1


def test_route_without_places_keeps_something() -> None:
    router = Router([target("a"), target("b")])
    whole = router.route("m")
    assert whole is not None

    assert router.without(whole, {0}).places == (1,)
    assert router.without(whole, {0, 1}) is whole


# -- whose turn ------------------------------------------------------------------------------------------------------


def shares(route: Route, stands: Sequence[Stand], *, asker: int, lines: int = 600) -> Counter[int | None]:
    return Counter(route.choose(asker, stands) for _ in range(lines))


def test_weights_decide_among_those_with_room_whoever_asks() -> None:
    stands = [Stand(), Stand()]

    for asker in (0, 1):
        assert shares(Route((0, 1), (2, 1)), stands, asker=asker) == {0: 400, 1: 200}


def test_upstream_without_room_gets_nothing_and_is_owed_nothing() -> None:
    route, stands = Route((0, 1), (1, 1)), [Stand(), Stand(has_room=False)]

    assert shares(route, stands, asker=0) == {0: 600}
    stands[1].has_room = True
    assert shares(route, stands, asker=0, lines=100) == {0: 50, 1: 50}


def test_spare_gets_lines_only_when_the_others_are_down() -> None:
    route, stands = Route((0, 1), (1, 0)), [Stand(has_room=False), Stand()]

    assert route.choose(1, stands) is None
    stands[0].has_room = True
    assert route.choose(1, stands) == 0
    stands[0].is_down = True
    assert route.choose(1, stands) == 1


def test_upstream_that_is_down_gets_only_what_nobody_else_could_send() -> None:
    stands = [Stand(is_down=True), Stand(has_room=False)]

    assert Route((0, 1), (1, 1)).choose(0, stands) is None
    assert Route((0,), (1, 1)).choose(0, stands) == 0
    assert Route((0,), (1, 1)).choose(1, stands) is None


def test_line_of_another_is_handed_on_only_where_there_is_room() -> None:
    stands = [Stand(), Stand()]
    route = Route((1,), (1, 1))

    assert route.choose(0, stands) == 1
    stands[1].has_room = False
    assert route.choose(0, stands) is None
    assert route.choose(1, stands) == 1


def test_other_is_one_that_is_up_and_a_spare_last() -> None:
    route, stands = Route((0, 1, 2), (1, 0, 1)), [Stand(), Stand(), Stand()]

    assert route.other(0, stands) == 2
    stands[2].is_down = True
    assert route.other(0, stands) is None
    stands[0].is_down = True
    assert route.other(0, stands) == 1


# -- the model in a body ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "model"),
    [
        (b'{"model":"m"}', "m"),
        (b'{"messages":[{"model":"x"}]}', None),
        (b'{"model":7}', None),
        (b'{"model":null}', None),
        (b'{"model":"m\\u00fc"}', "mü"),
    ],
)
def test_model_is_read_from_the_body(body: bytes, model: str | None) -> None:
    assert model_of(body) == model


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        (b'{"model":"fast"}', b'{"model":"real"}'),
        (b' { "a" : 1 , "model" :\t"fast" , "b":[] } ', b' { "a" : 1 , "model" :\t"real" , "b":[] } '),
        (
            b'{"x":{"model":"fast"},"y":["model","fast"],"model":"fast"}',
            b'{"x":{"model":"fast"},"y":["model","fast"],"model":"real"}',
        ),
        (b'{"a":"model","b":"fast"}', b'{"a":"model","b":"fast"}'),
        (b'{"model":"other"}', b'{"model":"other"}'),
        (b'{"mod\\u0065l":"f\\u0061st"}', b'{"mod\\u0065l":"real"}'),
        (b'{"a":"\\"model\\":\\"fast","model":"fast"}', b'{"a":"\\"model\\":\\"fast","model":"real"}'),
        (b'{"a":"}{][,:\\\\","model":"fast"}', b'{"a":"}{][,:\\\\","model":"real"}'),
        (b'{"model":"fast","model":"fast"}', b'{"model":"real","model":"real"}'),
    ],
)
def test_alias_changes_the_model_and_not_another_byte(body: bytes, sent: bytes) -> None:
    assert renamed(body, {"fast": "real"}) == sent


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), _VALUES, max_size=5), st.text(min_size=1), st.booleans(), st.integers(0, 5))
def test_alias_changes_the_model_of_any_body(rest: dict[str, object], alias: str, is_ascii: bool, place: int) -> None:
    items = [item for item in rest.items() if item[0] != "model"]
    items.insert(place, ("model", alias))
    body = json.dumps(dict(items), ensure_ascii=is_ascii, indent=place or None).encode(errors="surrogatepass")
    try:
        body.decode()
    except UnicodeDecodeError:
        return

    sent = renamed(body, {alias: 'r"eal'})

    assert json.loads(sent) == json.loads(body) | {"model": 'r"eal'}
    assert len(sent) - len(body) == len('"r\\"eal"') - len(json.dumps(alias, ensure_ascii=is_ascii).encode())
