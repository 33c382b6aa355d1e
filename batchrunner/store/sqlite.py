"""The Store in a SQLite file: one writer per process, readers that never wait for it, and errors in our own words."""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sqlalchemy import Connection, Engine, QueuePool, create_engine, event
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from batchrunner.errors import BatchrunnerError, DiskFull, FolderUnsuitable, OwnError, StoreUnavailable
from batchrunner.models import SessionId
from batchrunner.ports import Clock
from batchrunner.store import queries_claims, schema
from batchrunner.store.moments import Availability, Moment
from batchrunner.store.sql import SqlStore

logger = logging.getLogger(__name__)

_BUSY_TIMEOUT_S = 30.0
# SQLite waits for a lock by looking at longer and longer intervals, in the end of a tenth of a second, in which others
# take it again and again. So a writer begins to wait anew after each of these.
_LOOK_S = 0.005
_WRITER_WAIT_S = 60.0
# As many as there are threads that ask at once; to open a file anew takes longer than most questions. What SQLite keeps
# for each by itself would be 2 MiB.
_READERS, _READER_CACHE_KIB = 16, 512
_MOUNTS = Path("/proc/mounts")
_NETWORK = frozenset(
    {
        "nfs",
        "nfs4",
        "cifs",
        "smb",
        "smb2",
        "smb3",
        "smbfs",
        "9p",
        "afs",
        "ceph",
        "glusterfs",
        "lustre",
        "beegfs",
        "ncpfs",
        "davfs",
    }
)
_NETWORK_FUSE = frozenset(
    f"fuse.{each}"
    for each in ("sshfs", "s3fs", "rclone", "glusterfs", "gcsfuse", "goofys", "davfs2", "cephfs", "mount-s3")
)
# The constants of sqlite3's primary result codes; an extended code keeps its primary one in the low byte.
_UNAVAILABLE = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_PROTOCOL,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_NOLFS,
    }
)


def translated(error: SQLAlchemyError) -> BatchrunnerError:
    """Give the error in our words; anything but a full disk or an unreachable file is a bug of ours."""
    cause = error.orig if isinstance(error, DBAPIError) else None
    code = getattr(cause, "sqlite_errorcode", None)
    if isinstance(code, int) and (code & 0xFF == sqlite3.SQLITE_FULL or code == sqlite3.SQLITE_IOERR_SHMSIZE):
        return DiskFull(f"the database cannot grow: {cause}")
    if isinstance(code, int) and code & 0xFF in _UNAVAILABLE:
        return StoreUnavailable(f"the database does not answer: {cause}")
    return OwnError(f"the database refused a statement: {cause or type(error).__name__}")


def _noted(error: SQLAlchemyError, availability: Availability) -> BatchrunnerError:
    told = translated(error)
    if isinstance(told, StoreUnavailable | DiskFull):
        availability.failed()
    return told


