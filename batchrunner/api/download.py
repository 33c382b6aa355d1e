"""Gives the bytes of a blob: whole or a range, with an entity tag, a piece at a time."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping
from urllib.parse import quote

from batchrunner.api.envelope import Refusal
from batchrunner.api.http import Answer, Call
from batchrunner.errors import BlobsUnavailable, NotFound

_PIECE_BYTES = 512 * 1024
# Where each read is a request to another service.
_FAR_PIECE_BYTES = 4 << 20
_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


def blob_answer(
    call: Call,
    blob: str,
    *,
    size_bytes: int,
    etag: str,
    content_type: str,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """Answer with a blob as the request's Range and If-None-Match ask for it; the blob is held while it is read.

    Raises:
        Refusal: the range lies behind the end.
    """
    asked = call.request.headers
    known = {"etag": etag, "accept-ranges": "bytes", **(headers or {})}
    if _names(asked.get("If-None-Match"), etag):
        return Answer(status=304, content_type=content_type, headers=known)
    start, end = 0, size_bytes
    span = _range(asked.get("Range"), size_bytes) if asked.get("If-Range", etag) == etag else None
    if span is not None:
        start, end = span
        known["content-range"] = f"bytes {start}-{end - 1}/{size_bytes}"
    return Answer(
        status=206 if span is not None else 200,
        content_type=content_type,
        headers=known,
        chunks=_pieces(call, blob, start, end),
        size_bytes=end - start,
    )


def content_disposition(filename: str) -> str:
    """Offer a name for saving; whatever is in it, it stays one quoted word and one percent-encoded one."""
    plain = "".join(each if each.isascii() and each.isprintable() and each not in '"\\%' else "_" for each in filename)
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{quote(filename, safe='')}"


async def _pieces(call: Call, blob: str, start: int, end: int) -> AsyncIterator[bytes]:
    blobs = call.parts.blobs
    piece_bytes = _FAR_PIECE_BYTES if blobs.has_frozen_segments else _PIECE_BYTES
    with call.parts.reading.hold(blob):
        while start < end:
            try:
                piece = await call.blocking(blobs.read, blob, start, min(start + piece_bytes, end))
            except NotFound as error:
                # The file is known, so it is the bytes that are missing: that is no fault of the caller.
                raise BlobsUnavailable(f"{blob} is not there") from error
            if not piece:
                raise BlobsUnavailable(f"{blob} ends at byte {start}, {end} were announced")
            yield piece
            start += len(piece)


def _range(header: str | None, size_bytes: int) -> tuple[int, int] | None:
    """Read a Range of one span as [start, end); None for all, as for what is no range or several."""
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match[1] == match[2] == "":
        return None
    if match[1] == "":
        length = min(int(match[2]), size_bytes)
        start, end = size_bytes - length, size_bytes
    else:
        start = int(match[1])
        if match[2] and int(match[2]) < start:
            return None
        end = min(int(match[2]) + 1, size_bytes) if match[2] else size_bytes
    if start >= end:
        raise Refusal(
            f"The range {match[0]} lies outside of the {size_bytes} bytes.",
            status=416,
            headers={"content-range": f"bytes */{size_bytes}"},
        )
    return start, end


def _names(header: str | None, etag: str) -> bool:
    if header is None:
        return False
    return header.strip() == "*" or etag in {each.strip().removeprefix("W/") for each in header.split(",")}
