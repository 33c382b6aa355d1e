"""What the simulated upstream counts: requests, answers, and for each body how often it came and why.

A million distinct bodies cost some 80 MB: one 60-bit key each, and counts that are shared between bodies alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple


class BodyCounts(NamedTuple):
    """How often one body came, how often it was answered well or not, and how many of its sends were needless."""

    seen: int = 0
    ok: int = 0
    faulted: int = 0
    repeats: int = 0


_UNSEEN: Final = BodyCounts()
_ONCE: Final = BodyCounts(seen=1)
_ONCE_OK: Final = BodyCounts(seen=1, ok=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorStats:
    """One reading of the counters; `total` = `ok` + `faulted` + `abandoned` + `in_flight`, always.

    `unique` counts distinct bodies. `faulted` counts answers other than the good one, whatever the reason, `faults`
    tells them apart by name. `abandoned` requests lost their client before they were answered. `repeats` are sends
    that no fault called for; of them, `repeats_paid` came after the same body had been answered well. `in_flight`
    requests have got neither an answer nor a fault; `working` hold a slot, `waiting` a place in the queue.
    """

    total: int
    unique: int
    repeats: int
    repeats_paid: int
    ok: int
    faulted: int
    abandoned: int
    in_flight: int
    peak_in_flight: int
    working: int
    waiting: int
    connections: int
    statuses: dict[str, int]
    faults: dict[str, int]


def body_key(digest: bytes) -> int:
    """Return the key of the body with this SHA-256 digest; 60 bits, because an int of that size takes 32 bytes."""
    return int.from_bytes(digest[:8], "big") >> 4


class Tally:
    """The counters since the last reset."""

    __slots__ = (
        "_abandoned",
        "_bodies",
        "_faulted",
        "_faults",
        "_in_flight",
        "_ok",
        "_peak_in_flight",
        "_repeats",
        "_repeats_paid",
        "_shared",
        "_statuses",
        "_total",
    )

    def __init__(self) -> None:
        self._bodies: dict[int, BodyCounts] = {}
        self._shared: dict[BodyCounts, BodyCounts] = {}
        self._statuses: dict[int, int] = {}
        self._faults: dict[str, int] = {}
        self._total = 0
        self._ok = 0
        self._faulted = 0
        self._abandoned = 0
        self._repeats = 0
        self._repeats_paid = 0
        self._in_flight = 0
        self._peak_in_flight = 0

    def arrive(self, key: int) -> int:
        """Count a request and return how often its body had come before."""
        self._total += 1
        self._in_flight += 1
        self._peak_in_flight = max(self._peak_in_flight, self._in_flight)
        counts = self._bodies.get(key)
        if counts is None:
            self._bodies[key] = _ONCE
            return 0
        seen, ok, faulted, repeats = counts
        # Each earlier fault explains one send more, and so does each repeat that is counted already.
        if seen > faulted + repeats:
            repeats += 1
            self._repeats += 1
            if ok:
                self._repeats_paid += 1
        self._put(key, BodyCounts(seen + 1, ok, faulted, repeats))
        return seen

    def answer_well(self, key: int, status: int) -> None:
        """Count that a request got its good answer."""
        self._in_flight -= 1
        self._ok += 1
        self._statuses[status] = self._statuses.get(status, 0) + 1
        counts = self._bodies[key]
        if counts is _ONCE:
            self._bodies[key] = _ONCE_OK
        else:
            self._put(key, counts._replace(ok=counts.ok + 1))

    def fault(self, key: int, name: str, status: int | None) -> None:
        """Count that a request got something else; `status` is None when no status line goes out."""
        self._in_flight -= 1
        self._faulted += 1
        self._faults[name] = self._faults.get(name, 0) + 1
        if status is not None:
            self._statuses[status] = self._statuses.get(status, 0) + 1
        counts = self._bodies[key]
        self._put(key, counts._replace(faulted=counts.faulted + 1))

    def abandon(self) -> None:
        """Count that a request's client went away before the answer."""
        self._in_flight -= 1
        self._abandoned += 1

    def body(self, key: int) -> BodyCounts:
        """Return the counts of one body, all zero when it never came."""
        return self._bodies.get(key, _UNSEEN)

    def read(self, *, working: int, waiting: int, connections: int) -> SimulatorStats:
        """Return the counters as they stand, beside the occupancy that the server knows."""
        return SimulatorStats(
            total=self._total,
            unique=len(self._bodies),
            repeats=self._repeats,
            repeats_paid=self._repeats_paid,
            ok=self._ok,
            faulted=self._faulted,
            abandoned=self._abandoned,
            in_flight=self._in_flight,
            peak_in_flight=self._peak_in_flight,
            working=working,
            waiting=waiting,
            connections=connections,
            statuses={str(status): count for status, count in sorted(self._statuses.items())},
            faults=dict(sorted(self._faults.items())),
        )

    def _put(self, key: int, counts: BodyCounts) -> None:
        self._bodies[key] = self._shared.setdefault(counts, counts)
