"""Uploads over the wire: parts in any order, laid together once."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from batchrunner import pipeline
from batchrunner.api import uploads
from batchrunner.api.envelope import Refusal
from batchrunner.api.uploads import present_part
from batchrunner.clock import SystemClock
from batchrunner.holdings import UploadId, UploadPart
from batchrunner.housekeeping import clear
from batchrunner.ports import Blobs, TenantScope
from batchrunner.store.scope import SqlTenantScope
from tests.api.serving import FORM_HEADERS, LINE, Served, form, serving

PARTS = (LINE * 3, LINE * 2, LINE[:20], LINE[20:])
WHOLE = b"".join(PARTS)


async def announce(api: Served, size_bytes: int = len(WHOLE), **more: object) -> str:
    wanted = {"bytes": size_bytes, "filename": "in.jsonl", "mime_type": "application/jsonl", "purpose": "batch"} | more
    reply = await api.call("POST", "/v1/uploads", json=wanted)
    assert reply.status == 200
    return reply.json["id"]


async def send_part(api: Served, upload_id: str, content: bytes, **headers: str) -> str:
    raw = form(fields={}, content=content, name="data", filename="upload")
    sent = FORM_HEADERS | {name.replace("_", "-"): value for name, value in headers.items()}
    reply = await api.call("POST", f"/v1/uploads/{upload_id}/parts", body=raw, headers=sent)
    assert reply.status == 200, reply.body
    return reply.json["id"]


async def test_upload_that_is_cancelled_and_swept_in_mid_completion_is_closed(
    api: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload_id = await announce(api, len(LINE))
    part_id = await send_part(api, upload_id, LINE)

    def read_blob(blobs: Blobs, name: str) -> Iterator[bytes]:
        api.scope.cancel_upload(UploadId(upload_id))
        clear(api.parts.store, blobs, in_use=tuple)
        return pipeline.read_blob(blobs, name)

    monkeypatch.setattr(uploads, "read_blob", read_blob)

    done = await api.call("POST", f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part_id]})

    assert done.status == 400
    assert "is cancelled and cannot be changed" in done.json["error"]["message"]


async def test_upload_object_is_that_of_the_original(api: Served) -> None:
    wanted = {"bytes": 5, "filename": "in.jsonl", "mime_type": "text/jsonl", "purpose": "batch"}

    upload = (await api.call("POST", "/openai/v1/uploads", json=wanted)).json

    assert upload["id"].startswith("upload_")
    assert upload == {
        "id": upload["id"],
        "object": "upload",
        "bytes": 5,
        "created_at": upload["created_at"],
        "filename": "in.jsonl",
        "purpose": "batch",
        "status": "pending",
        "expires_at": upload["created_at"] + 3600,
        "file": None,
    }


@pytest.mark.parametrize("contents", [(), (b"",)])
async def test_an_upload_of_nothing_becomes_an_empty_file(api: Served, contents: tuple[bytes, ...]) -> None:
    upload_id = await announce(api, 0, purpose="user_data")
    part_ids = [await send_part(api, upload_id, content) for content in contents]

    done = (await api.call("POST", f"/v1/uploads/{upload_id}/complete", json={"part_ids": part_ids})).json

    assert (done["status"], done["file"]["bytes"], done["file"]["status"]) == ("completed", 0, "processed")


async def test_parts_sent_in_parallel_are_laid_together_in_the_order_named(api: Served) -> None:
    upload_id = await announce(api, expires_after={"anchor": "created_at", "seconds": 7200})
    backwards = await asyncio.gather(*(send_part(api, upload_id, content) for content in reversed(PARTS)))
    md5 = hashlib.md5(WHOLE, usedforsecurity=False).hexdigest()

    wanted = {"part_ids": list(reversed(backwards)), "md5": md5}
    done = (await api.call("POST", f"/v1/uploads/{upload_id}/complete", json=wanted)).json
    content = await api.call("GET", f"/v1/files/{done['file']['id']}/content")

    assert (done["status"], done["object"]) == ("completed", "upload")
    assert done["file"]["expires_at"] == done["file"]["created_at"] + 7200
    assert done["file"]["line_count"] == 6
    assert content.body == WHOLE


async def test_only_the_parts_named_make_the_file(api: Served) -> None:
    upload_id = await announce(api, len(LINE))
    await send_part(api, upload_id, b"a part sent in vain")
    part_id = await send_part(api, upload_id, LINE)

    done = await api.call("POST", f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part_id]})

    assert (await api.call("GET", f"/v1/files/{done.json['file']['id']}/content")).body == LINE


async def test_completing_twice_gives_the_same_file(api: Served) -> None:
    """An SDK sends the request again when the answer was lost."""
    upload_id = await announce(api, len(LINE))
    wanted = {"part_ids": [await send_part(api, upload_id, LINE)]}

    replies = await asyncio.gather(
        *(api.call("POST", f"/v1/uploads/{upload_id}/complete", json=wanted) for _ in range(4))
    )

    assert [reply.status for reply in replies] == [200] * 4
    assert len({reply.json["file"]["id"] for reply in replies}) == 1
    assert len((await api.call("GET", "/v1/files")).json["data"]) == 1


@pytest.mark.parametrize(("end", "status"), [("complete", 200), ("cancel", 400)])
async def test_upload_that_ends_before_its_parts_are_looked_at_is_told_as_it_ended(
    api: Served, monkeypatch: pytest.MonkeyPatch, end: str, status: int
) -> None:
    """With its end its parts are gone."""
    upload_id = await announce(api, len(LINE))
    wanted = {"part_ids": [await send_part(api, upload_id, LINE)]}
    loop, parts = asyncio.get_running_loop(), SqlTenantScope.parts
    others: list[Any] = []

    def late_parts(scope: SqlTenantScope, upload: UploadId) -> list[UploadPart]:
        if not others:
            others.append(None)
            ending = api.call("POST", f"/v1/uploads/{upload_id}/{end}", json=wanted)
            others.append(asyncio.run_coroutine_threadsafe(ending, loop).result())
        return parts(scope, upload)

    monkeypatch.setattr(SqlTenantScope, "parts", late_parts)

    done = await api.call("POST", f"/v1/uploads/{upload_id}/complete", json=wanted)

    assert others[-1].status == 200
    assert done.status == status
    if end == "complete":
        assert done.json == others[-1].json
    else:
        assert "is cancelled and cannot be changed" in done.json["error"]["message"]


async def test_cancel_needs_no_body_and_may_be_repeated(api: Served) -> None:
    upload_id = await announce(api)

    for _ in range(2):
        reply = await api.call("POST", f"/v1/uploads/{upload_id}/cancel")

        assert (reply.status, reply.json["status"], reply.json["file"]) == (200, "cancelled", None)


async def test_a_batch_file_must_begin_with_json_however_it_comes(api: Served) -> None:
    upload_id = await announce(api, 4)
    part_id = await send_part(api, upload_id, b"nope")

    reply = await api.call("POST", f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part_id]})

    assert reply.status == 400
    assert reply.json["error"]["message"] == "Invalid file format for Batch API. Must be .jsonl"


@dataclass(slots=True)
class MovedClock(SystemClock):
    """The machine's clock, put forward by hand."""

    ahead_s: float = 0.0

    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.ahead_s)


