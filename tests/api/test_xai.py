"""xAI's Batches API: open batches and batches of files, requests, results, cancel, and errors as xAI has them."""

from __future__ import annotations

import asyncio
import re
import uuid
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from batchrunner.api.xai_results import token_of
from batchrunner.holdings import KeyLimits
from batchrunner.settings import Settings
from tests.api.batching import chat_lines, check_ledger, content_of, ended, make_batch, until, working
from tests.api.serving import Served, serving
from tests.api.xai import add, added, chat, metadata, open_batch, pages, request, results, show, until_done
from tests.contract.conftest import ManualClock
from tests.pipeline.hands import Place

NAMES = [f"n{number:03}" for number in range(25)]
BATCH_KEYS = (
    "batch_id",
    "name",
    "create_time",
    "expire_time",
    "cancel_time",
    "create_api_key_id",
    "cancel_by_xai_message",
    "state",
    "cost_breakdown",
)


def state(total: int = 0, *, pending: int = 0, success: int = 0, error: int = 0, cancelled: int = 0) -> dict[str, int]:
    return {
        "num_requests": total,
        "num_pending": pending,
        "num_success": success,
        "num_error": error,
        "num_cancelled": cancelled,
    }


def ids(found: list[dict[str, Any]]) -> list[str]:
    return [each["batch_request_id"] for each in found]


# -- batches -----------------------------------------------------------------------------------------------------------


async def test_a_create_with_a_name_is_xais_and_open(api: Served) -> None:
    at_root = (await api.call("POST", "/v1/batches", json={"name": "nightly"})).json
    by_path = (await api.call("POST", "/xai/v1/batches", json={"name": "nightly"})).json

    assert tuple(by_path) == (*BATCH_KEYS, "status", "errors")
    assert {name: type(value) for name, value in by_path.items()} == {name: type(at_root[name]) for name in by_path}
    assert (by_path["name"], by_path["status"], by_path["state"]) == ("nightly", "in_progress", state())
    created, expires = (datetime.fromisoformat(by_path[name]) for name in ("create_time", "expire_time"))
    assert round((expires - created).total_seconds()) == 24 * 3600
    assert (at_root["object"], at_root["metadata"]) == ("batch", {"name": "nightly"})


@pytest.mark.parametrize(
    "body",
    [
        {"name": "x", "endpoint": "/v1/chat/completions"},
        {"name": "x", "completion_window": "24h"},
        {"input_file_id": "file-x"},
        {},
    ],
)
async def test_other_creates_are_not(api: Served, body: dict[str, Any]) -> None:
    reply = await api.call("POST", "/v1/batches", json=body)

    assert reply.status == 400
    assert reply.json["error"]["type"] == "invalid_request_error"


async def test_a_header_asks_for_xai_too(api: Served) -> None:
    batch_id = await open_batch(api)

    asked = (await api.call("GET", f"/v1/batches/{batch_id}", headers={"Batchrunner-Dialect": "xai"})).json
    listed = (await api.call("GET", "/v1/batches?dialect=xai")).json

    assert tuple(asked) == (*BATCH_KEYS, "status", "errors")
    assert tuple(listed) == ("batches", "pagination_token")


async def test_batches_page_newest_first_whoever_made_them(api: Served) -> None:
    made = [await open_batch(api), (await make_batch(api, chat_lines(["a"])))["id"], await open_batch(api)]

    first = (await api.call("GET", "/xai/v1/batches?limit=2")).json
    rest = (await api.call("GET", f"/xai/v1/batches?limit=2&pagination_token={first['pagination_token']}")).json

    assert [each["batch_id"] for each in first["batches"] + rest["batches"]] == made[::-1]
    assert rest["pagination_token"] is None


