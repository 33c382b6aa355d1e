"""What carries notifications from the outbox to their receivers: takes what is due, posts it signed, records what came.

One coroutine does all bookkeeping; each delivery under way is a task of its own, so that whoever is slow delays nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass, field
from typing import TypeVar

from batchrunner import crash
from batchrunner.deliveries import Appointments, Dispatch, Posted, PostError, Recorded
from batchrunner.errors import BatchrunnerError
from batchrunner.metrics import Latencies
from batchrunner.models import SessionId
from batchrunner.outbox import Poster
from batchrunner.ports import Clock, Rng, Store
from batchrunner.webhooks import SECRET_BYTES, judge, secret_of, signed_headers

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

# Of one attempt.
TIMEOUT_S = 15.0
# Nobody else takes what is still under way: what is not begun in the rest of it is not begun.
LEASE_S = 30.0
_BEGIN_S = LEASE_S - TIMEOUT_S - 3.0
LOOK_S = 0.25
# While answers come in, those of so long are recorded at one go.
_GATHER_S = 0.01
IN_FLIGHT_MAX = 1024
_BODY_BYTES_MAX = 64 << 20


@dataclass(slots=True)
class Posts:
    """What a courier did: attempts by outcome, and how long those took that were answered."""

    outcomes: Counter[str] = field(default_factory=Counter)
    latencies: Latencies = field(default_factory=Latencies)

    def add(self, posted: Posted) -> None:
        """Count an attempt."""
        word = "delivered" if posted.is_taken else "refused" if posted.status is not None else str(posted.error)
        self.outcomes[word] += 1
        if posted.status is not None:
            self.latencies.add(posted.elapsed_s)


class Courier:
    """One session's deliveries, of the running loop. `run` returns after `stop`, when what was under way has ended or
    its grace is over.

    At most `each_max` go to one receiver at a time, `in_flight_max` in all. Store calls run in `threads`, else in the
    loop's own.
    """

    def __init__(
        self,
        *,
        session: SessionId,
        store: Store,
        poster: Poster,
        clock: Clock,
        rng: Rng,
        each_max: int,
        in_flight_max: int = IN_FLIGHT_MAX,
        threads: Executor | None = None,
    ) -> None:
        self.posts = Posts()
        self._session = session
        self._store = store
        self._poster = poster
        self._clock = clock
        self._rng = rng
        self._each_max = each_max
        self._in_flight_max = in_flight_max
        self._threads = threads
        self._busy: Counter[str] = Counter()
        self._body_bytes = 0
        self._under_way: set[asyncio.Task[None]] = set()
        self._ended: list[Recorded] = []
        self._changed = asyncio.Event()
        self._is_stopping = False
        self._grace_s = 0.0
        self._is_in_trouble = False

    def stop(self, *, grace_s: float) -> None:
        """Take nothing more and end within the grace."""
        self._grace_s = grace_s
        self._is_stopping = True
        self._changed.set()

    async def run(self) -> None:
        """Deliver until `stop`."""
        try:
            while not self._is_stopping:
                await self._turn()
                await self._rest()
            if self._under_way:
                await asyncio.wait(self._under_way, timeout=self._grace_s)
        finally:
            cut = list(self._under_way)
            for task in cut:
                task.cancel()
            await asyncio.gather(*cut, return_exceptions=True)
            await self._end()

    async def _turn(self) -> None:
        """Record what ended and take what is due, at one go: each commit waits for the disk."""
        taken_at_s = self._clock.monotonic_s()
        try:
            taken = await self._take()
        except BatchrunnerError as error:
            self._note_trouble(error)
            return
        self._is_in_trouble = False
        for dispatch in taken:
            self._busy[dispatch.receiver] += 1
            self._body_bytes += len(dispatch.body)
            task = asyncio.create_task(self._deliver(dispatch, begin_by_s=taken_at_s + _BEGIN_S))
            self._under_way.add(task)
            task.add_done_callback(self._under_way.discard)

    def _note_trouble(self, error: BatchrunnerError) -> None:
        if not self._is_in_trouble:
            logger.warning("webhooks wait: %s", error, extra={"action": "webhooks_wait", "code": error.code})
        self._is_in_trouble = True

    async def _rest(self) -> None:
        """Wait for something to do; after an answer for a moment more, since others may be about to come."""
        try:
            async with asyncio.timeout(LOOK_S):
                await self._changed.wait()
        except TimeoutError:
            return
        self._changed.clear()
        await self._clock.sleep(_GATHER_S)

    async def _end(self) -> None:
        """Record what came in last, and let go of what did not end."""
        try:
            await self._record()
            await self._call(lambda: self._store.give_deliveries_back(self._session))
        except BatchrunnerError as error:
            # They are due again when their leases end.
            self._note_trouble(error)

    # -- one delivery ------------------------------------------------------------------------------------------------

    async def _take(self) -> list[Dispatch]:
        bytes_left = _BODY_BYTES_MAX - self._body_bytes
        wanted = Appointments(
            session=self._session,
            lease_s=LEASE_S,
            each_max=self._each_max,
            room=self._in_flight_max - self._busy.total() if bytes_left > 0 else 0,
            busy=dict(+self._busy),
            bytes_max=bytes_left,
        )
        recorded = list(self._ended)
        taken = await self._call(lambda: self._store.claim_deliveries(wanted, recorded))
        self._note_recorded(len(recorded))
        if taken:
            crash.point("webhook.claimed")
        return taken

    async def _deliver(self, dispatch: Dispatch, *, begin_by_s: float) -> None:
        """Post once, and leave what came of it to be recorded. Without the Store, or when it is too late to begin, that
        is left to whoever takes it next.
        """
        posted = Posted(error=PostError.UNKNOWN)
        try:
            secrets = dispatch.secrets
            if secrets is None:
                fresh = secret_of(self._rng.token_hex(SECRET_BYTES))
                secrets = await self._call(lambda: self._store.scope(dispatch.tenant).signing_secrets(fresh))
            if self._clock.monotonic_s() >= begin_by_s:
                logger.warning("%s was held up", dispatch.id, extra={"action": "webhook_late"})
                return
            now = self._clock.now()
            headers = signed_headers(
                dispatch.id, dispatch.type, dispatch.body, secrets.valid(now), now, endpoint_id=dispatch.endpoint_id
            )
            posted = await self._poster.post(dispatch.url, dispatch.body, headers)
            crash.point("webhook.posted")
        except BatchrunnerError as error:
            self._note_trouble(error)
            return
        except Exception:
            # A delivery that we cannot make is not retried forever: its attempts run out like any other's.
            logger.exception("delivery failed", extra={"action": "delivery_failed", "delivery_id": dispatch.id})
        finally:
            self._busy[dispatch.receiver] -= 1
            self._body_bytes -= len(dispatch.body)
        self._tell(dispatch, posted)
        self._ended.append(judge(dispatch, posted, self._clock.now(), chance=self._rng.uniform()))
        self._changed.set()

    def _tell(self, dispatch: Dispatch, posted: Posted) -> None:
        self.posts.add(posted)
        logger.info(
            "webhook %s attempt %d: %s",
            dispatch.id,
            dispatch.attempt_count,
            posted.status or posted.error,
            extra={"action": "webhook_posted", "delivery_id": dispatch.id, "status": posted.status},
        )

    async def _record(self) -> None:
        if not self._ended:
            return
        recorded = list(self._ended)
        await self._call(lambda: self._store.record_attempts(recorded))
        self._note_recorded(len(recorded))

    def _note_recorded(self, count: int) -> None:
        if count:
            crash.point("webhook.recorded")
            del self._ended[:count]

    async def _call(self, function: Callable[[], _T]) -> _T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function)
