"""How many requests may be in flight: a window that finds the smallest size with (nearly) the greatest throughput.

Pure rules over measurements, with all times passed in; who may send at all is the business of `limits`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import Enum, auto

from batchrunner.sampler import Bound, Sample
from batchrunner.trouble import Advice, Trouble

WINDOW_START = 16
WINDOW_MAX = 4096

# Growing from w to w*k pays when throughput grows by at least k**PRICE. A queue gives k**0 and free slots give k**1; a
# batching server whose latency is base*(1 + w/48) stops paying at w = 48*(1/PRICE - 1) = 272, with 85 % of its maximum.
PRICE = 0.15
# Below this latency a place in the window costs nobody anything: any real gain is taken, and the first places are free.
CHEAP_LATENCY_S = 0.05
CHEAP_PRICE = 0.04
CHEAP_SIZE = 32
# A smaller window is taken when it costs less throughput than this.
LOSS_TOLERATED = 0.03
# At the same window, less than this share of the known throughput means that the upstream has changed.
CHANGE = 0.15
# With less of the window in use, its size is not what was measured.
FULL_LEAST = 0.8
# Coefficient of variation of service times that judgements allow for.
VARIATION = 0.5
# Standard errors that settle a trial early, and that make a held size look changed; the latter is asked every second.
CERTAIN = 2.0
SURPRISING = 3.0
# With fewer answers a second only coarse steps can be told apart.
COARSE_RATE = 100.0

# Until every process has heard of a smaller window and keeps to it, what comes in tells of the size before.
HEARD_S = 0.25

PROBE_FIRST_S = 3.0
PROBE_EVERY_MAX_S = 12.0
CEILING_RETRY_FIRST_S = 5.0
CEILING_RETRY_MAX_S = 20.0
FLOOR_AGE_S = 6.0
FLOOR_AGE_MAX_S = 60.0


class _Aim(Enum):
    """Why the window has its present size."""

    HOLD = auto()
    UP = auto()
    DOWN = auto()


@dataclass(slots=True)
class _Level:
    """What a window of one size gives, from `count` answers."""

    size: int
    rate: float
    latency_s: float
    count: int

    def absorb(self, other: _Level) -> None:
        """Average with a later measurement of the same size; what is old fades."""
        kept = min(self.count, 4 * other.count)
        total = kept + other.count
        self.rate = (self.rate * kept + other.rate * other.count) / total
        self.latency_s = (self.latency_s * kept + other.latency_s * other.count) / total
        self.count = min(total, 4000)

    def gain_over(self, other: _Level) -> float:
        """Logarithm of the ratio of throughputs."""
        return math.log(self.rate / other.rate)

    def doubt_against(self, other: _Level) -> float:
        """One standard error of `gain_over`."""
        return VARIATION * math.sqrt(1.0 / self.count + 1.0 / other.count)


@dataclass(slots=True)
class _Trial:
    """A measurement under way; it counts from `from_s`, when the answers are those of the new size."""

    aim: _Aim
    size: int
    from_s: float
    span_s: float = 0.0
    answered: int = 0
    latency_sum_s: float = 0.0
    in_flight_s: float = 0.0

    def add(self, sample: Sample) -> None:
        self.span_s += sample.span_s
        self.answered += sample.answered
        self.latency_sum_s += sample.latency_sum_s
        self.in_flight_s += sample.in_flight_mean * sample.span_s

    def level(self) -> _Level:
        """Throughput by Little's law: answers come in bursts when requests started together, latencies do not."""
        in_flight = max(self.in_flight_s / self.span_s, 1e-3)
        return _Level(self.size, in_flight / self.latency_s, self.latency_s, self.answered)

    @property
    def latency_s(self) -> float:
        return max(self.latency_sum_s / self.answered, 1e-6)


