"""What the parent of a server and its API process tell each other: the parent who it is, then how the workers do, and
at the end to stop; the API what the requests that it passes on take of the upstreams.
"""

from __future__ import annotations

import msgspec

from batchrunner.holdings import LiveUse, UpstreamLive
from batchrunner.metrics import Tally, tally_from_wire
from batchrunner.settings import Settings

# What the API process writes: once it can be told something, and once it answers requests.
LISTENING = b"listening\n"
READY = b"ready\n"


class Greeting(msgspec.Struct, frozen=True, kw_only=True):
    """The first line. `listening_fds` are bound sockets, inherited; `is_local` means that all of them are loopback.
    `api_keys` are those of the upstreams by their names.
    """

    folder: str
    settings: Settings
    listening_fds: tuple[int, ...]
    is_local: bool
    api_keys: dict[str, str] = {}


class Using(msgspec.Struct, frozen=True, kw_only=True):
    """What the API says when it has changed: the use of each upstream, in their order."""

    uses: tuple[LiveUse, ...]


class Pulse(msgspec.Struct, frozen=True, kw_only=True):
    """Every later line: how the workers of this host stand. `ticking_count` of `worker_count` reported a moment ago.

    `stop_grace_s` asks to answer what is under way and to end within that time.
    """

    worker_count: int = 0
    ticking_count: int = 0
    has_upstream: bool = True
    in_flight: int = 0
    waiting: int = 0
    window: int = 0
    upstreams: tuple[UpstreamLive, ...] = ()
    tally: dict[str, object] = {}
    trouble: str | None = None
    stop_grace_s: float | None = None

    def counts(self) -> Tally:
        """Give the counts of all workers since the parent began."""
        return tally_from_wire(self.tally) if self.tally else Tally()


_ENCODER = msgspec.json.Encoder()


def encode_order(order: Greeting | Pulse | Using) -> bytes:
    """Give an order as one line."""
    return _ENCODER.encode(order) + b"\n"
