"""The way of a single job into the Store: its line is judged while the caller waits, then written with those that came
at the same time, and durable before anybody is told its number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from zlib import crc32

from msgspec import Raw

from batchrunner import crash
from batchrunner.additions import NewAddition
from batchrunner.api.creating import InlineRequest, line_of
from batchrunner.api.envelope import Refusal
from batchrunner.api.files import BlobSink
from batchrunner.api.http import LONG_BODY_BYTES, ApiParts, Call
from batchrunner.api.job_groups import JobLine
from batchrunner.errors import QuotaExceeded
from batchrunner.holdings import KeyId, KeyLimits, Replay
from batchrunner.jobs import InferenceType, Job, NewJob
from batchrunner.lines import parse_line
from batchrunner.models import CLUB, BatchId, LineProblem, NewBatch, ShardCut, TenantId
from batchrunner.validation import line_rules

# Settings do not change, and to make their rules costs as much as to judge a short line by them.
_rules = lru_cache(maxsize=1)(line_rules)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Intake:
    """What the lines of one key go into: its tenant's jobs, within its limits."""

    parts: ApiParts
    tenant: TenantId
    key_id: KeyId | None
    limits: KeyLimits

    async def committed(self, lines: Sequence[JobLine]) -> Sequence[Job | Exception]:
        """Commit those lines of a group that the limits let in. Raises: QuotaExceeded when there are none."""
        return await asyncio.get_running_loop().run_in_executor(self.parts.executor, self._commit_fitting, lines)

    def _commit_fitting(self, lines: Sequence[JobLine]) -> Sequence[Job | Exception]:
        room = len(lines)
        if self.limits.queued_lines_max is not None and room > 1:
            # The Store would refuse the group as a whole.
            held = self.parts.store.scope(self.tenant).open_counts().lines
            room = min(room, max(self.limits.queued_lines_max - held, 1))
        jobs = self.commit(lines[:room])
        left = len(lines) - room
        too_many = QuotaExceeded(f"{left} lines more than are allowed would wait for their results")
        return [*jobs, *[too_many] * left]

    def commit(self, lines: Sequence[JobLine], replay: Replay | None = None) -> Sequence[Job]:
        """Write lines as one shard, and let their jobs join the tenant's intake in one transaction. Blocks."""
        parts = self.parts
        content = b"".join(each.content for each in lines)
        cut = ShardCut(0, len(content), 1, 0, len(lines), crc32(content))
        models = {each.new.model for each in lines}
        model = models.pop() if len(models) == 1 else None
        sink = BlobSink(parts, f"jobs/{parts.rng.token_hex(16)}", size_bytes_max=len(content))
        try:
            sink.feed(content)
            sink.finish()
            crash.point("job.stored")
            addition = NewAddition(first_line=1, source=sink.name, id_hashes=b"", shards=(cut,), model=model)
            asked = [each.new for each in lines]
            scope = parts.store.scope(self.tenant)
            jobs = scope.add_jobs(self._batch(), addition, asked, replay=replay, limits=self.limits)
            crash.point("job.joined")
        except BaseException:
            sink.abort()
            raise
        return jobs

    def _batch(self) -> NewBatch:
        """Make what jobs join where the tenant has nothing that they could: an open batch that nobody is shown."""
        parts = self.parts
        return NewBatch(
            id=BatchId(f"batch_{parts.rng.token_hex(16)}"),
            tenant=self.tenant,
            dialect=CLUB,
            endpoint=None,
            input_file_id=None,
            source="",
            completion_window=None,
            deadline_at=parts.clock.now() + timedelta(seconds=parts.settings.job_retention_s),
            is_open=True,
            is_intake=True,
            created_by=self.key_id,
        )


async def submit(call: Call, url: str, body: bytes, model: str | None, inference_type: InferenceType) -> Job:
    """Make a job of a body, with the replay and within the limits of the call. Durable when it returns.

    Raises:
        Refusal: the body cannot be a line.
        QuotaExceeded: the limits of the key are reached.
    """
    new = NewJob(url=url, inference_type=inference_type, model=model)
    if len(body) > LONG_BODY_BYTES:
        line = await call.blocking(_judged, call.parts, new, body)
    else:
        line = _judged(call.parts, new, body)
    key_id = call.key.id if call.key is not None else None
    intake = _Intake(parts=call.parts, tenant=call.tenant, key_id=key_id, limits=call.limits)
    if call.replay is not None:
        # What its key has made already is looked up in the transaction that would make it.
        (job,) = await call.blocking(intake.commit, [line], call.replay)
        return job
    lane = (call.tenant, key_id, call.limits)
    return await call.parts.job_groups.join(lane, line, call.parts.clock, intake.committed)


def _judged(parts: ApiParts, new: NewJob, body: bytes) -> JobLine:
    """Write a line that somebody else would have written, and look at it as validation would. Raises: Refusal."""
    request = InlineRequest(custom_id=f"job-{parts.rng.token_hex(12)}", url=new.url, body=Raw(body))
    content = line_of(request)
    found = parse_line(content[:-1], 1, _rules(parts.settings))
    if isinstance(found, LineProblem):
        raise Refusal(found.message, param=found.param, code=found.code)
    return JobLine(new=new, content=content)
