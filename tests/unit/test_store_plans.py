"""What SQLite does for a server's questions: it walks indexes, however many files and batches there have been."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from batchrunner.clock import SystemClock
from batchrunner.holdings import KeyLimits
from batchrunner.models import LOCAL_TENANT, BatchId, FileId
from batchrunner.ports import TenantScope
from batchrunner.store.sqlite import SqliteStore
from tests.contract.worlds import file_of
from tests.unit.test_store_sqlite import new_batch


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
        if statement.startswith(("SELECT", "UPDATE", "DELETE")):
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
