"""What the pool of an upstream is made of: the upstream with all that may forbid to send to it, and what the pools of
one process share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from batchrunner.journal import Journal
from batchrunner.lanes import Lanes
from batchrunner.limits import Gate
from batchrunner.memory import MemoryBudget
from batchrunner.metrics import Tally
from batchrunner.ports import Clock, Rng, Upstream
from batchrunner.shards import nobody
from batchrunner.stash import Board
from batchrunner.verdict import RetryPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlet:
    """An upstream by its name, its gate, the models that it knows under other names, and its address for people."""

    name: str
    upstream: Upstream
    gate: Gate
    aliases: Mapping[str, str] = field(default_factory=dict)
    address: str = "the upstream"


@dataclass(slots=True, kw_only=True)
class Shared:
    """What the pools of one process have in common. `board` is None where one upstream takes every line; `fit` gives as
    much of a window as the memory has room for.

    `on_change` is called when a shard was finished, exhausted or needs an intent registered, and when a breaker has
    news.
    """

    lanes: Lanes
    journal: Journal
    memory: MemoryBudget
    clock: Clock
    rng: Rng
    policy: RetryPolicy
    tally: Tally
    board: Board | None
    fit: Callable[[int], int]
    stop_sends_at_s: float = 0.0
    is_closed: bool = False
    on_change: Callable[[], None] = nobody
