"""Media of jobs, where they were kept or stand in the answer: what a job's `result_url` leads to.

Source: inference.club's async jobs, `result_url`.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

from batchrunner.api.club_words import ClubError
from batchrunner.api.download import blob_answer
from batchrunner.api.envelope import Refusal, refused_if_missing
from batchrunner.api.http import Answer, Call, Held, Route
from batchrunner.frames import Record, read_payload
from batchrunner.job_results import (
    UNKNOWN_TYPE,
    EncodedMedium,
    JobResult,
    StoredMedium,
    content_type_of,
    media_of,
    record_of,
)
from batchrunner.jobs import Job
from batchrunner.lifecycle import JobStatus
from batchrunner.models import CLUB

_PATH = "/api/inference/assets"
_ID = re.compile(r"([1-9][0-9]{0,17})(?:-([1-9][0-9]{0,4}))?")
_PIECE_BYTES = 256 * 1024
# A medium is the caller's alone, and a retry puts another in its place.
_HEADERS = {"cache-control": "private, no-cache"}


def asset_path(number: int, place: int) -> str:
    """Give the path of a job's medium; its places count from 0."""
    return f"{_PATH}/{number if place == 0 else f'{number}-{place + 1}'}/"


async def read_asset(call: Call) -> Answer:
    """Give a medium of a job."""
    number, place = _asked(call)
    job, record = await call.blocking(_found, call, number)
    held = call.parts.held
    # The answer is read whole; what is decoded of it is shorter.
    held.take(record.payload_length)
    try:
        medium = await call.blocking(_opened, call, job, record, place)
    except BaseException:
        held.give_back(record.payload_length)
        raise
    if isinstance(medium, StoredMedium):
        held.give_back(record.payload_length)
        return await _kept(call, medium)
    held.give_back(record.payload_length - len(medium))
    chunks = _Pieces(medium, held)
    return Answer(content_type=content_type_of(medium), headers=_HEADERS, chunks=chunks, size_bytes=len(medium))


def _asked(call: Call) -> tuple[int, int]:
    """Read an id: `42` is the first medium of that job, `42-2` its second."""
    found = _ID.fullmatch(call.path_params["asset_id"])
    if found is None:
        raise _no_asset(call)
    return int(found[1]), int(found[2] or 1) - 1


def _no_asset(call: Call) -> Refusal:
    message = f"No asset found with id '{call.path_params['asset_id']}'."
    return Refusal(message, status=404, kind="not_found", code="not_found")


def _found(call: Call, number: int) -> tuple[Job, Record]:
    """Find the job and its result. Raises: Refusal."""
    with refused_if_missing(_no_asset(call)):
        job = call.scope.job(number)
    record = record_of(call.scope, call.parts.blobs, job) if job.status is JobStatus.PROCESSED else None
    if record is None:
        raise _no_asset(call)
    return job, record


def _opened(call: Call, job: Job, record: Record, place: int) -> bytes | StoredMedium:
    """Give a medium, decoded where it stands in the answer. Raises: Refusal."""
    media = media_of(job, JobResult(kind=record.kind, line=read_payload(call.parts.blobs, record)))
    medium = media[place] if place < len(media) else None
    match medium:
        case StoredMedium():
            return medium
        case EncodedMedium():
            try:
                return medium.decoded()
            except ValueError:
                raise _no_asset(call) from None
        case _:
            # What the upstream keeps is there, and not here.
            raise _no_asset(call)


async def _kept(call: Call, medium: StoredMedium) -> Answer:
    with refused_if_missing(_no_asset(call)):
        size_bytes = await call.blocking(call.parts.blobs.size_bytes, medium.blob)
    # The name holds the sum of the content.
    etag = f'"{medium.blob.rpartition("/")[2]}"'
    kind = medium.content_type
    return blob_answer(call, medium.blob, size_bytes=size_bytes, etag=etag, content_type=kind, headers=_HEADERS)


class _Pieces:
    """Bytes in memory on their way out, counted as held until they are gone."""

    def __init__(self, content: bytes, held: Held) -> None:
        self._content = content
        self._held = held
        self._at = 0

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        piece = self._content[self._at : self._at + _PIECE_BYTES]
        if not piece:
            raise StopAsyncIteration
        self._at += len(piece)
        return piece

    async def aclose(self) -> None:
        """Let go of them."""
        self._held.give_back(len(self._content))
        self._content = b""


ROUTE = Route(
    method="GET",
    path=_PATH + "/{asset_id}",
    handler=read_asset,
    summary="Read a medium that a job made",
    answer_media=UNKNOWN_TYPE,
    dialect=CLUB,
    error=ClubError,
)
