"""What tokens cost: prices as text, which one is a model's, and sums that lose no tick."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrunner.errors import UsageError
from batchrunner.prices import parse_price, price_of
from batchrunner.settings import Settings, resolve


@pytest.mark.parametrize(
    ("text", "tokens", "ticks"),
    [
        ("m=1/2", (1_000_000, 0, 1_000_000), 30_000_000_000),
        ("m=1/0.25/2", (1_000_000, 400_000, 0), 7_000_000_000),
        ("m=1/2", (1_000_000, 400_000, 0), 10_000_000_000),
        ("m=0.0001/0", (1, 0, 0), 1),
        ("m=0/0", (5, 0, 5), 0),
    ],
)
def test_tokens_cost_what_the_price_says(text: str, tokens: tuple[int, int, int], ticks: int) -> None:
    total, cached, out = tokens

    assert parse_price(text).cost_ticks(input_tokens=total, cached_tokens=cached, output_tokens=out) == ticks


@pytest.mark.parametrize("text", ["", "m", "m=", "m=1", "=1/2", "m=1/2/3/4", "m=a/b", "m=-1/2", "m=NaN/1", "m=1e9/1"])
def test_what_is_no_price_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="MODEL=INPUT/OUTPUT"):
        parse_price(text)
    with pytest.raises(UsageError, match="MODEL=INPUT/OUTPUT"):
        resolve([("flag", {"prices": [text]})])


def test_the_first_price_that_names_a_model_is_its_price() -> None:
    prices = [parse_price(text) for text in ("small=1/1", "big-*=2/2", "*=3/3")]

    found = [price_of(model, prices) for model in ("small", "big-7", "other", None)]

    assert [str(each.input_usd) if each else None for each in found] == ["1", "2", "3", "3"]
    assert price_of(None, prices[:2]) is None
    assert price_of("small", []) is None


def test_all_but_the_star_stands_for_itself() -> None:
    prices = [parse_price(text) for text in ("m[1]?=1/1", "m*=2/2")]

    found = [price_of(model, prices) for model in ("m[1]?", "m1x", "M1")]

    assert [str(each.input_usd) if each else None for each in found] == ["1", "2", None]


def test_prices_are_a_list_or_a_text_of_them() -> None:
    as_list, _ = resolve([("file", {"prices": ["a=1/2", "b=3/4"]})])
    as_text, _ = resolve([("environment", {"prices": "a=1/2,b=3/4"})])

    assert as_list.prices == as_text.prices == ("a=1/2", "b=3/4")
    assert Settings().prices == ()


@given(st.lists(st.tuples(st.integers(0, 10**9), st.integers(0, 10**9)), min_size=1, max_size=5))
def test_the_cost_of_a_sum_is_the_sum_of_the_costs(parts: list[tuple[int, int]]) -> None:
    price = parse_price("m=0.15/0.6")

    def cost(given: int, got: int) -> int:
        return price.cost_ticks(input_tokens=given, cached_tokens=0, output_tokens=got)

    assert cost(sum(each for each, _ in parts), sum(each for _, each in parts)) == sum(cost(*each) for each in parts)
