"""inference.club's queue at a glance: how many jobs and batches stand how, and whether anybody works on them.

Source: inference.club's API pages, Async jobs, Worker availability.
"""

from __future__ import annotations

from datetime import timedelta

import msgspec

from batchrunner.api.club_words import ClubError, ClubStatus
from batchrunner.api.http import Answer, Call, Route, json_answer
from batchrunner.jobs import JobBatchCounts
from batchrunner.lifecycle import ACTIVE_JOBS, JobStatus
from batchrunner.models import CLUB
from batchrunner.shared_object import rfc3339


class ClubQueue(msgspec.Struct, frozen=True, kw_only=True):
    """How the tenant's work stands. `last_dispatch` is when a worker of this server was last heard of, and
    `worker_stalled` tells that there are active jobs and that it was too long ago, or never.
    """

    jobs: dict[JobStatus, int]
    active: int
    runs: dict[ClubStatus, int]
    async_enabled: bool
    last_dispatch: str | None
    worker_stalled: bool


async def summarize_queue(call: Call) -> Answer:
    """Tell how the queue stands, also where no jobs are taken."""
    jobs = await call.blocking(call.scope.job_counts)
    batches = await call.blocking(call.scope.job_batch_counts)
    active = sum(jobs[each] for each in ACTIVE_JOBS)
    vitals, clock = call.parts.vitals, call.parts.clock
    silent_s = vitals.silent_s(clock.monotonic_s())
    return json_answer(
        ClubQueue(
            jobs=dict(jobs),
            active=active,
            runs=_runs(batches),
            async_enabled=call.parts.settings.async_enabled,
            last_dispatch=None if silent_s is None else rfc3339(clock.now() - timedelta(seconds=silent_s)),
            worker_stalled=active > 0 and vitals.is_stalled(clock.monotonic_s()),
        )
    )


def _runs(batches: JobBatchCounts) -> dict[ClubStatus, int]:
    return {"PENDING": batches.waiting, "PROCESSING": batches.begun, "DONE": batches.over}


ROUTE = Route(
    method="GET",
    path="/api/inference/queue/summary",
    handler=summarize_queue,
    summary="Tell how many jobs and batches stand how, and whether anybody works on them",
    answer=ClubQueue,
    dialect=CLUB,
    error=ClubError,
)
