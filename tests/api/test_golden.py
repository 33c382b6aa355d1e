"""Every refusal of files, uploads, keys and HTTP itself, byte for byte as the golden files have it.

A golden file holds a request, what is asked before it if anything, the status, headers that matter, and the body.
`{names}` in it stand for what the fixture made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from batchrunner.clock import SystemClock
from batchrunner.holdings import KeyLimits, KeyScope
from batchrunner.settings import Settings
from tests.api.serving import FORM_HEADERS, LINE, Served, form, serving

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
SMALL = Settings(file_bytes_max=100_000, upload_part_bytes_max=50_000)


@dataclass(frozen=True, slots=True)
class Stage:
    """A server with the objects that golden files speak of."""

    served: Served
    names: dict[str, str]

    def fill(self, text: str) -> str:
        for name, value in self.names.items():
            text = text.replace(f"{{{name}}}", value)
        return text


class StoppedClock(SystemClock):
    """The machine's clock, but nothing takes any time: of a slow machine's a refusal would tell."""

    def monotonic_s(self) -> float:
        return 0.0


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    async with serving(tmp_path, is_open=False, settings=SMALL, clock=StoppedClock()) as served:
        served.secret = served.add_key("acme")
        served.add_key("acme", scopes=[KeyScope.READ], secret="brk_reader_with_one_scope")
        served.add_key("acme", limits=KeyLimits(rpm=1), secret="brk_one_request_a_minute")
        names = {
            "batch_file": (await served.upload()).json["id"],
            "user_data_file": (await served.upload(b"x", purpose="user_data")).json["id"],
            "part_md5": hashlib.md5(LINE, usedforsecurity=False).hexdigest(),
        }
        for name in ("pending", "cancelled", "completed"):
            upload_id, part_id = await begin_upload(served)
            names[f"{name}_upload"] = upload_id
            if name == "pending":
                names["part"] = part_id
            elif name == "cancelled":
                assert (await served.call("POST", f"/v1/uploads/{upload_id}/cancel")).status == 200
            else:
                done = await served.call("POST", f"/v1/uploads/{upload_id}/complete", json={"part_ids": [part_id]})
                assert done.status == 200
        yield Stage(served, names)


async def begin_upload(served: Served) -> tuple[str, str]:
    wanted = {"bytes": len(LINE), "filename": "in.jsonl", "mime_type": "application/jsonl", "purpose": "batch"}
    upload = await served.call("POST", "/v1/uploads", json=wanted)
    raw = form(fields={}, name="data")
    part = await served.call("POST", f"/v1/uploads/{upload.json['id']}/parts", body=raw, headers=FORM_HEADERS)
    return upload.json["id"], part.json["id"]


@pytest.mark.parametrize("case", CASES)
async def test_refusal_is_as_the_golden_file_has_it(stage: Stage, case: str) -> None:
    await check_refusal(stage, (GOLDEN / f"{case}.json").read_text(encoding="utf-8"))


async def check_refusal(stage: Stage, content: str) -> None:
    """Ask for what a golden file asks for, and hold the answer against the one in it."""
    golden = json.loads(stage.fill(content))
    asked: dict[str, Any] = golden["request"]

    for each in golden.get("before", []):
        before = await stage.served.call(each["method"], each["path"], **sent(stage, each))
        assert before.status == 200
    reply = await stage.served.call(asked["method"], asked["path"], **sent(stage, asked))

    assert reply.status == golden["status"]
    assert reply.json == golden["body"]
    assert list(reply.json["error"]) == ["message", "type", "param", "code"]
    assert reply.headers["Content-Type"] == "application/json"
    assert reply.headers["x-request-id"].startswith("req_")
    for name, value in golden.get("headers", {}).items():
        assert reply.headers[name] == value
    if reply.status in {409, 413}:
        assert reply.headers["x-should-retry"] == "false"


def sent(stage: Stage, asked: dict[str, Any]) -> dict[str, Any]:
    """What a golden file sends besides method and path."""
    headers = dict(asked.get("headers", {}))
    body = None
    if "body" in asked:
        body = asked["body"].encode() * asked.get("body_times", 1)
    if "fields" in asked:
        content = asked["file"].encode() * asked.get("file_times", 1) if "file" in asked else None
        filename = asked.get("file_called", "in.jsonl")
        body = form(fields=asked["fields"], content=content, filename=filename, name=asked.get("file_name", "file"))
        headers |= FORM_HEADERS
    secret = asked.get("secret", stage.served.secret)
    if secret:
        headers["Authorization"] = f"Bearer {secret}"
    else:
        headers["Authorization"] = ""
    return {"body": body, "json": asked.get("json"), "headers": headers}