async def test_a_batch_of_a_file_is_sealed(api: Served, tmp_path: Path) -> None:
    file_id = (await api.upload(chat_lines(NAMES), purpose="")).json["id"]

    made = (await api.call("POST", "/xai/v1/batches", json={"name": "f", "input_file_id": file_id})).json
    refused = await add(api, made["batch_id"], chat("late"))
    async with working(tmp_path):
        batch = await ended(api, made["batch_id"])

    assert (made["input_file_id"], made["state"]) == (file_id, state())
    assert (refused.status, refused.json["code"]) == (400, "invalid-argument")
    assert "made of a file" in refused.json["error"]
    assert batch["state"] == state(25, success=25)
    await check_ledger(api, batch, chat_lines(NAMES), tmp_path)


async def test_one_bad_line_cancels_a_batch_of_a_file_with_a_message(api: Served, tmp_path: Path) -> None:
    content = chat_lines(["a"]) + b'{"custom_id":"b","method":"POST","url":"/v1/nothing","body":{}}\n'
    file_id = (await api.upload(content)).json["id"]
    made = (await api.call("POST", "/v1/batches", json={"name": "f", "input_file_id": file_id})).json

    async with working(tmp_path):
        await ended(api, made["batch_id"])
    batch = await show(api, made["batch_id"])

    assert batch["cancel_by_xai_message"].startswith("line 2: The provided url '/v1/nothing' is not supported")
    assert batch["cancel_time"] is not None
    assert (batch["status"], batch["state"]) == ("failed", state())
    assert [each["line"] for each in batch["errors"]["data"]] == [2]


async def test_a_create_is_made_once_for_a_key(api: Served) -> None:
    key = {"Idempotency-Key": "k"}

    first, again = [await api.call("POST", "/v1/batches", json={"name": "n"}, headers=key) for _ in range(2)]

    assert first.json["batch_id"] == again.json["batch_id"]


async def test_a_batch_tells_its_costs_where_there_is_a_price(tmp_path: Path) -> None:
    async with serving(tmp_path, settings=Settings(prices=("other=9/9", "m=1/3"))) as served, working(tmp_path):
        batch_id = await open_batch(served)
        free = await show(served, batch_id)
        await added(served, batch_id, NAMES)
        await until_done(served, batch_id, 25)
        batch = (await served.call("GET", f"/v1/batches/{batch_id}")).json
        of_file = await ended(served, (await make_batch(served, chat_lines(NAMES)))["id"])

    assert free["cost_breakdown"] is None
    for each, endpoint in ((batch, None), (of_file, "/v1/chat/completions")):
        costs, usage = each["cost_breakdown"], each["usage"]
        assert costs["total_cost_usd_ticks"] == 10_000 * (usage["input_tokens"] + 3 * usage["output_tokens"]) > 0
        assert [(part["endpoint"], part["request_count"]) for part in costs["endpoint_costs"]] == (
            [(endpoint, 25)] if endpoint else []
        )
        assert costs["calculation_time"].endswith("Z")


# -- requests ----------------------------------------------------------------------------------------------------------


async def test_requests_join_while_others_run_and_each_is_answered_once(api: Served, tmp_path: Path) -> None:
    batch_id = await open_batch(api)
    async with working(tmp_path) as simulator:
        for start in range(0, 25, 5):
            await added(api, batch_id, NAMES[start : start + 5])
        await until_done(api, batch_id, 25)
        running = await show(api, batch_id)
        found = await results(api, batch_id, limit=7)
        await api.call("POST", f"/v1/batches/{batch_id}/close")
        batch = await ended(api, batch_id)
        stats = simulator.stats()

    assert (running["status"], running["state"]) == ("in_progress", state(25, success=25))
    assert sorted(ids(found)) == NAMES
    for each in found:
        answer = each["batch_result"]["response"]["chat_get_completion"]
        assert answer["choices"][0]["message"]["content"].endswith(f" {each['batch_request_id']}")
        assert "error_message" not in each
    assert (batch["status"], batch["state"]) == ("completed", state(25, success=25))
    assert stats.repeats == 0
    await check_ledger(api, batch, written(NAMES), tmp_path)


