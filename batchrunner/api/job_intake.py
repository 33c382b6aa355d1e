"""The way of a single job into the Store: its line is judged while the caller waits, then written with those that came
at the same time, and durable before anybody is told its number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TypeVar

from msgspec import Raw
from zlib_ng.zlib_ng import crc32

from batchrunner import crash
from batchrunner.additions import NewAddition
from batchrunner.api.creating import InlineRequest, line_of
from batchrunner.api.envelope import Refusal
from batchrunner.api.files import kept_blob
from batchrunner.api.http import LONG_BODY_BYTES, ApiParts, Call
from batchrunner.api.job_groups import JobLine
from batchrunner.errors import QuotaExceeded
from batchrunner.holdings import KeyId, KeyLimits, Replay
from batchrunner.jobs import INTAKE_SHARE, InferenceType, Job, NewJob
from batchrunner.lines import parse_line
from batchrunner.models import CLUB, BatchId, LineProblem, NewBatch, ShardCut, TenantId
from batchrunner.ports import TenantScope
from batchrunner.validation import line_rules

T = TypeVar("T")


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
            held = self._scope.open_counts().lines
            room = min(room, max(self.limits.queued_lines_max - held, 1))
        jobs = self._keyed(lines[:room]) if lines[0].replay is not None else self._unkeyed(lines[:room])
        left = len(lines) - room
        too_many = QuotaExceeded(f"{left} lines more than are allowed would wait for their results")
        return [*jobs, *[too_many] * left]

    def _keyed(self, lines: Sequence[JobLine]) -> list[Job]:
        """Have each key make a job, unless it has made one before; those that come together under one key get one."""
        first: dict[Replay | None, JobLine] = {}
        for each in lines:
            first.setdefault(each.replay, each)
        made: dict[Replay | None, Job] = {}
        while rest := [line for replay, line in first.items() if replay not in made]:
            found = self._written(rest, partial(self._join_keyed, rest))
            made |= {line.replay: job for line, job in zip(rest, found, strict=True) if job is not None}
        return [made[each.replay] for each in lines]

    def _join_keyed(self, lines: Sequence[JobLine], addition: NewAddition) -> list[Job | None]:
        replays = [each.replay for each in lines if each.replay is not None]
        asked = [each.new for each in lines]
        return self._scope.add_keyed_jobs(self._batch(), addition, asked, replays, limits=self.limits)

    def _unkeyed(self, lines: Sequence[JobLine]) -> list[Job]:
        return self._written(lines, partial(self._join_unkeyed, lines))

    def _join_unkeyed(self, lines: Sequence[JobLine], addition: NewAddition) -> list[Job]:
        return self._scope.add_jobs(self._batch(), addition, [each.new for each in lines], limits=self.limits)

    @property
    def _scope(self) -> TenantScope:
        return self.parts.store.scope(self.tenant)

    def _written(self, lines: Sequence[JobLine], join: Callable[[NewAddition], T]) -> T:
        """Write lines as one shard, and have them join the tenant's intake by `join`, in one transaction."""
        parts = self.parts
        content = b"".join(each.content for each in lines)
        cut = ShardCut(0, len(content), 1, 0, len(lines), crc32(content))
        models = {each.new.model for each in lines}
        model = models.pop() if len(models) == 1 else None
        name = f"jobs/{parts.rng.token_hex(16)}"
        with kept_blob(parts, name, content):
            crash.point("job.stored")
            joined = join(NewAddition(first_line=1, source=name, id_hashes=b"", shards=(cut,), model=model))
            crash.point("job.joined")
        return joined

    def _batch(self) -> NewBatch:
        """Make what jobs join where the tenant has nothing that they could: an open batch that nobody is shown."""
        parts = self.parts
        life_s = parts.settings.job_retention_s / (1 - INTAKE_SHARE)
        return NewBatch(
            id=BatchId(f"batch_{parts.rng.token_hex(16)}"),
            tenant=self.tenant,
            dialect=CLUB,
            endpoint=None,
            input_file_id=None,
            source="",
            completion_window=None,
            deadline_at=parts.clock.now() + timedelta(seconds=life_s),
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
        line = await call.blocking(_judged, call.parts, new, body, call.replay)
    else:
        line = _judged(call.parts, new, body, call.replay)
    key_id = call.key.id if call.key is not None else None
    intake = _Intake(parts=call.parts, tenant=call.tenant, key_id=key_id, limits=call.limits)
    lane = (call.tenant, key_id, call.limits, call.replay is not None)
    return await call.parts.job_groups.join(lane, line, call.parts.clock, intake.committed)


def _judged(parts: ApiParts, new: NewJob, body: bytes, replay: Replay | None) -> JobLine:
    """Write a line that somebody else would have written, and look at it as validation would. Raises: Refusal."""
    request = InlineRequest(custom_id=f"job-{parts.rng.token_hex(12)}", url=new.url, body=Raw(body))
    content = line_of(request)
    found = parse_line(content[:-1], 1, line_rules(parts.settings))
    if isinstance(found, LineProblem):
        raise Refusal(found.message, param=found.param, code=found.code)
    return JobLine(new=new, content=content, replay=replay)
