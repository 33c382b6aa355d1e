"""What tokens cost at an upstream, by model, as its operator says: `MODEL=INPUT/OUTPUT` in US dollars a million tokens,
`MODEL=INPUT/CACHED/OUTPUT` where cached input costs something else.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

from batchrunner.errors import UsageError
from batchrunner.targets import wildcards

# Source: xAI's cost fields, which count in units of 1e-10 US dollars.
_TICKS_PER_USD = 10_000_000_000
_TOKENS = 1_000_000
_AMOUNT = re.compile(r"[0-9]{1,6}(\.[0-9]{1,9})?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Price:
    """US dollars a million tokens of the models that `model` names, `*` for any characters."""

    model: str
    input_usd: Decimal
    cached_usd: Decimal
    output_usd: Decimal

    def cost_ticks(self, *, input_tokens: int, cached_tokens: int, output_tokens: int) -> int:
        """Give the cost in ticks; cached tokens are among the input."""
        fresh_tokens = input_tokens - cached_tokens
        usd = fresh_tokens * self.input_usd + cached_tokens * self.cached_usd + output_tokens * self.output_usd
        return int(usd * _TICKS_PER_USD / _TOKENS)


def parse_price(text: str) -> Price:
    """Read one price.

    Raises:
        UsageError: it has another form.
    """
    model, _, amounts = text.strip().rpartition("=")
    numbers = [Decimal(each) for each in amounts.split("/") if _AMOUNT.fullmatch(each)]
    if not model or len(numbers) not in (2, 3) or len(numbers) != amounts.count("/") + 1:
        raise UsageError(f"price {text!r}: write MODEL=INPUT/OUTPUT in US dollars a million tokens, such as m=0.5/1.5")
    return Price(model=model, input_usd=numbers[0], cached_usd=numbers[-2], output_usd=numbers[-1])


def price_of(model: str | None, prices: Sequence[Price]) -> Price | None:
    """Give the first price that names the model; one of `*` names any, also where requests name several."""
    for price in prices:
        if price.model == "*" or (model is not None and re.fullmatch(wildcards(price.model), model, re.DOTALL)):
            return price
    return None
