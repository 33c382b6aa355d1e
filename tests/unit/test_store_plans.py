"""What SQLite does for a server's questions: it walks indexes, however many files and batches there have been."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from batchrunner.additions import NewAddition
from batchrunner.clock import SystemClock
from batchrunner.deliveries import Appointments, EventId, EventType
from batchrunner.holdings import KeyLimits
from batchrunner.models import LOCAL_TENANT, BatchId, FileId, SessionId, ShardCut
from batchrunner.ports import TenantScope
from batchrunner.store.sqlite import SqliteStore
from batchrunner.webhooks import sample_event
from tests.contract.worlds import file_of
from tests.unit.test_store_sqlite import WRITTEN_BY_0001, new_batch


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqliteStore]:
    opened = SqliteStore.open(tmp_path / "state.db", SystemClock())
    scope = opened.scope(LOCAL_TENANT)
    for name in ("f1", "f2"):
        scope.add_file(file_of(name, LOCAL_TENANT))
    scope.delete_file(FileId("f2"))
    scope.create_batch(new_batch())
    yield opened
    opened.close()


def plans(store: SqliteStore, ask: Callable[[], object]) -> list[str]:
    """Give the steps that SQLite takes for each statement of a call."""
    sent: list[tuple[str, Any]] = []

    def remember(_conn: Any, _cursor: Any, statement: str, parameters: Any, _context: Any, _many: Any) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE", "WITH")):
            sent.append((statement, parameters))

    engines = (store._writer._engine, store._readers)
    for engine in engines:
        event.listen(engine, "before_cursor_execute", remember)
    ask()
    for engine in engines:
        event.remove(engine, "before_cursor_execute", remember)
    with store.reading() as conn:
        return [row[3] for each in sent for row in conn.exec_driver_sql(f"EXPLAIN QUERY PLAN {each[0]}", each[1])]


@pytest.mark.parametrize(
    ("ask", "index"),
    [
        (
            lambda scope: scope.files(limit=3, after=FileId("f2")),
            "files_by_tenant (tenant=? AND (created_at,id)<(?,?))",
        ),
        (lambda scope: scope.files(limit=3, purpose="batch_output", newest_first=False), "files_by_tenant (tenant=?)"),
        (lambda scope: scope.batches(limit=3, after=BatchId("b1")), "batches_by_tenant (tenant=? AND serial<?)"),
        (lambda scope: scope.open_counts(), "batches_by_tenant_and_status (tenant=? AND status=?)"),
        (
            lambda scope: scope.create_batch(new_batch("b2"), limits=KeyLimits(open_batches_max=9)),
            "batches_by_tenant_and_status (tenant=? AND status=?)",
        ),
        (lambda scope: scope.family(BatchId("b1")), "batches_by_parent (parent_id=?)"),
    ],
)
def test_tenants_questions_are_answered_from_an_index(
    store: SqliteStore, ask: Callable[[TenantScope], object], index: str
) -> None:
    found = plans(store, lambda: ask(store.scope(LOCAL_TENANT)))

    assert any(index in step for step in found), found
    assert [step for step in found if step.startswith(("SCAN", "USE TEMP"))] == []


def test_a_line_leads_to_the_extents_of_its_shard_and_no_others(store: SqliteStore) -> None:
    found = plans(store, lambda: store.scope(LOCAL_TENANT).extents_at(BatchId("b1"), 1))

    assert any("tasks_by_batch (batch_id=? AND kind=? AND first_line<?)" in step for step in found), found
    assert any("extents_by_task (task_id=?)" in step for step in found), found
    assert [step for step in found if step.startswith("SCAN")] == []


@pytest.mark.parametrize(
    ("ask", "indexes"),
    [
        (
            lambda store: store.expire(),
            {"files_to_free", "uploads_by_status", "idempotency_by_age", "blobs_by_state", "batches_with_journals"},
        ),
        (lambda store: store.freeable_blobs(limit=9), {"files_to_free", "batches_by_status", "blobs_by_state"}),
    ],
)
def test_expiry_reads_what_is_due_and_nothing_else(
    store: SqliteStore, ask: Callable[[SqliteStore], object], indexes: set[str]
) -> None:
    found = plans(store, lambda: ask(store))

    assert {index for index in indexes if not any(index in step for step in found)} == set()
    # The constant rows are lists of values that happen to be empty.
    assert [
        step for step in found if step.startswith("SCAN") and "CONSTANT" not in step and "subquery" not in step
    ] == []


@pytest.mark.parametrize("additions", [1, 30])
def test_journal_of_an_open_batch_ends_in_as_few_statements_whatever_joined_it(
    store: SqliteStore, additions: int
) -> None:
    scope, clock = store.scope(LOCAL_TENANT), SystemClock()
    scope.create_batch(replace(new_batch("open"), source="", is_open=True, closes_at=clock.now()))
    for number in range(1, additions + 1):
        store.register_blob(f"add-{number}", owner="api")
        cut = ShardCut(byte_start=0, byte_end=9, first_line=number, first_index=number - 1, line_count=1, checksum=0)
        new = NewAddition(
            first_line=number,
            source=f"add-{number}",
            id_hashes=bytes(8),
            shards=(cut,),
            model="m",
            closes_at=clock.now(),
        )
        scope.add_lines(BatchId("open"), new)
    with store.writing() as conn:
        conn.exec_driver_sql("UPDATE batches SET status = 'completed', completed_at = 1 WHERE id = 'open'")

    found = plans(store, store.expire)

    assert sum("blobs_by_state" in step or "SEARCH blobs" in step for step in found) < 10, found
    assert len(store.freeable_blobs(limit=100)) >= additions


def test_deliveries_are_found_from_indexes(store: SqliteStore) -> None:
    scope = store.scope(LOCAL_TENANT)
    event = sample_event(EventType.COMPLETED, LOCAL_TENANT, EventId("evt_1"), SystemClock().now())
    scope.announce(event, url="https://hooks.example/")
    wanted = Appointments(session=SessionId("s"), lease_s=30, each_max=8, room=8)

    claimed = plans(store, lambda: store.claim_deliveries(wanted))
    listed = plans(store, lambda: scope.deliveries(limit=3, after=scope.deliveries(limit=1)[0].id))
    heard = plans(store, lambda: scope.events(after=0, limit=3))

    assert any("webhook_deliveries_to_claim (state=? AND receiver>?)" in step for step in claimed), claimed
    assert any("webhook_deliveries_to_claim (state=? AND receiver=? AND due_at<?)" in step for step in claimed), claimed
    assert any("webhook_deliveries_by_tenant (tenant=? AND serial<?)" in step for step in listed), listed
    assert any("webhook_events_by_tenant (tenant=? AND serial>?)" in step for step in heard), heard
    walks = [step for step in (*claimed, *listed, *heard) if step.startswith("SCAN") and "walk" not in step]
    assert [step for step in walks if "CONSTANT" not in step and "subquery" not in step] == []


def test_a_migrated_database_has_the_columns_and_indexes_of_a_new_one(tmp_path: Path) -> None:
    old, new = tmp_path / "old.db", tmp_path / "new.db"
    connection = sqlite3.connect(old)
    connection.executescript(WRITTEN_BY_0001.read_text())
    connection.close()
    for path in (old, new):
        SqliteStore.open(path, SystemClock()).close()

    def shape(path: Path) -> dict[str, list[object]]:
        with contextlib.closing(sqlite3.connect(path)) as opened:
            names = [row[0] for row in opened.execute("SELECT name FROM sqlite_master WHERE name LIKE 'webhook%'")]
            return {name: opened.execute(f"PRAGMA table_xinfo({name})").fetchall() for name in sorted(names)}

    assert shape(old) == shape(new)
    assert len(shape(new)) > 4
