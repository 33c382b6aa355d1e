"""What contract suites share: a clock that tests move, and the implementations to prove."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from batchrunner.ports import Store
from batchrunner.store.sqlite import SqliteStore
from tests.contract.worlds import World


@dataclass(slots=True)
class ManualClock:
    """Clock that stands still until a test moves it."""

    wall: datetime = datetime(2026, 1, 1, tzinfo=UTC)
    boot: float = 1000.0
    mono: float = 500.0
    boot_name: str = "boot-1"

    def monotonic_s(self) -> float:
        return self.mono

    def boot_s(self) -> float:
        return self.boot

    def boot_id(self) -> str:
        return self.boot_name

    def now(self) -> datetime:
        return self.wall

    async def sleep(self, duration_s: float) -> None:
        self.advance(duration_s)

    def advance(self, duration_s: float) -> None:
        self.wall += timedelta(seconds=duration_s)
        self.boot += duration_s
        self.mono += duration_s

    def suspend(self, duration_s: float) -> None:
        """Close the lid: wall and boot time run on, the process's own time does not."""
        self.wall += timedelta(seconds=duration_s)
        self.boot += duration_s

    def reboot(self) -> None:
        self.boot_name = f"{self.boot_name}-next"
        self.boot = 10.0


@dataclass(slots=True)
class SqliteBackend:
    """Stores over one SQLite file: several of them stand for several processes."""

    path: Path
    clock: ManualClock
    opened: list[SqliteStore] = field(default_factory=list)

    def open(self) -> Store:
        store = SqliteStore.open(self.path, self.clock)
        self.opened.append(store)
        return store

    def dump(self) -> str:
        """Everything that is committed, as text: two equal dumps mean that nothing happened."""
        connection = sqlite3.connect(self.path)
        try:
            return "\n".join(connection.iterdump())
        finally:
            connection.close()

    def change(self, statement: str) -> None:
        """Leave rows as a crash of another version might: no Store does this."""
        connection = sqlite3.connect(self.path, isolation_level=None)
        try:
            connection.execute(statement)
        finally:
            connection.close()

    def close(self) -> None:
        for store in self.opened:
            store.close()


BACKENDS: dict[str, Callable[[Path, ManualClock], SqliteBackend]] = {
    "sqlite": lambda folder, clock: SqliteBackend(folder / "state.db", clock),
}


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture(params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest, tmp_path: Path, clock: ManualClock) -> Iterator[SqliteBackend]:
    made = BACKENDS[request.param](tmp_path, clock)
    yield made
    made.close()


@pytest.fixture
def world(backend: SqliteBackend, clock: ManualClock) -> World:
    return World(backend, clock)
