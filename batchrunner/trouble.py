"""Whether failures come from a window that is too large, or are a habit of the upstream that no window cures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum, auto

# Standard errors above the usual share that count as more than chance.
CERTAIN = 3.0
# A habit is forgotten slowly: an upstream may lose it, and a window may have been blamed for too little.
HABIT_HALVES_S = 120.0
# So many attempts in a row without a failure end a spell of trouble.
CURED_AFTER = 500
# Fewer failures in a page are too few to speak of a share.
HEAVY_LEAST = 4


class Advice(Enum):
    """What refusals or breakages ask of the window."""

    NOTHING = auto()
    SHRINK = auto()
    RESTORE = auto()


@dataclass(slots=True)
class Trouble:
    """Attempts that failed in one way, and the share of them that shrinking does not cure: the upstream's habit.

    `tolerated` is the share that never counts, `block` how many attempts make a judgement once that share is not 0.
    `is_late`: a failure tells of the moment when the attempt began, so that even many at once have to be waited out.
    """

    tolerated: float
    habit_max: float
    shrinks_max: int
    block: int
    is_late: bool = False
    habit: float = 0.0
    habit_at_s: float = 0.0
    shrinks: int = 0
    size_before: int = 0
    failed: int = 0
    attempts: int = 0
    failed_before: int = 0
    attempts_before: int = 0
    clean: int = 0

    def note(self, failed: int, succeeded: int, *, size: int, at_s: float, is_patient: bool) -> Advice:
        """Judge what one span brought. While `is_patient`, only what is bad beyond all habit counts, unless late."""
        if not failed and not self.failed:
            self.clean += succeeded
            self.attempts_before += succeeded if self.shrinks else 0
            if self.clean > CURED_AFTER:
                self.shrinks = self.failed_before = self.attempts_before = 0
            return Advice.NOTHING
        self.failed += failed
        self.attempts += failed + succeeded
        limit = max(self.tolerated, self.habit * 0.5 ** ((at_s - self.habit_at_s) / HABIT_HALVES_S))
        if limit > 0.0 and self.attempts < self.block:
            return Advice.NOTHING
        share = self.failed / self.attempts
        is_heavy = share > self.habit_max and self.failed >= HEAVY_LEAST
        if is_patient and (self.is_late or not is_heavy):
            return Advice.NOTHING
        if self.failed <= limit * self.attempts + CERTAIN * math.sqrt(limit * self.attempts):
            if self.attempts > CURED_AFTER:
                self.failed, self.attempts = self.failed // 2, self.attempts // 2
            return Advice.NOTHING
        self.clean = 0
        self._turn_page()
        lasting = self.failed_before / self.attempts_before
        if is_heavy:
            # So many at once come from a window that is too large; what they say of a habit is nothing.
            self.shrinks = self.failed_before = self.attempts_before = 0
            return Advice.SHRINK
        if self.shrinks == 0:
            self.size_before = size
        self.shrinks += 1
        if self.shrinks <= self.shrinks_max or lasting > self.habit_max:
            return Advice.SHRINK
        self.shrinks = 0
        self.habit = min(self.habit_max, 0.005 + 1.2 * lasting)
        self.habit_at_s = at_s
        return Advice.RESTORE

    def forget(self) -> None:
        """Judge nothing by the failures since the last judgement."""
        self.failed = self.attempts = 0

    def _turn_page(self) -> None:
        self.failed_before += self.failed
        self.attempts_before += self.attempts
        self.failed = self.attempts = 0
