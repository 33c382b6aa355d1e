"""Requests that are answered at once: to which upstream one goes, and what they take of its limits before batches do.

Pure rules and counts, on one event loop; who sends is behind a Protocol. Such requests wait for nobody: what they use
is told to whoever hands out the limits, and batches get what is left.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from typing import NamedTuple, Protocol

import msgspec

from batchrunner.holdings import LiveUse, UpstreamLive
from batchrunner.limits import MINUTE_S
from batchrunner.members import renamed, without_member
from batchrunner.models import AttemptError
from batchrunner.routing import Route, Router
from batchrunner.targets import Target
from batchrunner.verdict import GATEWAY_ERRORS, REFUSALS

# A place stays free for the next request after one has ended, so that it need not be asked back from batches.
KEPT_S = 2.0
# So long nobody goes first to an upstream that could not be reached.
DOWN_S = 5.0
_BUSY_WAIT_S = 1.0
_NOBODY = -1

_Clock = Callable[[], float]


class Failure(NamedTuple):
    """Why there is no answer, or no more of one. The message is for the log: it may name an address."""

    error: AttemptError
    message: str


class LiveAnswer(Protocol):
    """An answer whose head has come, as the upstream wrote it: nothing of it is decoded."""

    @property
    def status(self) -> int:
        """The status."""

    @property
    def headers(self) -> Sequence[tuple[str, str]]:
        """All headers, in their order."""

    async def read(self) -> bytes | Failure:
        """Give what has come of the body, b"" at its end; waits for some."""

    def abort(self) -> None:
        """Drop the rest and free the upstream; nothing happens after the end."""


class Body(NamedTuple):
    """What is sent: `pieces` starts anew at each call, if it may be called again. Its length, None for chunks."""

    pieces: Callable[[], AsyncIterator[bytes]]
    size_bytes: int | None
    is_repeatable: bool


class LiveSender(Protocol):
    """Sends to one upstream, with its key."""

    async def send(self, url: str, headers: Mapping[str, str], body: Body) -> LiveAnswer | Failure:
        """POST to an allowed path and wait for the answer's head. Cancelled, it frees the upstream."""

    async def close(self) -> None:
        """End what is under way."""


class LivePlace:
    """One upstream, as far as requests that are answered at once are concerned."""

    __slots__ = (
        "_clock",
        "_down_until_s",
        "_kept_until_s",
        "_recent",
        "_tokens",
        "in_flight",
        "is_told_down",
        "number",
        "refused_count",
        "sender",
        "target",
    )

    def __init__(self, number: int, target: Target, sender: LiveSender, clock: _Clock) -> None:
        self.number = number
        self.target = target
        self.sender = sender
        self.in_flight = 0
        self.refused_count = 0
        self.is_told_down = False
        self._clock = clock
        self._down_until_s = 0.0
        self._kept_until_s: deque[float] = deque()
        self._recent: deque[tuple[float, int]] = deque()
        self._tokens = 0

    @property
    def is_down(self) -> bool:
        """See Standing."""
        return self.is_told_down or self._clock() < self._down_until_s

    @property
    def has_room(self) -> bool:
        """See Standing: the limits that the operator has set hold for these requests alone as well."""
        self._forget()
        target = self.target
        return (
            (target.window is None or self.in_flight < target.window)
            and (target.rpm is None or len(self._recent) < target.rpm)
            and (target.tpm is None or self._tokens < target.tpm)
        )

    @property
    def wait_s(self) -> float:
        """How long until there may be room."""
        target = self.target
        is_rate = target.window is None or self.in_flight < target.window
        return self._recent[0][0] + MINUTE_S - self._clock() if is_rate and self._recent else _BUSY_WAIT_S

    def begin(self, tokens: int) -> None:
        """Count a request as under way, with what it may cost; it takes a place that was kept, if there is one."""
        self.in_flight += 1
        if self._kept_until_s:
            self._kept_until_s.popleft()
        if self.target.rpm is not None or self.target.tpm is not None:
            self._recent.append((self._clock(), tokens))
            self._tokens += tokens

    def end(self) -> None:
        """Count it no more."""
        self.in_flight -= 1
        self._kept_until_s.append(self._clock() + KEPT_S)

    def note_unreached(self) -> None:
        """Note that nobody was there."""
        self._down_until_s = self._clock() + DOWN_S

    def note_answer(self, status: int) -> None:
        """Note an answer of any status."""
        self._down_until_s = 0.0
        self.refused_count += status in REFUSALS

    def use(self) -> LiveUse:
        """Tell what is used; what was refused is told once."""
        self._forget()
        refused, self.refused_count = self.refused_count, 0
        return LiveUse(
            places=self.in_flight + len(self._kept_until_s),
            requests=len(self._recent),
            tokens=self._tokens,
            refused=refused,
        )

    def _forget(self) -> None:
        now_s = self._clock()
        while self._kept_until_s and self._kept_until_s[0] <= now_s:
            self._kept_until_s.popleft()
        while self._recent and self._recent[0][0] <= now_s - MINUTE_S:
            self._tokens -= self._recent.popleft()[1]


