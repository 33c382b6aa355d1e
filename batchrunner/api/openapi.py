"""The OpenAPI document of the API, made from the route table and the structs that it names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec

from batchrunner import __version__
from batchrunner.api.events import EVENT_STREAM
from batchrunner.api.http import JSON, Route
from batchrunner.api.multipart import MULTIPART

_REFERENCE = "#/components/schemas/{name}"

Schema = dict[str, Any]


def document(routes: Sequence[Route]) -> Schema:
    """Describe a route table as OpenAPI 3.1. The same table gives the same document."""
    kinds = [*(route.error for route in routes), *_body_kinds(routes)]
    _, components = msgspec.json.schema_components(list(dict.fromkeys(kinds)), ref_template=_REFERENCE)
    paths: dict[str, Schema] = {}
    for route in sorted(routes, key=lambda each: (each.path, each.method)):
        shadows = [each for each in routes if each.recognizes and (each.root_path, each.method) == _place(route)]
        operation = _operation(route, shadows)
        paths.setdefault(route.path, {})[route.method.lower()] = operation
        if _is_alone_beside(route, routes):
            beside = paths.setdefault(route.root_path, {})
            beside[route.method.lower()] = operation | {"operationId": route.handler.__name__}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "batchrunner",
            "version": __version__,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
            "description": "An OpenAI Batch API. What is under /v1 is under /openai/v1 too, where files, uploads and "
            "batches have the fields of OpenAI only. What is under /xai/v1 is xAI's API, under /club/v1 that of "
            "inference.club; both are at /v1 too where a request can be told to be theirs.",
        },
        "servers": [{"url": "/"}],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": dict(sorted(components.items())),
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "header": {"type": "apiKey", "in": "header", "name": "api-key"},
            },
        },
    }


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


def _body_kinds(routes: Sequence[Route]) -> Iterator[type[msgspec.Struct]]:
    for route in routes:
        if route.request is not None and route.request_media == JSON:
            yield route.request
        yield from (kind for kind in (route.answer, route.accepted) if kind is not None)


def _is_alone_beside(route: Route, routes: Sequence[Route]) -> bool:
    """Tell whether a dialect's route stands at the root at a path that others describe, with a method of its own."""
    methods = {each.method for each in routes if each.path == route.root_path}
    return route.path != route.root_path and bool(methods) and route.method not in methods


def _place(route: Route) -> tuple[str, str]:
    return route.path, route.method


def _operation(route: Route, shadows: Sequence[Route]) -> Schema:
    operation: Schema = {"operationId": route.name, "summary": route.summary}
    if parameters := [*_path_parameters(route), *_query_parameters(route), *_header_parameters(route)]:
        operation["parameters"] = parameters
    if route.request is not None:
        content = {route.request_media: {"schema": _request(route)}}
        operation["requestBody"] = {"required": _needs_body(route), "content": content}
    operation["responses"] = _responses(route, shadows)
    # An open server, which listens on a loopback address only, takes requests without a key.
    operation["security"] = [{"bearer": []}, {"header": []}, {}] if route.scope is not None else []
    return operation


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
        return {"$ref": _REFERENCE.format(name=route.request.__name__)}
    fields = list(form_fields(route))
    return {
        "type": "object",
        "properties": {name: schema for name, schema, _ in fields},
        "required": [name for name, _, is_required in fields if is_required],
    }


def _needs_body(route: Route) -> bool:
    """Tell whether an empty body is refused; one that may lack every field may be left out."""
    assert route.request is not None
    return route.request_media == MULTIPART or any(is_required for _, _, is_required in fields_of(route.request))


def _responses(route: Route, shadows: Sequence[Route]) -> Schema:
    """Describe the answers; at the root `shadows`, routes of other dialects, may answer in a form of their own."""
    schema: Mapping[str, object] = {"type": "string"}
    if route.answer is not None:
        schema = {"$ref": _REFERENCE.format(name=route.answer.__name__)}
    elif route.answer_media == JSON:
        schema = {"type": "object"}
    forms = {route.answer_media: {"schema": schema}}
    for each in shadows:
        if each.answer is not None and each.answer_media not in forms:
            forms[each.answer_media] = {"schema": {"$ref": _REFERENCE.format(name=each.answer.__name__)}}
    refusals = [{"$ref": _REFERENCE.format(name=each.error.__name__)} for each in (route, *shadows)]
    accepted = {}
    if route.accepted is not None:
        reference = {"$ref": _REFERENCE.format(name=route.accepted.__name__)}
        accepted = {"202": {"description": "Accepted; it runs.", "content": {JSON: {"schema": reference}}}}
    error = {"content": {JSON: {"schema": refusals[0] if len(refusals) == 1 else {"anyOf": refusals}}}}
    over = {"204": {"description": "It is over, and nothing came after Last-Event-ID."}}
    return {
        **({} if accepted and route.answer is None else {"200": {"description": "Done.", "content": forms}}),
        **accepted,
        **(over if route.answer_media == EVENT_STREAM else {}),
        "4XX": {"description": "The request is at fault; `error.message` says why.", **error},
        "5XX": {"description": "The server is at fault or busy; the request may be sent again.", **error},
    }
