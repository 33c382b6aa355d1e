"""The document of the API at /openapi.json, and the same as a page for people at /docs: no script, nothing loaded."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Sequence
from functools import cache
from html import escape

import orjson

from batchrunner import __version__
from batchrunner.api.http import JSON, Answer, Call, Route
from batchrunner.api.multipart import MULTIPART
from batchrunner.api.openapi import Schema, document, fields_of, form_fields

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "h2{font:600 1rem ui-monospace,monospace;border-top:1px solid #8884;padding-top:1rem;margin-top:2rem}"
    "table{border-collapse:collapse}td,th{text-align:left;padding:.1rem 1rem .1rem 0;vertical-align:top}"
    "code,td:first-child{font-family:ui-monospace,monospace}.scope{opacity:.7}:root{color-scheme:light dark}"
)
_HEADERS = {
    "content-security-policy": "default-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    f"style-src 'sha256-{base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()}'",
    "referrer-policy": "no-referrer",
}


def reference_routes(table: Sequence[Route]) -> tuple[Route, ...]:
    """Give the two routes that describe a table, themselves included."""

    @cache
    def described() -> bytes:
        return orjson.dumps(document((*table, *routes)), option=orjson.OPT_INDENT_2)

    @cache
    def shown() -> bytes:
        return page((*table, *routes)).encode()

    async def openapi(call: Call) -> Answer:
        """Give the OpenAPI document."""
        return Answer(body=await call.blocking(described))

    async def docs(call: Call) -> Answer:
        """Give the page."""
        body = await call.blocking(shown)
        return Answer(body=body, content_type="text/html; charset=utf-8", headers=_HEADERS)

    routes = (
        Route(method="GET", path="/openapi.json", handler=openapi, summary="Describe the API as OpenAPI", scope=None),
        Route(
            method="GET",
            path="/docs",
            handler=docs,
            summary="Describe the API for people",
            scope=None,
            answer_media="text/html",
        ),
    )
    return routes


def page(routes: Sequence[Route]) -> str:
    """Render a route table as HTML."""
    body = "\n".join(_section(route) for route in routes)
    return (
        '<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>batchrunner API</title>\n'
        f"<style>{_STYLE}</style>\n"
        f"<h1>batchrunner {escape(__version__)}</h1>\n<p>An OpenAI Batch API. Send the key as <code>Authorization: "
        "Bearer KEY</code>; a server without keys takes any. What is under <code>/v1</code> is under "
        "<code>/openai/v1</code> too, where files, uploads and batches have the fields of OpenAI only. xAI's API is "
        "under <code>/xai/v1</code>, inference.club's under <code>/club/v1</code>, and both at <code>/v1</code> too "
        "where a request can be told to be theirs. "
        '<a href="/openapi.json">openapi.json</a></p>\n'
        f"{body}\n</html>\n"
    )


def _section(route: Route) -> str:
    key = f"key with scope {route.scope}" if route.scope is not None else "no key"
    text = f'<h2 id="{escape(route.name)}">{route.method} {escape(route.path)}</h2>\n<p>{escape(route.summary)}. '
    text += f'<span class="scope">{key}{", takes an Idempotency-Key" if route.is_create else ""}</span></p>\n'
    if route.query is not None:
        text += _table("query", fields_of(route.query))
    if route.request is not None:
        is_form = route.request_media == MULTIPART
        text += _table("form" if is_form else "body", form_fields(route) if is_form else fields_of(route.request))
    if route.answer is not None:
        return text + _table("answer", fields_of(route.answer))
    return text if route.answer_media == JSON else f"{text}<p>Answers <code>{escape(route.answer_media)}</code>.</p>\n"


def _table(name: str, fields: Iterator[tuple[str, Schema, bool]]) -> str:
    rows = ""
    for field, schema, is_required in fields:
        note = "required" if is_required and name != "answer" else ""
        rows += f"<tr><td>{escape(field)}<td>{escape(_kind(schema))}<td>{note}"
    return f"<table><tr><th>{name}<th><th>{rows}</table>\n" if rows else ""


def _kind(schema: Schema) -> str:
    """Say a schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "anyOf" in schema:
        return " or ".join(_kind(each) for each in schema["anyOf"])
    if "enum" in schema:
        return " | ".join(str(each) for each in schema["enum"])
    words = str(schema.get("type", "any"))
    if words == "array":
        words = f"array of {_kind(schema.get('items', {}))}"
    bounds = [f"{word} {schema[key]}" for key, word in _BOUNDS if key in schema]
    if schema.get("default") is not None:
        bounds.append(f"default {schema['default']}")
    return f"{words}, {', '.join(bounds)}" if bounds else words


_BOUNDS = (
    ("minimum", "at least"),
    ("maximum", "at most"),
    ("minLength", "length at least"),
    ("maxLength", "length at most"),
    ("maxItems", "at most"),
    ("maxProperties", "at most"),
)
