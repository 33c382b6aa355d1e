"""The schema of a data folder: checked without a change, brought up to date, refused when it is newer."""

from __future__ import annotations

import fcntl
import os
import sqlite3
from pathlib import Path

import pytest

from batchrunner.app import open_adapters
from batchrunner.store.schema import VERSION
from tests.cli.calling import Called, call
from tests.e2e.test_previous_version import WRITTEN


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return tmp_path / "served"


def migrate(folder: Path, *flags: str) -> Called:
    return call("migrate", "--data", folder, *flags)


def write_first_schema(folder: Path) -> None:
    folder.mkdir()
    connection = sqlite3.connect(folder / "state.db")
    connection.executescript((WRITTEN / "state.sql").read_text())
    connection.close()


def stamp(folder: Path, version: str) -> None:
    connection = sqlite3.connect(folder / "state.db")
    connection.execute("UPDATE alembic_version SET version_num = ?", (version,))
    connection.commit()
    connection.close()


def test_check_of_no_folder_makes_none_and_exits_1(folder: Path) -> None:
    checked = migrate(folder, "--check")

    assert checked.code == 1
    assert "no database" in checked.out
    assert not folder.exists()


def test_check_of_an_older_schema_changes_nothing_and_exits_1(folder: Path) -> None:
    write_first_schema(folder)
    before = (folder / "state.db").read_bytes()

    checked = migrate(folder, "--check")

    assert checked.code == 1
    assert "schema 0001" in checked.out
    assert (folder / "state.db").read_bytes() == before


def test_older_schema_is_brought_up_to_date(folder: Path) -> None:
    write_first_schema(folder)

    assert migrate(folder).code == 0

    checked = migrate(folder, "--check")
    assert checked.code == 0
    assert VERSION in checked.out


def test_new_folder_is_made(folder: Path) -> None:
    assert migrate(folder).code == 0
    assert migrate(folder, "--check").code == 0


@pytest.mark.parametrize("command", ["check", "migrate", "serve", "keys"])
def test_newer_schema_is_refused_by_all(folder: Path, command: str) -> None:
    open_adapters(folder).store.close()
    stamp(folder, "9999")
    words = {
        "check": ["migrate", "--check"],
        "migrate": ["migrate"],
        "serve": ["serve", "--port", "0"],
        "keys": ["keys", "list"],
    }

    refused = call(*words[command], "--data", folder)

    assert refused.code == 1
    assert "9999" in refused.err
    assert "Install the version that wrote it" in refused.err


def test_folder_of_a_running_server_is_left_alone(folder: Path) -> None:
    write_first_schema(folder)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.write(f"{os.getpid()}\n")
        lock.flush()

        refused = migrate(folder)

    assert refused.code == 1
    assert f"process {os.getpid()}" in refused.err
    assert migrate(folder, "--check").code == 1


def test_what_is_no_database_is_said(folder: Path) -> None:
    folder.mkdir()
    (folder / "state.db").write_bytes(b"no database at all, but long enough to be looked at")

    assert migrate(folder, "--check").code == 1
    assert "store_unavailable" not in migrate(folder, "--check").out