def written(names: list[str]) -> bytes:
    """Write the file that would have asked for the same."""
    lines = []
    for name in names:
        body = chat(name)["batch_request"]["chat_get_completion"]
        line = {"custom_id": name, "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(orjson.dumps(line) + b"\n")
    return b"".join(lines)


async def test_each_kind_of_request_goes_to_its_endpoint(api: Served) -> None:
    batch_id = await open_batch(api)
    kinds: dict[str, tuple[dict[str, Any], str]] = {
        "chat_get_completion": ({"model": "m", "messages": []}, "/v1/chat/completions"),
        "responses": ({"model": "m", "input": "x"}, "/v1/responses"),
        "image_generation": ({"prompt": "x"}, "/v1/images/generations"),
        "image_edit": ({"prompt": "x", "image": {"url": "u"}}, "/v1/images/edits"),
        "video_generation": ({"prompt": "x", "model": "v"}, "/v1/videos/generations"),
        "video_extension": ({"prompt": "x", "duration": 3}, "/v1/videos/extensions"),
    }
    wanted = [request(kind, kind, **body) for kind, (body, _) in kinds.items()]
    edit = request("edit", "video_generation", prompt="x", video={"url": "u"})

    assert (await add(api, batch_id, *wanted, edit)).status == 200

    found = {each["batch_request_id"]: each for each in await metadata(api, batch_id, limit=3)}
    assert {name: each["endpoint"] for name, each in found.items()} == {
        **{kind: url for kind, (_, url) in kinds.items()},
        "edit": "/v1/videos/edits",
    }
    assert {each["state"] for each in found.values()} == {"pending"}
    assert (found["responses"]["model"], found["image_edit"]["model"]) == ("m", "")


async def test_a_request_without_an_id_gets_one(api: Served) -> None:
    batch_id = await open_batch(api)

    await add(api, batch_id, chat(None, prompt="a"), chat(None, prompt="b"))

    first, second = ids(await metadata(api, batch_id))
    assert uuid.UUID(first).version == uuid.UUID(second).version == 4
    assert first != second


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "Invalid 'batch_requests': empty array"),
        ([chat("a"), {"batch_request": {}}], r"Invalid 'batch_requests\[1\].batch_request': it needs one key"),
        ([{"batch_request": {"chat_get_completion": {}, "responses": {}}}], "it needs one key, .* and has 2"),
        ([request("a", "telepathy")], "the kind of request is none of chat_get_completion, responses"),
        ([chat("a"), request("b", "responses", input="x")], r"batch_requests\[1\]: Model parameter is required."),
        ([chat("a"), chat("a")], r"batch_requests\[1\]: The custom_id 'a' for this request is a duplicate"),
        ([chat("a", stream=True)], "Streaming is not supported"),
        ([chat("x" * 513)], "it is 513 characters long, at most 512 are allowed"),
        ([{"batch_request_id": "a"}], r"Missing required parameter: 'batch_requests\[0\].batch_request'."),
        ([{"batch_request_id": 7, "batch_request": {}}], "expected a string or null, but got an integer instead"),
    ],
)
async def test_what_does_not_fit_joins_not_even_in_part(api: Served, requests: list[Any], message: str) -> None:
    batch_id = await open_batch(api)

    reply = await add(api, batch_id, *requests)

    assert reply.status == 400
    assert tuple(reply.json) == ("code", "error")
    assert reply.json["code"] == "invalid-argument"
    assert re.search(message, reply.json["error"]), reply.json
    assert (await show(api, batch_id))["state"] == state()


async def test_a_call_has_no_more_requests_than_memory_is_for(api: Served) -> None:
    batch_id = await open_batch(api)

    reply = await add(api, batch_id, *[request(None, "responses")] * 100_001)

    assert (reply.status, reply.json["code"]) == (400, "invalid-argument")
    assert "maximum length 100000" in reply.json["error"]


async def test_an_id_is_taken_once_in_a_batch_and_again_in_another(api: Served) -> None:
    batch_id, other = await open_batch(api), await open_batch(api)
    await added(api, batch_id, NAMES)

    reply = await add(api, batch_id, chat("fresh"), chat(NAMES[7]))

    assert (reply.status, reply.json["code"]) == (400, "invalid-argument")
    assert f"'{NAMES[7]}'" in reply.json["error"]
    assert (await show(api, batch_id))["state"]["num_requests"] == 25
    await added(api, other, NAMES)


