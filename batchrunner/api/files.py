"""Files: uploaded in one stream, listed, shown, downloaded, validated, deleted."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta

from batchrunner.api.download import blob_answer, content_disposition
from batchrunner.api.envelope import Refusal, no_such_file, refused_if_missing
from batchrunner.api.file_object import (
    BATCH,
    ExpiresAfter,
    FileDeleted,
    FileList,
    FileObject,
    Purpose,
    check_purpose,
    file_object,
    file_too_large,
    is_named_well,
    not_json_lines,
)
from batchrunner.api.http import JSON, Answer, ApiParts, Call, Route, json_answer
from batchrunner.api.idempotency import fields_fingerprint, settle_streamed
from batchrunner.api.multipart import MULTIPART, received
from batchrunner.api.paging import next_token, page_of
from batchrunner.api.typed import read_parameters
from batchrunner.errors import BlobsUnavailable, NotFound
from batchrunner.holdings import KeyScope
from batchrunner.intake import Intake, Taken, examine
from batchrunner.models import File, FileId
from batchrunner.pipeline import give_up
from batchrunner.settings import MIB

# Who registers the names of blobs.
OWNER = "api"
STRICT_FILE_BYTES_MAX = 512 * MIB
# How long an address that a download was sent to may be used.
_SIGNED_S = 600.0
# Source: the OpenAI API gives these back to nobody.
_NOT_DOWNLOADABLE = frozenset({"assistants", "vision", "user_data"})


class FileForm(msgspec.Struct, frozen=True):
    """The text fields of an upload. Source: without `purpose`, and with seconds as `expires_after`, as xAI has them."""

    purpose: Purpose = BATCH
    expires_after: ExpiresAfter | None = None


class ListFiles(msgspec.Struct, frozen=True):
    """The query of a listing."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=10_000)] = 10_000
    order: Literal["asc", "desc"] = "desc"
    purpose: str | None = None
    pagination_token: str | None = None


class DownloadFile(msgspec.Struct, frozen=True):
    """The query of a download; with `redirect` the bytes come from where they are kept, if that is another service."""

    redirect: bool = False


class LineReport(msgspec.Struct, frozen=True):
    """One problem of a validation; `line` counts physical lines from 1."""

    code: str
    message: str
    param: str | None
    line: int | None
    custom_id: str | None


class FileValidation(msgspec.Struct, frozen=True):
    """What is wrong with a file, all of it: `problems` is in line order and has no cap."""

    object: Literal["file.validation"]
    file_id: str
    is_valid: bool
    line_count: int
    problem_count: int
    problems: list[LineReport]


class BlobSink:
    """Bytes of one blob on their way, its name registered before the first of them. All of it blocks."""

    def __init__(
        self,
        parts: ApiParts,
        name: str,
        *,
        size_bytes_max: int,
        field: str = "file",
        digest: Callable[[bytes], None] | None = None,
    ) -> None:
        """Register the name and open the blob; `field` is where its bytes come from, `digest` sees them too."""
        self.name = name
        self._store = parts.store
        self._size_bytes_max = size_bytes_max
        self._field = field
        parts.store.register_blob(name, owner=OWNER)
        self._intake = Intake(parts.blobs, name, line_bytes_max=parts.settings.line_bytes_max, digest=digest)

    def feed(self, chunk: bytes) -> None:
        """Take bytes. Raises: Refusal above the cap, and as Intake.feed does."""
        if self._intake.size_bytes + len(chunk) > self._size_bytes_max:
            raise file_too_large(self._size_bytes_max, field=self._field)
        self._intake.feed(chunk)

    def finish(self) -> Taken:
        """Return once all is durable. Raises as Intake.finish does."""
        return self._intake.finish()

    def abort(self) -> None:
        """Leave nothing behind: neither bytes nor, in the end, the name."""
        self._intake.abort()
        give_up(self._store, self.name)


@contextmanager
def kept_blob(parts: ApiParts, name: str, content: bytes) -> Iterator[None]:
    """Make bytes durable as a blob, for a row that the block makes; nothing is left of it where that fails. Blocks."""
    sink = BlobSink(parts, name, size_bytes_max=len(content))
    try:
        sink.feed(content)
        sink.finish()
        yield
    except BaseException:
        sink.abort()
        raise


def expiry_s(parts: ApiParts, purpose: str, expires_after_s: int | None) -> float | None:
    """How long a file lives, None for ever. Source: the OpenAI API, where only files for batches end by themselves."""
    if expires_after_s is not None:
        return expires_after_s
    return parts.settings.batch_file_expires_s if purpose == BATCH else None


