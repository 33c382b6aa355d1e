"""What became of a job: the record of its line, and the media that stand in the answer, wherever they are kept.

An upstream's own address is passed on as it is; nothing is ever fetched from it.
"""

from __future__ import annotations

import re
from binascii import a2b_base64
from dataclasses import dataclass

import msgspec

from batchrunner.assets import MEDIA_TYPES, asset_blob
from batchrunner.frames import Record, find_record, read_payload, segment_of
from batchrunner.jobs import Job
from batchrunner.models import RecordKind
from batchrunner.ports import Blobs, TenantScope

UNKNOWN_TYPE = "application/octet-stream"
_ASSET = "asset"
_ASSET_ID = re.compile(r"asset_([0-9]{1,19})_[0-9a-f]{24}")
_URL_CHARACTERS_MAX = 8192
_WEB = ("https://", "http://")
# Source: RFC 2397. Some upstreams put the medium itself where its address belongs.
_ENCODED_URL = re.compile(r"data:[a-z0-9.+/-]{0,128};base64,")
# The member that holds it, with so much of it as tells what it is.
_ENCODED_MEMBER = re.compile(
    rb'"(?:b64_json|data|url)": ?"(?:data:[a-z0-9.+/-]{0,128};base64,)?((?:[A-Za-z0-9+/]{4}){8})'
)
# Source: the formats' own documents. Each begins so: bytes from the place on, and for what holds several formats more
# behind them.
_MAGIC: tuple[tuple[str, int, bytes], ...] = (
    ("image/png", 0, b"\x89PNG\r\n\x1a\n"),
    ("image/jpeg", 0, b"\xff\xd8\xff"),
    ("image/gif", 0, b"GIF8"),
    ("image/webp", 8, b"WEBP"),
    ("audio/wav", 8, b"WAVE"),
    ("audio/mpeg", 0, b"ID3"),
    ("audio/flac", 0, b"fLaC"),
    ("audio/ogg", 0, b"OggS"),
    ("video/mp4", 4, b"ftyp"),
    ("video/webm", 0, b"\x1a\x45\xdf\xa3"),
)
# The first eleven bits of an MPEG audio frame, then version and layer: 3 is layer I, 0 is ADTS.
_SYNC, _LAYER = 0xFFE0, 0x6


@dataclass(frozen=True, slots=True, kw_only=True)
class JobResult:
    """How a job's line ended, and its result line as files of a batch have it."""

    kind: RecordKind
    line: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMedium:
    """A medium in Blobs."""

    blob: str
    content_type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedMedium:
    """A medium that stands in the answer in base64."""

    encoded: str

    def decoded(self) -> bytes:
        """Give its bytes. Raises: ValueError when they are none."""
        return a2b_base64(self.encoded)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkedMedium:
    """A medium that the upstream keeps."""

    url: str


Medium = StoredMedium | EncodedMedium | LinkedMedium


class _Item(msgspec.Struct):
    url: str | None = None
    b64_json: str | None = None


class _Sound(msgspec.Struct):
    url: str | None = None
    data: str | None = None


class _Body(msgspec.Struct):
    """The answers that hold media, and what stands for one that was kept. Source: OpenAI's images, xAI's videos."""

    object: str | None = None
    id: str | None = None
    content_type: str | None = None
    url: str | None = None
    data: list[_Item] | None = None
    audio: _Sound | None = None
    video: _Item | None = None


class _Response(msgspec.Struct):
    body: _Body


class _Line(msgspec.Struct):
    response: _Response


_decode = msgspec.json.Decoder(_Line).decode


def record_of(scope: TenantScope, blobs: Blobs, job: Job) -> Record | None:
    """Find the result of a job's present line, None while there is none. Blocks."""
    for extent in scope.extents_at(job.batch_id, job.line_number):
        found = find_record(blobs, segment_of(extent), extent.byte_start, extent.byte_end, job.line_number)
        if found is not None:
            return found
    return None


def result_of(scope: TenantScope, blobs: Blobs, job: Job) -> JobResult | None:
    """Read the result of a job's present line, None while there is none. Blocks."""
    record = record_of(scope, blobs, job)
    return JobResult(kind=record.kind, line=read_payload(blobs, record)) if record is not None else None


def media_of(job: Job, result: JobResult) -> tuple[Medium, ...]:
    """Give the media of a good answer, in the order in which they stand in it; none of anything else, nor where one of
    them cannot be shown as such: the answer itself then tells what it has.
    """
    if result.kind is not RecordKind.SUCCEEDED:
        return ()
    try:
        body = _decode(result.line).response.body
    except msgspec.ValidationError:
        # An answer of another shape.
        return ()
    if body.object == _ASSET:
        stored = _stored(job, body)
        return (stored,) if stored is not None else ()
    given: list[str | None] = [each.b64_json or each.url for each in body.data or ()]
    if body.audio is not None:
        given.append(body.audio.data or body.audio.url)
    if body.video is not None:
        given.append(body.video.b64_json or body.video.url)
    given.append(body.url)
    media = [_medium(each) for each in given if each]
    return tuple(each for each in media if each is not None) if None not in media else ()


def _stored(job: Job, body: _Body) -> StoredMedium | None:
    """Name the blob of an asset. An upstream may write anything, so that the name has to be one of this very line."""
    found = _ASSET_ID.fullmatch(body.id or "")
    if found is None or int(found[1]) != job.line_number:
        return None
    content_type = body.content_type or UNKNOWN_TYPE
    blob = asset_blob(job.batch_id, found[0], content_type)
    return StoredMedium(blob=blob, content_type=content_type if content_type in MEDIA_TYPES else UNKNOWN_TYPE)


def _medium(given: str) -> Medium | None:
    """Tell base64 from an address. One that leads nowhere on the web is none, and so is what does not begin as a
    picture, a sound or a film does.
    """
    head = given[: len("data:") + 200]
    if head.startswith(_WEB):
        is_sound = len(given) <= _URL_CHARACTERS_MAX and given.isprintable()
        return LinkedMedium(url=given) if is_sound else None
    found = _ENCODED_URL.match(head)
    medium = EncodedMedium(encoded=given if found is None else given[found.end() :])
    try:
        return medium if content_type_of(medium.decoded()) != UNKNOWN_TYPE else None
    except ValueError:
        return None


def begins_with_medium(line: bytes) -> bool:
    """Tell by the first bytes of a result line whether the first medium in it stands there in base64."""
    found = _ENCODED_MEMBER.search(line)
    # A group of four characters is three bytes.
    return found is not None and content_type_of(a2b_base64(found[1])) != UNKNOWN_TYPE


def content_type_of(content: bytes) -> str:
    """Tell by its first bytes what a medium is, of what can do no harm in a browser."""
    for content_type, place, magic in _MAGIC:
        if content.startswith(magic, place):
            return content_type
    sync = int.from_bytes(content[:2], "big")
    if len(content) > 2 and sync & _SYNC == _SYNC:
        return "audio/aac" if sync & _LAYER == 0 else "audio/mpeg"
    return UNKNOWN_TYPE
