"""inference.club's batches: what makes one, how it stands, its end, and errors as inference.club has them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from batchrunner.holdings import KeyLimits, KeyScope
from batchrunner.settings import Settings
from tests.api.batching import chat_lines, ended, make_batch, working
from tests.api.club import CHAT, IMAGES, chat, create, created, error_of, message_of, show, until_done
from tests.api.serving import Served, serving
from tests.pipeline.hands import Place

LAMP = {"endpoint": IMAGES, "body": {"model": "flux-dev", "prompt": "a minimalist desk lamp"}}
BATCH_KEYS = (
    "id",
    "label",
    "status",
    "total",
    "queued",
    "processing",
    "processed",
    "failed",
    "created",
    "canceled",
    "created_at",
    "request_counts",
    "object",
)
COUNTS = ("queued", "processing", "processed", "failed", "canceled")
ROOTS = ["/v1", "/club/v1"]


def counted(batch: dict[str, Any]) -> tuple[int, ...]:
    """Give the counts in their order, which sum up."""
    found = tuple(batch[name] for name in COUNTS)
    assert sum(found) == batch["total"]
    return found


# -- what makes a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("root", ROOTS)
async def test_a_batch_is_made_of_requests(api: Served, root: str) -> None:
    reply = await create(api, LAMP, chat("a"), root=root, label="Q2 product shots")

    batch = reply.json
    assert reply.status == 202
    assert tuple(batch) == BATCH_KEYS
    assert batch["id"].isdecimal()
    assert (batch["label"], batch["status"], batch["object"]) == ("Q2 product shots", "PENDING", "batch")
    assert counted(batch) == (2, 0, 0, 0, 0)
    assert batch["created"] == batch["created_at"] == pytest.approx(api.clock.now().timestamp(), abs=60)


async def test_a_header_asks_for_inference_club_too(api: Served) -> None:
    made = await api.call(
        "POST", "/v1/batches", json={"requests": [chat("a")]}, headers={"Batchrunner-Dialect": "club"}
    )
    listed = await api.call("GET", "/v1/batches?dialect=club")

    assert made.status == 202
    assert tuple(listed.json) == ("data",)


@pytest.mark.parametrize(
    "body",
    [
        {"requests": [chat("a")], "endpoint": CHAT},
        {"requests": [], "completion_window": "24h"},
        {"label": "x", "input_file_id": "file-x"},
        {"name": "x", "endpoint": CHAT},
        {},
    ],
)
async def test_other_creates_are_not(api: Served, body: dict[str, Any]) -> None:
    reply = await api.call("POST", "/v1/batches", json=body)

    assert reply.status == 400
    assert reply.json["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("body", [{"label": "x", "name": "x"}, {"requests": [], "name": "x"}])
async def test_a_name_makes_no_difference(api: Served, body: dict[str, Any]) -> None:
    assert error_of(await api.call("POST", "/v1/batches", json=body)) == (400, "invalid_request")


async def test_a_label_is_not_needed(api: Served) -> None:
    assert (await create(api, chat("a"))).json["label"] == ""


@pytest.mark.parametrize("root", ROOTS)
@pytest.mark.parametrize(
    ("requests", "kind", "message"),
    [
        ([], "invalid_request", "Invalid 'requests': empty array"),
        ({}, "invalid_request", "Invalid type for 'requests': expected an array"),
        (None, "invalid_request", "Invalid type for 'requests': expected an array, but got null"),
        ([LAMP, "lamp"], "invalid_request", r"Invalid type for 'requests\[1\]': expected an object"),
        ([LAMP, {"body": {}}], "invalid_request", r"Missing required parameter: 'requests\[1\].endpoint'"),
        ([LAMP, {"endpoint": IMAGES}], "invalid_request", r"Missing required parameter: 'requests\[1\].body'"),
        ([LAMP, {"endpoint": IMAGES, "body": "x"}], "invalid_request", r"requests\[1\]: "),
        ([LAMP, {"endpoint": IMAGES, "body": None}], "invalid_request", r"requests\[1\]: "),
        ([LAMP, {"endpoint": 7, "body": {}}], "invalid_request", r"Invalid type for 'requests\[1\].endpoint'"),
        ([LAMP, {"endpoint": "/v1/x", "body": {}}], "invalid_request", r"'requests\[1\].endpoint': .*'/v1/x'"),
        ([{"endpoint": "/v1/images/edits", "body": {}}], "invalid_request", r"'requests\[0\].endpoint'"),
        ([{"endpoint": "/v1/audio/transcriptions", "body": {}}], "invalid_request", r"'requests\[0\].endpoint'"),
        ([{"endpoint": "https://evil.example/v1/x", "body": {}}], "invalid_request", r"'requests\[0\].endpoint'"),
        ([chat("a"), chat("b", stream=True)], "invalid_request", r"requests\[1\]: .*Streaming is not supported"),
        ([{"endpoint": CHAT, "body": {"messages": []}}], "invalid_request", r"requests\[0\]: .*Model parameter"),
        ([chat("a")] * 257, "too_large", "takes 256 requests at most, and this one has 257"),
    ],
)
async def test_what_does_not_fit_makes_nothing(api: Served, root: str, requests: Any, kind: str, message: str) -> None:
    reply = await api.call("POST", f"{root}/batches", json={"requests": requests, "label": "x"})

    assert error_of(reply) == (400, kind)
    assert re.search(message, message_of(reply)), reply.body
    assert (await api.call("GET", "/club/v1/batches")).json == {"data": []}


@pytest.mark.parametrize(
    "body", [{"label": "x"}, {"label": 7, "requests": [LAMP]}, {"label": "x" * 161, "requests": [LAMP]}]
)
async def test_label_and_requests_are_what_the_page_says(api: Served, body: dict[str, Any]) -> None:
    assert error_of(await api.call("POST", "/v1/batches", json=body)) == (400, "invalid_request")


async def test_as_many_requests_as_the_page_says_are_taken(api: Served) -> None:
    reply = await create(api, *(chat(str(number)) for number in range(256)))

    assert (reply.status, reply.json["total"]) == (202, 256)


async def test_what_is_no_json_is_told_as_a_detail(api: Served) -> None:
    reply = await api.call("POST", "/club/v1/batches", body=b'{"requests": [')

    assert (reply.status, tuple(reply.json)) == (400, ("detail",))


async def test_who_has_no_key_is_told_as_a_detail(keyed: Served) -> None:
    keyed.secret = None

    reply = await keyed.call("GET", "/club/v1/batches")

    assert (reply.status, tuple(reply.json)) == (401, ("detail",))


async def test_the_word_async_is_cut_out_of_each_request(api: Served, tmp_path: Path) -> None:
    said = b'{"requests":[{"endpoint":"/v1/chat/completions","body":{"async" :true, "model":"m","messages":[]}},'
    said += b'{"endpoint":"/v1/chat/completions","body":{"model":"m","n":1.50,"messages":[],"a\\u0073ync":false}}]}'
    await api.call("POST", "/v1/batches", body=said)

    (blob,) = (tmp_path / "blobs" / "jobs").iterdir()
    lines = blob.read_bytes()
    assert b'"body":{ "model":"m","messages":[]}}\n' in lines
    assert b'"body":{"model":"m","n":1.50,"messages":[]}}\n' in lines


async def test_a_create_is_made_once_for_a_key(api: Served) -> None:
    key = {"Idempotency-Key": "k"}

    first, again = [await create(api, chat("a"), **key) for _ in range(2)]
    other = await create(api, chat("b"), **key)

    assert (again.status, again.body) == (202, first.body)
    assert again.headers["idempotent-replayed"] == "true"
    assert error_of(other) == (422, "invalid_request")
    assert len((await api.call("GET", "/club/v1/batches")).json["data"]) == 1


async def test_a_keys_limit_of_waiting_lines_holds(keyed: Served) -> None:
    keyed.secret = keyed.add_key("acme", limits=KeyLimits(queued_lines_max=2))

    reply = await create(keyed, *(chat(name) for name in "abc"))

    assert error_of(reply) == (429, "rate_limited")


async def test_who_may_only_read_makes_and_cancels_nothing(keyed: Served) -> None:
    batch_id = await created(keyed, chat("a"))
    reader = keyed.add_key("acme", scopes=(KeyScope.READ,))

    made = await keyed.call("POST", "/club/v1/batches", json={"requests": [chat("a")]}, secret=reader)
    cancelled = await keyed.call("POST", f"/club/v1/batches/{batch_id}", secret=reader)

    assert error_of(made) == error_of(cancelled) == (403, "forbidden")


# -- how a batch stands ------------------------------------------------------------------------------------------------


async def test_jobs_run_and_the_batch_is_done(api: Served, tmp_path: Path) -> None:
    batch_id = await created(api, chat("a"), chat("b", simulate=["400"]), chat("c"))
    waiting = await show(api, batch_id)
    async with working(tmp_path):
        batch = await until_done(api, batch_id)

    assert tuple(batch) == (*BATCH_KEYS, "jobs")
    assert (waiting["status"], counted(waiting)) == ("PENDING", (3, 0, 0, 0, 0))
    assert (batch["status"], counted(batch)) == ("DONE", (0, 0, 2, 1, 0))
    assert [tuple(each) for each in batch["jobs"]] == [("id", "status", "inference_type")] * 3
    assert [each["status"] for each in batch["jobs"]] == ["PROCESSED", "FAILED", "PROCESSED"]
    assert [each["inference_type"] for each in batch["jobs"]] == ["LLM"] * 3
    numbers = [int(each["id"]) for each in batch["jobs"]]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize(
    ("endpoint", "kind"),
    [
        ("/v1/completions", "LLM"),
        ("/v1/embeddings", "LLM"),
        ("/v1/images/generations", "IMAGE"),
        ("/v1/videos/generations", "VIDEO"),
        ("/v1/videos", "VIDEO"),
        ("/v1/music/generations", "MUSIC"),
        ("/v1/audio/speech", "TTS"),
    ],
)
async def test_each_endpoint_makes_what_the_page_says(api: Served, endpoint: str, kind: str) -> None:
    batch_id = await created(api, {"endpoint": endpoint, "body": {"model": "m", "prompt": "x", "input": "x"}})

    assert (await show(api, batch_id))["jobs"][0]["inference_type"] == kind


async def test_batches_are_listed_newest_first_whoever_made_them(api: Served) -> None:
    made = [await created(api, chat("a"), label="a"), (await make_batch(api, chat_lines(["a"])))["id"]]
    made += [await created(api, chat("b"), label="b") for _ in range(2)]

    page = (await api.call("GET", "/club/v1/batches/")).json

    assert [each["id"] for each in page["data"]] == made[::-1]
    assert {tuple(each) for each in page["data"]} == {BATCH_KEYS}


async def test_no_more_than_fifty_are_listed(api: Served) -> None:
    made = [await created(api, chat("a")) for _ in range(52)]

    page = (await api.call("GET", "/club/v1/batches")).json

    assert [each["id"] for each in page["data"]] == made[:1:-1]


# -- cancel ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path",
    [
        "/v1/batches/{}/cancel",
        "/v1/batches/{}",
        "/v1/batches/{}/",
        "/club/v1/batches/{}/cancel/",
        "/club/v1/batches/{}",
    ],
)
async def test_a_cancel_cancels_what_has_not_ended(api: Served, tmp_path: Path, path: str) -> None:
    batch_id = await created(api, chat("a"), chat("b"))

    reply = await api.call("POST", path.format(batch_id))
    again = await api.call("POST", path.format(batch_id))

    batch = reply.json
    assert (reply.status, again.status) == (200, 200)
    assert tuple(batch) == (*BATCH_KEYS, "jobs")
    assert (batch["status"], counted(batch)) == ("DONE", (0, 0, 0, 0, 2))
    assert {each["status"] for each in batch["jobs"]} == {"CANCELED"}
    assert again.json == batch


async def test_a_cancel_leaves_what_has_ended(api: Served, tmp_path: Path) -> None:
    batch_id = await created(api, chat("a"), chat("b", simulate=["400"]))
    async with working(tmp_path):
        done = await until_done(api, batch_id)

    assert (await api.call("POST", f"/v1/batches/{batch_id}/cancel")).json == done


async def test_a_post_to_a_batch_of_another_dialect_cancels_nothing_at_the_root(api: Served) -> None:
    batch_id = (await make_batch(api, chat_lines(["a"])))["id"]

    refused = await api.call("POST", f"/v1/batches/{batch_id}")
    shown = (await api.call("GET", f"/v1/batches/{batch_id}")).json["status"]
    by_name = await api.call("POST", f"/club/v1/batches/{batch_id}")

    assert (refused.status, shown) == (405, "validating")
    assert by_name.json["status"] == "PROCESSING"


async def test_a_batch_that_is_not_there_is_not_found(api: Served) -> None:
    for method, path in [
        ("GET", "/v1/batches/7"),
        ("GET", "/club/v1/batches/7"),
        ("GET", "/club/v1/batches/none"),
        ("POST", "/v1/batches/7"),
        ("POST", "/v1/batches/7/cancel"),
        ("GET", f"/v1/batches/{'9' * 40}"),
    ]:
        assert error_of(await api.call(method, path)) == (404, "not_found"), path


async def test_batches_of_others_are_not_there(keyed: Served) -> None:
    batch_id = await created(keyed, chat("a"))
    other = keyed.add_key("other")

    for method, path in [
        ("GET", f"/v1/batches/{batch_id}"),
        ("POST", f"/v1/batches/{batch_id}"),
        ("POST", f"/v1/batches/{batch_id}/cancel"),
    ]:
        assert error_of(await keyed.call(method, path, secret=other)) == (404, "not_found")
    assert (await keyed.call("GET", "/club/v1/batches", secret=other)).json == {"data": []}
    assert (await show(keyed, batch_id))["status"] == "PENDING"


# -- other views -------------------------------------------------------------------------------------------------------


async def test_batches_of_other_dialects_are_shown_without_jobs(api: Served, tmp_path: Path) -> None:
    batch_id = (await make_batch(api, chat_lines(["a", "b"]), metadata={"name": "nightly"}))["id"]
    waiting = await show(api, batch_id)
    async with working(tmp_path):
        await ended(api, batch_id)
    done = await show(api, batch_id)

    assert (waiting["label"], waiting["status"], counted(waiting)) == ("nightly", "PENDING", (0, 0, 0, 0, 0))
    assert (done["status"], counted(done), done["jobs"]) == ("DONE", (0, 0, 2, 0, 0), [])


async def test_the_list_at_the_root_has_counts_of_jobs_besides(api: Served) -> None:
    club_id = await created(api, chat("a"), label="shots")
    file_id = (await make_batch(api, chat_lines(["a"])))["id"]

    page = (await api.call("GET", "/v1/batches")).json

    rows = {each["id"]: each for each in page["data"]}
    extras = {"label": "shots", "total": 1, "queued": 1, "processing": 0, "processed": 0, "failed": 0}
    assert rows[club_id].items() >= extras.items()
    assert rows[club_id]["status"] == "in_progress"
    assert rows[file_id].keys() == rows[club_id].keys() - extras.keys()


@pytest.mark.parametrize("path", ["/openai/v1/batches/{}/cancel", "/xai/v1/batches/{}:cancel", "/v1/batches/{}:cancel"])
async def test_other_dialects_cancel_jobs_too(api: Served, path: str) -> None:
    batch_id = await created(api, chat("a"), chat("b"))

    reply = await api.call("POST", path.format(batch_id))

    assert reply.status == 200
    assert counted(await show(api, batch_id)) == (0, 0, 0, 0, 2)


async def test_a_batch_of_jobs_is_not_closed(api: Served, tmp_path: Path) -> None:
    batch_id = await created(api, chat("a"))

    reply = await api.call("POST", f"/v1/batches/{batch_id}/close")
    async with working(tmp_path):
        done = await until_done(api, batch_id)

    assert (reply.status, reply.json["status"]) == (200, "in_progress")
    assert (done["status"], counted(done)) == ("DONE", (0, 0, 1, 0, 0))


async def test_without_async_there_are_no_batches(tmp_path: Path) -> None:
    async with serving(tmp_path, settings=Settings(async_enabled=False)) as served:
        refused = [
            await create(served, chat("a")),
            await served.call("GET", "/club/v1/batches"),
            await served.call("GET", "/v1/batches/7"),
            await served.call("POST", "/v1/batches/7"),
            await served.call("POST", "/v1/batches/7/cancel"),
        ]
        others = await served.call("GET", "/v1/batches")

    assert [error_of(each) for each in refused] == [(503, "async_disabled")] * 5
    assert others.status == 200


async def test_requests_of_a_message_batch_are_told_where_they_go(api: Served) -> None:
    body = {"requests": [{"custom_id": "a", "params": {"model": "m", "messages": []}}]}

    reply = await api.call("POST", "/v1/batches", json=body)

    assert (reply.status, reply.json["error"]["type"]) == (400, "invalid_request")
    assert '"endpoint": "/v1/messages"' in reply.json["error"]["message"]


async def test_counts_of_a_batch_stay_when_its_jobs_are_gone(tmp_path: Path) -> None:
    place = Place(tmp_path)
    async with serving(tmp_path, clock=place.clock) as served:
        batch_id = await created(served, LAMP, chat("hello"))
        hand = place.hand("one")
        hand.run_all()
        before = (await served.call("GET", f"/v1/batches/{batch_id}")).json
        place.clock.advance(15 * 86_400)
        # A clock that jumps so far is believed the second time.
        for _ in range(2):
            hand.store.sweep()
        hand.seal()
        place.clock.advance(2 * 86_400)
        for _ in range(2):
            hand.store.expire()
        hand.store.close()

        after = (await served.call("GET", f"/v1/batches/{batch_id}")).json
        (row,) = (await served.call("GET", "/v1/batches")).json["data"]
        job = await served.call("GET", f"/v1/jobs/{before['jobs'][0]['id']}")

    assert (before["status"], before["processed"]) == ("DONE", before["total"])
    assert after == before | {"jobs": []}
    assert (row["total"], row["processed"], row["queued"]) == (2, 2, 0)
    assert job.status == 404