def new_file(call: Call, taken: Taken, *, blob: str, filename: str, purpose: str, expires_after_s: int | None) -> File:
    """Make the row of what came in.

    Raises:
        Refusal: a batch file does not begin with JSON, or under /openai/v1 has another suffix.
    """
    is_wrong = call.is_strict and not is_named_well(filename, purpose)
    if is_wrong or (purpose == BATCH and not taken.is_json_lines):
        raise not_json_lines()
    now = call.parts.clock.now()
    life_s = expiry_s(call.parts, purpose, expires_after_s)
    return File(
        id=FileId(f"file-{call.parts.rng.token_hex(12)}"),
        tenant=call.tenant,
        purpose=purpose,
        filename=filename,
        size_bytes=taken.size_bytes,
        sha256=taken.sha256,
        blob=blob,
        created_at=now,
        expires_at=now + timedelta(seconds=life_s) if life_s is not None else None,
        line_count=taken.line_count if purpose == BATCH else None,
    )


async def create_file(call: Call) -> Answer:
    """Stream the form's file into Blobs; purpose may come before or after it."""
    parts = call.parts
    size_bytes_max = STRICT_FILE_BYTES_MAX if call.is_strict else parts.settings.file_bytes_max

    def open_sink(fields: dict[str, str]) -> BlobSink:
        if "purpose" in fields:
            check_purpose(fields["purpose"])
        return BlobSink(parts, f"files/{parts.rng.token_hex(16)}", size_bytes_max=size_bytes_max)

    async with received(call, open_sink, size_bytes_max=size_bytes_max) as form:
        wanted = _read_form(form.fields, is_strict=call.is_strict)
        if form.sink is None:
            raise required_property("file")
        taken = await call.blocking(form.sink.finish)
        answer = await settle_streamed(call, fields_fingerprint(call, form.fields, taken.sha256))
        if answer is not None:
            await call.blocking(form.abort)
            return answer
        new = new_file(
            call,
            taken,
            blob=form.sink.name,
            filename=form.filename,
            purpose=wanted.purpose,
            expires_after_s=wanted.expires_after.seconds if wanted.expires_after else None,
        )
        file = await call.blocking(call.scope.add_file, new, replay=call.replay)
        if file.id != new.id:
            await call.blocking(form.abort)
    return json_answer(file_object(file, is_strict=call.is_strict))


def _read_form(fields: Mapping[str, str], *, is_strict: bool) -> FileForm:
    """Raises: Refusal when a field is missing or does not fit."""
    if is_strict and "purpose" not in fields:
        raise required_property("purpose")
    purpose = fields.get("purpose", BATCH)
    check_purpose(purpose)
    given: dict[str, object] = {"purpose": purpose}
    expiry = {
        name: fields[f"expires_after[{name}]"] for name in ("anchor", "seconds") if f"expires_after[{name}]" in fields
    }
    if not is_strict and "expires_after" in fields:
        expiry = {"anchor": "created_at", "seconds": fields["expires_after"]}
    if expiry:
        given["expires_after"] = expiry
    return read_parameters(given, FileForm)


def required_property(name: str) -> Refusal:
    """A field of a form that has to be there."""
    return Refusal(f"'{name}' is a required property", param=name)


async def list_files(call: Call) -> Answer:
    """Give a page of the tenant's files."""
    # Ten thousand files are shown in a tenth of a second, for which the loop would stand still.
    return await call.blocking(_page, call, call.parameters(ListFiles))


def _page(call: Call, wanted: ListFiles) -> Answer:
    after = wanted.after or (None if call.is_strict else wanted.pagination_token)
    with refused_if_missing(no_such_file(after or "")):
        found = call.scope.files(
            limit=wanted.limit + 1,
            after=FileId(after) if after is not None else None,
            purpose=wanted.purpose,
            newest_first=wanted.order == "desc",
        )
    shown = [file_object(each, is_strict=call.is_strict) for each in found]
    token = UNSET if call.is_strict else next_token(shown, limit=wanted.limit)
    return json_answer(page_of(partial(FileList, pagination_token=token), shown, limit=wanted.limit))


async def file_of(call: Call) -> File:
    """Give the file that the path names. Raises: Refusal."""
    file_id = FileId(call.path_params["file_id"])
    with refused_if_missing(no_such_file(file_id)):
        return await call.blocking(call.scope.file, file_id)


