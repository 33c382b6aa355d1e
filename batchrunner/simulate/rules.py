"""What the simulated upstream is told to do: its settings, and the latencies and faults that they write as short texts.

Parses and draws only; it knows neither sockets nor answers.
"""

from __future__ import annotations

import bisect
import enum
import itertools
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

import msgspec

from batchrunner.errors import UsageError

_Value = TypeVar("_Value")

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m)")
_UNIT_S = {"ms": 0.001, "s": 1.0, "m": 60.0}
_STATUS_FAULT = re.compile(r"([45]\d\d)(?:\(([^()]*)\))?")
_ALWAYS = "always:"
_OK = "ok"
# What a bare rate such as 0.02 is spread over: the failures every client of a real server meets.
_USUAL_FAULTS = ("429(50ms)", "500", "503", "reset", "truncate")


def parse_duration(text: str) -> float:
    """Return the seconds that a text such as `200ms`, `1.5s`, `2m` or `0` stands for.

    Raises:
        UsageError: the text is anything else; a bare number has no unit and is refused.
    """
    if text == "0":
        return 0.0
    match = _DURATION.fullmatch(text)
    if match is None:
        raise UsageError(f"duration {text!r} is not a number with the unit ms, s or m, such as 200ms")
    return float(match[1]) * _UNIT_S[match[2]]


class Latency(Protocol):
    """How long one request is worked on."""

    def draw_s(self, rng: random.Random) -> float:
        """Return the seconds the next request takes; 0 means it is answered at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformLatency:
    """Every time between two bounds is as likely as any other; equal bounds make a constant."""

    least_s: float
    most_s: float

    def draw_s(self, rng: random.Random) -> float:
        """Return a time between the bounds; a constant leaves the generator untouched."""
        return self.least_s if self.least_s == self.most_s else rng.uniform(self.least_s, self.most_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class LognormalLatency:
    """Half the requests take less than the median, and a few take very long, as real models do."""

    median_s: float
    sigma: float

    def draw_s(self, rng: random.Random) -> float:
        """Return a time from the distribution."""
        return self.median_s * math.exp(rng.gauss(0.0, self.sigma))


def parse_latency(text: str) -> Latency:
    """Return the latency that `200ms`, `200ms..800ms` or `lognormal:200ms,0.4` (median, sigma) describes.

    Raises:
        UsageError: the text has none of these forms, or its bounds are the wrong way round.
    """
    text = text.strip()
    if text.startswith("lognormal:"):
        return _parse_lognormal(text)
    least, dots, most = text.partition("..")
    latency = UniformLatency(
        least_s=parse_duration(least.strip()),
        most_s=parse_duration(most.strip() if dots else least.strip()),
    )
    if latency.least_s > latency.most_s:
        raise UsageError(f"latency {text!r} starts above its end")
    return latency


def _parse_lognormal(text: str) -> LognormalLatency:
    median, comma, sigma_text = text.removeprefix("lognormal:").partition(",")
    if not comma:
        raise UsageError(f"latency {text!r} needs a median and a sigma, such as lognormal:200ms,0.4")
    median_s = parse_duration(median.strip())
    sigma = _parse_number(sigma_text, what="sigma", most=10.0)
    return LognormalLatency(median_s=median_s, sigma=sigma)


def _parse_number(text: str, *, what: str, most: float) -> float:
    try:
        number = float(text)
    except ValueError as error:
        raise UsageError(f"{what} {text.strip()!r} is not a number") from error
    # The comparison is also false for NaN.
    if not 0.0 <= number <= most:
        raise UsageError(f"{what} {text.strip()} is not between 0 and {most:g}")
    return number


class FaultKind(enum.Enum):
    """What goes wrong with one answer; every member but STATUS is written by its value."""

    STATUS = "status"
    RESET = "reset"
    RESET_MID = "reset_mid"
    STALL = "stall"
    TRUNCATE = "truncate"
    DRIP = "drip"
    GARBAGE = "garbage"
    ERROR_200 = "error200"
    REDIRECT = "redirect"
    HTML = "html"
    HUGE = "huge"
    GZIP = "gzip"
    BAD_UTF8 = "badutf8"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One thing that goes wrong: its name as written, and for a status the code and the wait it asks for."""

    name: str
    kind: FaultKind
    status: int = 200
    retry_after_s: float | None = None

    @property
    def is_good_answer(self) -> bool:
        """Whether the client gets a complete, right answer all the same, and so must not send again."""
        return self.kind is FaultKind.GZIP


def parse_fault(text: str) -> Fault:
    """Return the fault named `reset`, `garbage`, ..., or `503`, or `429(2s)` with the wait it asks for.

    Raises:
        UsageError: there is no such fault.
    """
    name = text.strip()
    match = _STATUS_FAULT.fullmatch(name)
    if match is not None:
        wait_s = None if match[2] is None else parse_duration(match[2].strip())
        return Fault(name=name, kind=FaultKind.STATUS, status=int(match[1]), retry_after_s=wait_s)
    for kind in FaultKind:
        if kind.value == name and kind is not FaultKind.STATUS:
            return Fault(name=name, kind=kind)
    known = ", ".join(kind.value for kind in FaultKind if kind is not FaultKind.STATUS)
    raise UsageError(f"fault {name!r} is neither a status from 400 to 599 nor one of {known}")


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultRates:
    """How often which fault happens; `thresholds` are the running sums of the rates."""

    faults: Sequence[Fault]
    thresholds: Sequence[float]

    def draw(self, rng: random.Random) -> Fault | None:
        """Return the fault of the next request, None for most; the generator is untouched when there are no rates."""
        if not self.faults:
            return None
        place = bisect.bisect_right(self.thresholds, rng.random())
        return self.faults[place] if place < len(self.faults) else None


