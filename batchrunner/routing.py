"""Which upstreams may answer a line, by the model that it asks for, and whose turn it is among them.

Pure rules; how an upstream stands is told by whoever sends to it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Protocol

import msgspec

from batchrunner.targets import Target, wildcards

# Names come from the lines of strangers; one that is longer is nobody's.
_MODELS_KEPT = 1024
_MODEL_CHARS_MAX = 256


class Standing(Protocol):
    """How an upstream stands at this moment."""

    @property
    def is_down(self) -> bool:
        """Whether it has died and not come back yet."""

    @property
    def has_room(self) -> bool:
        """Whether it would send a line at once if it were given one."""


class Route:
    """The upstreams, by their places, that may answer some lines. All lines with the same choice share one Route."""

    __slots__ = ("_passes", "_strides", "places")

    def __init__(self, places: Sequence[int], weights: Sequence[int]) -> None:
        self.places = tuple(places)
        # Stride scheduling: a heavy upstream gets ahead slowly, and who is behind is next.
        self._strides = {place: 1.0 / weights[place] if weights[place] else 0.0 for place in places}
        self._passes = dict.fromkeys(places, 0.0)

    def choose(self, asker: int, standings: Sequence[Standing]) -> int | None:
        """Tell who gets a line now that `asker` has room for one; None if the line has to wait for somebody's room.

        An upstream that is down gets only what nobody else could send; one of weight 0 only what no other that is up
        serves. Beyond that the weights decide between those that have room.
        """
        up = self._up(standings)
        if not up:
            return asker if asker in self._passes else None
        if len(up) == 1:
            only = up[0]
            return only if only == asker or standings[only].has_room else None
        passes = self._passes
        ready = [place for place in up if place == asker or standings[place].has_room]
        if not ready:
            return None
        first = min(ready, key=passes.__getitem__)
        before = passes[first]
        passes[first] = before + self._strides[first]
        for place in self.places:
            # Those without room are not owed what they could not take.
            passes[place] = max(passes[place], before)
        return first

    def other(self, place: int, standings: Sequence[Standing]) -> int | None:
        """Name another upstream that is up, None if there is none."""
        return next((each for each in self._up(standings) if each != place), None)

    def _up(self, standings: Sequence[Standing]) -> list[int]:
        """Who may be chosen at all: those that are up, and spare ones only if there are no others."""
        up = [place for place in self.places if not standings[place].is_down]
        return [place for place in up if self._strides[place]] or up


class Router:
    """Finds routes by model."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._weights = [target.weight for target in targets]
        self._patterns = [_pattern(target) for target in targets]
        self._routes: dict[tuple[int, ...], Route] = {}
        self._found: dict[str | None, Route | None] = {}
        self._all = tuple(range(len(targets)))
        self._rest = tuple(place for place, target in enumerate(targets) if target.models is None)
        # For people: which models there are, and at whom.
        self.served = "served are " + ", ".join(_served(target) for target in targets)

    def route(self, model: str | None) -> Route | None:
        """Give the route of a model: the upstreams that name it or an alias of it or match it; else those that take all
        others; None if there are none. A line without a model goes to the latter, or anywhere if there are none.
        """
        if model not in self._found:
            if len(self._found) >= _MODELS_KEPT:
                self._found.clear()
            places = self._find(model)
            self._found[model] = self._shared(places) if places else None
        return self._found[model]

    def without(self, route: Route, places: Collection[int]) -> Route:
        """Give a route less some places, unless nothing would be left of it."""
        left = tuple(place for place in route.places if place not in places)
        return self._shared(left) if left else route

    def _find(self, model: str | None) -> tuple[int, ...]:
        if model is None:
            return self._rest or self._all
        if len(model) > _MODEL_CHARS_MAX:
            return self._rest
        named = tuple(place for place, pattern in enumerate(self._patterns) if pattern.fullmatch(model))
        return named or self._rest

    def _shared(self, places: tuple[int, ...]) -> Route:
        route = self._routes.get(places)
        if route is None:
            route = self._routes[places] = Route(places, self._weights)
        return route


def router_of(targets: Sequence[Target]) -> Router | None:
    """Make a router, None if there is one upstream that takes every line as it is."""
    is_plain = len(targets) == 1 and targets[0].models is None and not targets[0].aliases
    return None if is_plain else Router(targets)


class _Asked(msgspec.Struct, gc=False):
    model: str | None = None


_decode_asked = msgspec.json.Decoder(_Asked).decode


def model_of(body: bytes) -> str | None:
    """Give the model that a request asks for, None if it names none; what is too long for a name is cut."""
    try:
        model = _decode_asked(body).model
    except (ValueError, RecursionError):
        # Whatever it says instead of a name is for the upstream to judge.
        return None
    return model if model is None or len(model) <= _MODEL_CHARS_MAX else f"{model[:_MODEL_CHARS_MAX]}..."


def _served(target: Target) -> str:
    return f"{' '.join((*(target.models or ()), *target.aliases))} ({target.name})"


def _pattern(target: Target) -> re.Pattern[str]:
    """Give what matches the models that a table names."""
    named = [wildcards(name) for name in target.models or ()]
    named += map(re.escape, target.aliases)
    return re.compile("|".join(f"(?:{each})" for each in named) or r"(?!)", re.DOTALL)
