"""Runs inside openai-python's own test run: lays the rows that its tests name into the server's folder before each of
them, and holds those that a correct server must refuse to that very refusal.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import tomllib
from collections.abc import Generator, Iterator
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import openai
import pytest

from batchrunner.blobs.local import LocalBlobs
from batchrunner.clock import SystemClock, SystemRng
from batchrunner.holdings import Upload, UploadId, UploadStatus
from batchrunner.models import LOCAL_TENANT, BatchId, File, FileId, NewBatch
from batchrunner.store.sqlite import SqliteStore

FOLDER = "OFFICIAL_SUITE_FOLDER"
REFUSED = Path(__file__).parent / "refused.toml"
CONTENT = b'{"custom_id":"a","method":"POST","url":"/v1/responses","body":{"model":"m","input":"Hello"}}\n'
FILE, BATCH, UPLOAD = "file_id", "batch_id", "upload_abc123"
# What an earlier test did to a row, as children first.
_CLEAR = (
    ("tasks", "batch_id", BATCH),
    ("batches", "id", BATCH),
    ("upload_parts", "upload_id", UPLOAD),
    ("uploads", "id", UPLOAD),
    ("files", "id", FILE),
)


def refusals() -> dict[str, dict[str, Any]]:
    """Give what a correct server refuses, by test without its parameters."""
    listed = tomllib.loads(REFUSED.read_text())["refused"]
    return {test: each for each in listed for test in each["tests"]}


class Rows:
    """A server's folder, opened beside the server."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / "state.db"
        self._clock = SystemClock()
        self.store = SqliteStore.open(self._path, self._clock)
        self._blobs = LocalBlobs(folder / "blobs")

    def lay(self) -> None:
        """Put the rows there as if no test had touched them yet."""
        with closing(sqlite3.connect(self._path, timeout=30)) as raw, raw:
            for table, column, value in _CLEAR:
                raw.execute(f"DELETE FROM {table} WHERE {column} = ?", (value,))
        now = self._clock.now()
        scope = self.store.scope(LOCAL_TENANT)
        blob = f"files/{SystemRng().token_hex(16)}"
        writer = self._blobs.writer(blob)
        writer.write(CONTENT)
        writer.commit()
        file = File(
            id=FileId(FILE),
            tenant=LOCAL_TENANT,
            purpose="batch",
            filename="in.jsonl",
            size_bytes=len(CONTENT),
            sha256=hashlib.sha256(CONTENT).hexdigest(),
            blob=blob,
            created_at=now,
        )
        scope.add_file(file)
        batch = NewBatch(
            id=BatchId(BATCH),
            tenant=LOCAL_TENANT,
            dialect="openai",
            endpoint="/v1/responses",
            input_file_id=file.id,
            input_name=file.id,
            source=blob,
            completion_window="24h",
            deadline_at=now + timedelta(hours=24),
        )
        scope.create_batch(batch)
        upload = Upload(
            id=UploadId(UPLOAD),
            tenant=LOCAL_TENANT,
            filename="in.jsonl",
            purpose="batch",
            mime_type="application/jsonl",
            size_bytes=len(CONTENT),
            status=UploadStatus.PENDING,
            created_at=now,
            expires_at=now + timedelta(hours=1),
        )
        scope.add_upload(upload)

    def close(self) -> None:
        """Let go of the folder."""
        self.store.close()


@pytest.fixture(scope="session")
def rows() -> Iterator[Rows]:
    opened = Rows(Path(os.environ[FOLDER]))
    yield opened
    opened.close()


@pytest.fixture(autouse=True)
def laid(rows: Rows) -> None:
    rows.lay()


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """Ask of a listed test that it ends by our refusal."""
    listed = refusals().get(pyfuncitem.nodeid.split("[")[0])
    if listed is None:
        return (yield)
    try:
        yield
    except openai.APIStatusError as error:
        said = error.body if isinstance(error.body, dict) else {}
        found = {"status": error.status_code} | {name: said.get(name) for name in ("code", "param", "message")}
        assert found == {name: listed.get(name) for name in found}, listed["reason"]
        return True
    return pytest.fail(f"{pyfuncitem.nodeid} is listed as one that we refuse, and was answered", pytrace=False)
