"""inference.club's jobs: what makes one, what it shows, cancel, retry, and who may do what."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from batchrunner.api import club_jobs
from batchrunner.holdings import KeyLimits, KeyScope
from batchrunner.settings import ENDPOINTS, Settings
from batchrunner.simulate import Simulator, SimulatorSettings
from batchrunner.targets import Target
from tests.api.batching import working
from tests.api.club import (
    CHAT,
    IMAGES,
    chat,
    create,
    created,
    error_of,
    job,
    message_of,
    show,
    submit,
    submitted,
    until_done,
    until_over,
)
from tests.api.serving import FORM_HEADERS, Served, form, serving

MESSAGES = [{"role": "user", "content": "a"}]
JOB_KEYS = ("id", "object", "status", "inference_type", "model", "created", "queued_at")
FORMS = ("/v1/images/edits", "/v1/audio/transcriptions")


# -- what makes a job --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ["", "/club"])
async def test_a_request_that_says_async_becomes_a_job(api: Served, root: str) -> None:
    reply = await submit(api, IMAGES, root=root, model="flux-dev", prompt="a lighthouse at dusk")

    made = reply.json
    assert reply.status == 202
    assert tuple(made) == JOB_KEYS
    assert (made["object"], made["status"]) == ("inference.job", "QUEUED")
    assert (made["inference_type"], made["model"]) == ("IMAGE", "flux-dev")
    assert made["id"].isdecimal()
    assert made["queued_at"].endswith("Z")
    assert await job(api, made["id"]) == made


@pytest.mark.parametrize("said", [True, 1, "1", "true", "yes", "on"])
async def test_other_words_for_yes_are_understood(api: Served, said: Any) -> None:
    reply = await api.call("POST", CHAT, json={"model": "m", "messages": MESSAGES, "async": said})

    assert reply.status == 202


async def test_a_header_asks_for_inference_club_too(api: Served) -> None:
    asked = {"model": "m", "messages": MESSAGES, "async": True}

    made = await api.call("POST", CHAT, json=asked, headers={"Batchrunner-Dialect": "club"})

    assert made.status == 202


@pytest.mark.parametrize("url", [url for url in ENDPOINTS if url not in FORMS])
async def test_every_json_endpoint_takes_jobs(api: Served, url: str) -> None:
    reply = await submit(api, url, model="m", messages=MESSAGES, input="a", prompt="a", query="a")

    assert reply.status == 202, reply.body


async def test_an_endpoint_that_the_operator_added_takes_jobs(tmp_path: Path) -> None:
    async with serving(tmp_path, settings=Settings(endpoints=("/v1/own",))) as served:
        own = await submit(served, "/v1/own", model="m")
        other = await submit(served, CHAT, model="m", messages=MESSAGES)

    assert own.status == 202
    assert error_of(other) == (404, "not_found")


async def test_a_server_with_several_upstreams_takes_jobs(tmp_path: Path) -> None:
    tables = (Target(name="one", base_url="http://127.0.0.1:9/v1", models=("m",), aliases={"n": "m"}),)
    async with serving(tmp_path, settings=Settings(upstream=tables)) as served:
        single = await submit(served, CHAT, model="m", messages=MESSAGES)
        batch = await create(served, chat("a"))

    assert (single.status, batch.status) == (202, 202)


async def test_the_upstream_never_sees_the_word_async(api: Served, tmp_path: Path) -> None:
    body = b'{"model": "m", "n": 1.50, "a\\u0073ync":true, "messages":[{"role":"user","content":"async"}]}'
    made = await api.call("POST", CHAT, body=body)

    (blob,) = (tmp_path / "blobs" / "jobs").iterdir()
    assert made.status == 202
    assert b'"body":{"model": "m", "n": 1.50, "messages":[{"role":"user","content":"async"}]}}\n' in blob.read_bytes()


@pytest.mark.parametrize("root", ["", "/club"])
@pytest.mark.parametrize("body", [{}, {"async": False}, {"async": "no"}, {"metadata": {"async": True}}])
async def test_any_other_request_is_answered_at_once(tmp_path: Path, root: str, body: dict[str, Any]) -> None:
    async with (
        Simulator(SimulatorSettings()) as simulator,
        serving(tmp_path, settings=Settings(base_url=simulator.url)) as served,
    ):
        reply = await served.call("POST", root + CHAT, json={"model": "m", "messages": MESSAGES} | body)

    assert reply.status == 200
    assert reply.json["choices"]


async def test_a_form_is_passed_on(tmp_path: Path) -> None:
    async with (
        Simulator(SimulatorSettings()) as simulator,
        serving(tmp_path, settings=Settings(base_url=simulator.url)) as served,
    ):
        body = form(fields={"model": "m"}, content=b"wave", filename="a.wav")
        replies = [
            await served.call("POST", f"{root}/v1/audio/transcriptions", body=body, headers=FORM_HEADERS)
            for root in ("", "/club")
        ]

    assert [each.status for each in replies] == [200, 200]


@pytest.mark.parametrize("url", FORMS)
async def test_what_takes_files_is_synchronous_only(api: Served, url: str) -> None:
    for root in ("", "/club"):
        reply = await submit(api, url, root=root, model="m", prompt="x")

        assert error_of(reply) == (400, "invalid_request")
        assert "synchronous only" in message_of(reply)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"messages": MESSAGES}, "Model parameter"),
        ({"model": "m"}, "Messages parameter"),
        ({"model": "m", "messages": MESSAGES, "stream": True}, "Streaming is not supported"),
    ],
)
async def test_what_cannot_run_is_refused(api: Served, body: dict[str, Any], words: str) -> None:
    reply = await submit(api, CHAT, **body)

    assert error_of(reply) == (400, "invalid_request")
    assert words in message_of(reply)
    assert (await api.call("GET", "/v1/jobs")).json == {"data": []}


async def test_what_is_no_json_is_told_as_a_detail(api: Served) -> None:
    reply = await api.call("POST", f"/club{CHAT}", body=b'{"async": true')

    assert (reply.status, tuple(reply.json)) == (400, ("detail",))


async def test_who_asks_for_openai_is_answered_at_once(tmp_path: Path) -> None:
    async with (
        Simulator(SimulatorSettings()) as simulator,
        serving(tmp_path, settings=Settings(base_url=simulator.url)) as served,
    ):
        reply = await submit(served, CHAT, root="/openai", model="m", messages=MESSAGES)

    assert reply.status == 200


async def test_a_key_makes_one_job_whatever_it_is_asked_for(api: Served) -> None:
    first = await submit(api, CHAT, model="m", messages=MESSAGES, KEY="k")
    again = await submit(api, CHAT, model="m", messages=MESSAGES, KEY="k")
    another = await submit(api, IMAGES, root="/club", prompt="x", KEY="k")
    other = await submit(api, CHAT, model="m", messages=MESSAGES, KEY="l")

    assert [each.status for each in (first, again, another, other)] == [202] * 4
    assert first.json == again.json == another.json != other.json
    assert len((await api.call("GET", "/v1/jobs")).json["data"]) == 2


@pytest.mark.parametrize(
    ("url", "body"),
    [
        (CHAT, {"model": "m", "messages": MESSAGES}),
        (CHAT, {"model": "m"}),
        (CHAT, {"messages": [], "stream": True}),
        ("/v1/images/edits", {}),
        ("/v1/embeddings", {}),
    ],
)
async def test_a_repeat_gives_the_job_whatever_stands_in_the_way_of_a_new_one(
    tmp_path: Path, url: str, body: dict[str, Any]
) -> None:
    async with serving(tmp_path, is_open=False, settings=Settings(endpoints=(CHAT, "/v1/images/edits"))) as served:
        served.secret = served.add_key("acme", limits=KeyLimits(queued_lines_max=1))
        first = await submit(served, CHAT, model="m", messages=MESSAGES, KEY="k")

        refused = await submit(served, url, **body, KEY="other")
        again = await asyncio.gather(*(submit(served, url, **body, KEY="k") for _ in range(3)))

    assert refused.status in (400, 404, 429)
    assert [each.status for each in again] == [202] * 3
    assert all(each.json == first.json for each in again)


async def test_many_at_once_with_one_key_make_one_job_where_there_is_room_for_one(keyed: Served) -> None:
    keyed.secret = keyed.add_key("acme", limits=KeyLimits(queued_lines_max=1))

    replies = await asyncio.gather(*(submit(keyed, CHAT, model="m", messages=MESSAGES, KEY="k") for _ in range(8)))

    assert {each.status for each in replies} == {202}
    assert len({each.json["id"] for each in replies}) == 1


async def test_many_at_once_with_one_key_make_one_job(api: Served) -> None:
    replies = await asyncio.gather(
        *(submit(api, CHAT, model="m", messages=MESSAGES, KEY="k") for _ in range(8)),
    )

    assert {each.status for each in replies} == {202}
    assert len({each.json["id"] for each in replies}) == 1


async def test_a_key_of_another_tenant_makes_another_job(keyed: Served) -> None:
    first = await submit(keyed, CHAT, model="m", messages=MESSAGES, KEY="k")
    keyed.secret = keyed.add_key("other")
    other = await submit(keyed, CHAT, model="m", messages=MESSAGES, KEY="k")

    assert first.json["id"] != other.json["id"]


async def test_a_keys_limit_of_waiting_lines_holds(keyed: Served) -> None:
    keyed.secret = keyed.add_key("acme", limits=KeyLimits(queued_lines_max=1))
    await submitted(keyed)

    assert error_of(await submit(keyed, CHAT, model="m", messages=MESSAGES)) == (429, "rate_limited")


async def test_who_may_only_read_makes_nothing(keyed: Served) -> None:
    job_id = await submitted(keyed)
    keyed.secret = keyed.add_key("acme", scopes=(KeyScope.READ,))

    assert (await submit(keyed, CHAT, model="m", messages=MESSAGES)).status == 403
    assert error_of(await keyed.call("POST", f"/v1/jobs/{job_id}/cancel")) == (403, "forbidden")
    assert error_of(await keyed.call("POST", f"/v1/jobs/{job_id}/retry")) == (403, "forbidden")
    assert (await job(keyed, job_id))["status"] == "QUEUED"


# -- what a job shows --------------------------------------------------------------------------------------------------


async def test_a_job_that_is_done_has_what_the_upstream_answered(api: Served, tmp_path: Path) -> None:
    job_id = await submitted(api, "what is asked")
    async with working(tmp_path):
        ((done),) = await until_over(api, job_id)

    assert tuple(done) == (*JOB_KEYS, "finished_at", "result")
    assert done["status"] == "PROCESSED"
    assert done["result"]["choices"][0]["message"]["content"].endswith(" what is asked")
    assert done["queued_at"] <= done["finished_at"]


async def test_a_job_that_made_a_picture_says_where_it_is(api: Served, tmp_path: Path) -> None:
    made = [await submit(api, IMAGES, prompt="x", n=count, response_format="b64_json") for count in (1, 2)]
    linked = await submit(api, IMAGES, prompt="x", response_format="url")
    async with working(tmp_path):
        one, two, other = await until_over(api, *(each.json["id"] for each in (*made, linked)))
    listed = (await api.call("GET", "/v1/jobs")).json["data"]
    picture = await api.call("GET", one["result_url"].removeprefix(api.base))

    assert one["result_url"] == f"{api.base}/api/inference/assets/{one['id']}/"
    assert "result" not in one
    assert two["result_urls"] == [f"{api.base}/api/inference/assets/{two['id']}{end}/" for end in ("", "-2")]
    assert not other["result_url"].startswith(api.base)
    assert (picture.headers["Content-Type"], picture.body[:4]) == ("image/png", b"\x89PNG")
    assert listed == [other, two, one]


async def test_a_job_that_spoke_says_where_it_is(api: Served, tmp_path: Path) -> None:
    made = await submit(api, "/v1/audio/speech", model="m", input="hello")
    async with working(tmp_path):
        (done,) = await until_over(api, made.json["id"])
    sound = await api.call("GET", done["result_url"].removeprefix(api.base))

    assert (done["inference_type"], sound.status) == ("TTS", 200)
    assert sound.headers["Content-Type"].startswith("audio/")


async def test_a_job_that_failed_says_why(api: Served, tmp_path: Path) -> None:
    job_id = await submitted(api, simulate="always:400")
    async with working(tmp_path):
        (failed,) = await until_over(api, job_id)

    assert failed["status"] == "FAILED"
    assert failed["error"] == {"message": "The simulator was told to answer 400.", "kind": "upstream_error"}
    assert "result" not in failed


async def test_a_job_of_a_batch_names_it(api: Served, tmp_path: Path) -> None:
    batch_id = await created(api, chat("first"), chat("second"))
    async with working(tmp_path):
        batch = await until_done(api, batch_id)
    first, second = [await job(api, each["id"]) for each in batch["jobs"]]

    assert first["batch_id"] == second["batch_id"] == batch_id
    for name, shown in (("first", first), ("second", second)):
        assert shown["result"]["choices"][0]["message"]["content"].endswith(f" {name}")


async def test_jobs_are_listed_newest_first_and_by_status(api: Served, tmp_path: Path) -> None:
    good, bad = await submitted(api), await submitted(api, simulate="always:400")
    async with working(tmp_path):
        await until_over(api, good, bad)
    waiting, gone = await submitted(api), await submitted(api)
    await api.call("POST", f"/v1/jobs/{gone}/cancel")

    async def listed(query: str = "") -> list[str]:
        reply = await api.call("GET", f"/v1/jobs{query}")
        assert reply.status == 200, reply.body
        return [each["id"] for each in reply.json["data"]]

    assert await listed() == [gone, waiting, bad, good]
    assert await listed("?status=FAILED") == [bad]
    assert await listed("?status=PROCESSED") == [good]
    assert await listed("?status=CANCELED") == [gone]
    assert await listed("?active=1") == [waiting]
    assert await listed("?active=0") == [gone, waiting, bad, good]
    assert await listed("?active=1&status=QUEUED") == [waiting]
    assert await listed("?active=1&status=FAILED") == []
    assert await listed("?limit=2") == [gone, waiting]
    assert await listed("?limit=0") == [gone]
    assert await listed("?limit=-5") == [gone]


async def test_no_more_than_two_hundred_are_listed_and_fifty_unasked(api: Served) -> None:
    await created(api, *(chat(str(number)) for number in range(201)))

    counts = [len((await api.call("GET", f"/v1/jobs{query}")).json["data"]) for query in ("", "?limit=100000")]

    assert counts == [50, 200]


@pytest.mark.parametrize("query", ["status=LOST", "status=queued", "limit=many", "active=perhaps"])
async def test_a_query_that_does_not_fit_is_refused(api: Served, query: str) -> None:
    assert error_of(await api.call("GET", f"/v1/jobs?{query}")) == (400, "invalid_request")


# -- cancel and retry --------------------------------------------------------------------------------------------------


async def test_a_cancel_ends_a_job_once(api: Served) -> None:
    job_id = await submitted(api)

    first, again = [await api.call("POST", f"/v1/jobs/{job_id}/cancel/") for _ in range(2)]

    assert (first.status, first.json) == (200, {"id": job_id, "status": "CANCELED", "canceled": True})
    assert (again.status, again.json) == (200, {"id": job_id, "status": "CANCELED", "canceled": False})
    assert tuple(await job(api, job_id)) == (*JOB_KEYS, "finished_at")


async def test_a_job_that_is_done_stays_done(api: Served, tmp_path: Path) -> None:
    job_id = await submitted(api)
    async with working(tmp_path):
        (done,) = await until_over(api, job_id)

    cancelled = await api.call("POST", f"/v1/jobs/{job_id}/cancel")
    retried = await api.call("POST", f"/v1/jobs/{job_id}/retry")

    assert cancelled.json == {"id": job_id, "status": "PROCESSED", "canceled": False}
    assert error_of(retried) == (409, "conflict")
    assert retried.headers["x-should-retry"] == "false"
    assert await job(api, job_id) == done


async def test_a_job_that_failed_runs_again_with_the_same_body(api: Served, tmp_path: Path) -> None:
    batch_id = await created(api, chat("a"), chat("b", simulate=["400"], n=1), chat("ü"))
    async with working(tmp_path):
        batch = await until_done(api, batch_id)
        job_id = batch["jobs"][1]["id"]
        retried = await api.call("POST", f"/v1/jobs/{job_id}/retry")
        (done,) = await until_over(api, job_id)
        whole = await until_done(api, batch_id)

    assert [each["status"] for each in batch["jobs"]] == ["PROCESSED", "FAILED", "PROCESSED"]
    assert retried.status == 202
    assert tuple(retried.json) == (*JOB_KEYS, "batch_id")
    assert (retried.json["id"], retried.json["status"]) == (job_id, "QUEUED")
    assert done["status"] == "PROCESSED"
    assert done["result"]["choices"][0]["message"]["content"].endswith(" b")
    assert [each["id"] for each in whole["jobs"]] == [each["id"] for each in batch["jobs"]]
    assert {each["status"] for each in whole["jobs"]} == {"PROCESSED"}


async def test_a_retry_takes_a_batch_from_done_back(api: Served) -> None:
    batch_id = await created(api, chat("a"), chat("b"))
    cancelled = (await api.call("POST", f"/v1/batches/{batch_id}/cancel")).json
    await api.call("POST", f"/v1/jobs/{cancelled['jobs'][1]['id']}/retry")
    again = await show(api, batch_id)

    assert cancelled["status"] == "DONE"
    assert (again["status"], again["queued"], again["canceled"]) == ("PROCESSING", 1, 1)


async def test_a_single_job_is_retried_among_others(api: Served, tmp_path: Path) -> None:
    names = [f"n{number}" for number in range(12)]
    jobs = await asyncio.gather(*(submitted(api, name) for name in names))
    for each in jobs[::2]:
        await api.call("POST", f"/v1/jobs/{each}/cancel")
    for each in jobs[::4]:
        assert (await api.call("POST", f"/v1/jobs/{each}/retry")).status == 202
    async with working(tmp_path):
        found = await until_over(api, *jobs)

    for number, (name, shown) in enumerate(zip(names, found, strict=True)):
        if number % 4 == 2:
            assert shown["status"] == "CANCELED"
        else:
            assert shown["result"]["choices"][0]["message"]["content"].endswith(f" {name}")


async def test_a_job_that_waits_is_not_retried(api: Served) -> None:
    job_id = await submitted(api)

    assert error_of(await api.call("POST", f"/v1/jobs/{job_id}/retry")) == (409, "conflict")


# -- who may do what ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("job_id", ["7", "0", "-1", "x", "1e3", "9" * 18, "9" * 40, "%D9%A3"])
async def test_a_job_that_is_not_there_is_not_found(api: Served, job_id: str) -> None:
    for method, end in (("GET", ""), ("POST", "/cancel"), ("POST", "/retry")):
        assert error_of(await api.call(method, f"/v1/jobs/{job_id}{end}")) == (404, "not_found")


async def test_a_job_has_one_name(api: Served) -> None:
    job_id = await submitted(api)

    assert error_of(await api.call("GET", f"/v1/jobs/0{job_id}")) == (404, "not_found")


async def test_jobs_of_others_are_not_there(keyed: Served) -> None:
    job_id = await submitted(keyed)
    other = keyed.add_key("other")

    for method, end in (("GET", ""), ("POST", "/cancel"), ("POST", "/retry")):
        reply = await keyed.call(method, f"/v1/jobs/{job_id}{end}", secret=other)
        assert error_of(reply) == (404, "not_found")
    assert (await keyed.call("GET", "/v1/jobs", secret=other)).json == {"data": []}
    assert (await job(keyed, job_id))["status"] == "QUEUED"


async def test_without_async_there_are_no_jobs(tmp_path: Path) -> None:
    async with serving(tmp_path, settings=Settings(async_enabled=False)) as served:
        refused = [
            await submit(served, CHAT, model="m", messages=MESSAGES),
            await submit(served, CHAT, root="/club", model="m", messages=MESSAGES),
            await served.call("GET", "/v1/jobs"),
            await served.call("GET", "/v1/jobs/7"),
            await served.call("POST", "/v1/jobs/7/cancel"),
            await served.call("POST", "/v1/jobs/7/retry"),
        ]

    assert [error_of(each) for each in refused] == [(503, "async_disabled")] * 6


async def test_a_root_for_openai_alone_has_no_jobs(tmp_path: Path) -> None:
    async with serving(tmp_path, settings=Settings(dialects="openai")) as served:
        at_root = await served.call("GET", "/v1/jobs")
        by_path = await served.call("GET", "/club/v1/jobs")

    assert (at_root.status, by_path.status) == (404, 200)


async def test_a_listing_does_not_look_into_a_long_answer(
    api: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await submit(api, IMAGES, prompt="x", response_format="b64_json")
    async with working(tmp_path):
        (done,) = await until_over(api, made.json["id"])
    monkeypatch.setattr(club_jobs, "_READ_BYTES_MAX", 64)
    monkeypatch.setattr(club_jobs, "read_payload", lambda *_: pytest.fail("it was read"))

    (listed,) = (await api.call("GET", "/v1/jobs")).json["data"]

    assert listed["result_url"] == done["result_url"]
