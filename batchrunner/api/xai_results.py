"""Pages of finished requests as xAI's clients read them, also while the batch runs: first what was answered, in the
order in which it was, then, once the batch is over, what never was.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Sequence
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from batchrunner.api.batches import batch_of
from batchrunner.api.envelope import Refusal
from batchrunner.api.http import Answer, Call, json_answer
from batchrunner.api.job_lines import jobs_of, request_id, shown_lines
from batchrunner.api.results import break_off
from batchrunner.api.sealed import is_not_run, sealed_files
from batchrunner.api.xai_words import XaiResult, result_of
from batchrunner.choosing import lines_of, read_error_line
from batchrunner.errors import InputChanged, NotFound
from batchrunner.frames import Record, read_payload
from batchrunner.lifecycle import TERMINAL, JobStatus
from batchrunner.lines import iter_lines
from batchrunner.models import Batch, File, LineCode
from batchrunner.pipeline import read_blob
from batchrunner.ports import Blobs
from batchrunner.reading import Reader
from batchrunner.results import ResultLines
from batchrunner.settings import MIB
from batchrunner.validation import line_rules

# Source: xAI's limits of a page. xAI's SDK takes messages of up to 20 MiB.
LIMIT, LIMIT_MAX = 100, 1000
PAGE_BYTES_MAX = 8 * MIB
# So much of a file is looked through for one page, however few of its lines belong there.
_LOOKED_BYTES_MAX = 64 * MIB
# Where a page goes on: behind a number of the journal's sequence; at a byte of the output file, or of the error file,
# of which either all lines belong to the results or, behind the journal, only those of requests that never ran.
_JOURNAL, _OUTPUT, _ERRORS, _NOT_RUN = "j", "o", "e", "n"
_PLACE = re.compile(r"([joen])([0-9]{1,18})")


class XaiPage(msgspec.Struct, frozen=True):
    """The query of a page. More than 1,000 are not given."""

    limit: Annotated[int, Meta(ge=1)] = LIMIT
    pagination_token: str | None = None


class XaiResultPage(msgspec.Struct, frozen=True):
    """A page of results. A token leads to those that are there besides; null says that there are no more now."""

    results: list[XaiResult]
    pagination_token: str | None


class _Place(NamedTuple):
    phase: str
    position: int


class _Found(NamedTuple):
    """What comes next: a record of the journal, or a line of a file; neither for a line that does not belong there."""

    behind: _Place
    size_bytes: int
    record: Record | None = None
    line: bytes = b""


def token_of(phase: str, position: int) -> str:
    """Write a place in a form that promises nothing."""
    return base64.urlsafe_b64encode(f"{phase}{position}".encode()).decode().rstrip("=")


def place_in(token: str, places: re.Pattern[str]) -> tuple[str, int]:
    """Read what `token_of` wrote. Raises: Refusal."""
    try:
        raw = base64.b64decode(token + "=" * (-len(token) % 4), altchars=b"-_", validate=True)
        found = places.fullmatch(raw.decode())
    except (binascii.Error, ValueError):
        found = None
    if found is None:
        raise _no_token()
    return found[1], int(found[2])


def _no_token() -> Refusal:
    return Refusal("The pagination_token is none that this server gave.", param="pagination_token")


async def list_results(call: Call) -> Answer:
    """Give a page of what is finished."""
    # A page may hold some megabytes, which are not for the event loop.
    return await call.blocking(_page, call, call.parameters(XaiPage))


def _page(call: Call, wanted: XaiPage) -> Answer:
    batch = batch_of(call)
    place = _Place(_JOURNAL if batch.journal_ended_at is None else _OUTPUT, 0)
    if wanted.pagination_token:
        place = _Place(*place_in(wanted.pagination_token, _PLACE))
    limit = min(wanted.limit, LIMIT_MAX)
    taken: list[_Found] = []
    taken_bytes = looked_bytes = 0
    is_more = False
    for found in _walk(call, batch, place):
        looked_bytes += found.size_bytes
        if found.record is not None or found.line:
            is_full = len(taken) == limit or taken_bytes + found.size_bytes > PAGE_BYTES_MAX
            if taken and is_full:
                is_more = True
                break
            taken.append(found)
            taken_bytes += found.size_bytes
        place = found.behind
        if looked_bytes > _LOOKED_BYTES_MAX:
            is_more = True
            break
    return json_answer(XaiResultPage(_results(call, batch, taken), token_of(*place) if is_more else None))


def _walk(call: Call, batch: Batch, place: _Place) -> Iterator[_Found]:
    """Give what stands behind a place, phase by phase. Blocks. Raises: Refusal when it is not kept any more."""
    phase, position = place
    if phase == _JOURNAL:
        yield from _answered(call, batch, position)
        if batch.status not in TERMINAL:
            return
        phase, position = _NOT_RUN, 0
    if batch.has_jobs:
        yield from _canceled(call, batch, position)
        return
    files = sealed_files(call.scope, batch)
    if phase == _OUTPUT:
        yield from _lines(call.parts.blobs, files.output, _OUTPUT, position)
        phase, position = _ERRORS, 0
    yield from _lines(call.parts.blobs, files.errors, phase, position)


def _answered(call: Call, batch: Batch, after: int) -> Iterator[_Found]:
    if batch.journal_ended_at is not None and after < batch.next_sequence - 1:
        raise Refusal("These results now stand in the batch's files; read on from the first page.", status=410)
    on_damage = break_off if batch.status in TERMINAL else None
    lines = shown_lines(call.scope, batch)
    reader = Reader(call.parts.blobs, call.scope, batch.id, after=after, on_damage=on_damage, lines=lines)
    for sequence, record in reader.fresh():
        yield _Found(_Place(_JOURNAL, sequence), record.payload_length, record=record)


def _canceled(call: Call, batch: Batch, position: int) -> Iterator[_Found]:
    """Give the jobs from a place on that were canceled, as the lines that a file would have of them."""
    result_lines = ResultLines(batch.id)
    for place, job in enumerate(jobs_of(call.scope, batch)):
        if place >= position and job.status is JobStatus.CANCELED:
            code, message = LineCode.BATCH_CANCELLED, "This request was canceled."
            line = result_lines.failed(job.line_number, request_id(place), code=code, message=message)
            yield _Found(_Place(_NOT_RUN, place + 1), len(line), line=line)


def _lines(blobs: Blobs, file: File | None, phase: str, position: int) -> Iterator[_Found]:
    """Give lines from a byte on. Raises: Refusal when none begins there."""
    if file is None:
        return
    if position and blobs.read(file.blob, position - 1, position) != b"\n":
        raise _no_token()
    for line in lines_of(read_blob(blobs, file.blob, position)):
        position += len(line)
        belongs = phase != _NOT_RUN or is_not_run(read_error_line(line))
        yield _Found(_Place(phase, position), len(line), line=line if belongs else b"")


def _results(call: Call, batch: Batch, taken: Sequence[_Found]) -> list[XaiResult]:
    urls = _urls(call, batch, [each.record for each in taken if each.record is not None])
    results = []
    for found in taken:
        url = urls.get(found.record.line_number) if found.record is not None else None
        line = read_payload(call.parts.blobs, found.record) if found.record is not None else found.line
        results.append(result_of(line, url))
    return results


def _urls(call: Call, batch: Batch, records: Sequence[Record]) -> dict[int, str]:
    """Look up where requests went; not where their input is gone."""
    numbers = {record.line_number for record in records}
    urls: dict[int, str] = {}
    rules = line_rules(call.parts.settings, endpoint=batch.endpoint)
    for shard in call.scope.shards_of(batch.id, {record.segment.task_id for record in records}):
        try:
            buffer = call.parts.blobs.read(shard.source or batch.source, shard.byte_start, shard.byte_end)
            for line in iter_lines(buffer, shard.first_line, shard.skipped, rules):
                if line.line_number in numbers:
                    urls[line.line_number] = line.url
        except (NotFound, InputChanged):
            # Somebody deleted the batch's file.
            continue
    return urls
