"""Finished lines over HTTP while the rest runs, their failures by cause, and the retries of a batch as one with it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from pathlib import Path
from typing import Any

import aiohttp.web
import orjson
import pytest

from batchrunner import frames, reading
from batchrunner.api import results, retrying
from batchrunner.api.routes import build_app, make_runner
from batchrunner.store.sqlite import SqliteStore
from tests.api.batching import (
    chat_lines,
    check_ledger,
    content_of,
    ended,
    events,
    get,
    make_batch,
    until,
    working,
)
from tests.api.serving import Reply, Served, serving
from tests.cli.calling import chat_line
from tests.invariants import check_shape

GOOD = [f"good-{number}" for number in range(12)]
BAD = [f"bad-{number}" for number in range(4)]
# They fail at their first appearance and succeed at their second.
CONTENT = chat_lines(GOOD) + chat_lines(BAD, simulate=["400"])
STUCK = chat_line("stuck", simulate="always:stall")


def names(reply: Reply) -> list[str]:
    assert reply.status == 200, reply.body
    assert reply.headers["Content-Type"] == "application/jsonl"
    return [orjson.loads(line)["custom_id"] for line in reply.body.splitlines()]


async def read(api: Served, batch_id: str, query: str = "") -> Reply:
    return await api.call("GET", f"/v1/batches/{batch_id}/results{query}")


async def retry(api: Served, batch_id: str, **wanted: Any) -> Reply:
    return await api.call("POST", f"/v1/batches/{batch_id}/retry", json=wanted)


async def test_results_are_readable_while_the_batch_runs(api: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        made = await make_batch(api, CONTENT + STUCK)
        await until(api, made["id"], done=16)
        early = await read(api, made["id"])
        behind = await read(api, made["id"], "?after=16")
        await api.call("POST", f"/v1/batches/{made['id']}/cancel")
        batch = await ended(api, made["id"])
        late = await read(api, made["id"])

    checked = await check_ledger(api, batch, CONTENT + STUCK, tmp_path)
    assert sorted(names(early)) == sorted(GOOD + BAD)
    assert (early.headers["X-Incomplete"], early.headers["X-Last-Sequence"]) == ("true", "16")
    assert names(behind) == []
    assert (late.body, late.headers["X-Incomplete"]) == (early.body, "false")
    assert checked.codes == {"400": 4, "batch_cancelled": 1}


async def test_lines_of_results_are_those_of_the_files(api: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        batch = await ended(api, (await make_batch(api, CONTENT))["id"])

    output = await content_of(api, batch["output_file_id"])
    errors = await content_of(api, batch["error_file_id"])
    succeeded = await read(api, batch["id"], "?outcome=succeeded")
    failed = await read(api, batch["id"], "?outcome=failed")
    await check_ledger(api, batch, CONTENT, tmp_path)
    assert sorted(succeeded.body.splitlines()) == sorted(output.splitlines())
    assert sorted(failed.body.splitlines()) == sorted(errors.splitlines())


@pytest.mark.parametrize("limit", [1, 3, 16, 100])
@pytest.mark.parametrize("outcome", [None, "failed"])
async def test_walking_in_pages_gives_every_line_once(
    api: Served, tmp_path: Path, limit: int, outcome: str | None
) -> None:
    async with working(tmp_path):
        batch = await ended(api, (await make_batch(api, CONTENT))["id"])
    query = f"?limit={limit}" + (f"&outcome={outcome}" if outcome else "")
    found: list[str] = []
    after = "0"

    while True:
        page = await read(api, batch["id"], f"{query}&after={after}")
        assert len(names(page)) <= limit
        found += names(page)
        after = page.headers["X-Last-Sequence"]
        if page.headers["X-Incomplete"] == "false":
            break

    assert sorted(found) == sorted(BAD if outcome else GOOD + BAD)
    assert after == "16"


async def test_errors_are_grouped_with_what_to_do(api: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        made = await make_batch(api, CONTENT + STUCK)
        await until(api, made["id"], done=16)
        early = await get(api, made["id"], "/errors")
        await api.call("POST", f"/v1/batches/{made['id']}/cancel")
        await ended(api, made["id"])
        late = await get(api, made["id"], "/errors")

    assert (early["object"], early["batch_id"], early["is_final"], early["total"]) == (
        "batch.errors",
        made["id"],
        False,
        4,
    )
    assert [group["count"] for group in early["groups"]] == [4]
    assert early["groups"][0]["code"].startswith("400")
    assert {each["custom_id"] for each in early["groups"][0]["samples"]} <= set(BAD)
    assert {group["code"].split()[0]: group["count"] for group in late["groups"]} == {"400": 4, "batch_cancelled": 1}
    assert "/retry" in late["groups"][1]["hint"]


async def test_retry_runs_the_failed_lines_as_a_linked_batch(api: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        parent = await ended(api, (await make_batch(api, CONTENT, metadata={"run": "1"}))["id"])
        made = await retry(api, parent["id"])
        child = await ended(api, made.json["id"])
        merged = await read(api, parent["id"], "?merged=true")
        merged_of_child = await read(api, child["id"], "?merged=true")
        again = await retry(api, parent["id"])

    await check_ledger(api, child, chat_lines(BAD, simulate=["400"]), tmp_path)
    assert (child["parent_id"], child["input_file_id"]) == (parent["id"], parent["input_file_id"])
    assert child["metadata"] == {"run": "1"}
    assert child["request_counts"] == {"total": 4, "completed": 4, "failed": 0}
    assert sorted(names(merged)) == sorted(GOOD + BAD)
    assert all(orjson.loads(line)["response"]["status_code"] == 200 for line in merged.body.splitlines())
    assert merged_of_child.body == merged.body
    assert merged.headers["X-Last-Sequence"] == "16.4"
    assert (again.status, again.json["error"]["code"]) == (400, "nothing_to_retry")


async def test_retry_takes_lines_by_code_and_by_custom_id(api: Served, tmp_path: Path) -> None:
    content = chat_line("a", simulate=["400"]) + chat_line("b", simulate=["404"]) + chat_line("c", simulate=["422"])
    async with working(tmp_path):
        parent = await ended(api, (await make_batch(api, content))["id"])
        by_code = await ended(api, (await retry(api, parent["id"], codes=["404"])).json["id"])
        by_id = await ended(api, (await retry(api, parent["id"], custom_ids=["c", "b"])).json["id"])
        codes = await read(api, by_code["id"])
        ids = await read(api, by_id["id"])

    assert names(codes) == ["b"]
    assert names(ids) == ["c"]


async def test_a_line_is_in_one_unfinished_retry_only(api: Served, tmp_path: Path) -> None:
    content = chat_lines("ab", simulate=["400"] * 3)
    async with working(tmp_path):
        parent = await ended(api, (await make_batch(api, content))["id"])
    first = await retry(api, parent["id"], custom_ids=["a"])

    both = await retry(api, parent["id"])
    other = await retry(api, parent["id"], custom_ids=["b"])
    below = await retry(api, first.json["id"])

    assert (first.status, other.status) == (200, 200)
    assert (both.status, both.json["error"]["code"]) == (409, "already_retrying")
    assert f"Line 1 is being retried by batch {first.json['id']}" in both.json["error"]["message"]
    assert both.headers["x-should-retry"] == "false"
    assert below.status == 409


async def test_of_two_retries_at_once_one_takes_the_line(
    api: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = chat_lines("a", simulate=["400"] * 3)
    async with working(tmp_path):
        parent = await ended(api, (await make_batch(api, content))["id"])
    real = retrying._check_apart
    rivals: list[Reply] = []
    loop = asyncio.get_running_loop()

    async def rival() -> None:
        async with serving(tmp_path) as other:
            rivals.append(await retry(other, parent["id"]))

    def check_apart(*asked: Any) -> None:
        """Let another process make the same retry right after the check."""
        real(*asked)
        monkeypatch.setattr(retrying, "_check_apart", real)
        asyncio.run_coroutine_threadsafe(rival(), loop).result()

    monkeypatch.setattr(retrying, "_check_apart", check_apart)

    late = await retry(api, parent["id"])

    assert rivals[0].status == 200
    assert (late.status, late.json["error"]["code"]) == (409, "already_retrying")


async def test_a_line_under_way_below_a_deleted_retry_is_not_taken_again(api: Served, tmp_path: Path) -> None:
    content = chat_lines("a", simulate=["400"] * 3)
    async with working(tmp_path):
        parent = await ended(api, (await make_batch(api, content))["id"])
        child = await ended(api, (await retry(api, parent["id"])).json["id"])
    grandchild = await retry(api, child["id"])
    assert (await api.call("DELETE", f"/v1/batches/{child['id']}")).status == 200

    again = await retry(api, parent["id"])

    assert grandchild.status == 200
    assert (again.status, again.json["error"]["code"]) == (409, "already_retrying")


async def test_a_retry_that_fails_again_can_be_retried_from_either(api: Served, tmp_path: Path) -> None:
    content = chat_lines("ab", simulate=["400", "400"])
    async with working(tmp_path):
        parent = await ended(api, (await make_batch(api, content))["id"])
        child = await ended(api, (await retry(api, parent["id"])).json["id"])
        merged_then = await read(api, parent["id"], "?merged=true")
        grandchild = await ended(api, (await retry(api, child["id"], custom_ids=["b"])).json["id"])
        rest = await ended(api, (await retry(api, parent["id"])).json["id"])
        merged = await read(api, parent["id"], "?merged=true")

    assert child["request_counts"]["failed"] == 2
    assert sorted(names(merged_then)) == ["a", "b"]
    assert grandchild["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    assert rest["request_counts"] == {"total": 1, "completed": 1, "failed": 0}
    assert sorted(names(merged)) == ["a", "b"]
    assert all(orjson.loads(line)["response"]["status_code"] == 200 for line in merged.body.splitlines())


def end_journals(api: Served) -> None:
    """Do what the sweep does a day after the end."""
    store = api.parts.store
    assert isinstance(store, SqliteStore)
    with store.writing() as conn:
        conn.exec_driver_sql("update batches set journal_ended_at = created_at where completed_at is not null")
        conn.exec_driver_sql("delete from extents")


async def healed_in_part(api: Served, tmp_path: Path) -> dict[str, Any]:
    """Give a batch of which `a` succeeded at once, `b` in a retry, and `c` never."""
    content = chat_lines("a") + chat_line("b", simulate=["400"]) + chat_line("c", simulate="always:400") + b"{\n"
    async with working(tmp_path):
        parent: dict[str, Any] = await ended(api, (await make_batch(api, content, on_invalid="skip"))["id"])
        await ended(api, (await retry(api, parent["id"])).json["id"])
    return parent


async def test_merged_results_outlast_the_journals(api: Served, tmp_path: Path) -> None:
    parent = await healed_in_part(api, tmp_path)
    before = await read(api, parent["id"], "?merged=true")
    end_journals(api)

    after = await read(api, parent["id"], "?merged=true")
    failed = await read(api, parent["id"], "?merged=true&outcome=failed")
    good = await read(api, parent["id"], "?merged=true&outcome=succeeded")

    assert sorted(names(before)) == ["a", "b", "c"]
    assert sorted(after.body.splitlines()) == sorted(before.body.splitlines())
    assert after.headers["X-Last-Sequence"] == before.headers["X-Last-Sequence"]
    assert (names(failed), sorted(names(good))) == (["c"], ["a", "b"])
    assert names(await read(api, parent["id"], f"?merged=true&after={after.headers['X-Last-Sequence']}")) == []
    for query in ("?merged=true&limit=2", "?merged=true&after=1", "?merged=true&after=0.1"):
        page = await read(api, parent["id"], query)
        assert (page.status, page.json["error"]["code"]) == (410, "results_gone")
        assert "read all of them at once" in page.json["error"]["message"]
    assert (await read(api, parent["id"])).status == 410


async def test_merged_results_whose_files_are_gone_are_gone(api: Served, tmp_path: Path) -> None:
    parent = await healed_in_part(api, tmp_path)
    end_journals(api)
    await api.call("DELETE", f"/v1/files/{parent['output_file_id']}")

    gone = await read(api, parent["id"], "?merged=true")

    assert (gone.status, gone.json["error"]["code"]) == (410, "results_gone")
    assert f"its file {parent['output_file_id']} was deleted" in gone.json["error"]["message"]


async def test_deleted_retry_shifts_nobodys_numbers(api: Served, tmp_path: Path) -> None:
    content = chat_lines("abc", simulate=["400"])
    async with working(tmp_path):
        parent = await ended(api, (await make_batch(api, content))["id"])
        first = await ended(api, (await retry(api, parent["id"], custom_ids=["a"])).json["id"])
        page = await read(api, parent["id"], "?merged=true")
        await ended(api, (await retry(api, parent["id"], custom_ids=["b", "c"])).json["id"])
        await api.call("DELETE", f"/v1/batches/{first['id']}")

    rest = await read(api, parent["id"], f"?merged=true&after={page.headers['X-Last-Sequence']}")

    assert page.headers["X-Last-Sequence"] == "3.1"
    assert sorted(names(rest)) == ["b", "c"]
    assert rest.headers["X-Last-Sequence"] == "3.1.2"


async def test_results_that_are_swept_in_mid_reading_are_broken_off(
    api: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with working(tmp_path):
        batch = await ended(api, (await make_batch(api, CONTENT))["id"])
    real = frames.read_records

    def read_records(*given: Any) -> Any:
        end_journals(api)
        return real(*given)

    monkeypatch.setattr(reading, "read_records", read_records)
    store = api.parts.store
    assert isinstance(store, SqliteStore)
    with store.writing() as conn:
        # As if there were one more extent behind those that were found.
        conn.exec_driver_sql("update batches set next_sequence = next_sequence + 5")

    with pytest.raises(aiohttp.ClientError):
        await read(api, batch["id"])


async def test_long_search_for_few_lines_is_made_in_short_turns(
    api: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(results, "_SLICE_S", 0.0)
    async with working(tmp_path):
        batch = await ended(api, (await make_batch(api, CONTENT))["id"])

    assert sorted(names(await read(api, batch["id"], "?outcome=failed"))) == sorted(BAD)
    page = await read(api, batch["id"], "?outcome=failed&limit=3")
    rest = await read(api, batch["id"], f"?outcome=failed&after={page.headers['X-Last-Sequence']}")

    assert (len(names(page)), page.headers["X-Incomplete"]) == (3, "true")
    assert sorted(names(page) + names(rest)) == sorted(BAD)


async def test_cancelled_lines_are_retried_though_the_input_was_deleted(api: Served, tmp_path: Path) -> None:
    content = chat_lines(["a"]) + chat_line("slow", simulate=["stall"])
    async with working(tmp_path):
        made = await make_batch(api, content)
        await until(api, made["id"], done=1)
        await api.call("POST", f"/v1/batches/{made['id']}/cancel")
        parent = await ended(api, made["id"])
        await api.call("DELETE", f"/v1/files/{parent['input_file_id']}")
        child = await ended(api, (await retry(api, parent["id"])).json["id"])
        found = await read(api, child["id"])

    assert parent["status"] == "cancelled"
    assert names(found) == ["slow"]


async def test_events_tell_every_status_once_and_end(api: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        made = await make_batch(api, CONTENT)
        seen = [event async for event in events(api, made["id"])]
    statuses = [event.batch["status"] for event in seen]
    order = ["validating", "in_progress", "finalizing", "completed"]

    assert statuses == sorted(statuses, key=order.index)
    assert statuses[-1] == "completed"
    assert seen[0].name == "status"
    for before, after in itertools.pairwise(seen):
        assert tuple(map(int, before.id.split("-"))) <= tuple(map(int, after.id.split("-")))
        assert (after.name == "status") is (before.id.split("-")[0] != after.id.split("-")[0])
    assert seen[-1].id.endswith("-17")
    assert seen[-1].batch == await get(api, made["id"])
    assert api.parts.watching.poller_count == 0


async def test_a_reader_that_has_seen_the_end_is_told_to_stay_away(api: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        made = await make_batch(api, CONTENT)
        seen = [event async for event in events(api, made["id"])]

    path = f"/v1/batches/{made['id']}/events"
    over = await api.call("GET", path, headers={"Last-Event-ID": seen[-1].id})
    missed = await api.call("GET", path, headers={"Last-Event-ID": seen[0].id})
    garbage = await api.call("GET", path, headers={"Last-Event-ID": "nothing of ours"})

    assert over.status == 204
    assert missed.body.count(b"event: ") == garbage.body.count(b"event: ") == 1


async def test_followers_of_one_batch_share_a_poller(api: Served, tmp_path: Path) -> None:
    made = await make_batch(api, CONTENT)
    async with contextlib.AsyncExitStack() as stack:
        followers = [await stack.enter_async_context(contextlib.aclosing(events(api, made["id"]))) for _ in range(5)]
        for follower in followers:
            assert (await anext(follower)).batch["status"] == "validating"
        await api.call("POST", f"/v1/batches/{made['id']}/pause")
        told = [(await anext(follower)).batch["paused_reason"] for follower in followers]
        pollers = api.parts.watching.poller_count

    assert told == ["operator"] * 5
    assert pollers == 1


async def test_followers_do_not_keep_a_server_from_ending(api: Served) -> None:
    made = await make_batch(api, CONTENT)
    runner = make_runner(build_app(api.parts), shutdown_s=30.0)
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
    port = runner.addresses[0][1]

    async with api.session.get(f"http://127.0.0.1:{port}/v1/batches/{made['id']}/events") as answer:
        first = await answer.content.readuntil(b"\n\n")
        async with asyncio.timeout(10):
            await runner.cleanup()
        rest = await answer.read()

    assert first.startswith(b"event: status\n")
    assert rest == b""


async def test_a_batch_that_is_deleted_ends_its_events(api: Served, tmp_path: Path) -> None:
    made = await make_batch(api, CONTENT)
    async with asyncio.timeout(10), contextlib.aclosing(events(api, made["id"])) as seen:
        await anext(seen)
        store = api.parts.store
        assert isinstance(store, SqliteStore)
        with store.writing() as conn:
            conn.exec_driver_sql("update batches set deleted_at = 0")

        assert [event async for event in seen] == []


async def test_revoked_key_follows_no_longer(keyed: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchrunner.api.events.HEARTBEAT_S", 0.05)
    monkeypatch.setattr("batchrunner.api.events.CACHED_S", 0.0)
    made = await make_batch(keyed, CONTENT)
    (key,) = keyed.parts.store.keys()

    async with asyncio.timeout(10), contextlib.aclosing(events(keyed, made["id"])) as seen:
        await anext(seen)
        keyed.parts.store.revoke_key(key.id, at=keyed.clock.now())

        assert [event async for event in seen] == []


async def test_look_that_breaks_ends_the_events(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    made = await make_batch(api, CONTENT)

    async with asyncio.timeout(10), contextlib.aclosing(events(api, made["id"])) as seen:
        await anext(seen)
        monkeypatch.setattr("batchrunner.api.events.shown", lambda *_: 1 / 0)

        assert [event async for event in seen] == []


async def test_silence_is_filled_with_comments(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchrunner.api.events.HEARTBEAT_S", 0.05)
    made = await make_batch(api, CONTENT)

    async with api.session.get(f"{api.base}/v1/batches/{made['id']}/events") as answer:
        lines = [await answer.content.readline() for _ in range(6)]

    assert lines[-2:] == [b": still here\n", b"\n"]


async def test_results_that_are_no_longer_kept_name_the_files(api: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        batch = await ended(api, (await make_batch(api, CONTENT))["id"])
    store = api.parts.store
    assert isinstance(store, SqliteStore)
    with store.writing() as conn:
        conn.exec_driver_sql("update batches set completed_at = 0")
    expired = store.expire()

    old = await read(api, batch["id"], "?after=3")
    new = await read(api, batch["id"], "?after=16")

    assert expired.journals == (batch["id"],)
    assert (old.status, old.json["error"]["code"]) == (410, "results_gone")
    assert batch["output_file_id"] in old.json["error"]["message"]
    assert (new.status, new.body, new.headers["X-Incomplete"]) == (200, b"", "false")


async def test_every_line_has_the_shape_that_is_published(api: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        batch = await ended(api, (await make_batch(api, CONTENT))["id"])

    for line in (await read(api, batch["id"])).body.splitlines():
        found = orjson.loads(line)
        check_shape("output_line" if found["response"]["status_code"] == 200 else "error_line", found)
