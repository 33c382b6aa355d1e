"""The version of the schema: made in one go in a new file, migrated in an older one, refused in a newer one."""

from __future__ import annotations

import fcntl
import sqlite3
from pathlib import Path

from sqlalchemy import Connection, insert, inspect, select

from batchrunner.errors import FolderUnsuitable, SchemaNewer
from batchrunner.store.tables import alembic_version, schema, stamp

VERSION = "0002"


def use_write_ahead_log(path: Path, *, timeout_s: float) -> None:
    """Switch the file to WAL, which it then stays in.

    SQLite does not wait for locks in this one step, so processes that open a new file together take turns at a lock
    beside it.
    """
    connection = sqlite3.connect(path, timeout=timeout_s, isolation_level=None)
    try:
        if connection.execute("PRAGMA journal_mode").fetchone() == ("wal",):
            return
        with path.with_name(f"{path.name}-setup").open("wb") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            connection.execute("PRAGMA journal_mode=WAL")
    finally:
        connection.close()


def prepare(conn: Connection) -> None:
    """Make or migrate the schema inside the caller's transaction.

    Raises:
        SchemaNewer: the file has a version that this program does not know.
        FolderUnsuitable: the file has tables, but not ours.
    """
    found = version_of(conn)
    if found == VERSION:
        return
    if found is not None and found > VERSION:
        raise SchemaNewer(f"the database has schema {found}, this program knows up to {VERSION}")
    if found is not None:
        from batchrunner.store.migrations import upgrade

        upgrade(conn)
        return
    if tables := inspect(conn).get_table_names():
        raise FolderUnsuitable(f"the database has tables that are not ours: {', '.join(tables[:3])}")
    schema.create_all(conn)
    stamp.create_all(conn)
    conn.execute(insert(alembic_version), {"version_num": VERSION})


def check(conn: Connection) -> None:
    """Make sure that the schema is the one that this program knows.

    Raises:
        SchemaNewer: it is another one.
    """
    found = version_of(conn)
    if found != VERSION:
        raise SchemaNewer(f"the database has schema {found}, this program works with {VERSION}")


def version_of(conn: Connection) -> str | None:
    """Read the stamped version; None in a file without one."""
    if not inspect(conn).has_table(alembic_version.name):
        return None
    return conn.execute(select(alembic_version.c.version_num)).scalar_one_or_none()
