"""The nouns of a server: what it keeps for its tenants besides batches and files, and what its workers report."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import NewType

import msgspec

from batchrunner.lifecycle import BatchEvent
from batchrunner.models import BatchId, FileId, TenantId

UploadId = NewType("UploadId", str)
PartId = NewType("PartId", str)
KeyId = NewType("KeyId", str)


class UploadStatus(StrEnum):
    """How an upload stands. Source: the Upload object of the OpenAI API, `status`."""

    PENDING = "pending"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class KeyScope(StrEnum):
    """What a key may do: each scope stands for itself alone."""

    READ = "read"
    WRITE = "write"
    ADMIN = "admin"


@dataclass(frozen=True, slots=True, kw_only=True)
class Upload:
    """A file that comes in parts. `size_bytes` is what was announced, `expires_at` the end of the upload itself,
    `expires_after_s` how long the file is to live.
    """

    id: UploadId
    tenant: TenantId
    filename: str
    purpose: str
    mime_type: str
    size_bytes: int
    status: UploadStatus
    created_at: datetime
    expires_at: datetime
    expires_after_s: int | None = None
    file_id: FileId | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class UploadPart:
    """One part of an upload; `blob` is its name in Blobs."""

    id: PartId
    upload_id: UploadId
    size_bytes: int
    blob: str
    created_at: datetime


class KeyLimits(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What one key may use; None is unlimited."""

    open_batches_max: int | None = None
    queued_lines_max: int | None = None
    rpm: int | None = None
    priority_max: int | None = None


NO_LIMITS = KeyLimits()


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    """A tenant's key. `digest` is the SHA-256 of the secret in hex, `shown` the secret's first characters."""

    id: KeyId
    tenant: TenantId
    name: str
    digest: str
    shown: str
    scopes: tuple[KeyScope, ...]
    limits: KeyLimits
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """The answer that belongs to an Idempotency-Key of a route.

    `fingerprint` is None while the request is still being read. `object_id` names what was made; `body` is None when
    the process died between making it and answering: the answer is then the object as it is now.
    """

    route: str
    key: str
    fingerprint: str | None
    status: int = 200
    body: bytes | None = None
    object_id: str | None = None


class UpstreamLive(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """How work at one of several upstreams stands at this moment."""

    name: str
    window: int
    bound_by: str
    in_flight: int
    waiting: int = 0
    is_down: bool = False


class LiveUse(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What requests that are answered at once use of one upstream: the places that batches leave to them, what they
    took of its limits in the last minute, and how many it refused since this was last said.
    """

    places: int = 0
    requests: int = 0
    tokens: int = 0
    refused: int = 0


class LiveShare(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """What one worker does for one batch at this moment. `bound_by` names what keeps its window from growing; where
    there are several upstreams, `upstreams` says both for each, with the batch's exchanges there.
    """

    batch_id: BatchId
    in_flight: int
    waiting: int
    done_per_s: float
    window: int
    bound_by: str | None = None
    upstreams: tuple[UpstreamLive, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenCounts:
    """What a tenant has unfinished: batches, and the lines in them without a result."""

    batches: int
    lines: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Expired:
    """What one expiry hid or dropped. `journals` lists ended batches whose extents are gone: their `journal/{id}/` may
    be deleted, and then be forgotten.
    """

    files: int = 0
    uploads: int = 0
    replays: int = 0
    journals: tuple[BatchId, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Swept:
    """What one sweep found and mended."""

    moved: tuple[tuple[BatchId, BatchEvent], ...] = ()
    seals_added: int = 0
    leases_ended: int = 0
