"""The OpenAPI document is the route table's, is sound, and is what the server serves; the page loads nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator

import jsonschema
import orjson
import pytest

from batchrunner.api.routes import ROUTES
from tests.api.club import chat
from tests.api.serving import WHOLE, Served
from tests.api.test_club_seed import CALLS
from tests.api.test_xai_seed import REQUESTS
from tests.generated import OPENAPI, openapi


def test_published_document_is_that_of_the_route_table() -> None:
    assert OPENAPI.read_bytes() == openapi(), "run: python -m tests.generated"


async def test_server_serves_the_published_document(keyed: Served) -> None:
    keyed.secret = None

    reply = await keyed.call("GET", "/openapi.json")

    assert reply.status == 200
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.body + b"\n" == openapi()


async def test_every_reference_is_resolved_and_every_schema_sound(api: Served) -> None:
    document = (await api.call("GET", "/openapi.json")).json
    schemas = document["components"]["schemas"]

    for name, schema in schemas.items():
        assert name in schemas
        jsonschema.Draft202012Validator.check_schema(schema)
    referenced = set(re.findall(r'"#/components/schemas/(\w+)"', openapi().decode()))
    assert referenced <= set(schemas)


def test_names_of_operations_are_used_once() -> None:
    names = [route.name for route in ROUTES]

    assert sorted(names) == sorted(set(names))


def test_document_says_where_another_dialect_may_answer() -> None:
    answers = orjson.loads(openapi())["paths"]["/v1/batches/{batch_id}/results"]["get"]["responses"]

    assert answers["200"]["content"]["application/json"] == {"schema": {"$ref": "#/components/schemas/XaiResultPage"}}
    assert set(answers["200"]["content"]) == {"application/json", "application/jsonl", "application/x-ndjson"}
    refused = answers["4XX"]["content"]["application/json"]["schema"]["anyOf"]
    assert [each["$ref"].rpartition("/")[2] for each in refused] == ["ErrorEnvelope", "XaiError"]


def test_every_route_is_described_wherever_it_stands() -> None:
    described = {
        (path, method.upper()) for path, row in orjson.loads(openapi())["paths"].items() for method in row if row
    }

    for route in WHOLE:
        assert (route.path, route.method) in described
        assert (route.root_path, route.method) in described
        if route.dialect is None and route.path.startswith("/v1/"):
            assert (f"/openai{route.path}", route.method) in described
    assert ("/dashboard/queue/batches/{batch_id}", "GET") in described
    assert ("/api/inference/assets/{asset_id}", "GET") in described


def test_operations_have_names_of_their_own() -> None:
    names = [each["operationId"] for row in orjson.loads(openapi())["paths"].values() for each in row.values()]

    assert sorted(names) == sorted(set(names))


def validator(path: str, method: str, *place: str) -> jsonschema.Draft202012Validator:
    """Give what judges the JSON that an operation takes (`requestBody`) or answers with (`responses`, its status)."""
    document = orjson.loads(openapi())
    found = document["paths"][path][method]
    for each in place:
        found = found[each]
    schema = found["content"]["application/json"]["schema"]
    return jsonschema.Draft202012Validator(schema | {"components": document["components"]})


def bodies() -> Iterator[tuple[str, object]]:
    """Give each body that a document of a dialect prints, with the path to which it goes."""
    for line in CALLS.values():
        if (said := re.search(r"-d '(.*)'", line, re.DOTALL)) is not None:
            url = re.search(r"https://[^/]*(/\S*)", line)
            assert url is not None
            yield url[1], orjson.loads(said[1])
    yield "/v1/batches", {"name": "my_batch"}
    yield "/v1/batches", {"name": "from_file", "input_file_id": "file-abc123"}
    yield "/v1/batches/{batch_id}/requests", {"batch_requests": REQUESTS}
    order = {"input_file_id": "file-abc123", "endpoint": "/v1/completions", "completion_window": "24h"}
    yield "/v1/batches", order
    yield "/v1/batches", order | {"webhook_url": "https://example.com/webhook", "metadata": {"a": "b"}}


@pytest.mark.parametrize(("path", "body"), list(bodies()))
def test_what_each_dialect_sends_to_the_root_is_as_described(path: str, body: object) -> None:
    validator(path, "post", "requestBody").validate(body)


@pytest.mark.parametrize(
    "body", [{}, {"label": "a"}, {"requests": []}, {"requests": [{"params": {}}]}, {"metadata": {}}]
)
def test_what_is_no_dialects_is_not_described(body: object) -> None:
    assert not validator("/v1/batches", "post", "requestBody").is_valid(body)


@pytest.mark.parametrize("asked", ["openai", "xai", "club", None])
async def test_what_each_dialect_gets_at_the_root_is_as_described(api: Served, asked: str | None) -> None:
    headers = {} if asked is None else {"Batchrunner-Dialect": asked}
    file = (await api.upload()).json["id"]
    order = {"input_file_id": file, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
    asks = {"openai": order, "xai": {"name": "a"}, "club": {"requests": [chat("a")]}}
    kinds = list(asks) if asked is None else [asked]
    made = [await api.call("POST", "/v1/batches", json=asks[each], headers=headers) for each in kinds]

    for reply in made:
        validator("/v1/batches", "post", "responses", str(reply.status)).validate(reply.json)
        shown = await api.call("GET", f"/v1/batches/{reply.json.get('id') or reply.json['batch_id']}", headers=headers)
        validator("/v1/batches/{batch_id}", "get", "responses", "200").validate(shown.json)
    listed = await api.call("GET", "/v1/batches", headers=headers)
    validator("/v1/batches", "get", "responses", "200").validate(listed.json)
    wrong: list[object] = [{}, {"metadata": {}}, {"name": 1}]
    for body in wrong:
        refused = await api.call("POST", "/v1/batches", json=body, headers=headers)
        assert refused.status == 400
        validator("/v1/batches", "post", "responses", "4XX").validate(refused.json)


async def test_what_a_described_path_says_it_takes_is_described(api: Served) -> None:
    for path, operations in orjson.loads(openapi())["paths"].items():
        allowed = (await api.call("OPTIONS", path.replace("{", "").replace("}", ""))).headers["Allow"]

        described = {method.upper() for method in operations} | ({"HEAD"} if "get" in operations else set())
        assert set(allowed.split(", ")) == described | {"OPTIONS"}, path


async def test_answers_fit_their_schemas(api: Served) -> None:
    document = (await api.call("GET", "/openapi.json")).json
    file = (await api.upload()).json
    listed = (await api.call("GET", "/v1/files")).json
    report = (await api.call("GET", f"/v1/files/{file['id']}/validation")).json
    refused = (await api.call("GET", "/v1/files/x")).json

    for name, answer in {
        "FileObject": file,
        "FileList": listed,
        "FileValidation": report,
        "ErrorEnvelope": refused,
    }.items():
        schema = {"$ref": f"#/components/schemas/{name}", "components": document["components"]}
        jsonschema.Draft202012Validator(schema).validate(answer)


@pytest.mark.parametrize("path", ["/docs", "/docs/"])
async def test_page_names_every_route_and_loads_nothing(api: Served, path: str) -> None:
    reply = await api.call("GET", path)

    text = reply.body.decode()
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "script" not in text.replace("transcriptions", "")
    assert "default-src 'none'" in reply.headers["Content-Security-Policy"]
    for route in ROUTES:
        assert f"{route.method} {route.path}" in text