async def test_an_upload_ends_after_an_hour(tmp_path: Path) -> None:
    clock = MovedClock()
    async with serving(tmp_path, clock=clock) as api:
        upload_id = await announce(api, len(LINE))
        part_id = await send_part(api, upload_id, LINE)
        clock.ahead_s = 3601

        reply = await api.call("POST", f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part_id]})

    assert reply.status == 400
    assert reply.json["error"]["message"] == f"The upload {upload_id} is expired and cannot be changed any more."


async def test_a_part_of_64_mib_fits(api: Served) -> None:
    content = b"0" * (64 * 1024 * 1024)
    upload_id = await announce(api, len(content), purpose="user_data")

    part_id = await send_part(api, upload_id, content)
    done = await api.call("POST", f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part_id]})

    assert done.json["file"]["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("same", [True, False])
async def test_a_part_with_an_idempotency_key_is_kept_once(api: Served, *, same: bool) -> None:
    upload_id = await announce(api)
    first = await send_part(api, upload_id, LINE, Idempotency_Key="k1")
    raw = form(fields={}, content=LINE if same else LINE * 2, name="data")

    again = await api.call(
        "POST", f"/v1/uploads/{upload_id}/parts", body=raw, headers=FORM_HEADERS | {"Idempotency-Key": "k1"}
    )

    if same:
        assert (again.status, again.json["id"]) == (200, first)
        assert again.headers["idempotent-replayed"] == "true"
    else:
        assert (again.status, again.json["error"]["code"]) == (422, "idempotency_mismatch")


async def test_a_part_that_ended_with_its_upload_is_missing_where_it_is_asked_for_again(api: Served) -> None:
    """The first request made the part and died before its answer; the upload ends while the second one streams in."""
    upload_id = await announce(api)
    part_id = await send_part(api, upload_id, LINE)
    await api.call("POST", f"/v1/uploads/{upload_id}/cancel")

    with pytest.raises(Refusal) as refused:
        await present_part(_Asking(api.scope, {"upload_id": upload_id}), part_id)  # type: ignore[arg-type]

    assert (refused.value.status, refused.value.message) == (404, f"No such UploadPart object: {part_id}")


@dataclass(frozen=True, slots=True)
class _Asking:
    """As much of a call as showing an object needs."""

    scope: TenantScope
    path_params: dict[str, str]

    async def blocking(self, function: Callable[..., object], *arguments: object) -> object:
        return await asyncio.to_thread(function, *arguments)
