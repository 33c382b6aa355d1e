"""The one byte budget of a process: shards, answers and unsynced records share it, and the rest bounds the window."""

from __future__ import annotations

from collections.abc import Iterable

from batchrunner.journal import Journal
from batchrunner.lanes import Lane
from batchrunner.limits import ReadBudget

_REPLY_BYTES_LEAST = 64 * 1024


class MemoryBudget:
    """What `bytes_max` has room for, given the shards in `lanes` and what waits in the journal."""

    __slots__ = ("_bytes_max", "_journal", "_lanes", "_reading", "_reply_bytes_high")

    def __init__(self, bytes_max: int, *, lanes: Iterable[Lane], journal: Journal, reading: ReadBudget) -> None:
        self._bytes_max = bytes_max
        self._lanes = lanes
        self._journal = journal
        self._reading = reading
        self._reply_bytes_high = float(_REPLY_BYTES_LEAST)

    def share(self) -> None:
        """Tell those who read answers how much they may hold; many times a second, and when much has become free."""
        # While the journal is full, answers read to their end would only pile up in front of it.
        self._reading.set_limit(self._left_bytes, may_lead=not self._journal.is_full)

    def window(self, window: int) -> int:
        """Give the window, or less where the budget would not hold that many answers."""
        return min(window, max(1, int(self._left_bytes / self._reply_bytes_high)))

    def note_reply(self, size_bytes: int) -> None:
        """Take in how large an answer was."""
        if size_bytes > self._reply_bytes_high:
            self._reply_bytes_high = float(size_bytes)

    def fade(self) -> None:
        """Forget large answers little by little; about twice a second."""
        self._reply_bytes_high = max(float(_REPLY_BYTES_LEAST), self._reply_bytes_high * 0.98)

    @property
    def shard_bytes(self) -> int:
        """What the shards take."""
        return sum(run.buffer_bytes for lane in self._lanes for run in lane.runs)

    @property
    def _left_bytes(self) -> int:
        return self._bytes_max - self.shard_bytes - self._journal.waiting_bytes