@dataclass(slots=True)
class Window:
    """The size of the window, adapted by `observe`. `pinned` fixes it.

    A size is held, a larger one is tried now and then, a smaller one when nothing known says that it would cost
    throughput. Each trial waits until the answers are those of its size and ends when the outcome is clear. Refusals
    shrink at once, unless shrinking proves to be no cure, or that the upstream was about to go down.
    """

    pinned: int | None = None
    start: int = WINDOW_START
    size_max: int = WINDOW_MAX
    size: int = field(init=False)
    bound_by: Bound = field(init=False, default=Bound.GROWING)
    _trial: _Trial = field(init=False)
    _known: _Level | None = field(init=False, default=None)
    _base_latency_s: float = field(init=False, default=math.inf)
    _is_base_sure: bool = field(init=False, default=False)
    # The largest size that is known to cost throughput, 0 when unknown; and the smallest that was refused.
    _floor: int = field(init=False, default=0)
    _floor_latency_s: float = field(init=False, default=0.0)
    _floor_at_s: float = field(init=False, default=0.0)
    _floor_age_s: float = field(init=False, default=FLOOR_AGE_S)
    _ceiling: float = field(init=False, default=math.inf)
    _ceiling_bound: Bound = field(init=False, default=Bound.REFUSALS)
    _ceiling_retry_at_s: float = field(init=False, default=0.0)
    _ceiling_retry_s: float = field(init=False, default=CEILING_RETRY_FIRST_S)
    _stretch: float = field(init=False, default=2.0)
    _is_climbing: bool = field(init=False, default=True)
    _has_fallen: bool = field(init=False, default=False)
    _probe_at_s: float = field(init=False, default=0.0)
    _probe_every_s: float = field(init=False, default=PROBE_FIRST_S)
    _refusals: Trouble = field(init=False)
    _breakages: Trouble = field(init=False)
    # From when on everybody keeps to the last smaller size.
    _heard_at_s: float = field(init=False, default=-math.inf)
    _patient_until_s: float = field(init=False, default=-math.inf)
    # The size at the last answer.
    _sound: int = field(init=False)

    def __post_init__(self) -> None:
        self.size = self.pinned if self.pinned is not None else min(self.start, self.size_max)
        self._sound = self.size
        self._trial = _Trial(_Aim.HOLD, self.size, -math.inf)
        self._refusals = Trouble(tolerated=0.0, habit_max=0.2, shrinks_max=3, block=50)
        self._breakages = Trouble(tolerated=0.1, habit_max=0.6, shrinks_max=2, block=20, is_late=True)
        if self.pinned is not None:
            self.bound_by = Bound.PINNED

    def observe(self, sample: Sample) -> None:
        """Take in what the last span (about 100 ms) brought; `size` and `bound_by` may change."""
        if self.pinned is not None:
            return
        if sample.is_down:
            self._forget_trouble(sample.at_s)
            return
        if sample.answered:
            self._sound = self.size
        if sample.at_s - sample.span_s < self._heard_at_s or self._is_troubled(sample):
            return
        trial = self._trial
        if sample.at_s - sample.span_s < trial.from_s - 1e-9:
            return
        if sample.was_full < FULL_LEAST:
            self._enter(trial.aim, trial.size, sample.at_s)
            self.bound_by = sample.short_of
            return
        self._name_bound()
        if math.isinf(self._base_latency_s):
            # The first answers met an empty upstream; what counts begins when the window has been full for a while.
            if sample.answered:
                self._base_latency_s = sample.latency_sum_s / sample.answered
                trial.from_s = sample.at_s + self._base_latency_s
            return
        trial.add(sample)
        if trial.answered >= min(8, 2 * trial.size):
            self._weigh(trial.level(), sample.at_s)

    # Trials.

    def _enter(self, aim: _Aim, size: int, at_s: float) -> None:
        known = self._known
        settle_s = 0.0
        if known is not None and (size != self.size or aim is not _Aim.HOLD):
            # What is in the queue of a larger size must leave first.
            before_s = self._trial.latency_s if self._trial.answered else 0.0
            settle_s = 0.1 + 1.1 * max(before_s, known.latency_s * max(1.0, size / known.size))
        self.size = size
        self._trial = _Trial(aim, size, at_s + settle_s)

    def _weigh(self, level: _Level, at_s: float) -> None:
        span_s = self._trial.span_s
        if span_s < max(0.3, level.latency_s) or level.count < min(24, 6 * level.size):
            return
        if self._known is None:
            if level.count >= min(64, 4 * level.size) or span_s >= max(6.0, 2.0 * level.latency_s):
                self._weigh_first(level, at_s)
            return
        match self._trial.aim:
            case _Aim.HOLD:
                if span_s >= max(1.0, 2.0 * level.latency_s):
                    self._weigh_hold(level, self._known, at_s)
            case _Aim.UP:
                self._weigh_up(level, self._known, at_s)
            case _Aim.DOWN:
                self._weigh_down(level, self._known, at_s)

    def _weigh_first(self, level: _Level, at_s: float) -> None:
        self._known = level
        is_crowded = self._has_fallen or level.latency_s > 3.0 * self._base_latency_s
        fit = round(level.rate * self._base_latency_s * 1.15) if is_crowded else level.size
        self._has_fallen = False
        self._base_latency_s = min(self._base_latency_s, level.latency_s)
        if fit < level.size:
            self._enter(_Aim.DOWN, max(1, fit, level.size // 4), at_s)
        else:
            self._go_on(at_s)

    def _weigh_hold(self, level: _Level, known: _Level, at_s: float) -> None:
        gain = level.gain_over(known)
        doubt = level.doubt_against(known)
        if gain < -max(CHANGE, SURPRISING * doubt):
            self._note_fall(at_s)
            return
        if gain > max(CHANGE / 2, SURPRISING * doubt):
            self._known = level
            self._probe_at_s = at_s
        else:
            known.absorb(level)
        self._base_latency_s = min(self._base_latency_s, known.latency_s)
        if known.latency_s > 1.3 * self._base_latency_s and at_s - self._floor_at_s > self._floor_age_s:
            self._floor = 0
            self._floor_age_s = min(FLOOR_AGE_MAX_S, 1.5 * self._floor_age_s)
        self._go_on(at_s)

    def _weigh_up(self, level: _Level, known: _Level, at_s: float) -> None:
        is_cheap = level.latency_s < CHEAP_LATENCY_S
        steps = math.log(level.size / known.size)
        gain = level.gain_over(known)
        due = (CHEAP_PRICE if is_cheap else PRICE) * steps
        # Just below a ceiling steps are too small to be measured; that nothing was refused is the gain.
        if steps < 0.1 or (is_cheap and level.size <= CHEAP_SIZE):
            due = -LOSS_TOLERATED
        if not self._is_clear(gain - due, level, known):
            return
        if gain < -max(CHANGE, SURPRISING * level.doubt_against(known)):
            self._note_fall(at_s)
            return
        if gain < due + 1.0 * level.doubt_against(known):
            self._is_climbing = False
            self._probe_at_s = at_s + self._probe_every_s
            self._probe_every_s = min(PROBE_EVERY_MAX_S, 1.5 * self._probe_every_s)
            self._retreat(at_s)
            return
        self._known = level
        self._is_climbing = level.size < self._ceiling
        if not self._is_climbing:
            # The upstream takes more than it did, maybe by little.
            self._ceiling = math.inf
            self._ceiling_retry_s = CEILING_RETRY_FIRST_S
        self._stretch = 2.0 if gain >= 0.5 * steps else 1.5
        self._probe_at_s = at_s
        self._probe_every_s = PROBE_FIRST_S
        self._go_on(at_s)

    def _weigh_down(self, level: _Level, known: _Level, at_s: float) -> None:
        loss = -level.gain_over(known)
        if not self._is_clear(loss - LOSS_TOLERATED, level, known):
            return
        steps = math.log(known.size / level.size)
        if loss > steps + max(CHANGE, SURPRISING * level.doubt_against(known)):
            # A smaller window costs its own share at most.
            self._note_fall(at_s)
            return
        if loss > max(LOSS_TOLERATED, 1.0 * level.doubt_against(known)):
            self._floor = level.size
            self._floor_latency_s = level.latency_s
            self._floor_at_s = at_s
            if loss > max(0.6 * steps, SURPRISING * level.doubt_against(known)):
                # Throughput fell with the window, so no request was waiting: this is what one costs alone.
                self._base_latency_s = level.latency_s
                self._is_base_sure = True
            self._retreat(at_s)
            return
        if self._floor > 0 and level.latency_s <= 1.1 * self._floor_latency_s:
            # Nobody waits longer than in a window that is too small.
            self._is_base_sure = True
        self._floor_age_s = FLOOR_AGE_S
        self._known = level
        self._base_latency_s = min(self._base_latency_s, level.latency_s)
        self._go_on(at_s)

    def _note_fall(self, at_s: float) -> None:
        """Measure anew: the upstream gives less than it did, and what was measured straddles the change."""
        size = self._known.size if self._known is not None else self.size
        self._has_fallen = True
        self._ceiling = math.inf
        self._probe_every_s = PROBE_FIRST_S
        self._restart(size, at_s)

    def _is_clear(self, margin: float, level: _Level, known: _Level) -> bool:
        if abs(margin) >= CERTAIN * level.doubt_against(known):
            return True
        return self._trial.span_s >= max(4.0 if known.rate > COARSE_RATE else 6.0, 4.0 * level.latency_s)

    def _retreat(self, at_s: float) -> None:
        known = self._known
        if known is None:
            return
        target = self._smaller(known)
        if target is not None:
            self._enter(_Aim.DOWN, target, at_s)
        else:
            self._enter(_Aim.HOLD, known.size, at_s)

    def _go_on(self, at_s: float) -> None:
        """Choose the next trial from the known level."""
        known = self._known
        if known is None:
            return
        larger = self._larger(known, at_s) if at_s >= self._probe_at_s else None
        smaller = None if self._is_climbing else self._smaller(known)
        if larger is not None:
            self._enter(_Aim.UP, larger, at_s)
        elif smaller is not None:
            self._enter(_Aim.DOWN, smaller, at_s)
        else:
            self._is_climbing = False
            self._enter(_Aim.HOLD, known.size, at_s)

    def _larger(self, known: _Level, at_s: float) -> int | None:
        stretch = self._stretch if self._is_climbing else 1.25 if known.rate > COARSE_RATE else 1.5
        target = min(max(known.size + 1, int(known.size * stretch)), self.size_max)
        room = self._ceiling - known.size
        if target > known.size + room / 2:
            if room > max(1.0, 0.03 * known.size):
                target = known.size + int(room / 2)
            elif at_s >= self._ceiling_retry_at_s:
                target = int(self._ceiling)
            else:
                return None
        return target if target > known.size else None

    def _smaller(self, known: _Level) -> int | None:
        if known.latency_s < CHEAP_LATENCY_S and known.size <= CHEAP_SIZE:
            return None
        if self._floor <= 0 or self._floor >= known.size:
            if self._is_base_sure and known.latency_s < 1.3 * self._base_latency_s:
                return None
            target = int(known.size / 1.5)
        elif known.size / self._floor > (1.3 if known.rate > COARSE_RATE else 1.6) and known.size - self._floor > 1:
            target = round(math.sqrt(known.size * self._floor))
        else:
            return None
        if self._is_base_sure and known.rate <= COARSE_RATE:
            # Less than throughput times the latency of one alone leaves places of the upstream empty for sure, and
            # where answers are few a trial of that is long and each place is a large share.
            target = max(target, round(known.rate * self._base_latency_s))
        return target if 1 <= target < known.size else None

    # What shrinks at once.

    def _is_troubled(self, sample: Sample) -> bool:
        """Shrink for refusals and breakages, or go back when shrinking proved useless."""
        at_s = sample.at_s
        advice = self._advice(self._refusals, sample.refused, sample)
        if advice is Advice.SHRINK:
            # In flight is what was not refused: about what the upstream has room for.
            fitting = max(min(self.size - 1, int(self.size * sample.was_full * 0.97)), self.size // 2)
            self._shrink(fitting, at_s, Bound.REFUSALS)
        elif advice is Advice.RESTORE:
            self._restore(self._refusals.size_before, at_s)
        else:
            advice = self._advice(self._breakages, sample.broken, sample)
            if advice is Advice.SHRINK:
                self._shrink(int(self.size * 0.7), at_s, Bound.FAILURES)
            elif advice is Advice.RESTORE:
                self._restore(self._breakages.size_before, at_s)
        return advice is not Advice.NOTHING

    def _advice(self, trouble: Trouble, failed: int, sample: Sample) -> Advice:
        held = self._known.size if self._known is not None else self.size
        is_patient = sample.at_s < self._patient_until_s
        return trouble.note(failed, sample.answered, size=self.size, held=held, at_s=sample.at_s, is_patient=is_patient)

    def _shrink(self, size: int, at_s: float, bound: Bound) -> None:
        self._ceiling = max(self.size, size + 1, 2)
        self._ceiling_bound = bound
        self._ceiling_retry_at_s = at_s + self._ceiling_retry_s
        self._ceiling_retry_s = min(CEILING_RETRY_MAX_S, 1.5 * self._ceiling_retry_s)
        self._is_climbing = False
        self._probe_at_s = at_s + 1.0
        if self._trial.aim is _Aim.UP and self._known is not None and bound is Bound.REFUSALS:
            # What was known before the step up holds still.
            self._enter(_Aim.HOLD, self._known.size, at_s)
        else:
            self._restart(max(1, size), at_s)
        self._heard_at_s = at_s + HEARD_S
        self._patient_until_s = self._trial.from_s + (1.0 if bound is Bound.FAILURES else 0.0)
        self._name_bound()

    def _restore(self, size: int, at_s: float) -> None:
        self._ceiling = math.inf
        self._restart(size, at_s)

    def _forget_trouble(self, at_s: float) -> None:
        self._refusals.forget()
        self._breakages.forget()
        if self.size != self._sound:
            self._restore(self._sound, at_s)

    def _restart(self, size: int, at_s: float) -> None:
        """Go to a size without a claim about it; the next hold measures it anew."""
        latency_s = self._known.latency_s if self._known is not None else 0.0
        self._known = None
        self._floor = 0
        self._enter(_Aim.HOLD, size, at_s)
        self._trial.from_s = at_s + 0.1 + latency_s

    def _name_bound(self) -> None:
        if self._trial.size >= self.size_max:
            self.bound_by = Bound.MAXIMUM
        elif self._ceiling <= max(1.3 * self.size, self.size + 2) or (self._known is None and self._ceiling < math.inf):
            self.bound_by = self._ceiling_bound
        else:
            self.bound_by = Bound.GROWING if self._is_climbing else Bound.THROUGHPUT
