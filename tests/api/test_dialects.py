"""Which dialect a request speaks: by its path, by a header, by what it is; and the object that two of them share."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest

from batchrunner.api.dispatch import Router
from batchrunner.api.http import Answer, Call, Route
from batchrunner.settings import Settings
from batchrunner.simulate.media import png
from tests.api.batching import chat_lines, make_batch
from tests.api.jobs import answer, jobs_made
from tests.api.serving import Served, serving
from tests.api.xai import open_batch

PICTURE = png("x", b"abc")
STATE = ("num_requests", "num_pending", "num_success", "num_error", "num_cancelled")


async def handler(_call: Call) -> Answer:
    return Answer()


def route(path: str, dialect: str | None = None, method: str = "GET") -> Route:
    prefix = "" if dialect is None else f"/{dialect}"
    return Route(method=method, path=prefix + path, handler=handler, summary="", dialect=dialect)


PLAIN, OWN, ONLY = route("/v1/a/{id}"), route("/v1/a/{id}", "xai"), route("/v1/a/{id}:stop", "xai", "POST")


@pytest.mark.parametrize(
    ("path", "method", "expected"),
    [
        ("/v1/a/1", "GET", [PLAIN, OWN]),
        ("/xai/v1/a/1", "GET", [OWN]),
        ("/openai/v1/a/1", "GET", [PLAIN]),
        ("/v1/a/1:stop", "POST", [ONLY]),
        ("/v1/a/1%3Astop", "POST", [ONLY]),
        ("/xai/v1/a/1:stop", "POST", [ONLY]),
    ],
)
def test_a_path_finds_the_routes_that_may_answer_it(path: str, method: str, expected: list[Route]) -> None:
    match = Router([OWN, ONLY, PLAIN]).match(path)

    assert match is not None
    assert match.routes[method] == expected
    assert match.path_params == {"id": "1"}


@pytest.mark.parametrize(
    "path", ["/club/v1/a/1", "/xai/v1/b", "/xai/a/1", "/openai/xai/v1/a/1", "/xai/xai/v1/a/1", "/v1/a/:stop"]
)
def test_what_a_dialect_does_not_have_is_not_there(path: str) -> None:
    match = Router([OWN, ONLY, PLAIN]).match(path)

    assert match is None or path == "/v1/a/:stop"
    if match is not None:
        assert match.path_params == {"id": ":stop"}


def test_a_root_for_openai_alone_has_nothing_of_others() -> None:
    router = Router([OWN, ONLY, PLAIN], is_openai_only=True)

    plain, only, by_name = router.match("/v1/a/1"), router.match("/v1/a/1:stop"), router.match("/xai/v1/a/1")

    assert plain is not None
    assert (plain.routes, plain.asked) == ({"GET": [PLAIN]}, "openai")
    assert only is not None
    assert "POST" not in only.routes
    assert by_name is not None
    assert by_name.routes == {"GET": [OWN]}


async def test_a_batch_has_the_keys_of_both_clients(api: Served) -> None:
    batch = await make_batch(api, chat_lines(["a", "b"]), metadata={"name": "nightly"})

    shown = (await api.call("GET", f"/v1/batches/{batch['id']}")).json

    assert (shown["batch_id"], shown["name"]) == (batch["id"], "nightly")
    assert shown["create_time"].endswith("Z")
    assert shown["create_time"] < shown["expire_time"]
    assert shown["cancel_time"] is None
    assert shown["cancel_by_xai_message"] is None
    assert tuple(shown["state"]) == STATE
    assert shown["status"] == "validating"


async def test_a_key_that_makes_a_batch_is_named_on_it(keyed: Served) -> None:
    batch = await make_batch(keyed, chat_lines(["a"]))

    (key,) = keyed.parts.store.keys()
    assert batch["create_api_key_id"] == key.id


async def test_the_list_at_the_root_has_one_shape(api: Served) -> None:
    ids = [(await make_batch(api, chat_lines(["a"])))["id"] for _ in range(3)]

    first = (await api.call("GET", "/v1/batches?limit=2")).json
    rest = (await api.call("GET", f"/v1/batches?limit=2&pagination_token={first['pagination_token']}")).json

    assert tuple(first) == ("object", "data", "first_id", "last_id", "has_more", "batches", "pagination_token")
    assert [each["id"] for each in first["data"]] == ids[:0:-1]
    assert [each["batch_id"] for each in first["batches"]] == ids[:0:-1]
    assert ([each["id"] for each in rest["data"]], rest["pagination_token"]) == (ids[:1], None)


@pytest.mark.parametrize("ask", [{"path": "/openai/v1/batches"}, {"headers": {"Batchrunner-Dialect": "openai"}}])
async def test_who_asks_for_openai_gets_its_keys_and_no_more(api: Served, ask: dict) -> None:
    await make_batch(api, chat_lines(["a"]))

    page = (await api.call("GET", ask.get("path", "/v1/batches"), headers=ask.get("headers"))).json

    assert tuple(page) == ("object", "data", "first_id", "last_id", "has_more")
    assert "batch_id" not in page["data"][0]
    assert "progress" not in page["data"][0]


async def test_the_setting_makes_the_root_plain(tmp_path: Path) -> None:
    async with serving(tmp_path, settings=Settings(dialects="openai")) as served:
        page = (await served.call("GET", "/v1/batches")).json
        refused = await served.call("POST", "/v1/batches", json={"name": "a"})

    assert "batches" not in page
    assert (refused.status, refused.json["error"]["code"]) == (400, "missing_required_parameter")


async def test_the_setting_leaves_what_is_not_under_v1_where_it_is(tmp_path: Path) -> None:
    """Results of jobs made earlier, or under /club/v1, are where their `result_url` says."""
    async with serving(tmp_path, settings=Settings(dialects="openai")) as served:
        (job,) = jobs_made(served)
        answer(served, [job], [{"data": [{"b64_json": base64.b64encode(PICTURE).decode()}]}])
        shown = (await served.call("GET", f"/club/v1/jobs/{job.number}")).json
        medium = await served.call("GET", shown["result_url"].removeprefix(served.base))
        summary = await served.call("GET", "/api/inference/queue/summary")
        jobs = [await served.call("GET", path) for path in ("/v1/jobs", "/%76%31/jobs", "/openai/v1/jobs")]

    assert (medium.status, medium.body) == (200, PICTURE)
    assert (summary.status, summary.json["jobs"]["PROCESSED"]) == (200, 1)
    assert [each.status for each in jobs] == [404, 404, 404]


REQUESTS = [{"endpoint": "/v1/chat/completions", "body": {"model": "m"}}]
ORDER = {"input_file_id": "file-x", "endpoint": "/v1/chat/completions", "completion_window": "24h"}


@pytest.mark.parametrize(
    ("asked", "body", "lack", "told"),
    [
        (
            "openai",
            {"name": "a"},
            "Missing required parameter: 'endpoint'.",
            "With 'name' it has the shape of xAI's API",
        ),
        (
            "openai",
            {"name": "a", "input_file_id": "file-x"},
            "Missing required parameter: 'endpoint'.",
            "send it to /xai/v1/batches.",
        ),
        ("openai", {"requests": REQUESTS}, "Missing required parameter: 'endpoint'.", "send it to /club/v1/batches."),
        (
            "openai",
            {"label": "a"},
            "Missing required parameter: 'endpoint'.",
            "With 'label' it has the shape of inference.club's API",
        ),
        (
            "xai",
            ORDER,
            "Missing required parameter: 'name'.",
            "With 'completion_window' it has the shape of OpenAI's API",
        ),
        ("xai", {"input_file_id": "file-x"}, "Missing required parameter: 'name'.", "send it to /openai/v1/batches."),
        ("xai", {"requests": REQUESTS, "name": "a"}, "Unknown parameter: 'requests'.", "send it to /club/v1/batches."),
        ("club", {"name": "a"}, "Missing required parameter: 'requests'.", "send it to /xai/v1/batches."),
        ("club", ORDER, "Missing required parameter: 'requests'.", "send it to /openai/v1/batches."),
        (
            "club",
            {"requests": REQUESTS, "endpoint": "/v1/x"},
            "Unknown parameter: 'endpoint'.",
            "the shape of OpenAI's API",
        ),
    ],
)
async def test_who_asks_for_one_api_in_the_shape_of_another_is_told_where_to_go(
    api: Served, asked: str, body: dict, lack: str, told: str
) -> None:
    by_path = await api.call("POST", f"/{asked}/v1/batches", json=body)
    by_header = await api.call("POST", "/v1/batches", json=body, headers={"Batchrunner-Dialect": asked})

    assert (by_path.status, by_header.status) == (400, 400)
    assert by_path.body == by_header.body
    error = by_path.json["error"]
    message = error if asked == "xai" else error["message"]
    assert told in message
    assert message.startswith(lack)
    if asked == "openai":
        assert (error["param"], error["code"]) == ("endpoint", "missing_required_parameter")


@pytest.mark.parametrize("path", ["/v1/batches", "/openai/v1/batches", "/xai/v1/batches", "/club/v1/batches"])
async def test_a_message_batch_is_told_what_to_do(api: Served, path: str) -> None:
    body = {"requests": [{"custom_id": "a", "params": {"model": "m", "messages": []}}]}

    reply = await api.call("POST", path, json=body)

    assert reply.status == 400
    assert b"/v1/messages/batches is not served" in reply.body


@pytest.mark.parametrize("body", [{}, [], {"metadata": {}}, "name"])
@pytest.mark.parametrize("asked", ["openai", "xai", "club"])
async def test_a_body_of_no_shape_is_told_what_it_lacks(api: Served, asked: str, body: object) -> None:
    reply = await api.call("POST", f"/{asked}/v1/batches", json=body)

    assert reply.status == 400
    assert b"shape" not in reply.body


async def test_a_dialect_that_nobody_knows_is_refused(api: Served) -> None:
    by_header = await api.call("GET", "/v1/batches", headers={"Batchrunner-Dialect": "klingon"})
    by_query = await api.call("GET", "/v1/batches?dialect=klingon")
    by_both = await api.call("GET", "/v1/batches?dialect=klingon", headers={"Batchrunner-Dialect": "xai"})

    for reply in (by_header, by_query, by_both):
        assert reply.status == 400
        assert reply.json["error"]["param"] == "dialect"
        assert "'klingon'" in reply.json["error"]["message"]


async def test_a_file_may_come_as_xai_has_it(api: Served) -> None:
    reply = await api.upload(purpose="", expires_after="7200")

    assert reply.status == 200
    assert reply.json["purpose"] == "batch"
    assert reply.json["expires_at"] - reply.json["created_at"] == 7200


@pytest.mark.parametrize("seconds", ["3599", "2592001", "soon"])
async def test_a_files_life_is_bounded_however_it_is_given(api: Served, seconds: str) -> None:
    reply = await api.upload(expires_after=seconds)

    assert (reply.status, reply.json["error"]["param"]) == (400, "expires_after.seconds")


async def test_files_page_by_token(api: Served) -> None:
    ids = [(await api.upload()).json["id"] for _ in range(3)]

    first = (await api.call("GET", "/v1/files?limit=2&order=asc")).json
    rest = (await api.call("GET", f"/v1/files?limit=2&order=asc&pagination_token={first['pagination_token']}")).json

    assert [each["id"] for each in first["data"] + rest["data"]] == ids
    assert rest["pagination_token"] is None
    assert "pagination_token" not in (await api.call("GET", "/openai/v1/files")).json


@pytest.mark.parametrize(
    "path",
    [
        *("/v1/files?after=", "/xai/v1/files?pagination_token=", "/openai/v1/files?after="),
        *("/v1/batches?after=", "/v1/batches?pagination_token=", "/xai/v1/batches?pagination_token="),
        *("/openai/v1/batches?after=", "/v1/batches/{batch}/results?after="),
        *("/xai/v1/batches/{batch}/results?pagination_token=", "/xai/v1/batches/{batch}/requests?pagination_token="),
        *("/v1/webhook_endpoints?after=", "/v1/webhook_deliveries?after="),
    ],
)
async def test_an_empty_place_in_a_listing_is_its_beginning(api: Served, path: str) -> None:
    batch = await make_batch(api, chat_lines(["a"]))
    path = path.format(batch=batch["id"])

    beginning = await api.call("GET", path.partition("?")[0])
    empty = await api.call("GET", path)

    assert empty.status == 200
    assert empty.body == beginning.body


async def test_an_empty_place_does_not_make_lines_of_a_page(api: Served) -> None:
    batch_id = await open_batch(api)

    for query in ("", "?after=", "?pagination_token="):
        reply = await api.call("GET", f"/v1/batches/{batch_id}/results{query}")
        assert reply.json == {"results": [], "pagination_token": None}, query


@pytest.mark.parametrize("kind", ["application/jsonl", "application/x-ndjson"])
async def test_lines_come_under_the_name_that_they_are_asked_for_by(api: Served, kind: str) -> None:
    made = [await open_batch(api), (await make_batch(api, chat_lines(["a"])))["id"]]

    for batch_id in made:
        reply = await api.call("GET", f"/v1/batches/{batch_id}/results", headers={"Accept": f"{kind}, */*;q=0.1"})
        assert (reply.status, reply.headers["Content-Type"], reply.body) == (200, kind, b"")
    page = await api.call("GET", f"/xai/v1/batches/{made[1]}/results", headers={"Accept": kind})
    assert page.json == {"results": [], "pagination_token": None}
