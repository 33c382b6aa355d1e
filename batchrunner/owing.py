"""Failed tasks whose failure is not in the store yet. They must get there, or their session renews their leases
forever.
"""

from __future__ import annotations

import logging
from functools import partial

from batchrunner.claiming import Caller
from batchrunner.errors import (
    BatchrunnerError,
    DiskFull,
    Fenced,
    InputChanged,
    JournalCorrupt,
    ReconciliationError,
)
from batchrunner.models import Claim
from batchrunner.ports import Store

logger = logging.getLogger(__name__)

# Trying again would find the same bytes.
_HOPELESS = (InputChanged, JournalCorrupt, ReconciliationError)


class Owing:
    """The failures that one session owes the store."""

    def __init__(self, store: Store, call: Caller) -> None:
        self._store = store
        self._call = call
        self._owed: list[tuple[Claim, Exception]] = []

    def __len__(self) -> int:
        """How many there are."""
        return len(self._owed)

    def note(self, claim: Claim, error: Exception) -> None:
        """Remember a task that failed."""
        self._owed.append((claim, error))

    async def pay(self) -> None:
        """Put failed tasks back with backoff. A full disk is nobody's failure: such a task never parks; one that no
        repeat can help does so at once.
        """
        while self._owed:
            claim, error = self._owed[0]
            code = error.code if isinstance(error, BatchrunnerError) else type(error).__name__
            fail = partial(
                self._store.fail_task,
                claim.ref,
                f"{code}: {error}",
                progressed=isinstance(error, DiskFull),
                is_hopeless=isinstance(error, _HOPELESS),
            )
            try:
                await self._call(fail)
            except Fenced:
                logger.info("failed task was taken over", extra={"action": "task_fenced", "task_id": claim.ref.task_id})
            del self._owed[0]

    def forget(self) -> None:
        """Leave all to their leases."""
        self._owed.clear()
