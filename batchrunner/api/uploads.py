"""Uploads: a file in parts, sent in any order, laid together when the caller says in which order they belong."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import timedelta
from typing import Annotated

import msgspec
from msgspec import Meta

from batchrunner.api.envelope import Refusal, no_such_part, no_such_upload, refused_if_missing
from batchrunner.api.file_object import (
    ExpiresAfter,
    Purpose,
    UploadObject,
    UploadPartObject,
    check_purpose,
    upload_object,
)
from batchrunner.api.files import BlobSink, new_file, required_property
from batchrunner.api.http import Answer, Call, Route, json_answer
from batchrunner.api.idempotency import fields_fingerprint, settle_streamed
from batchrunner.api.multipart import MULTIPART, received
from batchrunner.errors import BlobsUnavailable, NotFound, TransitionRefused
from batchrunner.holdings import KeyScope, PartId, Upload, UploadId, UploadPart, UploadStatus
from batchrunner.models import File
from batchrunner.pipeline import read_blob
from batchrunner.progress import seconds_of

_FILENAME_CHARS_MAX = 1024
_PARTS_MAX = 10_000


class NewUpload(msgspec.Struct, frozen=True):
    """What an upload is announced with. `bytes` is the size of the whole file."""

    bytes: Annotated[int, Meta(ge=0)]
    filename: Annotated[str, Meta(min_length=1, max_length=_FILENAME_CHARS_MAX)]
    mime_type: Annotated[str, Meta(max_length=256)]
    purpose: Purpose
    expires_after: ExpiresAfter | None = None


class UploadPartForm(msgspec.Struct, frozen=True):
    """A part is a form with one file field, `data`."""


class CompleteUpload(msgspec.Struct, frozen=True):
    """The order of the parts, and if wanted the MD5 of the whole file in hex."""

    part_ids: Annotated[list[str], Meta(max_length=_PARTS_MAX)]
    md5: str | None = None


async def create_upload(call: Call) -> Answer:
    """Announce a file that will come in parts."""
    wanted = await call.json(NewUpload)
    check_purpose(wanted.purpose)
    settings = call.parts.settings
    if wanted.bytes > settings.file_bytes_max:
        raise Refusal(
            f"Invalid 'bytes': integer above maximum value. Expected a value <= {settings.file_bytes_max}, but got "
            f"{wanted.bytes} instead.",
            param="bytes",
            code="integer_above_max_value",
        )
    now = call.parts.clock.now()
    upload = Upload(
        id=UploadId(f"upload_{call.parts.rng.token_hex(16)}"),
        tenant=call.tenant,
        filename="".join(each for each in wanted.filename if each.isprintable()) or "upload",
        purpose=wanted.purpose,
        mime_type=wanted.mime_type,
        size_bytes=wanted.bytes,
        status=UploadStatus.PENDING,
        created_at=now,
        expires_at=now + timedelta(seconds=settings.upload_expires_s),
        expires_after_s=wanted.expires_after.seconds if wanted.expires_after else None,
    )
    upload = await call.blocking(call.scope.add_upload, upload, replay=call.replay)
    return json_answer(upload_object(upload, None, is_strict=call.is_strict))


async def add_part(call: Call) -> Answer:
    """Stream one part into Blobs. Parts may come in parallel and in any order."""
    upload = await _upload_of(call)
    _check_pending(upload)
    parts = call.parts
    size_bytes_max = parts.settings.upload_part_bytes_max

    def open_sink(_fields: dict[str, str]) -> BlobSink:
        name = f"parts/{parts.rng.token_hex(16)}"
        return BlobSink(parts, name, size_bytes_max=size_bytes_max, field=call.route.file_field)

    try:
        async with received(call, open_sink, size_bytes_max=size_bytes_max) as form:
            if form.sink is None:
                raise required_property("data")
            taken = await call.blocking(form.sink.finish)
            answer = await settle_streamed(call, fields_fingerprint(call, {"upload_id": upload.id}, taken.sha256))
            if answer is not None:
                await call.blocking(form.abort)
                return answer
            new = UploadPart(
                id=PartId(f"part_{parts.rng.token_hex(16)}"),
                upload_id=upload.id,
                size_bytes=taken.size_bytes,
                blob=form.sink.name,
                created_at=parts.clock.now(),
            )
            part = await call.blocking(call.scope.add_part, new, replay=call.replay)
            if part.id != new.id:
                await call.blocking(form.abort)
    except TransitionRefused:
        raise _closed(await _upload_of(call)) from None
    return json_answer(_part_object(part))


async def complete_upload(call: Call) -> Answer:
    """Lay the parts together in the order given. A completed upload answers with its file again."""
    wanted = await call.json(CompleteUpload)
    upload_id = UploadId(call.path_params["upload_id"])
    with refused_if_missing(no_such_upload(upload_id)):
        known = await call.blocking(call.scope.parts, upload_id)
    # Parts end with their upload, so that they have to be those that it had while it is seen to be open.
    upload = await _upload_of(call)
    if upload.status is not UploadStatus.COMPLETED:
        _check_pending(upload)
        parts = _in_order(known, wanted.part_ids)
        _check_sum(upload, parts)
        async with call.parts.heavy:
            call.require_listener()
            upload = await call.blocking(_lay_together, call, upload, parts, wanted.md5)
    return await _shown(call, upload)


async def cancel_upload(call: Call) -> Answer:
    """End an upload without a file; ending it again changes nothing."""
    upload = await _upload_of(call)
    try:
        upload = await call.blocking(call.scope.cancel_upload, upload.id)
    except TransitionRefused:
        raise _closed(await _upload_of(call)) from None
    return await _shown(call, upload)


async def present_upload(call: Call, upload_id: str) -> Answer:
    """Show the upload that an earlier request with the same Idempotency-Key made."""
    return await _shown(call, await call.blocking(call.scope.upload, UploadId(upload_id)))


async def present_part(call: Call, part_id: str) -> Answer:
    """Show the part that an earlier request with the same Idempotency-Key made."""
    upload_id = UploadId(call.path_params["upload_id"])
    known = {each.id: each for each in await call.blocking(call.scope.parts, upload_id)}
    part = known.get(PartId(part_id))
    if part is None:
        # The end of its upload was the end of the part.
        raise no_such_part(part_id)
    return json_answer(_part_object(part))


def _lay_together(call: Call, upload: Upload, parts: Sequence[UploadPart], md5: str | None) -> Upload:
    """Copy the parts into one blob and make the file of it. Blocks."""
    sum_of_all = hashlib.md5(usedforsecurity=False)
    sink = BlobSink(
        call.parts,
        f"files/{call.parts.rng.token_hex(16)}",
        size_bytes_max=call.parts.settings.file_bytes_max,
        digest=sum_of_all.update if md5 is not None else None,
    )
    try:
        for part in parts:
            for chunk in read_blob(call.parts.blobs, part.blob):
                sink.feed(chunk)
        if md5 is not None and sum_of_all.hexdigest() != md5.strip().lower():
            message = f"The MD5 of the parts is {sum_of_all.hexdigest()}, which is not the 'md5' given."
            raise Refusal(message, param="md5", code="invalid_value")
        file = new_file(
            call,
            sink.finish(),
            blob=sink.name,
            filename=upload.filename,
            purpose=upload.purpose,
            expires_after_s=upload.expires_after_s,
        )
        return call.scope.complete_upload(upload.id, file)
    except (TransitionRefused, NotFound) as error:
        # Somebody else ended the upload, and the sweep may have its parts already.
        sink.abort()
        now = call.scope.upload(upload.id)
        if now.status is UploadStatus.COMPLETED:
            return now
        if now.status is UploadStatus.PENDING:
            raise BlobsUnavailable(f"a part of {upload.id} is not there") from error
        raise _closed(now) from None
    except BaseException:
        sink.abort()
        raise


def _in_order(known: Sequence[UploadPart], part_ids: Sequence[str]) -> list[UploadPart]:
    """Raises: Refusal when an id is unknown or named twice."""
    by_id = {part.id: part for part in known}
    for place, part_id in enumerate(part_ids):
        if part_id not in by_id:
            raise _wrong_parts(f"part_ids[{place}] is no part of this upload, or is named twice.")
        del by_id[PartId(part_id)]
    by_id = {part.id: part for part in known}
    return [by_id[PartId(each)] for each in part_ids]


def _check_sum(upload: Upload, parts: Sequence[UploadPart]) -> None:
    size_bytes = sum(part.size_bytes for part in parts)
    if size_bytes != upload.size_bytes:
        message = f"The parts have {size_bytes} bytes together, the upload was announced with {upload.size_bytes}."
        raise Refusal(message, param="bytes", code="invalid_value")


async def _upload_of(call: Call) -> Upload:
    upload_id = UploadId(call.path_params["upload_id"])
    with refused_if_missing(no_such_upload(upload_id)):
        return await call.blocking(call.scope.upload, upload_id)


async def _shown(call: Call, upload: Upload) -> Answer:
    file: File | None = None
    if upload.file_id is not None:
        try:
            file = await call.blocking(call.scope.file, upload.file_id)
        except NotFound:
            # Deleted or expired since.
            file = None
    return json_answer(upload_object(upload, file, is_strict=call.is_strict))


def _part_object(part: UploadPart) -> UploadPartObject:
    return UploadPartObject(id=part.id, created_at=seconds_of(part.created_at), upload_id=part.upload_id)


def _check_pending(upload: Upload) -> None:
    if upload.status is not UploadStatus.PENDING:
        raise _closed(upload)


def _closed(upload: Upload) -> Refusal:
    """A 400 and no 409, which the SDKs would send again."""
    return Refusal(f"The upload {upload.id} is {upload.status} and cannot be changed any more.")


def _wrong_parts(what: str) -> Refusal:
    return Refusal(f"Invalid 'part_ids': {what}", param="part_ids", code="invalid_value")


ROUTES = (
    Route(
        method="POST",
        path="/v1/uploads",
        handler=create_upload,
        summary="Announce a file that comes in parts",
        scope=KeyScope.WRITE,
        request=NewUpload,
        answer=UploadObject,
        present=present_upload,
    ),
    Route(
        method="POST",
        path="/v1/uploads/{upload_id}/parts",
        handler=add_part,
        summary="Send one part",
        scope=KeyScope.WRITE,
        request=UploadPartForm,
        request_media=MULTIPART,
        file_field="data",
        answer=UploadPartObject,
        present=present_part,
        is_streamed_in=True,
    ),
    Route(
        method="POST",
        path="/v1/uploads/{upload_id}/complete",
        handler=complete_upload,
        summary="Lay the parts together into a file",
        scope=KeyScope.WRITE,
        request=CompleteUpload,
        answer=UploadObject,
    ),
    Route(
        method="POST",
        path="/v1/uploads/{upload_id}/cancel",
        handler=cancel_upload,
        summary="End an upload without a file",
        scope=KeyScope.WRITE,
        answer=UploadObject,
    ),
)
