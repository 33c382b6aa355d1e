"""Schemathesis' hooks: lead half of what it makes up to objects that are there, so that more than 404 is tried."""

from __future__ import annotations

import json
import os
import zlib
from typing import Any

import schemathesis

KNOWN = "FUZZ_KNOWN_IDS"
_IDS: dict[str, list[str]] = json.loads(os.environ.get(KNOWN, "{}"))


def _draw(made_up: object, known: list[str]) -> str | None:
    """Choose by what was made up, so that the same seed gives the same requests."""
    number = zlib.crc32(repr(made_up).encode())
    return known[number // 2 % len(known)] if known and number % 2 else None


@schemathesis.hook
def map_path_parameters(context: schemathesis.HookContext, path_parameters: dict[str, Any]) -> dict[str, Any]:
    assert context.operation is not None
    for name in path_parameters or ():
        # The events of what has not ended go on until it has.
        kind = "ended_batch_id" if context.operation.path.endswith("/events") else name
        path_parameters[name] = _draw(path_parameters[name], _IDS.get(kind, [])) or path_parameters[name]
    return path_parameters


@schemathesis.hook
def map_body(context: schemathesis.HookContext, body: Any) -> Any:
    assert context.operation is not None
    if isinstance(body, dict) and context.operation.label == "POST /v1/batches":
        file_id = _draw(body, _IDS.get("file_id", []))
        if file_id is not None:
            known = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
            return {name: value for name, value in body.items() if name != "requests"} | known
    return body