def parse_fault_rates(text: str) -> FaultRates:
    """Return the rates that `429:0.01,reset:0.2%` or one total such as `0.02` or `2%` describes.

    An empty text means no faults. A total is spread evenly over 429, 500, 503, reset and truncate.

    Raises:
        UsageError: a fault is unknown, a rate is not between 0 and 1, or all of them together exceed 1.
    """
    text = text.strip()
    if not text:
        return FaultRates(faults=(), thresholds=())
    if ":" not in text:
        share = _parse_rate(text) / len(_USUAL_FAULTS)
        pairs = [(parse_fault(name), share) for name in _USUAL_FAULTS]
    else:
        pairs = [_parse_pair(part) for part in text.split(",")]
    pairs = [(fault, rate) for fault, rate in pairs if rate > 0.0]
    thresholds = tuple(itertools.accumulate(rate for _, rate in pairs))
    if thresholds and thresholds[-1] > 1.0 + 1e-9:
        raise UsageError(f"fault rates add up to {thresholds[-1]:g}, at most 1")
    return FaultRates(faults=tuple(fault for fault, _ in pairs), thresholds=thresholds)


def _parse_pair(part: str) -> tuple[Fault, float]:
    name, colon, rate = part.partition(":")
    if not colon:
        raise UsageError(f"fault {part.strip()!r} has no rate, such as {part.strip()}:0.01")
    return parse_fault(name), _parse_rate(rate)


def _parse_rate(text: str) -> float:
    text = text.strip()
    if text.endswith("%"):
        return _parse_number(text[:-1], what="fault percentage", most=100.0) / 100.0
    return _parse_number(text, what="fault rate", most=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """The faults one body asks for itself, by appearance; None is a good answer."""

    steps: Sequence[Fault | None]
    is_endless: bool

    def fault_at(self, appearance_index: int) -> Fault | None:
        """Return what becomes of the body's appearance, counted from 0; past the last step all is well."""
        if self.is_endless:
            return self.steps[0]
        return self.steps[appearance_index] if appearance_index < len(self.steps) else None


class _ScriptedBody(msgspec.Struct):
    simulate: str | list[str] | None = None


_SCRIPTED_BODY = msgspec.json.Decoder(_ScriptedBody)


def parse_script(body: bytes) -> Script | None:
    """Return the script in the body's top-level key `simulate`, None when it has none.

    The key holds a list of fault names or `ok`, one name, or `always:` and one name. A body that is not JSON has none.

    Raises:
        UsageError: the key holds something else.
    """
    try:
        wanted = _SCRIPTED_BODY.decode(body).simulate
    except msgspec.ValidationError as error:
        raise UsageError(f"the body's script does not fit: {error}") from error
    except (ValueError, RecursionError):
        return None
    if wanted is None:
        return None
    if isinstance(wanted, str):
        is_endless = wanted.startswith(_ALWAYS)
        return Script(steps=(_parse_step(wanted.removeprefix(_ALWAYS)),), is_endless=is_endless)
    return Script(steps=tuple(_parse_step(name) for name in wanted), is_endless=False)


def _parse_step(name: str) -> Fault | None:
    return None if name == _OK else parse_fault(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorSettings:
    """How the simulated upstream behaves; `latency` and `faults` are texts as on the command line.

    Port 0 takes a free one. `slots` requests at most are worked on at once and `queue` more wait; None is no limit.
    """

    host: str = "127.0.0.1"
    port: int = 0
    latency: str = "0"
    slots: int | None = None
    queue: int | None = None
    faults: str = ""
    seed: int = 0
    api_key: str | None = None
    is_down: bool = False
    huge_bytes: int = 40 * 1024 * 1024
    drip_interval_s: float = 0.1
    stream_interval_s: float = 0.0


class _Change(msgspec.Struct, forbid_unknown_fields=True):
    slots: int | msgspec.UnsetType | None = msgspec.UNSET
    queue: int | msgspec.UnsetType | None = msgspec.UNSET
    latency: str | msgspec.UnsetType = msgspec.UNSET
    faults: str | msgspec.UnsetType = msgspec.UNSET
    down: bool | msgspec.UnsetType = msgspec.UNSET
    refuse_ms: int | None = None


def changed_settings(settings: SimulatorSettings, body: bytes) -> tuple[SimulatorSettings, float | None]:
    """Return the settings that a control request asks for, and the seconds for which connections are to be refused.

    The body is a JSON object of slots, queue, latency, faults, down and refuse_ms; what it leaves out stays.

    Raises:
        UsageError: the body is something else. The texts in it are judged by whoever applies the settings.
    """
    try:
        change = msgspec.json.decode(body, type=_Change)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"the control request does not fit: {error}") from error
    if change.refuse_ms is not None and change.refuse_ms < 0:
        raise UsageError(f"refuse_ms is {change.refuse_ms}, at least 0")
    changed = replace(
        settings,
        slots=_given(change.slots, settings.slots),
        queue=_given(change.queue, settings.queue),
        latency=_given(change.latency, settings.latency),
        faults=_given(change.faults, settings.faults),
        is_down=_given(change.down, settings.is_down),
    )
    return changed, None if change.refuse_ms is None else change.refuse_ms / 1000


def _given(value: _Value | msgspec.UnsetType, current: _Value) -> _Value:
    return current if isinstance(value, msgspec.UnsetType) else value
