"""What a session can take besides its kinds of task: the limits that it puts to the Store when it asks for work."""

from __future__ import annotations

from dataclasses import dataclass

from batchrunner.models import BatchId, PauseReason

# Pauses found by a breaker, which also finds out when they are over; all others need an operator.
BREAKER_REASONS = (PauseReason.AUTHENTICATION, PauseReason.MODEL_UNKNOWN)


@dataclass(frozen=True, slots=True, kw_only=True)
class Appetite:
    """Of the batches in `sated` the session has lines enough. Without `has_room` it holds too many batches to begin
    with another, unless that one's tenant has none among them. With `probe_every_s` a batch that a breaker paused gives
    out one shard in that time, to find out whether it may go on.
    """

    sated: frozenset[BatchId] = frozenset()
    has_room: bool = True
    probe_every_s: float | None = None


HUNGRY = Appetite()