async def test_ids_are_known_after_a_restart(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        batch_id = await open_batch(served)
        await added(served, batch_id, NAMES)
    async with serving(tmp_path) as served:
        taken = await add(served, batch_id, chat(NAMES[3]))
        await added(served, batch_id, ["fresh"])

        assert taken.status == 400
        assert (await show(served, batch_id))["state"]["num_requests"] == 26


async def test_requests_of_many_callers_at_once_all_join(api: Served) -> None:
    batch_id = await open_batch(api)

    await asyncio.gather(*(added(api, batch_id, [f"{name}-{number}" for number in range(3)]) for name in NAMES))

    found = ids(await metadata(api, batch_id, limit=10))
    assert len(found) == len(set(found)) == 75


async def test_an_addition_is_made_once_for_a_key(api: Served) -> None:
    batch_id = await open_batch(api)

    first = await add(api, batch_id, chat(None, prompt="a"), **{"Idempotency-Key": "k"})
    again = await add(api, batch_id, chat(None, prompt="a"), **{"Idempotency-Key": "k"})
    other = await add(api, batch_id, chat(None, prompt="b"), **{"Idempotency-Key": "k"})

    assert (first.status, first.body) == (again.status, again.body) == (200, b"{}")
    assert again.headers["idempotent-replayed"] == "true"
    assert other.status == 422
    assert (await show(api, batch_id))["state"]["num_requests"] == 1


async def test_a_keys_limit_of_waiting_lines_holds(keyed: Served) -> None:
    keyed.secret = keyed.add_key("acme", limits=KeyLimits(queued_lines_max=10))
    batch_id = await open_batch(keyed)
    await added(keyed, batch_id, NAMES[:8])

    reply = await add(keyed, batch_id, *(chat(name) for name in NAMES[8:12]))

    assert (reply.status, reply.json["code"]) == (429, "resource-exhausted")


async def test_a_batch_has_no_more_lines_than_the_setting_lets_it(tmp_path: Path) -> None:
    async with serving(tmp_path, settings=Settings(lines_max=10)) as served:
        batch_id = await open_batch(served)
        await added(served, batch_id, NAMES[:8])

        reply = await add(served, batch_id, *(chat(name) for name in NAMES[8:12]))

    assert reply.status == 400
    assert "has 8 requests, at most 10" in reply.json["error"]


async def test_what_failed_to_join_leaves_no_blob(api: Served) -> None:
    batch_id = await open_batch(api)
    await added(api, batch_id, ["a"])

    await add(api, batch_id, chat("a"))

    stored = set(api.parts.blobs.list("added/"))
    assert len(stored) == 2
    assert len(stored.intersection(api.parts.store.freeable_blobs(limit=10))) == 1


# -- results -----------------------------------------------------------------------------------------------------------


async def test_results_are_read_while_the_batch_runs(api: Served, tmp_path: Path) -> None:
    batch_id = await open_batch(api)
    await added(api, batch_id, NAMES[:10])
    await added(api, batch_id, ["slow"], simulate="always:stall")

    async with working(tmp_path):
        await until_done(api, batch_id, 10)
        first = await results(api, batch_id)
        states = {each["batch_request_id"]: each["state"] for each in await metadata(api, batch_id)}

    assert sorted(ids(first)) == NAMES[:10]
    assert states == {**dict.fromkeys(NAMES[:10], "succeeded"), "slow": "pending"}


async def test_a_page_goes_on_where_the_one_before_ended_though_more_came(api: Served, tmp_path: Path) -> None:
    batch_id = await open_batch(api)
    await added(api, batch_id, NAMES[:10])
    async with working(tmp_path):
        await until_done(api, batch_id, 10)
        first = (await api.call("GET", f"/v1/batches/{batch_id}/results?limit=6")).json
        await added(api, batch_id, NAMES[10:])
        await until_done(api, batch_id, 25)
        query = f"?limit=1000&pagination_token={first['pagination_token']}"
        rest = (await api.call("GET", f"/v1/batches/{batch_id}/results{query}")).json

    assert sorted(ids(first["results"]) + ids(rest["results"])) == NAMES


async def test_a_failure_is_told_in_both_ways(api: Served, tmp_path: Path) -> None:
    batch_id = await open_batch(api)
    await add(api, batch_id, chat("bad", simulate=["400"]), chat("good"))

    async with working(tmp_path):
        await until_done(api, batch_id, 2)
        found = {each["batch_request_id"]: each for each in await results(api, batch_id)}
        states = {each["batch_request_id"]: each["state"] for each in await metadata(api, batch_id)}

    error = found["bad"]["batch_result"]["error"]
    assert error["code"] == 3
    assert found["bad"]["error_message"] == error["message"] != ""
    assert states == {"bad": "failed", "good": "succeeded"}
    assert (await show(api, batch_id))["state"] == state(2, success=1, error=1)


async def test_an_answer_of_responses_comes_as_a_chat_completion(api: Served, tmp_path: Path) -> None:
    batch_id = await open_batch(api)
    await add(api, batch_id, request("r", "responses", model="m", input="hello"))

    async with working(tmp_path):
        await until_done(api, batch_id, 1)
        (found,) = await results(api, batch_id)

    (key,) = found["batch_result"]["response"]
    answer = found["batch_result"]["response"][key]
    assert (key, answer["object"], answer["model"]) == ("chat_get_completion", "chat.completion", "m")
    assert answer["choices"][0]["message"]["content"].endswith(" hello")
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + answer["usage"]["completion_tokens"]


async def test_a_page_is_bounded_by_its_bytes(api: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("batchrunner.api.xai_results.PAGE_BYTES_MAX", 2500)
    batch_id = await open_batch(api)
    await added(api, batch_id, NAMES)

    async with working(tmp_path):
        await until_done(api, batch_id, 25)
        found = await pages(api, batch_id, "results")

    assert len(found) > 5
    assert all(1 <= len(page.json["results"]) <= 4 for page in found)
    assert sorted(each for page in found for each in ids(page.json["results"])) == NAMES


async def test_an_openai_batch_is_read_as_xais_and_the_reverse(api: Served, tmp_path: Path) -> None:
    theirs = (await make_batch(api, chat_lines(NAMES)))["id"]
    ours = await open_batch(api)
    await added(api, ours, NAMES)

    async with working(tmp_path):
        await ended(api, theirs)
        await until_done(api, ours, 25)
        as_page = await results(api, theirs)
        plain = await api.call("GET", f"/v1/batches/{theirs}/results")
        as_lines = await api.call("GET", f"/v1/batches/{ours}/results", headers={"Accept": "application/jsonl"})
        after = await api.call("GET", f"/v1/batches/{ours}/results?after=20")

    assert sorted(ids(as_page)) == NAMES
    assert plain.headers["Content-Type"] == "application/jsonl"
    assert sorted(orjson.loads(line)["custom_id"] for line in as_lines.body.splitlines()) == NAMES
    assert len(after.body.splitlines()) == 5


@pytest.mark.parametrize("what", ["results", "requests"])
@pytest.mark.parametrize("token", ["x", "!!", "c3g", "%C3%A9", "ajF4"])
async def test_a_token_that_is_none_is_refused(api: Served, what: str, token: str) -> None:
    batch_id = await open_batch(api)

    reply = await api.call("GET", f"/xai/v1/batches/{batch_id}/{what}?pagination_token={token}")

    assert (reply.status, reply.json["code"]) == (400, "invalid-argument")
    assert "pagination_token" in reply.json["error"]


async def test_a_token_for_the_middle_of_a_line_is_refused(api: Served, tmp_path: Path) -> None:
    batch_id = (await make_batch(api, chat_lines(NAMES)))["id"]
    async with working(tmp_path):
        await ended(api, batch_id)

    replies = [
        await api.call("GET", f"/xai/v1/batches/{batch_id}/results?pagination_token={token_of('o', place)}")
        for place in (0, 5, 10**17)
    ]

    assert [each.status for each in replies] == [200, 400, 400]
    assert "pagination_token" in replies[1].json["error"]


# -- the end -----------------------------------------------------------------------------------------------------------


async def test_cancelled_requests_are_results_too(api: Served, tmp_path: Path) -> None:
    batch_id = await open_batch(api)
    await added(api, batch_id, NAMES[:5])
    async with working(tmp_path, concurrency=2):
        await until_done(api, batch_id, 5)
        await added(api, batch_id, NAMES[5:], simulate="always:stall")
        await until(api, batch_id, done=5)
        cancelled = (await api.call("POST", f"/v1/batches/{batch_id}:cancel")).json
        late = await add(api, batch_id, chat("late"))
        await ended(api, batch_id)
    batch, found = await show(api, batch_id), await results(api, batch_id, limit=4)
    again = await api.call("POST", f"/xai/v1/batches/{batch_id}%3Acancel")

    assert cancelled["cancel_time"] is not None
    assert (late.status, late.json["code"]) == (400, "invalid-argument")
    assert batch["state"] == state(25, success=5, cancelled=20)
    assert sorted(ids(found)) == NAMES
    failures = [each["batch_result"]["error"]["code"] for each in found if "error" in each["batch_result"]]
    assert failures == [1] * 20
    assert {each["state"] for each in await metadata(api, batch_id)} == {"succeeded", "cancelled"}
    assert (again.status, again.json["status"]) == (200, "cancelled")


async def test_a_batch_whose_time_is_over_counts_the_rest_as_errors(api: Served, tmp_path: Path) -> None:
    batch_id = await open_batch(api)
    await added(api, batch_id, NAMES[:3])
    expire(api, batch_id)

    async with working(tmp_path, is_down=True):
        batch = await ended(api, batch_id)

    assert (batch["status"], batch["state"]) == ("expired", state(3, error=3))
    found = await results(api, batch_id)
    assert [(each["batch_request_id"], each["batch_result"]["error"]["code"]) for each in found] == [
        (name, 4) for name in NAMES[:3]
    ]
    assert {each["state"] for each in await metadata(api, batch_id)} == {"failed"}


def expire(served: Served, batch_id: str) -> None:
    """Say in the store that the batch's time is over."""
    store: Any = served.parts.store
    with store.writing() as conn:
        conn.exec_driver_sql("update batches set deadline_at = 1 where id = ?", (batch_id,))


async def test_results_outlast_the_journal(api: Served, tmp_path: Path) -> None:
    batch_id = await open_batch(api)
    wanted = [chat("bad", simulate=["400"]), *(chat(name) for name in NAMES)]
    await add(api, batch_id, *wanted)
    async with working(tmp_path):
        await until_done(api, batch_id, 26)
        before = await results(api, batch_id)
        await api.call("POST", f"/v1/batches/{batch_id}/close")
        await ended(api, batch_id)
    token = (await api.call("GET", f"/v1/batches/{batch_id}/results?limit=3")).json["pagination_token"]
    store: Any = api.parts.store
    with store.writing() as conn:
        conn.exec_driver_sql("update batches set completed_at = 1 where id = ?", (batch_id,))
    store.expire()

    after = await results(api, batch_id, limit=4)
    stale = await api.call("GET", f"/v1/batches/{batch_id}/results?pagination_token={token}")
    listed = await api.call("GET", f"/v1/batches/{batch_id}/requests")

    assert sorted(map(orjson.dumps, after)) == sorted(map(orjson.dumps, before))
    assert (stale.status, listed.status) == (410, 410)


async def test_an_idle_batch_ends_by_itself(tmp_path: Path) -> None:
    async with serving(tmp_path, settings=Settings(open_idle_s=0.0)) as served:
        batch_id = await open_batch(served)
        await added(served, batch_id, NAMES)
        async with working(tmp_path):
            batch = await ended(served, batch_id)
        late = await add(served, batch_id, chat("late"))

    assert (batch["status"], batch["state"]) == ("completed", state(25, success=25))
    assert "is closed, and its status 'completed'" in late.json["error"]


async def test_requests_of_an_open_batch_that_failed_are_retried_as_a_whole(api: Served, tmp_path: Path) -> None:
    batch_id = await open_batch(api)
    await add(api, batch_id, chat("good"), chat("bad", simulate=["400"]))
    await add(api, batch_id, chat("worse", simulate=["400", "400"]), chat("fine"))
    async with working(tmp_path):
        await until_done(api, batch_id, 4)
        await api.call("POST", f"/v1/batches/{batch_id}/close")
        await ended(api, batch_id)
        first = await api.call("POST", f"/v1/batches/{batch_id}/retry")
        assert first.status == 200, first.body
        child = await ended(api, first.json["id"])
        second = await api.call("POST", f"/v1/batches/{batch_id}/retry")
        grandchild = await ended(api, second.json["id"])

    third = await api.call("POST", f"/v1/batches/{batch_id}/retry")
    merged = await api.call("GET", f"/v1/batches/{batch_id}/results?merged=true")

    assert (child["state"], child["status"]) == (state(2, success=1, error=1), "completed")
    assert (grandchild["state"], grandchild["status"]) == (state(1, success=1), "completed")
    assert (third.status, third.json["error"]["code"]) == (400, "nothing_to_retry")
    answered = {
        line["custom_id"]: line["response"]["status_code"] for line in map(orjson.loads, merged.body.splitlines())
    }
    assert answered == dict.fromkeys(("good", "bad", "worse", "fine"), 200)
    named = [
        orjson.loads(line)["custom_id"] for line in (await content_of(api, first.json["input_file_id"])).splitlines()
    ]
    assert named == ["good", "bad", "worse", "fine"]


async def test_requests_that_are_no_longer_kept_are_not_retried(tmp_path: Path) -> None:
    clock = ManualClock()
    async with serving(tmp_path, clock=clock) as served:
        batch_id = await open_batch(served)
        await added(served, batch_id, ["a"])
        await served.call("POST", f"/v1/batches/{batch_id}:cancel")
        hand = Place(tmp_path, clock=clock).hand("one")
        hand.seal()
        clock.advance(25 * 3600)
        for _ in range(2):
            hand.store.expire()
        hand.store.close()

        reply = await served.call("POST", f"/v1/batches/{batch_id}/retry")

    assert (reply.status, reply.json["error"]["code"]) == (410, "input_gone")


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/xai/v1/batches/x", 404, "not-found"),
        ("POST", "/v1/batches/x:cancel", 404, "not-found"),
        ("GET", "/v1/batches/x/requests", 404, "not-found"),
        ("POST", "/xai/v1/batches", 400, "invalid-argument"),
        ("GET", "/xai/v1/nothing", 404, "not-found"),
        ("GET", "/xai/v1/uploads", 404, "not-found"),
        ("GET", "/xai/v1/files/x", 404, "not-found"),
        ("GET", "/xai/v1/batches?limit=0", 400, "invalid-argument"),
        ("DELETE", "/xai/v1/batches", 405, "invalid-argument"),
    ],
)
async def test_refusals_have_xais_shape(api: Served, method: str, path: str, status: int, code: str) -> None:
    reply = await api.call(method, path)

    assert (reply.status, reply.json["code"]) == (status, code)
    assert tuple(reply.json) == ("code", "error")


async def test_no_key_is_unauthenticated(keyed: Served) -> None:
    keyed.secret = None

    reply = await keyed.call("GET", "/xai/v1/batches")

    assert (reply.status, reply.json["code"]) == (401, "unauthenticated")


async def test_files_are_uploaded_listed_and_deleted_under_xais_path(api: Served) -> None:
    file = (await api.upload(prefix="/xai/v1", purpose="", expires_after="3600")).json

    listed = (await api.call("GET", "/xai/v1/files")).json
    content = await api.call("GET", f"/xai/v1/files/{file['id']}/content")
    deleted = (await api.call("DELETE", f"/xai/v1/files/{file['id']}")).json

    assert ([each["id"] for each in listed["data"]], listed["pagination_token"]) == ([file["id"]], None)
    assert content.status == 200
    assert deleted == {"id": file["id"], "object": "file", "deleted": True}
