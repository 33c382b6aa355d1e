"""The upstream of a server that was told none: nothing is ever sent, so every line waits."""

from __future__ import annotations

from batchrunner.models import Attempt, AttemptError
from batchrunner.ports import AssetOwner, Clock


class NowhereUpstream:
    """Upstream that cannot be reached. See the Protocol."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def send(
        self,
        url: str,  # noqa: ARG002
        body: bytes,  # noqa: ARG002
        *,
        idempotency_key: str | None,  # noqa: ARG002
        is_at_most_once: bool = False,  # noqa: ARG002
        owner: AssetOwner | None = None,  # noqa: ARG002
    ) -> Attempt:
        """See Upstream."""
        return self._unreachable()

    async def knock(self) -> Attempt:
        """See Upstream."""
        return self._unreachable()

    def _unreachable(self) -> Attempt:
        return Attempt(
            error=AttemptError.NOT_CONNECTED,
            message="no upstream is named: start the server with -u URL",
            started_at_s=self._clock.monotonic_s(),
        )

    def sweep_deadlines(self) -> None:
        """See Upstream."""

    async def close(self) -> None:
        """See Upstream."""
