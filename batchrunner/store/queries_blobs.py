"""Statements on the names of blobs: known before the first byte, needed by a row, dropped, deleted, forgotten."""

from __future__ import annotations

from collections.abc import Collection
from datetime import timedelta

from sqlalchemy import Connection, Select, and_, delete, exists, insert, or_, select, update

from batchrunner.errors import BlobsUnavailable, NameTaken
from batchrunner.lifecycle import TERMINAL, BatchStatus
from batchrunner.store.moments import Moment
from batchrunner.store.tables import BlobState, batches, blobs, files

_PENDING_FOR = timedelta(hours=24)
UNFINISHED = tuple(status for status in BatchStatus if status not in TERMINAL)


def register_blob(conn: Connection, name: str, moment: Moment, *, owner: str) -> None:
    """Insert a pending name; guards that a name is given to one owner, and lets the same insert be repeated."""
    found = conn.execute(select(blobs.c.state, blobs.c.owner).where(blobs.c.name == name)).one_or_none()
    if found is not None and (found.state, found.owner) == (BlobState.PENDING, owner):
        return
    if found is not None:
        raise NameTaken(f"the blob name {name} is taken")
    row = {"name": name, "state": BlobState.PENDING, "created_at": moment.wall, "owner": owner}
    conn.execute(insert(blobs).values(row))


def abandon_blob(conn: Connection, name: str) -> None:
    """Give a pending name up; guards by its state that one that a row needs stays."""
    conn.execute(
        update(blobs).where(blobs.c.name == name, blobs.c.state == BlobState.PENDING).values(state=BlobState.DEAD)
    )


def need_blob(conn: Connection, name: str) -> None:
    """Make a registered name live; guards that a row never begins to need what may be deleted already."""
    alive = and_(blobs.c.name == name, blobs.c.state != BlobState.DEAD)
    if conn.execute(update(blobs).where(alive).values(state=BlobState.LIVE)).rowcount == 1:
        return
    if conn.execute(select(blobs.c.state).where(blobs.c.name == name)).one_or_none() is not None:
        raise BlobsUnavailable(f"the blob {name} was given up before it was needed", hint="Send the request again.")


def drop_blob(conn: Connection, name: str, moment: Moment) -> None:
    """Mark a name for deletion, unless a file that is not freed has it too."""
    is_needed = exists().where(files.c.blob == name, files.c.freed_at.is_(None))
    if conn.execute(select(is_needed)).scalar_one():
        return
    if conn.execute(update(blobs).where(blobs.c.name == name).values(state=BlobState.DEAD)).rowcount == 0:
        row = {"name": name, "state": BlobState.DEAD, "created_at": moment.wall, "owner": ""}
        conn.execute(insert(blobs).values(row))


def drop_blobs(conn: Connection, names: Select[tuple[str]]) -> None:
    """Mark registered names, which no file has, for deletion, however many they are."""
    conn.execute(update(blobs).where(blobs.c.name.in_(names)).values(state=BlobState.DEAD))


def drop_assets(conn: Connection, batch_id: str, moment: Moment) -> None:
    """Mark a batch's media answers for deletion: they are known by the lines of its output file, and live as long."""
    drop_blob(conn, f"assets/{batch_id}/", moment)


def drop_forgotten(conn: Connection, moment: Moment) -> None:
    """Give up names that nothing came to need within a day: whoever registered them is long gone."""
    old = and_(blobs.c.state == BlobState.PENDING, blobs.c.created_at <= moment.wall - _PENDING_FOR)
    conn.execute(update(blobs).where(old).values(state=BlobState.DEAD))


def freeable_blobs(conn: Connection, moment: Moment, *, limit: int, in_use: Collection[str]) -> list[str]:
    """Free hidden files that nothing reads and name what may be deleted; guards with `freed_at`, before any byte goes,
    that no batch begins to read it.
    """
    is_read = exists().where(
        batches.c.status.in_(UNFINISHED),
        or_(batches.c.input_file_id == files.c.id, batches.c.source == files.c.blob),
    )
    hidden = and_(files.c.freed_at.is_(None), files.c.deleted_at.is_not(None))
    free = select(files.c.id, files.c.blob, files.c.validation_blob).where(hidden, ~is_read).limit(limit)
    found = conn.execute(free.where(files.c.blob.not_in(in_use))).all()
    ids = [row.id for row in found]
    conn.execute(update(files).where(files.c.id.in_(ids)).values(freed_at=moment.wall))
    for row in found:
        drop_blob(conn, row.blob, moment)
        if row.validation_blob is not None:
            drop_blob(conn, row.validation_blob, moment)
    for batch_id in conn.execute(select(batches.c.id).where(batches.c.output_file_id.in_(ids))).scalars().all():
        drop_assets(conn, batch_id, moment)
    dead = select(blobs.c.name).where(blobs.c.state == BlobState.DEAD, blobs.c.name.not_in(in_use))
    return list(conn.execute(dead.order_by(blobs.c.created_at, blobs.c.name).limit(limit)).scalars())


def forget_blobs(conn: Connection, names: Collection[str]) -> None:
    """Remove the rows of deleted blobs; guards by their state that only dropped ones go."""
    conn.execute(delete(blobs).where(blobs.c.name.in_(names), blobs.c.state == BlobState.DEAD))
