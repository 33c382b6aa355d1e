"""The File and Upload objects as the wire has them, in the order of the OpenAI API, and the words they share."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from batchrunner.api.envelope import Refusal
from batchrunner.api.paging import Page
from batchrunner.grouping import printable
from batchrunner.holdings import Upload
from batchrunner.models import File
from batchrunner.progress import seconds_of

# Source: the purposes of the OpenAI API, in the order in which it lists them in its refusal.
PURPOSES = ("fine-tune", "assistants", "batch", "user_data", "vision", "evals")
BATCH = "batch"
_BATCH_SUFFIX = ".jsonl"
# Checked by `check_purpose`, whose words differ from those for other fields.
Purpose = Annotated[str, Meta(extra_json_schema={"enum": list(PURPOSES)})]
_BADLY_NAMED = f"The name does not end in {_BATCH_SUFFIX}."
_EXPIRES_S_MIN = 3600
_EXPIRES_S_MAX = 2_592_000


class ExpiresAfter(msgspec.Struct, frozen=True):
    """How long a file lives, counted from its creation."""

    anchor: Literal["created_at"]
    seconds: Annotated[int, Meta(ge=_EXPIRES_S_MIN, le=_EXPIRES_S_MAX)]


class FileObject(msgspec.Struct, frozen=True, kw_only=True):
    """Source: the File object of the OpenAI API. `line_count` and `sha256` are ours and stay away from /openai/v1."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"] = "processed"
    status_details: str | None = None
    line_count: int | UnsetType | None = UNSET
    sha256: str | UnsetType = UNSET


class FileList(Page, frozen=True, kw_only=True):
    """A page of files. The next one is behind `last_id`, or `pagination_token`, which stays away from /openai/v1."""

    data: tuple[FileObject, ...]
    pagination_token: str | UnsetType | None = UNSET


class FileDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to a deletion."""

    id: str
    object: Literal["file"] = "file"
    deleted: bool = True


class UploadObject(msgspec.Struct, frozen=True, kw_only=True):
    """Source: the Upload object of the OpenAI API. `bytes` is what was announced."""

    id: str
    object: Literal["upload"] = "upload"
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["pending", "completed", "cancelled", "expired"]
    expires_at: int
    file: FileObject | None


class UploadPartObject(msgspec.Struct, frozen=True, kw_only=True):
    """Source: the UploadPart object of the OpenAI API."""

    id: str
    object: Literal["upload.part"] = "upload.part"
    created_at: int
    upload_id: str


def file_object(file: File, *, is_strict: bool) -> FileObject:
    """Show a file. Bytes are whole before there is a row, so its status is `processed` from the first answer on."""
    return FileObject(
        id=file.id,
        bytes=file.size_bytes,
        created_at=seconds_of(file.created_at),
        expires_at=seconds_of(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
        status_details=None if is_strict or is_named_well(file.filename, file.purpose) else _BADLY_NAMED,
        line_count=UNSET if is_strict else file.line_count,
        sha256=UNSET if is_strict else file.sha256,
    )


def is_named_well(filename: str, purpose: str) -> bool:
    """Tell whether the OpenAI API would take a file of this name."""
    return purpose != BATCH or filename.lower().endswith(_BATCH_SUFFIX)


def upload_object(upload: Upload, file: File | None, *, is_strict: bool) -> UploadObject:
    """Show an upload, with its file once it is complete."""
    return UploadObject(
        id=upload.id,
        bytes=upload.size_bytes,
        created_at=seconds_of(upload.created_at),
        filename=upload.filename,
        purpose=upload.purpose,
        status=upload.status.value,
        expires_at=seconds_of(upload.expires_at),
        file=file_object(file, is_strict=is_strict) if file else None,
    )


def check_purpose(purpose: str) -> None:
    """Source: recorded answer of the OpenAI API. Raises: Refusal."""
    if purpose not in PURPOSES:
        raise Refusal(f"'{printable(purpose)}' is not one of {list(PURPOSES)} - 'purpose'", param="purpose")


def not_json_lines() -> Refusal:
    """Source: recorded answer of the OpenAI API to a batch file of another suffix, or empty, or without JSON."""
    return Refusal("Invalid file format for Batch API. Must be .jsonl")


def file_too_large(size_bytes_max: int, *, field: str) -> Refusal:
    """A file above the cap; sending it again will not help."""
    return Refusal(f"The file is larger than the maximum of {size_bytes_max} bytes.", status=413, param=field)
