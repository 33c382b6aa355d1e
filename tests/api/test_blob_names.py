"""Each blob is known by name before its first byte and needed by a row after its last: nothing stays for ever."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from batchrunner.blobs.local import LocalBlobs, LocalWriter
from batchrunner.holdings import KeyLimits
from batchrunner.housekeeping import clear
from tests.api.batching import CHAT, chat_lines, ended, make_batch, working
from tests.api.serving import FORM_HEADERS, LINE, Served, form
from tests.api.xai import add, added, chat, open_batch

BROKEN = LINE + LINE + b"no json\n"


def states(folder: Path) -> dict[str, str]:
    """Read what the store knows of names."""
    with sqlite3.connect(folder / "state.db") as connection:
        return dict(connection.execute("SELECT name, state FROM blobs"))


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None]]:
    """Collect each name that is opened with what the store says of it at that moment."""
    opened: list[tuple[str, str | None]] = []
    real = LocalBlobs.writer

    def writer(self: LocalBlobs, name: str) -> LocalWriter:
        opened.append((name, states(tmp_path).get(name)))
        return real(self, name)

    monkeypatch.setattr(LocalBlobs, "writer", writer)
    return opened


def check_names(folder: Path, written: list[tuple[str, str | None]]) -> None:
    """Prove that all were pending when they were opened, and that what lies there now is needed or given up."""
    assert [name for name, state in written if state != "pending"] == []
    known = states(folder)
    kept = [name for name in LocalBlobs(folder / "blobs").list("") if not name.startswith("journal/")]
    assert {name: known.get(name) for name in kept} == dict.fromkeys(kept, "live")
    assert "pending" not in known.values()


async def test_names_of_a_whole_life_are_pending_before_and_live_after(
    api: Served, tmp_path: Path, written: list[tuple[str, str | None]]
) -> None:
    broken = (await api.upload(BROKEN)).json["id"]
    assert (await api.call("GET", f"/v1/files/{broken}/validation")).status == 200
    async with working(tmp_path):
        rejected = await ended(api, (await make_batch(api, BROKEN))["id"])
        parent = await ended(
            api,
            (
                await make_batch(
                    api, chat_lines("a") + chat_lines("b", simulate=["400"]) + LINE + b"{", on_invalid="skip"
                )
            )["id"],
        )
        child = await api.call("POST", f"/v1/batches/{parent['id']}/retry", json={})
        await ended(api, child.json["id"])
        asked = [{"custom_id": "a", "body": {"model": "m", "messages": []}}]
        made = await api.call("POST", "/v1/batches", json={"endpoint": CHAT, "requests": asked})
        await ended(api, made.json["id"])
    announced = {"bytes": len(LINE), "filename": "a.jsonl", "mime_type": "x", "purpose": "batch"}
    upload = (await api.call("POST", "/v1/uploads", json=announced)).json["id"]
    part = await api.call(
        "POST", f"/v1/uploads/{upload}/parts", body=form(fields={}, content=LINE, name="data"), headers=FORM_HEADERS
    )
    done = await api.call("POST", f"/v1/uploads/{upload}/complete", json={"part_ids": [part.json["id"]]})

    assert rejected["status"] == "failed"
    assert done.status == 200
    assert {name.partition("/")[0] for name, _ in written} == {"files", "parts", "validations", "reports", "chosen"}
    clear(api.parts.store, api.parts.blobs, in_use=tuple)
    check_names(tmp_path, written)


async def test_refused_inline_create_leaves_no_file(keyed: Served) -> None:
    keyed.secret = keyed.add_key("full", limits=KeyLimits(open_batches_max=0))
    asked = [{"custom_id": "a", "body": {"model": "m", "messages": []}}]

    made = await keyed.call("POST", "/v1/batches", json={"endpoint": CHAT, "requests": asked})

    assert made.status == 429
    assert (await keyed.call("GET", "/v1/files")).json["data"] == []
    assert set(states(keyed.folder).values()) == {"dead"}


async def test_repeated_inline_create_has_one_file(api: Served) -> None:
    asked = {"endpoint": CHAT, "requests": [{"custom_id": "a", "body": {"model": "m", "messages": []}}]}

    first = await api.call("POST", "/v1/batches", json=asked, headers={"Idempotency-Key": "k"})
    again = await api.call("POST", "/v1/batches", json=asked, headers={"Idempotency-Key": "k"})

    assert first.body == again.body
    assert len((await api.call("GET", "/v1/files")).json["data"]) == 1


async def test_validation_that_fails_half_way_gives_its_names_up(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    file_id = (await api.upload(BROKEN)).json["id"]
    real = LocalWriter.commit

    def commit(self: LocalWriter, last_part: str | None = None) -> None:
        monkeypatch.setattr(LocalWriter, "commit", real)
        raise OSError(5, "the disk is gone")

    monkeypatch.setattr(LocalWriter, "commit", commit)

    failed = await api.call("GET", f"/v1/files/{file_id}/validation")

    assert failed.status == 500
    assert set(states(api.folder).values()) == {"live", "dead"}
    assert not list((api.folder / "blobs").rglob("*~*"))
    assert (await api.call("GET", f"/v1/files/{file_id}/validation")).json["problem_count"] == 2


async def test_refused_retry_gives_its_lines_up(api: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        parent = await ended(api, (await make_batch(api, chat_lines("a", simulate=["400"] * 3)))["id"])
    first = await api.call("POST", f"/v1/batches/{parent['id']}/retry", json={})
    again = await api.call("POST", f"/v1/batches/{parent['id']}/retry", json={})
    none = await api.call("POST", f"/v1/batches/{parent['id']}/retry", json={"codes": ["429"]})

    assert (first.status, again.status, none.status) == (200, 409, 400)
    chosen = [state for name, state in states(tmp_path).items() if name.startswith("chosen/")]
    # The last had nothing to write.
    assert sorted(chosen) == ["dead", "live"]


async def test_requests_that_join_are_pending_before_and_live_after(
    api: Served, tmp_path: Path, written: list[tuple[str, str | None]]
) -> None:
    batch_id = await open_batch(api)
    await added(api, batch_id, ["a", "b"])

    refused = await add(api, batch_id, chat("b"))
    clear(api.parts.store, api.parts.blobs, in_use=tuple)

    assert refused.status == 400
    assert [name.startswith(f"added/{batch_id}/") for name, _ in written] == [True, True]
    check_names(tmp_path, written)
