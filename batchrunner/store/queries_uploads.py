"""Statements on uploads and their parts; an upload that is over has no parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

from sqlalchemy import ColumnElement, Connection, RowMapping, delete, func, insert, select, update

from batchrunner.errors import NameTaken, NotFound, QuotaExceeded, TransitionRefused
from batchrunner.holdings import Upload, UploadId, UploadPart, UploadStatus
from batchrunner.models import File, TenantId
from batchrunner.store.moments import Moment
from batchrunner.store.queries_blobs import drop_blob, need_blob
from batchrunner.store.queries_files import add_file
from batchrunner.store.rows import upload_of
from batchrunner.store.tables import upload_parts, uploads

PARTS_MAX = 10_000
_EXPIRED_MAX = 1000


def add_upload(conn: Connection, upload: Upload) -> None:
    """Insert an upload; guards that an id names one upload, and lets the same insert be repeated."""
    row = conn.execute(select(uploads).where(uploads.c.id == upload.id)).mappings().one_or_none()
    if row is None:
        conn.execute(insert(uploads).values({each.name: getattr(upload, each.name) for each in fields(Upload)}))
    elif row["tenant"] != upload.tenant:
        raise NameTaken(f"the upload id {upload.id} is taken")


def upload_of_tenant(conn: Connection, tenant: TenantId, upload_id: UploadId, moment: Moment) -> Upload:
    """Read an upload, locked in a writing transaction; guards that another tenant's looks like a missing one and that
    one that is late does not wait for the sweep to be over.
    """
    mine = select(uploads).where(uploads.c.id == upload_id, uploads.c.tenant == tenant)
    row = conn.execute(mine.with_for_update()).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no upload {upload_id}")
    upload = upload_of(row)
    if upload.status is UploadStatus.PENDING and upload.expires_at <= moment.wall:
        return replace(upload, status=UploadStatus.EXPIRED)
    return upload


def _pending(conn: Connection, tenant: TenantId, upload_id: UploadId, moment: Moment) -> Upload:
    upload = upload_of_tenant(conn, tenant, upload_id, moment)
    if upload.status is not UploadStatus.PENDING:
        raise TransitionRefused(f"the upload {upload_id} is {upload.status}")
    return upload


def add_part(conn: Connection, tenant: TenantId, part: UploadPart, moment: Moment) -> None:
    """Insert a part; guards that the upload is pending and has room for it, and lets the same insert be repeated."""
    _pending(conn, tenant, part.upload_id, moment)
    row = conn.execute(select(upload_parts).where(upload_parts.c.id == part.id)).mappings().one_or_none()
    if row is None:
        counted = select(func.count()).where(upload_parts.c.upload_id == part.upload_id)
        if conn.execute(counted).scalar_one() >= PARTS_MAX:
            raise QuotaExceeded(f"the upload {part.upload_id} has {PARTS_MAX} parts, which is the most")
        need_blob(conn, part.blob)
        conn.execute(insert(upload_parts).values({each.name: getattr(part, each.name) for each in fields(UploadPart)}))
    elif (row["upload_id"], row["blob"]) != (part.upload_id, part.blob):
        raise NameTaken(f"the part id {part.id} is taken")


def part_of_upload(conn: Connection, upload_id: UploadId, part_id: str) -> RowMapping:
    """Read a part; guards that the end of its upload ends it."""
    mine = select(upload_parts).where(upload_parts.c.id == part_id, upload_parts.c.upload_id == upload_id)
    row = conn.execute(mine).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no part {part_id} of the upload {upload_id}")
    return row


def parts_of_upload(conn: Connection, upload_id: UploadId) -> Sequence[RowMapping]:
    """List the parts of an upload, oldest first."""
    query = select(upload_parts).where(upload_parts.c.upload_id == upload_id).order_by(upload_parts.c.serial)
    return conn.execute(query).mappings().all()


def complete_upload(conn: Connection, tenant: TenantId, upload_id: UploadId, file: File, moment: Moment) -> Upload:
    """Insert the file and end the upload; guards that the upload is pending, and lets the same end be repeated."""
    upload = upload_of_tenant(conn, tenant, upload_id, moment)
    if upload.file_id == file.id:
        return upload
    _pending(conn, tenant, upload_id, moment)
    add_file(conn, file)
    values = {"status": UploadStatus.COMPLETED, "file_id": file.id}
    conn.execute(update(uploads).where(uploads.c.id == upload_id).values(values))
    _drop_parts(conn, upload_parts.c.upload_id == upload_id, moment)
    return upload_of_tenant(conn, tenant, upload_id, moment)


def cancel_upload(conn: Connection, tenant: TenantId, upload_id: UploadId, moment: Moment) -> Upload:
    """End an upload without a file; guards that only a pending one is."""
    upload = upload_of_tenant(conn, tenant, upload_id, moment)
    if upload.status is UploadStatus.CANCELLED:
        return upload
    _pending(conn, tenant, upload_id, moment)
    conn.execute(update(uploads).where(uploads.c.id == upload_id).values(status=UploadStatus.CANCELLED))
    _drop_parts(conn, upload_parts.c.upload_id == upload_id, moment)
    return replace(upload, status=UploadStatus.CANCELLED)


def expire_uploads(conn: Connection, moment: Moment) -> int:
    """End uploads that are past their time, as many as a statement can name; the next sweep ends more."""
    late = (uploads.c.status == UploadStatus.PENDING, uploads.c.expires_at <= moment.wall)
    ids = list(conn.execute(select(uploads.c.id).where(*late).limit(_EXPIRED_MAX).with_for_update()).scalars())
    if ids:
        conn.execute(update(uploads).where(uploads.c.id.in_(ids)).values(status=UploadStatus.EXPIRED))
        _drop_parts(conn, upload_parts.c.upload_id.in_(ids), moment)
    return len(ids)


def _drop_parts(conn: Connection, found: ColumnElement[bool], moment: Moment) -> None:
    """Remove parts and drop their blobs; guards that one that a file took over stays."""
    for blob in conn.execute(delete(upload_parts).where(found).returning(upload_parts.c.blob)).scalars().all():
        drop_blob(conn, blob, moment)
