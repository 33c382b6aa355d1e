"""The OpenAPI document of the API, made from the route table and the structs that it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import msgspec

from batchrunner import __version__
from batchrunner.api.events import EVENT_STREAM
from batchrunner.api.http import DIALECT_HEADER, DIALECT_PARAMETER, JSON, Route
from batchrunner.api.live import InferenceAnswer
from batchrunner.api.multipart import MULTIPART
from batchrunner.api.results import JSON_LINES, LINES_TYPES
from batchrunner.models import OPENAI

_REFERENCE = "#/components/schemas/{name}"

Schema = dict[str, Any]


def document(routes: Sequence[Route]) -> Schema:
    """Describe a route table as OpenAPI 3.1. The same table gives the same document."""
    rows = [*routes, *map(_strict, (each for each in routes if each.dialect is None and each.path.startswith("/v1/")))]
    kinds = [*(row.error for row in rows), *_body_kinds(rows)]
    _, components = msgspec.json.schema_components(list(dict.fromkeys(kinds)), ref_template=_REFERENCE)
    places: dict[tuple[str, str], list[Route]] = {}
    # At the root the row of no dialect stands first, as it does for the router.
    for row in sorted(rows, key=lambda each: (each.root_path, each.method, each.dialect or "")):
        places.setdefault((row.root_path, row.method), []).append(row)
        if row.path != row.root_path:
            places[row.path, row.method] = [row]
    paths: dict[str, Schema] = {}
    for (path, method), found in sorted(places.items()):
        paths.setdefault(path, {})[method.lower()] = _operation(path, found)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "batchrunner",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "An OpenAI Batch API. What is under /v1 is under /openai/v1 too, where files, uploads and "
            "batches have the fields of OpenAI only. What is under /xai/v1 is xAI's API, under /club/v1 that of "
            "inference.club; both are at /v1 too where a request can be told to be theirs, or asks for one by name.",
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": dict(sorted(components.items())),
            "parameters": _dialect_parameters(sorted({row.dialect for row in rows if row.dialect is not None})),
            "securitySchemes": {
                "basic": {"type": "http", "scheme": "basic"},
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "api-key"},
            },
        },
    }


def _strict(route: Route) -> Route:
    """Give the row of OpenAI's API alone."""
    return replace(
        route,
        path=f"/{OPENAI}{route.path}",
        dialect=OPENAI,
        request=route.strict_request or route.request,
        answer=route.strict_answer or route.answer,
    )


def fields_of(kind: type[msgspec.Struct]) -> Iterator[tuple[str, Schema, bool]]:
    """Give each field of a struct by its name on the wire, with its schema and whether it must be there."""
    (_,), components = msgspec.json.schema_components([kind], ref_template=_REFERENCE)
    schema = components[kind.__name__]
    for name, each in schema["properties"].items():
        yield name, each, name in schema.get("required", ())


def form_fields(route: Route) -> Iterator[tuple[str, Schema, bool]]:
    """Give the fields of a multipart form: what is nested is written `outer[inner]`, as the SDKs do."""
    assert route.request is not None
    yield route.file_field, {"type": "string", "format": "binary"}, True
    for member in msgspec.structs.fields(route.request):
        nested = _nested(member.type)
        if nested is None:
            yield from (each for each in fields_of(route.request) if each[0] == member.encode_name)
            continue
        for name, schema, _ in fields_of(nested):
            yield f"{member.encode_name}[{name}]", schema, False


def _nested(kind: object) -> type[msgspec.Struct] | None:
    for each in getattr(kind, "__args__", (kind,)):
        if isinstance(each, type) and issubclass(each, msgspec.Struct):
            return each
    return None


def _body_kinds(rows: Sequence[Route]) -> Iterator[type[msgspec.Struct]]:
    for row in rows:
        if row.request is not None and row.request_media != MULTIPART:
            yield row.request
        yield from (kind for kind in (row.answer, row.accepted) if kind is not None)


def _dialect_parameters(dialects: Sequence[str]) -> Schema:
    schema = {"type": "string", "enum": list(dialects)}
    told = "The API that is asked for, instead of the one that the request shows by what it is."
    return {
        "DialectHeader": {"name": DIALECT_HEADER, "in": "header", "description": told, "schema": schema},
        "DialectQuery": {"name": DIALECT_PARAMETER, "in": "query", "description": told, "schema": schema},
    }


def _operation(path: str, rows: Sequence[Route]) -> Schema:
    """Describe what stands at a path for a method: one row, or at the root all that may answer there."""
    first = rows[0]
    is_alone = len(rows) == 1
    name = first.name if path == first.path else f"root_{first.name}"
    operation: Schema = {"operationId": name, "summary": first.summary}
    others = [f"{each.dialect}: {each.summary}." for each in rows[1:] if each.summary != first.summary]
    if others:
        operation["description"] = " ".join(["As another dialect has it,", *others])
    parameters = _merged(rows)
    if not is_alone:
        parameters += [{"$ref": f"#/components/parameters/{each}"} for each in ("DialectHeader", "DialectQuery")]
    if parameters:
        operation["parameters"] = parameters
    content: dict[str, list[Schema]] = {}
    for row in rows:
        if row.request is not None:
            content.setdefault(row.request_media, []).append(_request(row))
    if content:
        operation["requestBody"] = {"required": all(map(_needs_body, rows)), "content": _contents(content)}
    operation["responses"] = _responses(rows)
    operation["security"] = _security(first)
    return operation


