"""Whether failures come from a window that is too large, or are a habit of the upstream that no window cures."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field
from enum import Enum, auto

# So small a share is nobody's habit: one failure among so many says nothing, several at once do.
STRAY = 0.002
# Standard errors above the usual share that count as more than chance.
CERTAIN = 3.0
# A habit is forgotten slowly: an upstream may lose it, and a window may have been blamed for too little.
HABIT_HALVES_S = 120.0
# The larger sizes are to blame where the smaller ones failed less than so large a part of what the share of the larger
# would have brought them, that being at least so many.
CURED_SHARE = 0.1
CURED_LEAST = 5.0
# So many attempts in a row without a failure end a spell of trouble.
CURED_AFTER = 5000
# What is no more than chance fades after so many attempts.
FADES_AFTER = 500
# Fewer failures in a page are too few to speak of a share.
HEAVY_LEAST = 4


class Advice(Enum):
    """What refusals or breakages ask of the window."""

    NOTHING = auto()
    SHRINK = auto()
    RESTORE = auto()


@dataclass(slots=True)
class _Count:
    """Attempts, and how many of them failed."""

    failed: int = 0
    attempts: int = 0

    def note(self, failed: int, succeeded: int) -> None:
        self.failed += failed
        self.attempts += failed + succeeded

    def add(self, other: _Count) -> None:
        self.failed += other.failed
        self.attempts += other.attempts


@dataclass(slots=True)
class Trouble:
    """Attempts that failed in one way, and the share of them that shrinking does not cure: the upstream's habit.

    `tolerated` is the share that never counts, nor does a single failure; `block` how many attempts make a judgement
    once there is a habit. `is_late`: a failure tells of the moment when the attempt began, so that even many at once
    have to be waited out.
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
    # What went well in a row.
    clean: int = 0
    # What came since the last judgement, from the first failure on; of what was no more than chance a part stays.
    page: _Count = field(default_factory=_Count)
    # What came since the spell of trouble began, by the size that the window had.
    spell: defaultdict[int, _Count] = field(default_factory=lambda: defaultdict(_Count))

    def note(self, failed: int, succeeded: int, *, size: int, held: int, at_s: float, is_patient: bool) -> Advice:
        """Judge what one span brought. While `is_patient`, only what is bad beyond all habit counts, unless late.

        `size` is that of the window, `held` the last one that held.
        """
        self.clean = 0 if failed else self.clean + succeeded
        if self.clean > CURED_AFTER:
            self._end_spell()
        page = self.page
        if failed or page.failed or self.shrinks:
            self.spell[size].note(failed, succeeded)
        if not failed and not page.failed:
            return Advice.NOTHING
        page.note(failed, succeeded)
        is_heavy = page.failed > self.habit_max * page.attempts and page.failed >= HEAVY_LEAST
        if (is_patient and (self.is_late or not is_heavy)) or self._is_chance(at_s):
            return Advice.NOTHING
        self.page = _Count()
        if is_heavy:
            # So many at once come from a window that is too large; what they say of a habit is nothing.
            self._end_spell()
            return Advice.SHRINK
        return self._blame(held, at_s)

    def forget(self) -> None:
        """Judge nothing by what failed so far."""
        self.page = _Count()
        self._end_spell()

    def _is_chance(self, at_s: float) -> bool:
        """Whether the page holds no more than chance makes of what is tolerated, or of the habit."""
        page = self.page
        stray = 0.0 if self.shrinks else STRAY
        limit = max(stray, self.tolerated, self.habit * 0.5 ** ((at_s - self.habit_at_s) / HABIT_HALVES_S))
        if limit > STRAY and page.attempts < self.block:
            return True
        if page.failed > max(1.0, limit * page.attempts + CERTAIN * math.sqrt(limit * page.attempts)):
            return False
        if page.attempts > FADES_AFTER:
            page.failed, page.attempts = page.failed // 2, page.attempts // 2
            if not self.shrinks:
                self.spell.clear()
        return True

    def _blame(self, held: int, at_s: float) -> Advice:
        if self.shrinks == 0:
            self.size_before = held
        self.shrinks += 1
        if self.shrinks <= self.shrinks_max:
            return Advice.SHRINK
        if self._is_cured_by_size():
            self._end_spell()
            return Advice.SHRINK
        whole = self._sum()
        lasting = whole.failed / whole.attempts
        if lasting > self.habit_max:
            return Advice.SHRINK
        self._end_spell()
        self.habit = min(self.habit_max, 0.005 + 1.2 * lasting)
        self.habit_at_s = at_s
        return Advice.RESTORE

    def _is_cured_by_size(self) -> bool:
        """Whether hardly any failed below some size, of as many as the share from that size on would have given."""
        whole, below = self._sum(), _Count()
        for size in sorted(self.spell):
            above = (whole.failed - below.failed) / max(1, whole.attempts - below.attempts)
            due = below.attempts * above
            if due >= CURED_LEAST and below.failed < CURED_SHARE * due:
                return True
            below.add(self.spell[size])
        return False

    def _sum(self) -> _Count:
        whole = _Count()
        for each in self.spell.values():
            whole.add(each)
        return whole

    def _end_spell(self) -> None:
        self.shrinks = 0
        self.spell.clear()
