"""The version of the schema: made in one go in a new file, migrated in an older one, refused in a newer one."""

from __future__ import annotations

import contextlib
import fcntl
import sqlite3
from pathlib import Path

from sqlalchemy import Connection, insert, inspect, select

from batchrunner.errors import FolderUnsuitable, SchemaNewer, StoreUnavailable
from batchrunner.store.tables import alembic_version, schema, stamp

VERSION = "0005"


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


def prepare(conn: Connection) -> bool:
    """Make or migrate the schema inside the caller's transaction; tells whether there was anything to do.

    Raises:
        SchemaNewer: the file has a version that this program does not know.
        FolderUnsuitable: the file has tables, but not ours.
    """
    found = version_of(conn)
    if found == VERSION:
        return False
    if found is not None and found > VERSION:
        raise SchemaNewer(f"the database has schema {found}, this program knows up to {VERSION}")
    if found is not None:
        from batchrunner.store.migrations import upgrade

        upgrade(conn)
        return True
    if tables := inspect(conn).get_table_names():
        raise FolderUnsuitable(f"the database has tables that are not ours: {', '.join(tables[:3])}")
    schema.create_all(conn)
    stamp.create_all(conn)
    conn.execute(insert(alembic_version), {"version_num": VERSION})
    return True


def check(conn: Connection) -> None:
    """Make sure that the schema is the one that this program knows.

    Raises:
        SchemaNewer: it is another one.
    """
    found = version_of(conn)
    if found != VERSION:
        raise SchemaNewer(f"the database has schema {found}, this program works with {VERSION}")


def version_of_file(path: Path) -> str | None:
    """Read the stamped version of a database that nobody else has open in this process; None without one. Writes
    nothing.

    Raises:
        StoreUnavailable: it cannot be read, or is no database.
    """
    try:
        with contextlib.closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as connection:
            named = connection.execute("SELECT name FROM sqlite_master WHERE name = ?", (alembic_version.name,))
            if named.fetchone() is None:
                return None
            found = connection.execute(f"SELECT version_num FROM {alembic_version.name}").fetchone()  # noqa: S608
            return str(found[0]) if found else None
    except sqlite3.Error as error:
        raise StoreUnavailable(f"{path} cannot be read: {error}") from error


def version_of(conn: Connection) -> str | None:
    """Read the stamped version; None in a file without one."""
    if not inspect(conn).has_table(alembic_version.name):
        return None
    return conn.execute(select(alembic_version.c.version_num)).scalar_one_or_none()
