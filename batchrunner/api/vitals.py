"""What an API process knows of its own server: how the workers do, what it has answered, whether it is about to end."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from batchrunner.courier import Posts
from batchrunner.metrics import Latencies
from batchrunner.orders import Pulse


@dataclass(slots=True, kw_only=True)
class Vitals:
    """Of one event loop. `is_local` means that the server listens on loopback only.

    `closing` is set when the server is asked to end: whoever streams without an end of its own has to stop then. `busy`
    are the connections with a request under way. `ticked_at_s` is when a worker of this server was last heard of.
    """

    is_local: bool = True
    pulse: Pulse = field(default_factory=Pulse)
    pulsed_at_s: float = -math.inf
    ticked_at_s: float = -math.inf
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    answered: Counter[int] = field(default_factory=Counter)
    latencies: Latencies = field(default_factory=Latencies)
    posts: Posts = field(default_factory=Posts)

    busy: set[object] = field(default_factory=set)
    under_way: int = 0
    _idle: asyncio.Event = field(default_factory=asyncio.Event)

    @contextmanager
    def request(self, connection: object) -> Iterator[None]:
        """Count a request as under way, and its connection as busy, while the block runs."""
        self.under_way += 1
        self.busy.add(connection)
        self._idle.clear()
        try:
            yield
        finally:
            self.busy.discard(connection)
            self.under_way -= 1
            if self.under_way == 0:
                self._idle.set()

    async def idle(self) -> None:
        """Wait until no request is under way."""
        if self.under_way:
            await self._idle.wait()

    def note_answer(self, status: int, elapsed_s: float) -> None:
        """Count a request."""
        self.answered[status] += 1
        self.latencies.add(elapsed_s)

    def feel(self, pulse: Pulse, now_s: float) -> None:
        """Take in what the parent said."""
        self.pulse = pulse
        self.pulsed_at_s = now_s
        if pulse.ticking_count:
            self.ticked_at_s = now_s
