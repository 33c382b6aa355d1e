"""Statements on files: those that can be seen, and those that are only places in a list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, insert, or_, select, tuple_, update

from batchrunner.errors import NameTaken, NotFound
from batchrunner.models import File, FileId, TenantId
from batchrunner.store.moments import Moment
from batchrunner.store.queries_blobs import need_blob
from batchrunner.store.tables import files


def _is_visible(moment: Moment) -> ColumnElement[bool]:
    return and_(files.c.deleted_at.is_(None), or_(files.c.expires_at.is_(None), files.c.expires_at > moment.wall))


def add_file(conn: Connection, file: File) -> None:
    """Insert a file; guards that an id names one file for ever, and lets the same insert be repeated."""
    row = conn.execute(select(files).where(files.c.id == file.id)).mappings().one_or_none()
    if row is None:
        need_blob(conn, file.blob)
        conn.execute(insert(files).values({each.name: getattr(file, each.name) for each in fields(File)}))
    elif (row["tenant"], row["blob"]) != (file.tenant, file.blob):
        raise NameTaken(f"the file id {file.id} is taken")


def file_of_tenant(conn: Connection, tenant: TenantId, file_id: FileId, moment: Moment) -> RowMapping:
    """Read a file; guards that another tenant's and a hidden one look like a missing one."""
    query = select(files).where(files.c.id == file_id, files.c.tenant == tenant, _is_visible(moment))
    row = conn.execute(query).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no file {file_id}")
    return row


def require_bytes(conn: Connection, file_id: FileId) -> None:
    """Guard that a file, hidden or not, still has its bytes."""
    there = select(files.c.id).where(files.c.id == file_id, files.c.freed_at.is_(None))
    if conn.execute(there.with_for_update()).one_or_none() is None:
        raise NotFound(f"the bytes of file {file_id} are gone")


def files_of_tenant(
    conn: Connection,
    tenant: TenantId,
    moment: Moment,
    *,
    limit: int,
    after: FileId | None,
    purpose: str | None,
    newest_first: bool,
) -> Sequence[RowMapping]:
    """List a tenant's files behind a cursor that must be the tenant's own but may be hidden."""
    place = tuple_(files.c.created_at, files.c.id)
    query = select(files).where(files.c.tenant == tenant, _is_visible(moment))
    if purpose is not None:
        query = query.where(files.c.purpose == purpose)
    if after is not None:
        cursor = select(files.c.created_at, files.c.id).where(files.c.id == after, files.c.tenant == tenant)
        if (found := conn.execute(cursor).one_or_none()) is None:
            raise NotFound(f"no file {after}")
        query = query.where(place < tuple(found) if newest_first else place > tuple(found))
    ends = (files.c.created_at, files.c.id)
    query = query.order_by(*(each.desc() if newest_first else each.asc() for each in ends))
    return conn.execute(query.limit(limit)).mappings().all()


def note_lines(
    conn: Connection,
    tenant: TenantId,
    file_id: FileId,
    moment: Moment,
    *,
    line_count: int,
    validation_blob: str | None,
) -> None:
    """Write what a validation found; the first report stays, so that no blob is left without a row."""
    row = file_of_tenant(conn, tenant, file_id, moment)
    values: dict[str, object] = {"line_count": line_count}
    if validation_blob is not None and row["validation_blob"] is None:
        need_blob(conn, validation_blob)
        values["validation_blob"] = validation_blob
    conn.execute(update(files).where(files.c.id == file_id).values(values))


def delete_file(conn: Connection, tenant: TenantId, file_id: FileId, moment: Moment) -> None:
    """Hide a file; guards as `file_of_tenant` does."""
    file_of_tenant(conn, tenant, file_id, moment)
    conn.execute(update(files).where(files.c.id == file_id).values(deleted_at=moment.wall))