def _security(route: Route) -> list[Schema]:
    """Tell how a key is given. An open server, which listens on a loopback address only, takes requests without."""
    if route.scope is None:
        return []
    return [{"bearer": []}, {"header": []}, *([{"basic": []}] if route.refuse is not None else []), {}]


def _merged(rows: Sequence[Route]) -> list[Schema]:
    """Give the parameters of all rows, each once."""
    found: dict[tuple[str, str], list[Schema]] = {}
    for row in rows:
        for each in (*_path_parameters(row), *_query_parameters(row), *_header_parameters(row)):
            found.setdefault((each["in"], each["name"]), []).append(each)
    return [
        each[0]
        | {
            "required": len(each) == len(rows) and all(one["required"] for one in each),
            "schema": _any_of([one["schema"] for one in each]),
        }
        for each in found.values()
    ]


def _any_of(schemas: Sequence[Schema]) -> Schema:
    """Say that any of these will do."""
    told = [each for place, each in enumerate(schemas) if each not in schemas[:place]]
    return told[0] if len(told) == 1 else {"anyOf": told}


def _contents(by_media: Mapping[str, Sequence[Schema]]) -> Schema:
    return {media: {"schema": _any_of(schemas)} for media, schemas in by_media.items()}


def _reference(kind: type[msgspec.Struct]) -> Schema:
    return {"$ref": _REFERENCE.format(name=kind.__name__)}


def _path_parameters(route: Route) -> Iterator[Schema]:
    for name in route.parameters:
        yield {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}


def _query_parameters(route: Route) -> Iterator[Schema]:
    if route.query is None:
        return
    for name, schema, is_required in fields_of(route.query):
        yield {"name": name, "in": "query", "required": is_required, "schema": schema}


def _header_parameters(route: Route) -> Iterator[Schema]:
    if route.is_create:
        schema = {"type": "string", "minLength": 1, "maxLength": 255}
        yield {"name": "Idempotency-Key", "in": "header", "required": False, "schema": schema}
    if route.answer_media == EVENT_STREAM:
        yield {"name": "Last-Event-ID", "in": "header", "required": False, "schema": {"type": "string"}}


def _request(route: Route) -> Schema:
    assert route.request is not None
    if route.request_media != MULTIPART:
        return _reference(route.request)
    fields = list(form_fields(route))
    return {
        "type": "object",
        "properties": {name: schema for name, schema, _ in fields},
        "required": [name for name, _, is_required in fields if is_required],
    }


def _needs_body(route: Route) -> bool:
    """Tell whether an empty body is refused; one that may lack every field may be left out."""
    if route.request is None:
        return False
    return route.request_media == MULTIPART or any(is_required for _, _, is_required in fields_of(route.request))


def _responses(rows: Sequence[Route]) -> Schema:
    """Describe the answers of all rows."""
    done: dict[str, list[Schema]] = {}
    accepted: dict[str, list[Schema]] = {}
    refused: dict[str, list[Schema]] = {}
    for row in rows:
        for media, schema in _answers(row):
            done.setdefault(media, []).append(schema)
        if row.accepted is not None:
            accepted.setdefault(JSON, []).append(_reference(row.accepted))
        refused.setdefault(JSON, []).append(_reference(row.error))
        if row.answer is InferenceAnswer:
            # Whatever the upstream refuses, in its own words.
            refused[JSON].append(_reference(row.answer))
        if row.refuse is not None:
            refused.setdefault(row.answer_media, []).append({"type": "string"})
    responses: Schema = {}
    if done:
        responses["200"] = {"description": "Done.", "content": _contents(done)}
    if accepted:
        responses["202"] = {"description": "Accepted; it runs.", "content": _contents(accepted)}
    if any(row.answer_media == EVENT_STREAM for row in rows):
        responses["204"] = {"description": "It is over, and nothing came after Last-Event-ID."}
    if any(row.leads_on for row in rows):
        responses["303"] = {"description": "Done; `Location` says where to go on."}
    error = {"content": _contents(refused)}
    return responses | {
        "4XX": {"description": "The request is at fault; `error.message` says why.", **error},
        "5XX": {"description": "The server is at fault or busy; the request may be sent again.", **error},
    }


def _answers(row: Route) -> Iterator[tuple[str, Schema]]:
    """Give what a row answers with 200, by its media type."""
    if row.leads_on or (row.accepted is not None and row.answer is None):
        return
    if row.answer is not None:
        yield row.answer_media, _reference(row.answer)
        return
    schema = {"type": "object" if row.answer_media == JSON else "string"}
    for media in LINES_TYPES if row.answer_media == JSON_LINES else (row.answer_media,):
        yield media, schema
