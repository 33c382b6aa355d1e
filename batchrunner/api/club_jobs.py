"""inference.club's jobs: any JSON request to an inference endpoint that says `async` becomes one, and its caller comes
for the result.

Source: inference.club's API pages, Async jobs.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import msgspec
from msgspec import Raw
from msgspec.structs import replace
from zlib_ng.zlib_ng import crc32

from batchrunner.api import job_intake
from batchrunner.api.batches import batch_of
from batchrunner.api.club_assets import asset_path
from batchrunner.api.club_words import (
    CONFLICT,
    EXPIRED,
    ClubError,
    ClubJob,
    club_job,
    failure_of,
    inference_type_of,
    require_async,
)
from batchrunner.api.envelope import Refusal, no_such_route
from batchrunner.api.http import Answer, Call, Route, json_answer
from batchrunner.api.idempotency import HEADER, check_key
from batchrunner.api.job_lines import jobs_of
from batchrunner.api.live import (
    FORM_URLS,
    TRANSCRIPTIONS,
    Inference,
    asked_of,
    extra_urls,
    inference_row,
    is_form,
    synchronous_only,
)
from batchrunner.choosing import lines_of
from batchrunner.errors import BatchrunnerError, NotFound, TransitionRefused
from batchrunner.frames import read_payload
from batchrunner.holdings import KeyScope, Replay
from batchrunner.job_results import JobResult, LinkedMedium, begins_with_medium, media_of, record_of, result_of
from batchrunner.jobs import InferenceType, Job
from batchrunner.lifecycle import ACTIVE_JOBS, RETRYABLE_JOBS, JobStatus
from batchrunner.live import Asked
from batchrunner.models import CLUB, ShardCut
from batchrunner.ports import Blobs, TenantScope
from batchrunner.settings import ENDPOINTS, KIB

LIMIT, LIMIT_MAX = 50, 200
# The word `async` in a body, whichever way a key may be written.
_NAME, _ESCAPE = b'"async"', b"\\u"
# The one scope of keys for all endpoints. Source: a repeat gives the job that is there, whatever it asks for.
_KEY_ROUTE = "POST /club/v1/jobs"
_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_READ_BYTES_MAX = 256 * KIB
# Of what is longer so much tells what it holds.
_HEAD_BYTES = 16 * KIB
_WITH_RESULT = frozenset({JobStatus.PROCESSED, JobStatus.FAILED})


class ListJobs(msgspec.Struct, frozen=True):
    """The query of a listing; `active` are those that are queued or under way. 1 to 200 are given."""

    status: JobStatus | None = None
    active: bool = False
    limit: int = LIMIT


class ClubJobList(msgspec.Struct, frozen=True):
    """Jobs, newest first."""

    data: list[ClubJob]


class ClubCanceled(msgspec.Struct, frozen=True):
    """How a job stands after a cancel; `canceled` tells whether this call was its end."""

    id: str
    status: JobStatus
    canceled: bool


class _Response(msgspec.Struct):
    body: Raw


class _Line(msgspec.Struct):
    response: _Response


_read_line = msgspec.json.Decoder(_Line).decode


class Submission:
    """Handles the calls of one endpoint: what asks for a job becomes one, and all else is answered at once."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._answer_at_once = Inference(url)
        self.__name__ = self._answer_at_once.__name__

    async def __call__(self, call: Call) -> Answer:
        """Make a job and answer with it, or pass the request on. Raises: Refusal."""
        if is_form(call) or not (asked := await asked_of(call)).is_async:
            return await self._answer_at_once(call)
        require_async(call.parts.settings)
        call.replay = _replay(call)
        try:
            job = await self._submitted(call, asked)
        except (Refusal, BatchrunnerError):
            # Whatever stands in the way of a new job, a repeat asks for the one that is there.
            made = await call.blocking(call.scope.job_made, call.replay) if call.replay is not None else None
            if made is None:
                raise
            job = made
        return json_answer(club_job(job), status=202)

    async def _submitted(self, call: Call, asked: Asked) -> Job:
        if self._url in FORM_URLS:
            raise synchronous_only()
        if self._url not in call.parts.settings.endpoints:
            raise no_such_route(call.request.method, call.path)
        return await job_intake.submit(call, self._url, asked.body, asked.model, inference_type_of(self._url))


async def asks_for_job(call: Call) -> bool:
    """Tell whether a request wants a job; a body that does not name it is not taken apart."""
    if is_form(call):
        return False
    raw = await call.body(call.parts.settings.line_bytes_max)
    if _NAME not in raw and _ESCAPE not in raw:
        return False
    try:
        return (await asked_of(call)).is_async
    except Refusal:
        # What is wrong with it is told by whoever answers it.
        return False


