"""Batches over HTTP, run by a real worker against the simulator; every one of them ends in the proof of its ledger."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson
import pytest

from batchrunner.errors import NotFound
from batchrunner.holdings import KeyLimits
from batchrunner.models import TenantId
from batchrunner.store.scope import SqlTenantScope
from batchrunner.store.sqlite import SqliteStore
from tests.api.batching import CHAT, chat_lines, check_ledger, content_of, ended, get, make_batch, until, working
from tests.api.serving import Served
from tests.cli.calling import chat_line

NAMES = [f"line-{number}" for number in range(40)]


async def test_a_batch_runs_from_upload_to_files(api: Served, tmp_path: Path) -> None:
    content = chat_lines(NAMES)
    async with working(tmp_path):
        made = await make_batch(api, content, metadata={"run": "1"})
        batch = await ended(api, made["id"])

    checked = await check_ledger(api, batch, content, tmp_path)
    assert made["status"] == "validating"
    assert (batch["status"], batch["error_file_id"], batch["errors"]) == ("completed", None, None)
    assert batch["request_counts"] == {"total": 40, "completed": 40, "failed": 0}
    assert batch["usage"]["total_tokens"] == batch["usage"]["input_tokens"] + batch["usage"]["output_tokens"] > 0
    assert batch["expires_at"] - batch["created_at"] == 86400
    assert batch["progress"]["remaining"] == 0
    assert checked.succeeded == NAMES


async def test_requests_in_the_create_run_like_lines_of_a_file(api: Served, tmp_path: Path) -> None:
    content = chat_lines(NAMES[:3])
    requests = [orjson.loads(raw) for raw in content.splitlines()]
    raw = orjson.dumps({"endpoint": CHAT, "requests": requests}, option=orjson.OPT_INDENT_2)
    async with working(tmp_path):
        made = await api.call("POST", "/v1/batches", body=raw)
        batch = await ended(api, made.json["id"])

    source = await content_of(api, batch["input_file_id"])
    checked = await check_ledger(api, batch, source, tmp_path)
    assert [orjson.loads(line) for line in source.splitlines()] == requests
    assert checked.succeeded == NAMES[:3]
    assert batch["completion_window"] == "24h"


async def test_a_missing_input_makes_a_batch_that_fails(api: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        order = {"input_file_id": "file-none", "endpoint": CHAT, "completion_window": "24h"}
        made = await api.call("POST", "/v1/batches", json=order)
        batch = await ended(api, made.json["id"])

    assert (made.status, made.json["status"], batch["status"]) == (200, "validating", "failed")
    assert batch["input_file_id"] == "file-none"
    assert batch["errors"]["data"] == [
        {
            "code": "invalid_request",
            "message": "Cannot find file file-none, or organization local does not have access to it.",
            "param": "file_id",
            "line": None,
        }
    ]


async def test_a_bad_line_fails_the_whole_batch_and_is_named(api: Served, tmp_path: Path) -> None:
    content = chat_line("a") + b'{"custom_id": "b"}\n' + b"no json\n"
    async with working(tmp_path):
        batch = await ended(api, (await make_batch(api, content))["id"])
        errors = await get(api, batch["id"], "/errors")

    assert (batch["status"], batch["in_progress_at"], batch["output_file_id"]) == ("failed", None, None)
    assert batch["request_counts"] == {"total": 0, "completed": 0, "failed": 0}
    assert [(each["code"], each["line"]) for each in batch["errors"]["data"]] == [
        ("missing_required_parameter", 2),
        ("invalid_json_line", 3),
    ]
    assert list(batch["errors"]["data"][0]) == ["code", "message", "param", "line"]
    assert errors["total"] == 2
    assert {group["code"] for group in errors["groups"]} == {"missing_required_parameter", "invalid_json_line"}


async def test_refused_lines_are_skipped_on_demand(api: Served, tmp_path: Path) -> None:
    content = chat_line("a") + b"no json\n" + chat_line("b")
    async with working(tmp_path):
        batch = await ended(api, (await make_batch(api, content, on_invalid="skip"))["id"])

    await check_ledger(api, batch, content, tmp_path)
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 3, "completed": 2, "failed": 1}
    assert (batch["progress"]["failed"], batch["progress"]["refused"]) == (0, 1)


async def test_strict_wants_one_model_and_a_url_on_every_line(api: Served, tmp_path: Path) -> None:
    other = orjson.loads(chat_line("b"))
    other["body"]["model"] = "another"
    content = chat_line("a") + orjson.dumps(other) + b"\n"
    bare = orjson.loads(chat_line("c"))
    del bare["url"]
    content += orjson.dumps(bare) + b"\n"
    async with working(tmp_path):
        file_id = (await api.upload(content)).json["id"]
        order = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        made = await api.call("POST", "/openai/v1/batches", json=order)
        batch = await ended(api, made.json["id"])
        shown = await api.call("GET", f"/openai/v1/batches/{batch['id']}")
        listed = await api.call("GET", "/openai/v1/batches")

    assert [(each["code"], each["line"]) for each in batch["errors"]["data"]] == [
        ("mismatched_model", 2),
        ("missing_required_parameter", 3),
    ]
    assert list(shown.json)[-2:] == ["usage", "metadata"]
    assert listed.json["data"] == [shown.json]


async def test_cancel_keeps_what_is_done_and_repeats_without_error(api: Served, tmp_path: Path) -> None:
    content = chat_lines(NAMES[:5]) + chat_line("stuck", simulate="always:stall")
    async with working(tmp_path):
        made = await make_batch(api, content)
        await until(api, made["id"], done=5)
        first = await api.call("POST", f"/v1/batches/{made['id']}/cancel")
        again = await api.call("POST", f"/v1/batches/{made['id']}/cancel")
        batch = await ended(api, made["id"])
        after = await api.call("POST", f"/v1/batches/{made['id']}/cancel")

    checked = await check_ledger(api, batch, content, tmp_path)
    assert (first.status, first.json["status"], again.status, after.status) == (200, "cancelling", 200, 200)
    assert (batch["status"], after.json["status"]) == ("cancelled", "cancelled")
    assert batch["request_counts"] == {"total": 6, "completed": 5, "failed": 0}
    assert checked.codes == {"batch_cancelled": 1}
    assert batch["progress"]["cancelled"] == 1


async def test_pause_holds_a_batch_until_it_is_resumed(api: Served, tmp_path: Path) -> None:
    content = chat_lines(NAMES)
    made = await make_batch(api, content)
    paused = await api.call("POST", f"/v1/batches/{made['id']}/pause")
    async with working(tmp_path) as simulator:
        second = await make_batch(api, chat_lines(["other"]))
        await ended(api, second["id"])
        sent = simulator.stats().unique
        held = await get(api, made["id"])
        resumed = await api.call("POST", f"/v1/batches/{made['id']}/resume")
        batch = await ended(api, made["id"])

    await check_ledger(api, batch, content, tmp_path)
    assert (paused.json["paused_reason"], held["paused_reason"]) == ("operator", "operator")
    assert held["progress"]["bound_by"] == "paused"
    assert sent == 1
    assert resumed.json["paused_reason"] is None
    assert batch["status"] == "completed"


async def test_delete_hides_a_batch_that_is_over_and_leaves_its_files(api: Served, tmp_path: Path) -> None:
    made = [await make_batch(api, chat_lines([name])) for name in "abc"]
    early = await api.call("DELETE", f"/v1/batches/{made[1]['id']}")
    async with working(tmp_path):
        batches = [await ended(api, each["id"]) for each in made]

    deleted = await api.call("DELETE", f"/v1/batches/{made[1]['id']}")

    assert early.status == 409
    assert deleted.json == {"id": made[1]["id"], "object": "batch", "deleted": True}
    assert (await api.call("GET", f"/v1/batches/{made[1]['id']}")).status == 404
    assert await content_of(api, batches[1]["output_file_id"])
    behind = await api.call("GET", f"/v1/batches?after={made[1]['id']}")
    assert [each["id"] for each in behind.json["data"]] == [made[0]["id"]]


async def test_listing_walks_in_pages_and_ends_with_an_empty_one(api: Served) -> None:
    made = [(await make_batch(api, chat_lines(["a"])))["id"] for _ in range(5)]
    found: list[str] = []
    path, has_more = "/v1/batches?limit=2", []

    while page := (await api.call("GET", path)).json:
        has_more.append(page["has_more"])
        if not page["data"]:
            break
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        found += [each["id"] for each in page["data"]]
        path = f"/v1/batches?limit=2&after={page['last_id']}"

    assert found == made[::-1]
    assert has_more == [True, True, False, False]


async def test_creates_with_one_idempotency_key_make_one_batch(api: Served) -> None:
    file_id = (await api.upload(chat_lines(["a"]))).json["id"]
    order = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
    key = {"Idempotency-Key": "k-1"}

    first = await api.call("POST", "/v1/batches", json=order, headers=key)
    again = await api.call("POST", "/v1/batches", json=order, headers=key)
    other = await api.call("POST", "/v1/batches", json=order | {"metadata": {"a": "b"}}, headers=key)

    assert again.json == first.json
    assert other.status == 422
    assert len((await api.call("GET", "/v1/batches")).json["data"]) == 1


async def test_limits_of_a_key_hold(keyed: Served) -> None:
    secret = keyed.add_key("small", limits=KeyLimits(open_batches_max=1, priority_max=3))
    keyed.secret = secret
    file_id = (await keyed.upload(chat_lines(["a"]))).json["id"]
    order = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}

    high = await keyed.call("POST", "/v1/batches", json=order | {"priority": 4})
    first = await keyed.call("POST", "/v1/batches", json=order | {"priority": 3})
    second = await keyed.call("POST", "/v1/batches", json=order)

    assert (high.status, high.json["error"]["code"]) == (403, "priority_above_limit")
    assert (first.status, second.status) == (200, 429)
    assert second.json["error"]["code"] == "quota_exceeded"


async def test_retry_has_no_higher_priority_than_its_key_may_ask_for(keyed: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        made = await make_batch(keyed, chat_lines(["a"], simulate=["400"]), priority=50)
        parent = await ended(keyed, made["id"])
    small = keyed.add_key("acme", limits=KeyLimits(priority_max=3))
    path = f"/v1/batches/{parent['id']}/retry"

    high = await keyed.call("POST", path, json={"priority": 4}, secret=small)
    long = await keyed.call("POST", path, json={"webhook_url": "https://h/" + "a" * 3000}, secret=small)
    retried = await keyed.call("POST", path, json={}, secret=small)

    assert (high.status, long.status) == (403, 400)
    assert long.json["error"]["code"] == "string_above_max_length"
    assert keyed.parts.store.scope(TenantId("acme")).batch(retried.json["id"]).priority == 3


async def test_list_shows_a_batch_that_is_deleted_meanwhile(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await make_batch(api, chat_lines(["a"]))

    def live(*_: object) -> None:
        raise NotFound("no such batch")

    monkeypatch.setattr(SqlTenantScope, "live", live)
    listed = await api.call("GET", "/v1/batches")

    assert [each["id"] for each in listed.json["data"]] == [made["id"]]


@pytest.mark.parametrize("window", ["1m", "90s", "14d", "1h"])
async def test_any_window_from_a_minute_to_two_weeks_is_taken(api: Served, window: str) -> None:
    batch = await make_batch(api, chat_lines(["a"]), completion_window=window)

    seconds = {"1m": 60, "90s": 90, "14d": 14 * 86400, "1h": 3600}[window]
    assert batch["completion_window"] == window
    assert batch["expires_at"] - batch["created_at"] == pytest.approx(seconds, abs=1)


async def test_creates_at_once_are_all_there(api: Served) -> None:
    made = await asyncio.gather(*(make_batch(api, chat_lines([name])) for name in "abcdefgh"))

    listed = (await api.call("GET", "/v1/batches")).json["data"]
    assert {each["id"] for each in listed} == {each["id"] for each in made}


async def test_strict_runs_what_openai_would_run(api: Served, tmp_path: Path) -> None:
    content = chat_lines(NAMES)
    async with working(tmp_path):
        file_id = (await api.upload(content, prefix="/openai/v1")).json["id"]
        order = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        made = await api.call("POST", "/openai/v1/batches", json=order)
        batch = await ended(api, made.json["id"])

    await check_ledger(api, batch, content, tmp_path)
    assert (batch["status"], batch["model"]) == ("completed", "m")


async def test_a_deadline_ends_a_batch_with_what_is_done(api: Served, tmp_path: Path) -> None:
    content = chat_lines(NAMES[:5]) + chat_line("slow", simulate=["stall"])
    async with working(tmp_path):
        made = await make_batch(api, content)
        await until(api, made["id"], done=5)
        store = api.parts.store
        assert isinstance(store, SqliteStore)
        with store.writing() as conn:
            conn.exec_driver_sql("update batches set deadline_at = created_at")
        batch = await ended(api, made["id"])
        errors = await get(api, batch["id"], "/errors")
        again = await api.call("POST", f"/v1/batches/{batch['id']}/retry", json={"codes": ["batch_expired"]})
        child = await ended(api, again.json["id"])

    checked = await check_ledger(api, batch, content, tmp_path)
    assert batch["status"] == "expired"
    assert batch["request_counts"] == {"total": 6, "completed": 5, "failed": 0}
    assert (batch["progress"]["expired"], batch["progress"]["remaining"]) == (1, 0)
    assert checked.codes == {"batch_expired": 1}
    assert [group["code"] for group in errors["groups"]] == ["batch_expired"]
    assert (child["status"], child["request_counts"]["completed"]) == ("completed", 1)


async def test_a_file_of_another_tenant_is_not_there(keyed: Served, tmp_path: Path) -> None:
    file_id = (await keyed.upload(chat_lines(["a"]))).json["id"]
    keyed.secret = keyed.add_key("stranger")
    async with working(tmp_path):
        order = {"input_file_id": file_id, "endpoint": CHAT, "completion_window": "24h"}
        made = await keyed.call("POST", "/v1/batches", json=order)
        batch = await ended(keyed, made.json["id"])

    assert batch["status"] == "failed"
    assert batch["errors"]["data"][0]["message"].startswith(f"Cannot find file {file_id}, or organization stranger ")


async def test_cancel_and_the_end_race_to_one_word(api: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        made = [await make_batch(api, chat_lines(NAMES[:3])) for _ in range(6)]
        replies = await asyncio.gather(
            *(api.call("POST", f"/v1/batches/{each['id']}/cancel") for each in made for _ in range(3))
        )
        batches = [await ended(api, each["id"]) for each in made]

    assert {reply.status for reply in replies} <= {200, 409}
    for batch in batches:
        assert batch["status"] in {"completed", "cancelled"}
        if batch["request_counts"]["total"]:
            await check_ledger(api, batch, chat_lines(NAMES[:3]), tmp_path)


async def test_thousands_of_requests_come_in_one_create_and_again_with_its_key(api: Served, tmp_path: Path) -> None:
    content = chat_lines(f"line-{number}" for number in range(3000))
    order = {"endpoint": CHAT, "requests": [orjson.loads(raw) for raw in content.splitlines()]}
    key = {"Idempotency-Key": "long"}
    async with working(tmp_path):
        made = await api.call("POST", "/v1/batches", json=order, headers=key)
        again = await api.call("POST", "/v1/batches", json=dict(reversed(order.items())), headers=key)
        other = await api.call("POST", "/v1/batches", json=order | {"priority": 1}, headers=key)
        batch = await ended(api, made.json["id"])

    await check_ledger(api, batch, await content_of(api, batch["input_file_id"]), tmp_path)
    assert batch["request_counts"]["completed"] == 3000
    assert again.json["id"] == made.json["id"]
    assert other.status == 422


async def test_a_create_above_its_cap_is_refused_before_it_is_read(api: Served) -> None:
    reply = await api.call("POST", "/v1/batches", body=b" " * (8 * 1024 * 1024 + 1))

    assert reply.status == 413
    assert reply.headers["x-should-retry"] == "false"
