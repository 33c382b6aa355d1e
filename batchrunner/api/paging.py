"""Pages of listings, in the form that the OpenAI API gives them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, Protocol, TypeVar

import msgspec


class Page(msgspec.Struct, frozen=True, kw_only=True):
    """A part of a listing; the next one is behind `last_id`. Each listing says what its `data` are."""

    object: Literal["list"] = "list"
    data: tuple[msgspec.Struct, ...]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Listed(Protocol):
    """What a listing consists of."""

    @property
    def id(self) -> str:
        """What a cursor names it by."""


def next_token(found: Sequence[Listed], *, limit: int) -> str | None:
    """Give what names the next page of what was looked for up to one beyond the limit; None at its end. Source: the
    lists of xAI.
    """
    return found[limit - 1].id if len(found) > limit else None


PageT = TypeVar("PageT", bound=Page)
ListedT = TypeVar("ListedT", bound=Listed)


def page_of(kind: Callable[..., PageT], found: Sequence[ListedT], *, limit: int) -> PageT:
    """Make a page of what was looked for up to one beyond the limit, which tells whether there is more."""
    shown = tuple(found[:limit])
    return kind(
        data=shown,
        first_id=shown[0].id if shown else None,
        last_id=shown[-1].id if shown else None,
        has_more=len(found) > limit,
    )
