"""What is SQLite's own: files it refuses, its errors in our words, readers beside a writer, schema and migrations."""

from __future__ import annotations

import contextlib
import sqlite3
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import QueuePool, create_engine, event, inspect, update
from sqlalchemy.exc import DBAPIError, InvalidRequestError

from batchrunner.clock import SystemClock
from batchrunner.errors import DiskFull, FolderUnsuitable, OwnError, SchemaNewer, StoreUnavailable
from batchrunner.lifecycle import TRANSITIONS, BatchEvent, BatchStatus
from batchrunner.models import LOCAL_TENANT, Batch, BatchId, NewBatch, SessionId, TaskKind, TaskState
from batchrunner.settings import Settings
from batchrunner.store import migrations, schema, sqlite
from batchrunner.store.migrations import upgrade
from batchrunner.store.moments import Moment
from batchrunner.store.queries_batches import batch_of_tenant, move
from batchrunner.store.sqlite import SqliteStore, require_local_disk, translated
from batchrunner.store.tables import batches, stamp
from batchrunner.store.tables import schema as metadata

WRITTEN_BY_0001 = Path(__file__).parents[1] / "e2e" / "written_by_0001" / "state.sql"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state.db"


def new_batch(name: str = "b1") -> NewBatch:
    return NewBatch(
        id=BatchId(name),
        tenant=LOCAL_TENANT,
        dialect="openai",
        endpoint=None,
        input_file_id=None,
        source="input.jsonl",
        completion_window=None,
        deadline_at=None,
    )


def make_batch(store: SqliteStore, name: str = "b1") -> Batch:
    return store.scope(LOCAL_TENANT).create_batch(new_batch(name))


def sql_of(connection: Any) -> dict[str, list[str]]:
    """Every table and index as the set of its parts: constraints may stand in another order."""
    rows = connection.exec_driver_sql("SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    return {name: sorted(" ".join(sql.split()).removesuffix(" )").split(", ")) for name, sql in rows}


# -- the file ----------------------------------------------------------------------------------------------------------


def test_new_file_is_stamped_and_logs_ahead_with_full_sync(path: Path) -> None:
    store = SqliteStore.open(path, SystemClock())

    with store.writing() as conn:
        assert schema.version_of(conn) == schema.VERSION
        pragmas = ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        assert [conn.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas] == ["wal", 2, 1, 5]
    with store.reading() as conn:
        assert [conn.exec_driver_sql(f"PRAGMA {name}").scalar() for name in pragmas] == ["wal", 2, 1, 30_000]
    store.close()


def test_readers_are_kept_for_as_many_threads_as_an_api_has_each_with_little_memory(path: Path) -> None:
    store = SqliteStore.open(path, SystemClock())

    with contextlib.ExitStack() as held:
        readers = [held.enter_context(store.reading()) for _ in range(Settings().api_threads)]
        assert {reader.exec_driver_sql("PRAGMA cache_size").scalar() for reader in readers} == {-512}
    pool = store._readers.pool
    assert isinstance(pool, QueuePool)
    assert pool.checkedin() == Settings().api_threads
    store.close()


def test_reader_cannot_write(path: Path) -> None:
    store = SqliteStore.open(path, SystemClock())
    make_batch(store)

    with pytest.raises(StoreUnavailable), store.reading() as conn:
        conn.execute(update(batches).values(priority=9))

    assert store.scope(LOCAL_TENANT).batch(BatchId("b1")).priority == 0
    store.close()


@pytest.mark.parametrize("version", ["0006", "9999", "later"])
def test_file_of_a_newer_version_is_refused_untouched(path: Path, version: str) -> None:
    SqliteStore.open(path, SystemClock()).close()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
    connection.commit()
    before = list(connection.iterdump())

    with pytest.raises(SchemaNewer):
        SqliteStore.open(path, SystemClock())

    assert list(connection.iterdump()) == before
    connection.close()