def _replay(call: Call) -> Replay | None:
    """Give what the job is noted under, so that a repeat finds it. Raises: Refusal."""
    key = call.request.headers.get(HEADER)
    if key is None:
        return None
    check_key(key)
    return Replay(route=_KEY_ROUTE, key=key, fingerprint=None)


async def list_jobs(call: Call) -> Answer:
    """Give the tenant's jobs, newest first."""
    require_async(call.parts.settings)
    return json_answer(await call.blocking(_listed, call, call.parameters(ListJobs)))


def _listed(call: Call, wanted: ListJobs) -> ClubJobList:
    statuses = frozenset(JobStatus) if wanted.status is None else frozenset({wanted.status})
    if wanted.active:
        statuses &= ACTIVE_JOBS
    limit = min(max(wanted.limit, 1), LIMIT_MAX)
    jobs = call.scope.jobs(limit=limit, statuses=statuses) if statuses else []
    return ClubJobList([_listed_job(call, each) for each in jobs])


def _listed_job(call: Call, job: Job) -> ClubJob:
    """Show a job with the address of what it made; what it said is given one by one only."""
    shown = club_job(job)
    if job.inference_type is InferenceType.LLM or job.status is not JobStatus.PROCESSED:
        return shown
    with contextlib.suppress(NotFound):
        record = record_of(call.scope, call.parts.blobs, job)
        if record is not None and record.payload_length > _READ_BYTES_MAX:
            # An answer of that length holds the medium itself, or something else that nobody can use.
            end = record.payload_offset + min(record.payload_length, _HEAD_BYTES)
            is_medium = begins_with_medium(call.parts.blobs.read(record.segment.blob, record.payload_offset, end))
            return replace(shown, result_url=_own_url(call, job, 0)) if is_medium else shown
        if record is not None:
            result = JobResult(kind=record.kind, line=read_payload(call.parts.blobs, record))
            return replace(shown, **_addresses(call, job, result))
    return shown


async def retrieve_job(call: Call) -> Answer:
    """Show a job with its result, or why it failed."""
    require_async(call.parts.settings)
    return json_answer(await call.blocking(lambda: _with_result(call, _job_of(call))))


def _with_result(call: Call, job: Job) -> ClubJob:
    shown = club_job(job)
    if job.status not in _WITH_RESULT:
        return shown
    try:
        found = result_of(call.scope, call.parts.blobs, job)
    except NotFound:
        # It is not kept any more.
        found = None
    if job.status is JobStatus.FAILED:
        return replace(shown, error=failure_of(found.line) if found is not None else EXPIRED)
    if found is None:
        return shown
    addresses = {} if job.inference_type is InferenceType.LLM else _addresses(call, job, found)
    return replace(shown, **addresses or {"result": _read_line(found.line).response.body})


def _addresses(call: Call, job: Job, result: JobResult) -> dict[str, Any]:
    """Give where the media of a job are, if it made any."""
    urls = [
        # The upstream's own is passed on.
        each.url if isinstance(each, LinkedMedium) else _own_url(call, job, place)
        for place, each in enumerate(media_of(job, result))
    ]
    found: dict[str, Any] = {"result_url": urls[0]} if urls else {}
    return found | ({"result_urls": urls} if len(urls) > 1 else {})


def _own_url(call: Call, job: Job, place: int) -> str:
    return f"{call.request.scheme}://{call.request.host}{asset_path(job.number, place)}"


def _job_of(call: Call) -> Job:
    """Look up the job that the path names. Blocks. Raises: Refusal."""
    job_id = call.path_params["job_id"]
    try:
        if _NUMBER.fullmatch(job_id) is None:
            raise NotFound(job_id)
        return call.scope.job(int(job_id))
    except NotFound:
        raise Refusal(f"No job found with id '{job_id}'.", status=404) from None


async def cancel_job(call: Call) -> Answer:
    """Cancel a job; on one that has ended it has no effect."""
    require_async(call.parts.settings)
    return json_answer(await call.blocking(_canceled, call))


def _canceled(call: Call) -> ClubCanceled:
    job = _job_of(call)
    was_active = job.status in ACTIVE_JOBS
    job = call.scope.cancel_job(job.number) if was_active else job
    return ClubCanceled(str(job.number), job.status, was_active and job.status is JobStatus.CANCELED)


async def retry_job(call: Call) -> Answer:
    """Queue a job again that failed or was canceled, with the same body and the same id."""
    require_async(call.parts.settings)
    return json_answer(club_job(await call.blocking(_retried, call)), status=202)


