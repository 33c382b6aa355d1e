"""The OpenAPI document is the route table's, is sound, and is what the server serves; the page loads nothing."""

from __future__ import annotations

import re

import jsonschema
import orjson
import pytest

from batchrunner.api.routes import ROUTES
from tests.api.serving import Served
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
    assert set(answers["200"]["content"]) == {"application/json", "application/jsonl"}
    refused = answers["4XX"]["content"]["application/json"]["schema"]["anyOf"]
    assert [each["$ref"].rpartition("/")[2] for each in refused] == ["ErrorEnvelope", "XaiError"]


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