def test_database_of_another_program_is_refused_untouched(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE recipes (id)")
    connection.commit()

    with pytest.raises(FolderUnsuitable):
        SqliteStore.open(path, SystemClock())

    assert [row[0] for row in connection.execute("SELECT name FROM sqlite_master")] == ["recipes"]
    connection.close()


def test_file_that_is_no_database_is_unavailable(path: Path) -> None:
    path.write_bytes(b"something else entirely" * 100)

    with pytest.raises(StoreUnavailable):
        SqliteStore.open(path, SystemClock())


def test_folder_that_is_missing_is_unavailable(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable):
        SqliteStore.open(tmp_path / "nowhere" / "state.db", SystemClock())


MOUNTS = """\
/dev/vda / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
//server/share /mnt/my\\040share cifs rw 0 0
me@host: /mnt/ssh fuse.sshfs rw 0 0
share /mnt/host 9p rw 0 0
tmpfs /home/local tmpfs rw 0 0
"""


@pytest.mark.parametrize("folder", ["/home/ana/run", "/mnt/my share/run", "/mnt/ssh", "/mnt/host/x"])
def test_network_file_systems_are_refused(tmp_path: Path, folder: str) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)

    with pytest.raises(FolderUnsuitable, match="local disk"):
        require_local_disk(Path(folder, "state.db"), mounts=mounts)


@pytest.mark.parametrize("folder", ["/srv/run", "/home/local/run", "/homeless", "/mnt/sshd"])
def test_local_file_systems_are_taken(tmp_path: Path, folder: str) -> None:
    mounts = tmp_path / "mounts"
    mounts.write_text(MOUNTS)

    require_local_disk(Path(folder, "state.db"), mounts=mounts)
    require_local_disk(Path(folder, "state.db"), mounts=tmp_path / "no such list")


def test_open_looks_at_the_file_system(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> None:
        raise FolderUnsuitable("far away")

    monkeypatch.setattr(sqlite, "require_local_disk", refuse)

    with pytest.raises(FolderUnsuitable):
        SqliteStore.open(path, SystemClock())
    assert not path.exists()


OPEN_TOGETHER = """
import sys
from pathlib import Path
from batchrunner.clock import SystemClock
from batchrunner.store.sqlite import SqliteStore
sys.stdin.readline()
SqliteStore.open(Path(sys.argv[1]), SystemClock()).close()
"""


@pytest.mark.slow
def test_processes_that_open_a_new_file_together_all_get_it(path: Path) -> None:
    started = [
        subprocess.Popen([sys.executable, "-c", OPEN_TOGETHER, str(path)], stdin=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.close()

    assert [process.wait(timeout=60) for process in started] == [0] * 4


# -- errors ------------------------------------------------------------------------------------------------------------


def failure(code: int) -> DBAPIError:
    cause = sqlite3.OperationalError("what sqlite says")
    cause.sqlite_errorcode = code
    return DBAPIError("SELECT secret", {"key": "secret"}, cause)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (sqlite3.SQLITE_FULL, DiskFull),
        (sqlite3.SQLITE_IOERR_SHMSIZE, DiskFull),
        (sqlite3.SQLITE_BUSY, StoreUnavailable),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, StoreUnavailable),
        (sqlite3.SQLITE_LOCKED, StoreUnavailable),
        (sqlite3.SQLITE_IOERR_FSYNC, StoreUnavailable),
        (sqlite3.SQLITE_CANTOPEN, StoreUnavailable),
        (sqlite3.SQLITE_CORRUPT, StoreUnavailable),
        (sqlite3.SQLITE_CONSTRAINT_CHECK, OwnError),
    ],
)
def test_errors_of_sqlite_are_told_in_our_words(code: int, expected: type[OwnError]) -> None:
    error = translated(failure(code))

    assert type(error) is expected
    assert "secret" not in error.message


def test_error_without_a_cause_is_our_own() -> None:
    assert type(translated(InvalidRequestError("closed"))) is OwnError


def test_writer_that_stays_locked_out_is_unavailable_and_recovers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_BUSY_TIMEOUT_S", 0.01)
    store = SqliteStore.open(path, SystemClock())
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(StoreUnavailable):
        make_batch(store)
    other.execute("ROLLBACK")

    assert make_batch(store).status is BatchStatus.VALIDATING
    other.close()
    store.close()


class Relenting(sqlite3.Connection):
    """Has another connection let go of its lock before the third look."""

    other: sqlite3.Connection
    looks = 0

    def execute(self, statement: str, *parameters: Any) -> sqlite3.Cursor:
        self.looks += 1
        if self.looks == 3:
            self.other.execute("ROLLBACK")
        return super().execute(statement, *parameters)


