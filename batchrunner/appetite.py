"""What a session can take besides its kinds of task: the limits that it puts to the Store when it asks for work."""

from __future__ import annotations

from dataclasses import dataclass

from batchrunner.models import BatchId, PauseReason, TaskKind
from batchrunner.settings import MIB

# Pauses found by a breaker, which also finds out when they are over; all others need an operator.
BREAKER_REASONS = (PauseReason.AUTHENTICATION, PauseReason.MODEL_UNKNOWN)
# A batch no larger than a shard is light: it is validated or sealed in a moment.
LIGHT_LINES_MAX = 1000
LIGHT_BYTES_MAX = 8 * MIB


@dataclass(frozen=True, slots=True, kw_only=True)
class Appetite:
    """Of the batches in `sated` the session has lines enough. Without `has_room` it holds too many batches to begin
    with another, unless that one's tenant has none among them. With `probe_every_s` a batch that a breaker paused gives
    out one shard in that time, to find out whether it may go on. Of the kinds in `light` only tasks of light batches
    are wanted. A session that `takes_turns` leaves a batch that has just begun to those that hold fewer.
    """

    sated: frozenset[BatchId] = frozenset()
    has_room: bool = True
    probe_every_s: float | None = None
    light: frozenset[TaskKind] = frozenset()
    takes_turns: bool = False


HUNGRY = Appetite()
