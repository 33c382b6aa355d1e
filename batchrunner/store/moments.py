"""Time as the store sees it: the moment of a transaction, how long the database has answered, jumps of the wall."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from datetime import datetime

from batchrunner.ports import Clock

logger = logging.getLogger(__name__)

STEADY_AFTER_S = 5.0
_SLEPT_S = 1.0
_WAITED_S = 1.0
_WALL_JUMP_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The clocks at the start of a transaction."""

    wall: datetime
    boot_s: float
    boot_id: str


class Availability:
    """Since when the database has answered without interruption.

    After an outage every lease may have run out although its holder lives: whoever comes back first must give the
    others time to renew before it takes anything from them. A host that slept has the same outage, seen as boot time
    that ran ahead.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._since_s: float | None = None
        self._asleep_s = self._slept_so_far_s()

    def succeeded(self) -> None:
        """Note an answer."""
        self._notice_sleep()
        if self._since_s is None:
            self._since_s = self._clock.monotonic_s()

    def failed(self) -> None:
        """Note that the database did not answer."""
        self._since_s = None

    def asked_s(self) -> float:
        """Read the time at which a transaction asks for its turn."""
        return self._clock.monotonic_s()

    def answered(self, asked_s: float) -> None:
        """Note how long the turn took: while somebody waited long, others may not have been able to renew."""
        if self._clock.monotonic_s() - asked_s > _WAITED_S:
            self.failed()

    def is_steady(self) -> bool:
        """Tell whether leases that ran out may be taken."""
        self._notice_sleep()
        return self._since_s is not None and self._clock.monotonic_s() - self._since_s >= STEADY_AFTER_S

    def _slept_so_far_s(self) -> float:
        return self._clock.boot_s() - self._clock.monotonic_s()

    def _notice_sleep(self) -> None:
        asleep_s = self._slept_so_far_s()
        if asleep_s - self._asleep_s > _SLEPT_S:
            self._since_s = None
        self._asleep_s = asleep_s


class WallWatch:
    """Compares the wall clock with boot time from sweep to sweep, so that a wrong clock alone expires no batch."""

    def __init__(self) -> None:
        self._last: Moment | None = None

    def is_trusted(self, moment: Moment) -> bool:
        """Tell whether deadlines may pass now; False, once, after a jump of more than five minutes."""
        last, self._last = self._last, moment
        if last is None or last.boot_id != moment.boot_id:
            return True
        jump_s = (moment.wall - last.wall).total_seconds() - (moment.boot_s - last.boot_s)
        if abs(jump_s) <= _WALL_JUMP_S:
            return True
        logger.warning(
            "wall clock jumped by %.0f s, deadlines wait for the next sweep",
            jump_s,
            extra={"action": "wall_clock_jumped", "jump_s": jump_s},
        )
        return False
