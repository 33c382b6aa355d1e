"""The thread that keeps a session's leases alive, for as long as its work shows that it lives."""

from __future__ import annotations

import logging
import threading

from batchrunner.errors import DiskFull, StoreUnavailable
from batchrunner.models import SessionId
from batchrunner.ports import Clock, Renewer, Store
from batchrunner.settings import Settings

logger = logging.getLogger(__name__)

_LOOP_SILENCE_S = 5.0
_STEP_SILENCE_S = 60.0


class Renewals:
    """The thread that keeps the session's leases alive, only while the work proves that it lives."""

    def __init__(self, store: Store, session: SessionId, settings: Settings, clock: Clock) -> None:
        self.renewed_at_s = clock.monotonic_s()
        self._store = store
        self._session = session
        self._settings = settings
        self._clock = clock
        self._loop_at_s = clock.monotonic_s()
        self._steps: dict[int, float] = {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="renewals", daemon=True)

    def start(self) -> None:
        """Begin renewing."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._ended.set()
        self._thread.join()

    def loop_ticked(self) -> None:
        """Proof of life of the event loop."""
        self._loop_at_s = self._clock.monotonic_s()

    def step_moved(self, task_id: int) -> None:
        """Proof of life of a validating or sealing step."""
        self._steps[task_id] = self._clock.monotonic_s()

    def step_ended(self, task_id: int) -> None:
        """The step needs no proof any more."""
        self._steps.pop(task_id, None)

    def _is_alive(self) -> bool:
        now_s = self._clock.monotonic_s()
        if now_s - self._loop_at_s > _LOOP_SILENCE_S:
            return False
        return all(now_s - moved_s <= _STEP_SILENCE_S for moved_s in list(self._steps.values()))

    def _run(self) -> None:
        renewer: Renewer | None = None
        while not self._ended.wait(self._settings.renew_s):
            if not self._is_alive():
                logger.error("leases not renewed: the work shows no life", extra={"action": "renewal_withheld"})
                continue
            began_s = self._clock.monotonic_s()
            try:
                renewer = renewer or self._store.renewer()
                renewer.renew(self._session, self._settings.lease_s)
                self.renewed_at_s = began_s
            except (StoreUnavailable, DiskFull) as error:
                logger.warning("leases not renewed: %s", error, extra={"action": "renewal_failed"})
        if renewer is not None:
            renewer.close()
