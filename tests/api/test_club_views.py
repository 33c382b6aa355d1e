"""A batch of jobs through the views of other dialects: the same results in each, with a retry in them and a cancel."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.api.batching import working
from tests.api.club import CHAT, IMAGES, chat, created, job, until_done, until_over
from tests.api.serving import Served
from tests.api.xai import metadata, results


def content_of(body: Any) -> str:
    return str(body["choices"][0]["message"]["content"]).rpartition(" ")[2]


@pytest.fixture
async def batch(api: Served, tmp_path: Path) -> dict[str, Any]:
    """Of five requests one has failed for good, one was retried, and one was canceled after it had failed."""
    batch_id = await created(
        api,
        chat("good"),
        chat("bad", simulate="always:400"),
        chat("healed", simulate=["400"]),
        chat("gone", simulate="always:400"),
        chat("late"),
    )
    async with working(tmp_path):
        jobs = [each["id"] for each in (await until_done(api, batch_id))["jobs"]]
        await api.call("POST", f"/v1/jobs/{jobs[2]}/retry")
        await until_over(api, jobs[2])
    for each in (jobs[3], jobs[4]):
        await api.call("POST", f"/v1/jobs/{each}/retry")
        await api.call("POST", f"/v1/jobs/{each}/cancel")
    return (await api.call("GET", f"/club/v1/batches/{batch_id}")).json


async def test_each_job_shows_its_own_result(api: Served, batch: dict[str, Any]) -> None:
    shown = [await job(api, each["id"]) for each in batch["jobs"]]

    assert [each["status"] for each in shown] == ["PROCESSED", "FAILED", "PROCESSED", "CANCELED", "PROCESSED"]
    assert [content_of(each["result"]) for each in shown if "result" in each] == ["good", "healed", "late"]


async def test_counts_agree_in_every_view(api: Served, batch: dict[str, Any]) -> None:
    path = f"batches/{batch['id']}"
    openai = (await api.call("GET", f"/openai/v1/{path}")).json
    xai = (await api.call("GET", f"/xai/v1/{path}")).json
    (row,) = (await api.call("GET", "/v1/batches")).json["data"]

    assert batch["status"] == "DONE"
    counts = [batch[name] for name in ("total", "queued", "processing", "processed", "failed", "canceled")]
    assert counts == [5, 0, 0, 3, 1, 1]
    assert (openai["status"], xai["status"]) == ("completed", "completed")
    assert openai["request_counts"] == {"total": 5, "completed": 3, "failed": 1}
    assert list(xai["state"].values()) == [5, 0, 3, 1, 1]
    assert (row["state"], row["request_counts"]) == (xai["state"], openai["request_counts"])
    assert {name: row[name] for name in ("total", "processed", "failed")} == {"total": 5, "processed": 3, "failed": 1}


async def test_a_cancelled_batch_is_cancelled_in_every_view_until_a_retry(api: Served, tmp_path: Path) -> None:
    batch_id = await created(api, chat("a"), chat("b"))
    following = asyncio.ensure_future(until_done(api, batch_id))

    again = [await api.call("POST", f"/openai/v1/batches/{batch_id}/cancel") for _ in range(2)]
    openai = (await api.call("GET", f"/openai/v1/batches/{batch_id}")).json
    xai = (await api.call("GET", f"/xai/v1/batches/{batch_id}")).json
    (row,) = (await api.call("GET", "/v1/batches")).json["data"]
    club = await following

    assert [(each.status, each.json["status"]) for each in again] == [(200, "cancelled")] * 2
    assert [each["status"] for each in (openai, xai, row, club)] == ["cancelled"] * 3 + ["DONE"]
    assert openai["cancelled_at"] == openai["cancelling_at"] is not None
    assert (openai["completed_at"], xai["cancel_time"]) == (None, row["cancel_time"])
    assert list(xai["state"].values()) == [2, 0, 0, 0, 2]

    assert (await api.call("POST", f"/v1/jobs/{club['jobs'][0]['id']}/retry")).status == 202
    waiting = (await api.call("GET", f"/openai/v1/batches/{batch_id}")).json
    async with working(tmp_path):
        await until_done(api, batch_id)
    done = (await api.call("GET", f"/xai/v1/batches/{batch_id}")).json

    assert (waiting["status"], waiting["cancelled_at"]) == ("in_progress", None)
    assert (done["status"], done["cancel_time"]) == ("completed", None)
    assert list(done["state"].values()) == [2, 0, 1, 0, 1]


async def test_who_follows_a_batch_hears_that_its_last_job_was_canceled(api: Served) -> None:
    batch_id = await created(api, chat("a"))
    following = asyncio.ensure_future(until_done(api, batch_id))
    (only,) = (await api.call("GET", f"/v1/batches/{batch_id}")).json["jobs"]

    await api.call("POST", f"/v1/jobs/{only['id']}/cancel")

    assert (await following)["status"] == "DONE"


async def test_results_by_sequence_leave_out_what_a_retry_replaced(api: Served, batch: dict[str, Any]) -> None:
    reply = await api.call("GET", f"/v1/batches/{batch['id']}/results")
    paged = await api.call("GET", f"/v1/batches/{batch['id']}/results?limit=100")

    lines = {each["custom_id"]: each for each in map(orjson.loads, reply.body.splitlines())}
    assert len(reply.body.splitlines()) == 4
    assert paged.body == reply.body
    assert lines["requests[1]"]["response"]["status_code"] == 400
    answers = {name: content_of(each["response"]["body"]) for name, each in lines.items() if name != "requests[1]"}
    assert answers == {"requests[0]": "good", "requests[2]": "healed", "requests[4]": "late"}


async def test_failures_are_those_that_stand(api: Served, batch: dict[str, Any]) -> None:
    first, again = [(await api.call("GET", f"/v1/batches/{batch['id']}/errors")).json for _ in range(2)]

    assert first == again
    assert first["total"] == 1
    assert [each["samples"][0]["custom_id"] for each in first["groups"]] == ["requests[1]"]


@pytest.mark.parametrize("limit", [1, 2, 100])
async def test_xais_pages_have_every_request_once(api: Served, batch: dict[str, Any], limit: int) -> None:
    found = {each["batch_request_id"]: each for each in await results(api, batch["id"], limit=limit)}
    listed = await metadata(api, batch["id"], limit=limit)

    assert len(found) == 5
    answers = {
        name: content_of(each["batch_result"]["response"]["chat_get_completion"])
        for name, each in found.items()
        if "response" in each["batch_result"]
    }
    assert answers == {"requests[0]": "good", "requests[2]": "healed", "requests[4]": "late"}
    assert found["requests[1]"]["batch_result"]["error"]["code"] == 3
    assert found["requests[3]"]["batch_result"]["error"]["code"] == 1
    assert {each["batch_request_id"]: each["state"] for each in listed} == {
        "requests[0]": "succeeded",
        "requests[1]": "failed",
        "requests[2]": "succeeded",
        "requests[3]": "cancelled",
        "requests[4]": "succeeded",
    }
    assert len(listed) == 5


async def test_xais_requests_tell_how_jobs_stand_before_the_end(api: Served) -> None:
    batch_id = await created(api, chat("a"), {"endpoint": IMAGES, "body": {"prompt": "x"}})
    jobs = (await api.call("GET", f"/v1/batches/{batch_id}")).json["jobs"]
    await api.call("POST", f"/v1/jobs/{jobs[1]['id']}/cancel")

    listed = await metadata(api, batch_id)

    assert [(each["endpoint"], each["state"]) for each in listed] == [(CHAT, "pending"), (IMAGES, "cancelled")]
    assert await results(api, batch_id) == []


async def test_a_batch_of_jobs_takes_no_other_requests(api: Served) -> None:
    batch_id = await created(api, chat("a"))
    asked = {"batch_requests": [{"batch_request": {"responses": {"model": "m", "input": "x"}}}]}

    reply = await api.call("POST", f"/xai/v1/batches/{batch_id}/requests", json=asked)

    assert (reply.status, reply.json["code"]) == (400, "invalid-argument")
    assert "takes no more requests: it was made of jobs" in reply.json["error"]
    assert (await api.call("GET", f"/v1/batches/{batch_id}")).json["total"] == 1


async def test_a_batch_of_jobs_is_not_retried_as_a_whole(api: Served, batch: dict[str, Any]) -> None:
    reply = await api.call("POST", f"/v1/batches/{batch['id']}/retry", json={})

    assert (reply.status, reply.json["error"]["code"]) == (409, "not_retryable")


async def test_a_batch_of_jobs_that_is_over_can_be_deleted(api: Served, batch: dict[str, Any]) -> None:
    reply = await api.call("DELETE", f"/v1/batches/{batch['id']}")
    shown = await api.call("GET", f"/v1/batches/{batch['id']}")

    assert (reply.status, shown.status) == (200, 404)
