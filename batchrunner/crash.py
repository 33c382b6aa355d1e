"""Named places where a test has the process die as if the power failed; nothing happens at them unless one is armed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from batchrunner.errors import UsageError

# Every durable step has one before it, behind it or both, in the order in which a run comes to them.
POINTS = (
    "run_record.before_save",
    "run_record.saved",
    "batch.created",
    "add.stored",
    "add.joined",
    "job.stored",
    "job.joined",
    "claim.taken",
    "validate.before_accept",
    "validate.accepted",
    "salvage.copied",
    "shard.loaded",
    "journal.synced",
    "register.before_commit",
    "register.committed",
    "split.committed",
    "give_back.committed",
    "settle.before_commit",
    "settle.committed",
    "seal.fenced",
    "seal.salvage_copied",
    "seal.salvaged",
    "seal.repaired",
    "seal.files_committed",
    "seal.published",
    "webhook.claimed",
    "webhook.posted",
    "webhook.recorded",
    "clear.journal_deleted",
    "clear.blobs_deleted",
    "export.before",
    "export.errors_placed",
    "export.manifest_written",
    "export.output_placed",
)


@dataclass(slots=True)
class _Trap:
    """The one armed point and how often it is still passed unharmed."""

    name: str
    passes_left: int
    die: Callable[[], None]

    def reach(self, name: str) -> None:
        """Die when it is the turn of this point."""
        if name != self.name:
            return
        if self.passes_left == 0:
            self.die()
        self.passes_left -= 1


_traps: list[_Trap] = []


def arm(wanted: str, die: Callable[[], None]) -> None:
    """Have `die` called at a point: `NAME` the first time it is reached, `NAME:3` the third; empty disarms.

    Raises:
        UsageError: there is no such point, or the number is none.
    """
    _traps.clear()
    if not wanted:
        return
    name, _, ordinal = wanted.partition(":")
    if name not in POINTS or not (ordinal or "1").isdecimal() or ordinal == "0":
        raise UsageError(f"crash point {wanted!r} is not one of {', '.join(POINTS)}, with :N for the Nth time")
    _traps.append(_Trap(name, int(ordinal or "1") - 1, die))


def point(name: str) -> None:
    """Name a place between two durable effects."""
    for trap in _traps:
        trap.reach(name)