def require_local_disk(path: Path, *, mounts: Path = _MOUNTS) -> None:
    """Refuse a folder whose file system does not keep locks or synced bytes as a local one does.

    Raises:
        FolderUnsuitable: the mount that holds `path` is a network file system.
    """
    if not mounts.exists():
        return
    target = path.resolve()
    kind, point = "", Path()
    for line in mounts.read_text(errors="surrogateescape").splitlines():
        _, mounted, found, *_ = line.split(" ")
        # The kernel writes blanks in a path as octal numbers.
        place = Path(mounted.replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\"))
        if target.is_relative_to(place) and len(place.parts) >= len(point.parts):
            kind, point = found, place
    if kind in _NETWORK or kind in _NETWORK_FUSE:
        raise FolderUnsuitable(f"{path} lies on {point}, which is {kind}: the database needs a local disk")


def _connect(path: Path, *, is_reader: bool, is_alone: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path,
        timeout=_BUSY_TIMEOUT_S if is_reader and not is_alone else _LOOK_S,
        isolation_level=None,
        check_same_thread=False,
        cached_statements=256,
    )
    try:
        if is_alone:
            # Before anything is read: then the index of the log is kept in memory.
            connection.execute("PRAGMA locking_mode=EXCLUSIVE")
        connection.execute("PRAGMA foreign_keys=ON")
        connection.execute("PRAGMA synchronous=FULL")
        if is_reader:
            connection.execute("PRAGMA query_only=ON")
            connection.execute(f"PRAGMA cache_size=-{_READER_CACHE_KIB}")
    except BaseException:
        connection.close()
        raise
    return connection


def _begin_immediate(conn: Connection) -> None:
    """Begin with the writer's lock, after which nothing in the transaction waits. One that begins by reading and writes
    later fails at once when another process wrote in between.
    """
    connection = conn.connection.driver_connection
    assert isinstance(connection, sqlite3.Connection)
    for _ in range(round(_BUSY_TIMEOUT_S / _LOOK_S)):
        try:
            connection.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY:
                break
        else:
            return
    # What is wrong is for those to tell who translate it.
    conn.exec_driver_sql("BEGIN IMMEDIATE")


def _engine(path: Path, *, is_reader: bool, connections: int, is_alone: bool = False) -> Engine:
    engine = create_engine(
        "sqlite://",
        creator=partial(_connect, path, is_reader=is_reader, is_alone=is_alone),
        poolclass=QueuePool,
        pool_size=connections,
        # Each thread reads at its own time, and how many there are is for whoever starts them.
        max_overflow=0 if is_alone or not is_reader else -1,
        pool_reset_on_return=None if is_reader else "rollback",
        isolation_level="AUTOCOMMIT" if is_reader else None,
    )
    if not is_reader:
        event.listen(engine, "begin", _begin_immediate)
    return engine


class Writer:
    """One connection, used by one thread at a time, whose transactions begin IMMEDIATE; after a failure a new one."""

    def __init__(self, path: Path, availability: Availability) -> None:
        self._engine = _engine(path, is_reader=False, connections=1)
        self._availability = availability
        self._turn = threading.Lock()
        self._connection: Connection | None = None

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Open a transaction; it commits at the end of the block and has no effect after an exception.

        Raises:
            StoreUnavailable: the file cannot be reached, or stayed locked.
            DiskFull: there is no space for the transaction.
        """
        if not self._turn.acquire(timeout=_WRITER_WAIT_S):
            self._availability.failed()
            raise StoreUnavailable(f"the database was busy for {_WRITER_WAIT_S:.0f} s in this process")
        try:
            if self._connection is None:
                self._connection = self._engine.connect()
            asked_s = self._availability.asked_s()
            with self._connection.begin():
                self._availability.answered(asked_s)
                yield self._connection
        except SQLAlchemyError as error:
            self._drop()
            raise _noted(error, self._availability) from error
        else:
            self._availability.succeeded()
        finally:
            self._turn.release()

    def close(self) -> None:
        """Let go of the connection."""
        with self._turn:
            self._drop()
            self._engine.dispose()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.invalidate()
            connection.close()


class SqliteRenewer:
    """Renewer over a writer of its own, so that no long transaction of this process's threads delays it."""

    def __init__(self, path: Path, availability: Availability, clock: Clock) -> None:
        self._writer = Writer(path, availability)
        self._clock = clock
        self._boot_id = clock.boot_id()

    def renew(self, session: SessionId, lease_s: float) -> None:
        """See Renewer."""
        with self._writer.transaction() as conn:
            moment = Moment(wall=self._clock.now(), boot_s=self._clock.boot_s(), boot_id=self._boot_id)
            queries_claims.renew(conn, session, moment, lease_s=lease_s)

    def close(self) -> None:
        """See Renewer."""
        self._writer.close()


class SqliteStore(SqlStore):
    """Store in one file of a local disk, shared by the processes of one host. Methods may be called from any thread."""

    def __init__(self, path: Path, clock: Clock, *, is_alone: bool = False) -> None:
        super().__init__(clock)
        self._path = path
        self._writer = Writer(path, self.availability)
        self._readers = _engine(path, is_reader=True, connections=1 if is_alone else _READERS, is_alone=is_alone)

    @classmethod
    def open(cls, path: Path, clock: Clock) -> SqliteStore:
        """Open the file, made and brought up to this version's schema where needed.

        Raises:
            FolderUnsuitable: it lies on a network file system, or is the database of another program.
            SchemaNewer: a newer version wrote it.
            StoreUnavailable: it cannot be opened.
            DiskFull: there is no space to make it.
        """
        require_local_disk(path)
        store = cls(path, clock)
        try:
            store.prepare()
        except BaseException:
            store.close()
            raise
        return store

    @classmethod
    def open_alone(cls, path: Path, clock: Clock) -> SqliteStore:
        """Open a file of this version that no other process has open, for one thread to read: on a full disk there may
        be no room for what processes share beside it.

        Raises:
            SchemaNewer: it has another version.
            StoreUnavailable: another process has it open, or it cannot be read.
        """
        store = cls(path, clock, is_alone=True)
        try:
            with store.reading() as conn:
                schema.check(conn)
        except BaseException:
            store.close()
            raise
        return store

    def prepare(self) -> None:
        """Switch the file to write-ahead logging and bring its schema up to date."""
        try:
            schema.use_write_ahead_log(self._path, timeout_s=_BUSY_TIMEOUT_S)
        except sqlite3.Error as error:
            raise translated(DBAPIError("PRAGMA journal_mode", None, error)) from error
        with self.writing() as conn:
            is_changed = schema.prepare(conn)
        if is_changed:
            self._keep_to_owner()

    def _keep_to_owner(self) -> None:
        """Take what signs webhooks, which it is about to hold, out of others' sight; whoever wants to share it may."""
        for suffix in ("", "-wal", "-shm"):
            path = self._path.with_name(f"{self._path.name}{suffix}")
            try:
                path.chmod(0o600)
            except FileNotFoundError:
                continue
            except OSError as error:
                logger.warning("others may read %s: %s", path, error.strerror, extra={"action": "store_readable"})

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """See SqlStore."""
        with self._writer.transaction() as conn:
            yield conn

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """See SqlStore."""
        try:
            with self._readers.connect() as conn:
                yield conn
        except SQLAlchemyError as error:
            raise _noted(error, self.availability) from error
        self.availability.succeeded()

    def renewer(self) -> SqliteRenewer:
        """See Store."""
        return SqliteRenewer(self._path, self.availability, self._clock)

    def close(self) -> None:
        """See Store."""
        self._writer.close()
        self._readers.dispose()
