"""When nothing may be sent or read, however large the window: rate limits, a cooldown, breakers, a budget of memory.

Pure rules; all times are monotonic seconds, passed in.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Annotated, Protocol

import msgspec

from batchrunner.models import PauseReason

MINUTE_S = 60.0
# What is handed out steadily, so that with the burst on top no minute exceeds the limit.
STEADY_SHARE = 0.98
BURST_SHARE = 0.01

COOLDOWN_MAX_S = 60.0
# So large a part of what is in flight must ask for a pause before all pause: one odd answer stalls its own line only.
COOLDOWN_QUORUM = 0.25
COOLDOWN_SPAN_S = 1.0

SUSPECTS_MIN = 5

OUTAGE_SPAN_S = 1.0
# So few in flight seldom fail within one second of each other.
OUTAGE_FEW = 3
# An upstream whose door answers for it is down when so many lines, or all there are, have come to nothing for a while.
SILENT_LINES = 8
# One line may be refused again and again for what it holds.
SILENT_LINES_LEAST = 2
PROBE_FIRST_S = 0.25
PROBE_MAX_S = 5.0
# A line in flight at this many deaths of the upstream may be their cause: it is sent alone, and its tries count again.
DEATHS_ALONE = 3

# So many knocks may go unanswered before a line is sent all the same, to an upstream that never answered any.
VAIN_KNOCKS_MAX = 64

_Tokens = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]


class _Asked(msgspec.Struct, gc=False):
    """How much a request lets the model generate. Source: chat and completions, chat since 2024, Responses."""

    max_tokens: _Tokens | None = None
    max_completion_tokens: _Tokens | None = None
    max_output_tokens: _Tokens | None = None


_decode_asked = msgspec.json.Decoder(_Asked).decode


def estimate_tokens(body: bytes) -> int:
    """Guess a request's cost before it is sent: a token for 4 bytes of its body, and all that it may generate."""
    try:
        asked = _decode_asked(body)
    except (ValueError, RecursionError):
        # Whatever it says instead of a number is for the upstream to judge.
        asked = _Asked()
    generated = asked.max_completion_tokens or asked.max_tokens or asked.max_output_tokens or 0
    return max(1, len(body) // 4 + generated)


class TokenBucket:
    """A rate limit per minute, for requests or for tokens.

    It fills at 98 % of the limit and holds 1 % of it, so that no minute exceeds the limit. An amount larger than the
    bucket is let through when the bucket is full, and is paid off before the next.
    """

    __slots__ = ("_burst", "_level", "_per_s", "_seen_s")

    def __init__(self, per_minute: float) -> None:
        self._seen_s = -math.inf
        self._level = 0.0
        self._set(per_minute)
        self._level = self._burst

    def _set(self, per_minute: float) -> None:
        self._per_s = max(per_minute, 1e-9) * STEADY_SHARE / MINUTE_S
        self._burst = max(per_minute, 1e-9) * BURST_SHARE

    def set_rate(self, per_minute: float, now_s: float) -> None:
        """Change the limit, as when a share of it is handed out; debts stay, savings shrink to the new burst."""
        self._fill(now_s)
        self._set(per_minute)
        self._level = min(self._level, self._burst)

    def wait_s(self, now_s: float, amount: float) -> float:
        """Tell how long `amount` has to wait; 0 when it may be taken now. Nothing is taken."""
        self._fill(now_s)
        missing = min(amount, self._burst) - self._level
        # Rounding must not make anybody wait for a wait that is over.
        return missing / self._per_s if missing > 1e-6 * self._burst else 0.0

    def take(self, now_s: float, amount: float) -> float:
        """Take `amount` and give 0, or give the seconds to wait and take nothing."""
        wait_s = self.wait_s(now_s, amount)
        if wait_s <= 0.0:
            self._level -= amount
        return wait_s

    def settle(self, more: float) -> None:
        """Charge what a request cost beyond what was taken for it, or give back what it did not need (negative)."""
        self._level = min(self._level - more, self._burst)

    def _fill(self, now_s: float) -> None:
        if now_s > self._seen_s:
            if self._seen_s > -math.inf:
                self._level = min(self._level + (now_s - self._seen_s) * self._per_s, self._burst)
            self._seen_s = now_s


@dataclass(slots=True)
class Cooldown:
    """A pause of all sends after answers with Retry-After; extended, never shortened, and at most 60 s at a time."""

    until_s: float = -math.inf
    _asked_s: deque[float] = field(default_factory=deque)

    def ask(self, now_s: float, retry_after_s: float, *, in_flight: int = 1, uniform: float = 0.0) -> None:
        """Note that an answer asked for a pause. It holds for all once a quarter of what is in flight asks within 1 s.

        `uniform` from [0, 1) spreads the resumption of several processes over a tenth of the pause, at most 1 s.
        """
        asked_s = self._asked_s
        while asked_s and asked_s[0] < now_s - COOLDOWN_SPAN_S:
            asked_s.popleft()
        asked_s.append(now_s)
        if not retry_after_s > 0.0 or len(asked_s) < COOLDOWN_QUORUM * in_flight:
            return
        pause_s = min(retry_after_s, COOLDOWN_MAX_S)
        self.until_s = max(self.until_s, now_s + pause_s + uniform * min(1.0, 0.1 * pause_s))


@dataclass(slots=True)
class Breaker:
    """Finds out whether every line would be answered that the key is refused, or that the model or route is unknown.

    It trips when all answers so far gave one such reason, for `suspects_min` lines or for all there are. Any other
    answer ends the suspicion for good: then such lines are their own failures.
    """

    suspects_min: int = SUSPECTS_MIN
    _reason: PauseReason | None = None
    _lines: set[int] = field(default_factory=set)
    _is_cleared: bool = False

    def note(self, reason: PauseReason | None, line: int) -> None:
        """Take in an answer: what `verdict.suspicion` says of it, and a number that tells its line from others."""
        if self._is_cleared:
            return
        if reason is None or (self._reason is not None and reason is not self._reason):
            self._is_cleared = True
            self._lines.clear()
            return
        self._reason = reason
        if len(self._lines) < self.suspects_min:
            self._lines.add(line)

    @property
    def has_suspects(self) -> bool:
        """Whether it may trip."""
        return bool(self._lines)

    @property
    def is_undecided(self) -> bool:
        """Whether a suspicious answer may yet be that of every line: keep such a line, do not give it up."""
        return not self._is_cleared

    def tripped(self, *, is_nothing_left: bool) -> PauseReason | None:
        """Give the reason to stop sending. `is_nothing_left`: no other line is left to send, and none is in flight."""
        if self._is_cleared or not self._lines:
            return None
        return self._reason if is_nothing_left or len(self._lines) >= self.suspects_min else None


@dataclass(slots=True)
class Outage:
    """Tells the death of the upstream from failures of single requests, and lets one probe at a time through meanwhile.

    The upstream is down when more than half of what was in flight fails with connection errors within 1 s, answers in
    between counting against it. With at most 3 in flight it is also down when as many have failed in a row, however
    slowly, without an answer in between. It is down as well when for 1 s several lines were answered as only a door
    answers behind which nobody is, and nothing else came.
    """

    is_down: bool = False
    _began_s: float = -math.inf
    _died_s: float = -math.inf
    _ended_s: float = -math.inf
    _spell_s: float = -math.inf
    _spell_in_flight: int = 0
    _failures: int = 0
    _row: int = 0
    _row_began_s: float = -math.inf
    _row_in_flight: int = 0
    # Such answers as a door gives: 0 none lately, 1 the first ones, 2 none else to what was sent since then.
    _silence: int = 0
    _silent_from_s: float = -math.inf
    _silent_lines: set[Hashable] = field(default_factory=set)
    _elders: int = 0
    _elders_until_s: float = -math.inf
    _probe_at_s: float = 0.0
    _probe_every_s: float = PROBE_FIRST_S
    _is_probing: bool = False
    _knows_knocks: bool = False
    _vain_knocks: int = 0
    _vain_knocks_most: int = 1

    def note_failure(self, now_s: float, in_flight: int) -> None:
        """Take in an attempt that found nobody; `in_flight` counts the exchanges under way, this one included."""
        if self.is_down:
            self._end_probe(now_s)
            return
        if self._failures == 0 or now_s > self._spell_s + OUTAGE_SPAN_S:
            self._spell_s = now_s
            self._spell_in_flight = in_flight
            self._failures = 0
        if self._row == 0:
            self._row_began_s, self._row_in_flight = now_s, 0
        self._failures += 1
        self._row += 1
        self._row_in_flight = max(self._row_in_flight, in_flight)
        is_whole_row = self._row_in_flight <= OUTAGE_FEW and self._row >= self._row_in_flight
        if is_whole_row or 2 * self._failures > self._spell_in_flight:
            self._silence = 0
            self._go_down(now_s, began_s=self._row_began_s if is_whole_row else self._spell_s, died_s=now_s)

    def note_silence(
        self, now_s: float, started_at_s: float, line: Hashable, *, in_flight: int, line_count: int
    ) -> None:
        """Take in that a line, sent at `started_at_s`, was answered as a door answers.

        The upstream is down when that became of 8 lines, of `line_count` if that is less, but of 2 at least, within no
        less than 1 s and without a sign of life. Lines count that were sent when it had begun, and all that were in
        flight then must have come back: a server that is full says 503 too, while it works on others.
        """
        if self.is_down:
            self._end_probe(now_s)
        elif self._silence == 0:
            self._silence = 1
            self._silent_from_s = now_s
        elif self._silence == 1:
            if started_at_s > self._silent_from_s:
                self._silence = 2
                self._silent_lines = {line}
                self._elders = in_flight - 1
                self._elders_until_s = now_s
        else:
            if len(self._silent_lines) < SILENT_LINES:
                self._silent_lines.add(line)
            # Some come back in other ways, so that there may be fewer than are known.
            self._elders = min(self._elders - (started_at_s <= self._elders_until_s), in_flight - 1)
            lines_min = max(SILENT_LINES_LEAST, min(SILENT_LINES, line_count))
            is_long = now_s >= self._silent_from_s + OUTAGE_SPAN_S
            if is_long and self._elders <= 0 and len(self._silent_lines) >= lines_min:
                self._go_down(now_s, began_s=self._silent_from_s, died_s=self._silent_from_s)

    @property
    def is_silent(self) -> bool:
        """Whether it is down by the word of a door, which may refuse one batch's lines for reasons of their own."""
        return self.is_down and self._silence > 0

    def ask_again(self, now_s: float) -> None:
        """Probe at once, and soon again: there is a batch that has not been refused yet, and will have a turn."""
        if self.is_silent:
            self._probe_at_s = now_s
            self._probe_every_s = PROBE_FIRST_S

    def _go_down(self, now_s: float, *, began_s: float, died_s: float) -> None:
        """`died_s` is when what was sent before proves nothing any more."""
        self.is_down = True
        self._began_s = began_s
        self._died_s = died_s
        self._ended_s = math.inf
        self._is_probing = False
        self._probe_every_s = PROBE_FIRST_S
        self._probe_at_s = now_s + PROBE_FIRST_S

    def _end_probe(self, now_s: float) -> None:
        # Without a probe on its way this is a straggler from before the death.
        if self._is_probing:
            self._is_probing = False
            self._probe_every_s = min(PROBE_MAX_S, 2.0 * self._probe_every_s)
            self._probe_at_s = now_s + self._probe_every_s

    def note_answer(self, started_at_s: float) -> None:
        """Take in a sign of life that a request sent at `started_at_s` brought; one sent since the death ends it."""
        self._row = self._silence = 0
        if self.is_down:
            if started_at_s > self._died_s:
                self.is_down = False
                self._ended_s = started_at_s
                self._failures = 0
        elif self._failures:
            self._failures -= 1

    def is_turn(self, now_s: float) -> bool:
        """Tell whether `may_send` would say true now."""
        return not self.is_down or now_s >= self._probe_at_s

    def may_send(self, now_s: float) -> bool:
        """Tell whether to send now.

        While the upstream is down, true is the turn of the one probe: it is not said again until that probe has failed
        and its backoff is over, or 5 s have passed without news of it.
        """
        if not self.is_down:
            return True
        if now_s < self._probe_at_s:
            return False
        self._is_probing = True
        self._probe_at_s = now_s + PROBE_MAX_S
        return True

    def note_knock(self, *, is_answered: bool) -> bool:
        """Take in a knock; true when the line that it was for is to be sent next time without being blamed.

        An upstream that has never answered a knock may know none, so that only a line shows whether it is back. Such a
        line may as well be what kills it: ever more knocks go before it, so that one of them finds the upstream alive.
        """
        self._knows_knocks = self._knows_knocks or is_answered
        self._vain_knocks = 0 if is_answered else self._vain_knocks + 1
        if self._knows_knocks or self._vain_knocks < self._vain_knocks_most:
            return False
        self._vain_knocks = 0
        self._vain_knocks_most = min(VAIN_KNOCKS_MAX, 2 * self._vain_knocks_most)
        return True

    def covers(self, failed_at_s: float) -> bool:
        """Tell whether a failure of that moment belongs to the present or the last death: it uses up no try.

        The first half of the failures comes before anybody can know; ask again when the line is due.
        """
        return self._began_s <= failed_at_s <= self._ended_s


@dataclass(slots=True)
class FirstContact:
    """Whether the upstream was ever there: before the first answer, failures for so long mean a wrong set-up."""

    patience_s: float = 10.0
    has_answered: bool = False
    _failing_since_s: float = math.inf

    def note_answer(self) -> None:
        """Take in an answer of any status."""
        self.has_answered = True

    def note_failure(self, since_s: float) -> None:
        """Take in that nobody was reached, and since when."""
        self._failing_since_s = min(self._failing_since_s, since_s)

    def is_lost(self, now_s: float) -> bool:
        """Tell whether to give up on the upstream: `UpstreamUnreachable`."""
        return not self.has_answered and now_s - self._failing_since_s >= self.patience_s


class Reader(Protocol):
    """An answer that is being read."""

    started_at_s: float

    @property
    def missing_bytes(self) -> int:
        """What may still come of it, as far as is known; at least 1."""

    def pause(self) -> None:
        """Read nothing more for now."""

    def resume(self) -> None:
        """Read on."""


class ReadBudget:
    """Bytes of unfinished answers that may be held at once; beyond that nothing is read on for a while.

    One answer, the oldest, leads: it is read on all the same, so that it ends and makes room. What was read to its end
    counts until the limit is set anew, for it is still in memory, and only then in the sums of others; until then
    nobody else leads.
    """

    __slots__ = (
        "_delivered_bytes", "_held_bytes", "_leader", "_limit_bytes", "_may_lead", "_paused", "_running", "is_short",
    )  # fmt: skip

    def __init__(self) -> None:
        # Whether the next read should be a small one.
        self.is_short = False
        self._limit_bytes = math.inf
        self._may_lead = True
        self._held_bytes = 0
        self._delivered_bytes = 0
        self._leader: Reader | None = None
        self._running: set[Reader] = set()
        self._paused: set[Reader] = set()

    def set_limit(self, limit_bytes: float, *, may_lead: bool = True) -> None:
        """Say how much memory is left for answers; to be repeated many times a second.

        Without `may_lead` no answer is begun to be read beyond the limit: where it would go, there is no room either.
        """
        self._limit_bytes = limit_bytes
        self._may_lead = may_lead
        self._delivered_bytes = 0
        self.is_short = self._room() < 0.0
        if self._paused:
            self._go_on()

    def take(self, reader: Reader, size_bytes: int) -> None:
        """Count what was read of an unfinished answer; if that is too much, only the leader is read on."""
        self._held_bytes += size_bytes
        self._running.add(reader)
        if self._room() >= 0.0:
            return
        self.is_short = True
        if self._is_leader_wanted():
            self._leader = min(self._running | self._paused, key=_age)
            if self._leader in self._paused:
                self._resume(self._leader)
        for each in self._running - {self._leader}:
            self._running.discard(each)
            self._paused.add(each)
            each.pause()

    def give_back(self, size_bytes: int) -> None:
        """Give back a part of what was counted for an answer that goes on."""
        self._held_bytes -= size_bytes
        self._after_giving()

    def release(self, reader: Reader, size_bytes: int, *, is_delivered: bool) -> None:
        """Give back what is still counted for an answer that has ended. It is not resumed if it was paused."""
        self._held_bytes -= size_bytes
        if is_delivered:
            self._delivered_bytes += size_bytes
        self._running.discard(reader)
        self._paused.discard(reader)
        if reader is self._leader:
            self._leader = None
        self._after_giving()

    def is_leader(self, reader: Reader) -> bool:
        """Tell whether it is read on although memory is short."""
        return reader is self._leader

    def _after_giving(self) -> None:
        self.is_short = self._room() < 0.0
        if self._paused:
            self._go_on()

    def _is_leader_wanted(self) -> bool:
        return self._leader is None and self._may_lead and self._delivered_bytes == 0

    def _room(self) -> float:
        return self._limit_bytes - self._held_bytes - self._delivered_bytes

    def _go_on(self) -> None:
        room = self._room()
        for reader in sorted(self._paused, key=_age):
            if room <= 0.0 and not self._is_leader_wanted():
                return
            room -= reader.missing_bytes
            if room <= 0.0 and self._leader is None:
                self._leader = reader
            self._resume(reader)

    def _resume(self, reader: Reader) -> None:
        self._paused.discard(reader)
        self._running.add(reader)
        reader.resume()


def _age(reader: Reader) -> float:
    return reader.started_at_s


@dataclass(slots=True)
class Gate:
    """All that may forbid the next send or the reading of its answer, besides the window."""

    cooldown: Cooldown
    outage: Outage
    first_contact: FirstContact
    requests: TokenBucket | None = None
    tokens: TokenBucket | None = None
    reading: ReadBudget = field(default_factory=ReadBudget)

    def set_rates(self, now_s: float, *, rpm: float | None, tpm: float | None) -> None:
        """Take a new share of the rate limits."""
        for bucket, rate in ((self.requests, rpm), (self.tokens, tpm)):
            if bucket is not None and rate is not None:
                bucket.set_rate(rate, now_s)