class Live:
    """All upstreams, and the counts that are shown of them. Routes, aliases, weights are those of batches."""

    def __init__(self, targets: Sequence[Target], senders: Sequence[LiveSender], clock: _Clock) -> None:
        pairs = enumerate(zip(targets, senders, strict=True))
        self.places = [LivePlace(number, target, sender, clock) for number, (target, sender) in pairs]
        self.begun: Counter[str] = Counter({target.name: 0 for target in targets})
        self.failures: Counter[str] = Counter()
        self._router = Router(targets)

    def route(self, model: str | None) -> Route | None:
        """Find who serves a model, None if nobody does."""
        return self._router.route(model)

    def choose(self, route: Route, tried: Collection[int]) -> LivePlace | None:
        """Name who gets a request now, None if nobody who was not tried has room. While all are down, the first of them
        is asked: that costs the caller a moment, and finds out.
        """
        left = [number for number in route.places if number not in tried]
        if not left:
            return None
        chosen = self._router.without(route, tried).choose(_NOBODY, self.places)
        if chosen is None and all(self.places[number].is_down for number in left):
            chosen = left[0]
        return None if chosen is None else self.places[chosen]

    def wait_s(self, route: Route) -> float:
        """Tell how long until one of a route may have room."""
        return min(self.places[number].wait_s for number in route.places)

    def hear(self, upstreams: Sequence[UpstreamLive]) -> None:
        """Take in what the workers found out."""
        for place, told in zip(self.places, upstreams, strict=False):
            place.is_told_down = told.is_down

    async def close(self) -> None:
        """End what is under way."""
        for place in self.places:
            await place.sender.close()

    def uses(self) -> tuple[LiveUse, ...]:
        """Tell what is used of each upstream, in their order."""
        return tuple(place.use() for place in self.places)


def may_go_elsewhere(outcome: LiveAnswer | Failure) -> bool:
    """Tell whether another upstream should be asked: this one was not reached, is full, or a gateway stands alone."""
    if isinstance(outcome, Failure):
        return outcome.error is AttemptError.NOT_CONNECTED
    return outcome.status in REFUSALS or outcome.status in GATEWAY_ERRORS


class Asked(NamedTuple):
    """What a body asks for: `body` is what goes on, without the word `async`."""

    model: str | None
    is_async: bool
    body: bytes


class _Head(msgspec.Struct, gc=False):
    model: msgspec.Raw = msgspec.Raw(b"null")
    is_async: msgspec.Raw | msgspec.UnsetType = msgspec.field(name="async", default=msgspec.UNSET)


# Source: inference.club takes words for it as well.
_YES = frozenset({b"true", b"1", b'"1"', b'"true"', b'"yes"', b'"on"'})
_decode_head = msgspec.json.Decoder(_Head).decode
_decode_name = msgspec.json.Decoder(str).decode


def read_asked(body: bytes) -> Asked:
    """Read a JSON body.

    Raises:
        msgspec.ValidationError: it is no object.
        msgspec.DecodeError: it is no JSON.
        RecursionError: it is nested too deep.
    """
    head = _decode_head(body)
    # Whatever it says instead of a name is for the upstream to judge.
    model = _decode_name(head.model) if bytes(head.model)[:1] == b'"' else None
    if isinstance(head.is_async, msgspec.UnsetType):
        return Asked(model, False, body)
    return Asked(model, bytes(head.is_async).lower() in _YES, without_member(body, "async"))


def body_for(place: LivePlace, asked: Asked) -> bytes:
    """Give the body with the model under the name that an upstream knows it by."""
    aliases = place.target.aliases
    return renamed(asked.body, aliases) if asked.model in aliases else asked.body