def test_writer_that_waited_in_vain_waits_anew_and_begins_when_it_may(tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "some.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    mine = sqlite3.connect(tmp_path / "some.db", isolation_level=None, timeout=0.001, factory=Relenting)
    mine.other = other

    sqlite._begin_immediate(SimpleNamespace(connection=SimpleNamespace(driver_connection=mine)))  # type: ignore[arg-type]

    assert mine.in_transaction
    assert mine.looks == 3
    mine.close()
    other.close()


def test_full_disk_has_no_effect_and_ends_with_it(path: Path) -> None:
    store = SqliteStore.open(path, SystemClock())
    with store.writing() as conn:
        pages = conn.exec_driver_sql("PRAGMA page_count").scalar_one()
        conn.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    with pytest.raises(DiskFull):
        store.scope(LOCAL_TENANT).create_batch(new_batch_of_size(100_000))

    # The connection is a new one, without the bound that stood for the disk.
    assert store.scope(LOCAL_TENANT).batches(limit=1) == []
    make_batch(store)
    store.close()


def new_batch_of_size(size_bytes: int) -> NewBatch:
    plain = new_batch("large")
    return NewBatch(
        **{name: getattr(plain, name) for name in NewBatch.__dataclass_fields__} | {"source": "x" * size_bytes}
    )


def test_outage_starts_the_wait_for_lost_leases_anew(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sqlite, "_BUSY_TIMEOUT_S", 0.01)
    store = SqliteStore.open(path, SystemClock())
    store.availability._since_s = 0.0
    assert store.availability.is_steady()

    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")

    with pytest.raises(StoreUnavailable):
        make_batch(store)
    other.close()

    assert not store.availability.is_steady()
    make_batch(store)
    assert not store.availability.is_steady()
    store.close()


class SteppingClock(SystemClock):
    """The machine's clock, some seconds on."""

    ahead_s = 0.0

    def monotonic_s(self) -> float:
        return super().monotonic_s() + self.ahead_s

    def boot_s(self) -> float:
        return super().boot_s() + self.ahead_s


@pytest.mark.parametrize(("wait_s", "is_steady"), [(0.0, True), (2.0, False)])
def test_long_wait_for_the_file_counts_as_an_outage(path: Path, wait_s: float, is_steady: bool) -> None:
    """Whoever waited so long may find leases that ran out only because their holders waited too."""
    clock = SteppingClock()
    store = SqliteStore.open(path, clock)
    clock.ahead_s += 6.0

    def wait(_conn: Any) -> None:
        clock.ahead_s += wait_s

    event.listen(store._writer._engine, "begin", wait)
    with store.writing():
        assert store.availability.is_steady() is is_steady
    store.close()


def test_refused_words_never_reach_a_row(path: Path) -> None:
    store = SqliteStore.open(path, SystemClock())
    make_batch(store)

    with pytest.raises(OwnError), store.writing() as conn:
        conn.exec_driver_sql("UPDATE batches SET status = 'done'")

    assert store.scope(LOCAL_TENANT).batch(BatchId("b1")).status is BatchStatus.VALIDATING
    store.close()


# -- threads -----------------------------------------------------------------------------------------------------------


def test_reads_do_not_wait_for_the_writer(path: Path) -> None:
    store = SqliteStore.open(path, SystemClock())
    make_batch(store)

    with store.writing() as conn, ThreadPoolExecutor(1) as pool:
        conn.execute(update(batches).values(priority=9))
        during = pool.submit(store.scope(LOCAL_TENANT).batch, BatchId("b1")).result(timeout=10)
        watched = pool.submit(store.watch, SessionId("s")).result(timeout=10)

    assert (during.priority, watched.held) == (0, ())
    assert store.scope(LOCAL_TENANT).batch(BatchId("b1")).priority == 9
    store.close()


def test_renewer_does_not_wait_for_the_lock_of_this_process(path: Path) -> None:
    store = SqliteStore.open(path, SystemClock())
    make_batch(store)
    store.claim(SessionId("s"), lease_s=1, kinds=tuple(TaskKind))
    renewer = store.renewer()

    with store._writer._turn, ThreadPoolExecutor(1) as pool:
        pool.submit(renewer.renew, SessionId("s"), 100.0).result(timeout=10)

    renewer.close()
    store.close()


def test_writers_of_one_process_take_turns(path: Path) -> None:
    store = SqliteStore.open(path, SystemClock())
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        for each in range(5):
            make_batch(store, f"b{number}-{each}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))

    assert len(store.scope(LOCAL_TENANT).batches(limit=100)) == 20
    store.close()


# -- moves -------------------------------------------------------------------------------------------------------------


def test_move_that_saw_an_older_version_is_lost_and_does_nothing(path: Path) -> None:
    store = SqliteStore.open(path, SystemClock())
    make_batch(store)
    moment: Moment = store.moment()
    with store.reading() as conn:
        seen = batch_of_tenant(conn, LOCAL_TENANT, BatchId("b1"))
    store.scope(LOCAL_TENANT).send(BatchId("b1"), BatchEvent.CANCEL_REQUESTED)
    connection = sqlite3.connect(path)
    before = list(connection.iterdump())

    with store.writing() as conn:
        assert move(conn, seen, BatchEvent.DEADLINE_PASSED, moment) is None

    assert list(connection.iterdump()) == before
    connection.close()
    store.close()


def test_every_status_that_can_be_reached_has_its_stamp() -> None:
    reached = {target for row in TRANSITIONS.values() for target in row.values()}

    assert {f"{status}_at" for status in reached} <= set(batches.c.keys())


# -- schema ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("constraint", "members"),
    [("batch_status", BatchStatus), ("task_kind", TaskKind), ("task_state", TaskState)],
)
def test_checks_name_exactly_the_words_of_the_enums(path: Path, constraint: str, members: Any) -> None:
    SqliteStore.open(path, SystemClock()).close()
    engine = create_engine(f"sqlite:///{path}")

    checks = [each for table in ("batches", "tasks") for each in inspect(engine).get_check_constraints(table)]
    engine.dispose()

    (text,) = [str(each["sqltext"]) for each in checks if each["name"] == constraint]
    assert sorted(text.partition("(")[2].rstrip(")").split(", ")) == sorted(f"'{word}'" for word in members)


def test_migrations_make_the_schema_that_the_tables_describe() -> None:
    made, migrated = create_engine("sqlite://"), create_engine("sqlite://")
    with made.begin() as conn:
        metadata.create_all(conn)
        stamp.create_all(conn)
        expected = sql_of(conn)
    with migrated.begin() as conn:
        upgrade(conn)
        version, found = schema.version_of(conn), sql_of(conn)
    made.dispose()
    migrated.dispose()

    assert found == expected
    assert version == schema.VERSION


def rows_of(path: Path, columns: dict[str, list[str]]) -> dict[str, list[Any]]:
    """Read these columns of these tables."""
    connection = sqlite3.connect(path)
    found = {}
    for table, names in columns.items():
        listed = '"' + '", "'.join(names) + '"'
        found[table] = connection.execute(f"SELECT {listed} FROM {table}").fetchall()
    connection.close()
    return found


# Besides the version, only the ends of batches that nobody was ever told.
GONE = "'alembic_version', 'outbox'"


def test_database_of_the_first_schema_is_migrated_with_every_row(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(WRITTEN_BY_0001.read_text())
    tables = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT IN (" + GONE + ")")
    columns = {
        name: [column[1] for column in connection.execute(f"PRAGMA table_info({name})")]
        for (name,) in tables.fetchall()
    }
    connection.close()
    before = rows_of(path, columns)

    SqliteStore.open(path, SystemClock()).close()

    assert rows_of(path, columns) == before
    assert len(before["extents"]) > 0
    assert rows_of(path, {"alembic_version": ["version_num"]})["alembic_version"] == [(schema.VERSION,)]


def test_batch_of_the_first_schema_is_read_and_goes_on(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(WRITTEN_BY_0001.read_text())
    connection.close()

    store = SqliteStore.open(path, SystemClock())
    scope = store.scope(LOCAL_TENANT)
    (batch,) = scope.batches(limit=10)
    store.sweep()
    claim = store.claim(SessionId("s"), lease_s=5, kinds=(TaskKind.SHARD,))
    extents = scope.extents(batch.id)
    store.close()

    assert (batch.status, batch.total_count, batch.succeeded_count) == (BatchStatus.IN_PROGRESS, 60, 40)
    assert (batch.input_name, batch.webhook_url, batch.journal_ended_at) == (None, None, None)
    assert sum(each.count for each in extents) == 40
    assert claim is not None
    assert claim.shard is not None
    assert (claim.shard.line_count, claim.ref.epoch) == (20, 2)


def test_alembic_is_imported_only_for_a_migration(path: Path) -> None:
    code = "import sys; from pathlib import Path; from batchrunner.clock import SystemClock\n"
    code += "from batchrunner.store.sqlite import SqliteStore\n"
    code += f"SqliteStore.open(Path({str(path)!r}), SystemClock()).close(); sys.exit('alembic' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_claim_reads_no_shard_but_the_front_of_each_queue(path: Path) -> None:
    """The plan walks batches, then one index entry per batch: the number of shards does not matter."""
    store = SqliteStore.open(path, SystemClock())
    sent: list[tuple[str, Any]] = []

    def remember(_conn: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: Any) -> None:
        sent.append((statement, parameters))

    event.listen(store._writer._engine, "before_cursor_execute", remember)
    assert store.claim(SessionId("s"), lease_s=1, kinds=tuple(TaskKind)) is None
    statement, parameters = sent[-1]
    with store.writing() as conn:
        plan = [row[3] for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)]
    store.close()

    made_up = ("SCAN found", "SCAN CONSTANT ROW", "SCAN (subquery")
    assert [step for step in plan if step.startswith("SCAN") and not step.startswith(made_up)] == []
    assert any("front" in step and "first_index<?" in step for step in plan), plan


def test_as_many_threads_read_at_once_as_there_are(tmp_path: Path) -> None:
    store = SqliteStore.open(tmp_path / "state.db", SystemClock())
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            assert stack.enter_context(store.reading()).exec_driver_sql("select 1").scalar_one() == 1
    store.close()


def written_by_0002(path: Path) -> None:
    """Make a database as the second schema left it: an end in its outbox, and a batch that has a webhook_url."""
    connection = sqlite3.connect(path)
    connection.executescript(WRITTEN_BY_0001.read_text())
    connection.close()
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    engine = create_engine(f"sqlite:///{path}")
    with engine.begin() as opened:
        config.attributes["connection"] = opened
        command.upgrade(config, "0002")
    engine.dispose()
    connection = sqlite3.connect(path)
    connection.execute("UPDATE batches SET webhook_url = 'https://hooks.example/'")
    told = "SELECT 'evt_1', id, 'batch.failed', '{}', 1 FROM batches"
    connection.execute(f"INSERT INTO outbox (id, batch_id, event, body, created_at) {told}")
    connection.commit()
    assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("0002",)]
    connection.close()


def test_batch_of_the_second_schema_tells_its_end(path: Path) -> None:
    written_by_0002(path)
    tables = ("files", "batches", "claims", "tasks", "extents", "blobs")
    connection = sqlite3.connect(path)
    columns = {name: [row[1] for row in connection.execute(f"PRAGMA table_info({name})")] for name in tables}
    connection.close()
    before = rows_of(path, columns)

    store = SqliteStore.open(path, SystemClock())
    assert rows_of(path, columns) == before
    scope = store.scope(LOCAL_TENANT)
    (batch,) = scope.batches(limit=10)
    assert scope.deliveries(limit=10) == [], "ends of the past are not told any more"
    scope.send(batch.id, BatchEvent.GAVE_UP)
    (delivery,) = scope.deliveries(limit=10)
    store.close()

    assert (delivery.batch_id, delivery.url, delivery.type) == (batch.id, "https://hooks.example/", "batch.failed")


@pytest.mark.parametrize("is_old", [False, True])
def test_only_its_owner_reads_what_signs(path: Path, is_old: bool) -> None:
    if is_old:
        written_by_0002(path)
        path.chmod(0o644)
    store = SqliteStore.open(path, SystemClock())
    store.scope(LOCAL_TENANT).signing_secrets("whsec_secret")

    found = {each.name: stat.S_IMODE(each.stat().st_mode) for each in path.parent.glob(f"{path.name}*")}
    store.close()

    assert {found[path.name], found[f"{path.name}-wal"], found[f"{path.name}-shm"]} == {0o600}


def test_whoever_shares_a_database_may_go_on_to(path: Path) -> None:
    SqliteStore.open(path, SystemClock()).close()
    path.chmod(0o640)

    SqliteStore.open(path, SystemClock()).close()

    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_file_that_nobody_has_open_is_read_without_anything_beside_it(path: Path) -> None:
    clock = SystemClock()
    with contextlib.closing(SqliteStore.open(path, clock)):
        pass

    with contextlib.closing(SqliteStore.open_alone(path, clock)) as store:
        assert list(store.scope(LOCAL_TENANT).batches(limit=1)) == []
        assert not path.with_name(f"{path.name}-shm").exists()


def test_file_that_somebody_has_open_is_not_opened_alone(path: Path) -> None:
    clock = SystemClock()
    with contextlib.closing(SqliteStore.open(path, clock)), pytest.raises(StoreUnavailable):
        SqliteStore.open_alone(path, clock)