async def retrieve_file(call: Call) -> Answer:
    """Show one file."""
    return json_answer(file_object(await file_of(call), is_strict=call.is_strict))


async def present_file(call: Call, file_id: str) -> Answer:
    """Show the file that an earlier request with the same Idempotency-Key made."""
    file = await call.blocking(call.scope.file, FileId(file_id))
    return json_answer(file_object(file, is_strict=call.is_strict))


async def delete_file(call: Call) -> Answer:
    """Hide a file; its bytes stay while a batch reads them."""
    file_id = FileId(call.path_params["file_id"])
    with refused_if_missing(no_such_file(file_id)):
        await call.blocking(call.scope.delete_file, file_id)
    return json_answer(FileDeleted(id=file_id))


async def download_file(call: Call) -> Answer:
    """Stream a file's bytes, or a range of them."""
    file = await file_of(call)
    if file.purpose in _NOT_DOWNLOADABLE:
        raise Refusal(f"Not allowed to download files of purpose: {file.purpose}")
    if call.parameters(DownloadFile).redirect:
        sign = partial(call.parts.blobs.download_url, file.blob, expires_s=_SIGNED_S, filename=file.filename)
        if (url := await call.blocking(sign)) is not None:
            return Answer(status=307, headers={"location": url, "cache-control": "no-store"})
    headers: Mapping[str, str] = {"content-disposition": content_disposition(file.filename)}
    return blob_answer(
        call,
        file.blob,
        size_bytes=file.size_bytes,
        etag=f'"{file.sha256}"',
        content_type="application/octet-stream",
        headers=headers,
    )


async def validate_file(call: Call) -> Answer:
    """Give all problems of a batch file; worked out at the first call, kept for those that follow."""
    file = await file_of(call)
    if file.purpose != BATCH:
        raise Refusal(f"Only files of purpose 'batch' can be validated, not '{file.purpose}'.", param="id")
    name = file.validation_blob
    if name is None:
        name = await _validated(call)
    try:
        size_bytes = await call.blocking(call.parts.blobs.size_bytes, name)
    except NotFound as error:
        raise BlobsUnavailable(f"{name} is not there") from error
    return blob_answer(call, name, size_bytes=size_bytes, etag=f'"{file.sha256}-validation"', content_type=JSON)


async def _validated(call: Call) -> str:
    """Wait for the turn; whoever had it before may have validated the same file."""
    async with call.parts.heavy:
        call.require_listener()
        file = await file_of(call)
        if file.validation_blob is not None:
            return file.validation_blob
        try:
            with call.parts.reading.hold(file.blob):
                return await call.blocking(_examine, call, file)
        except NotFound:
            # Deleted in mid reading, or before.
            await file_of(call)
            raise BlobsUnavailable(f"{file.blob} is not there") from None


def _examine(call: Call, file: File) -> str:
    """Validate the file and note the report. Blocks, for as long as reading the file takes."""
    parts = call.parts
    name = f"validations/{parts.rng.token_hex(16)}"
    found = examine(parts.blobs, parts.store, file, name, parts.settings, owner=OWNER)
    try:
        call.scope.note_lines(file.id, line_count=found.total_count, validation_blob=name)
        return call.scope.file(file.id).validation_blob or name
    finally:
        # The one that the file came to need stays.
        give_up(parts.store, name)


ROUTES = (
    Route(
        method="POST",
        path="/v1/files",
        handler=create_file,
        summary="Upload a file",
        scope=KeyScope.WRITE,
        request=FileForm,
        request_media=MULTIPART,
        answer=FileObject,
        present=present_file,
        is_streamed_in=True,
    ),
    Route(
        method="GET",
        path="/v1/files",
        handler=list_files,
        summary="List files",
        query=ListFiles,
        answer=FileList,
    ),
    Route(
        method="GET",
        path="/v1/files/{file_id}",
        handler=retrieve_file,
        summary="Show a file",
        answer=FileObject,
    ),
    Route(
        method="DELETE",
        path="/v1/files/{file_id}",
        handler=delete_file,
        summary="Delete a file; batches that read it go on",
        scope=KeyScope.WRITE,
        answer=FileDeleted,
    ),
    Route(
        method="GET",
        path="/v1/files/{file_id}/content",
        handler=download_file,
        summary="Download a file's bytes; Range and If-None-Match are honoured",
        query=DownloadFile,
        answer_media="application/octet-stream",
    ),
    Route(
        method="GET",
        path="/v1/files/{file_id}/validation",
        handler=validate_file,
        summary="List every problem of a batch file",
        answer=FileValidation,
    ),
)