def _retried(call: Call) -> Job:
    job = _job_of(call)
    if job.status not in RETRYABLE_JOBS:
        raise _not_retryable(job)
    with contextlib.suppress(NotFound, TransitionRefused):
        cut, source = _Lines(call.scope, call.parts.blobs).find(job)
        return call.scope.retry_job(job.number, cut, source)
    job = _job_of(call)
    if job.status not in RETRYABLE_JOBS:
        # Somebody else was first.
        raise _not_retryable(job)
    message = f"Job '{job.number}' is too old to be retried: what it asked for is not kept any more."
    raise Refusal(message, status=409, code=CONFLICT)


def _not_retryable(job: Job) -> Refusal:
    message = f"Job '{job.number}' cannot be retried: its status is {job.status}."
    return Refusal(message, status=409, code=CONFLICT)


async def retry_jobs(call: Call) -> None:
    """Queue all jobs of a batch again that failed or were canceled, each as `retry_job` does.

    Raises:
        Refusal: there are none, or they are too old.
    """
    require_async(call.parts.settings)
    await call.blocking(_retry_jobs, call)


def _retry_jobs(call: Call) -> None:
    batch = batch_of(call)
    jobs = [each for each in jobs_of(call.scope, batch) if each.status in RETRYABLE_JOBS] if batch.has_jobs else []
    lines, count = _Lines(call.scope, call.parts.blobs), 0
    for job in jobs:
        with contextlib.suppress(NotFound, TransitionRefused):
            cut, source = lines.find(job)
            call.scope.retry_job(job.number, cut, source)
            count += 1
    if not count:
        why = "what its jobs asked for is not kept any more" if jobs else "none of its jobs failed or was canceled"
        raise Refusal(f"Batch '{batch.id}' cannot be retried: {why}.", status=409, code=CONFLICT)


class _Lines:
    """Finds the lines of jobs, those of one shard in one read."""

    def __init__(self, scope: TenantScope, blobs: Blobs) -> None:
        self._scope = scope
        self._blobs = blobs
        self._place: tuple[str, int, int] | None = None
        self._lines: list[bytes] = []

    def find(self, job: Job) -> tuple[ShardCut, str]:
        """Give a job's line, and the blob that holds it. Raises: NotFound when it is gone."""
        shards = self._scope.shards_from(job.batch_id, job.line_number, limit=1)
        if not shards or (source := shards[0].source) is None:
            raise NotFound(f"there is no line {job.line_number}")
        shard = shards[0]
        place = (source, shard.byte_start, shard.byte_end)
        if place != self._place:
            # None is blank, and none was refused.
            self._lines = list(lines_of([self._blobs.read(*place)]))
            self._place = place
        before = job.line_number - shard.first_line
        start = shard.byte_start + sum(map(len, self._lines[:before]))
        line = self._lines[before]
        cut = ShardCut(
            byte_start=start,
            byte_end=start + len(line),
            first_line=1,
            first_index=0,
            line_count=1,
            checksum=crc32(line),
        )
        return cut, source


def inference_rows(urls: Iterable[str]) -> Iterator[Route]:
    """Give the routes of endpoints, which take a word more than those at the root."""
    for url in urls:
        yield dataclasses.replace(
            inference_row(url),
            path=f"/{CLUB}{url}",
            handler=Submission(url),
            summary=f"Have the upstream answer {url.removeprefix('/v1/')} at once, or with `async` as a job",
            accepted=None if url in FORM_URLS else ClubJob,
            dialect=CLUB,
            error=ClubError,
            recognizes=asks_for_job,
        )


_route = partial(Route, dialect=CLUB, error=ClubError)
_JOB = "/club/v1/jobs/{job_id}"

ROUTES: tuple[Route, ...] = (
    *inference_rows((*ENDPOINTS, TRANSCRIPTIONS)),
    _route(
        method="GET",
        path="/club/v1/jobs",
        handler=list_jobs,
        summary="List jobs, newest first",
        query=ListJobs,
        answer=ClubJobList,
    ),
    _route(
        method="GET",
        path=_JOB,
        handler=retrieve_job,
        summary="Show a job with its result",
        answer=ClubJob,
    ),
    _route(
        method="POST",
        path=f"{_JOB}/cancel",
        handler=cancel_job,
        summary="Cancel a job that has not ended",
        scope=KeyScope.WRITE,
        answer=ClubCanceled,
    ),
    _route(
        method="POST",
        path=f"{_JOB}/retry",
        handler=retry_job,
        summary="Queue a job again that failed or was canceled",
        scope=KeyScope.WRITE,
        accepted=ClubJob,
    ),
)


def extra_routes(endpoints: tuple[str, ...]) -> tuple[Route, ...]:
    """Give the routes of endpoints that the operator has added to the usual ones."""
    return tuple(inference_rows(extra_urls(endpoints)))
