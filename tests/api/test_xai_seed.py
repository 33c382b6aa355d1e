"""The seven calls of xAI's reference page, with the host alone replaced, at the root and under xAI's path: each answer
is what the golden file has, but for ids and times.
"""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.api.batching import working
from tests.api.serving import Served, serving
from tests.api.xai import chat, until_done

GOLDEN = json.loads((Path(__file__).parent / "golden_xai" / "reference.json").read_text(encoding="utf-8"))
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
REQUESTS = [chat("first", prompt="Say hello"), chat("second", simulate=["400"])]


@dataclass(frozen=True, slots=True)
class Asked:
    """One call of the page and its answer, ids and times replaced."""

    name: str
    status: int
    body: Any


def settled(value: Any, batch_id: str) -> Any:
    """Put words in the place of what differs from run to run."""
    if isinstance(value, dict):
        return {key: settled(each, batch_id) for key, each in value.items()}
    if isinstance(value, list):
        return [settled(each, batch_id) for each in value]
    if isinstance(value, str):
        return TIME.sub("<time>", value.replace(batch_id, "<batch>"))
    return value


async def walk(served: Served, folder: Path, root: str, headers: dict[str, str]) -> AsyncIterator[Asked]:
    """Send the calls in an order in which each has something to show."""
    batch_id = "none"

    async def ask(name: str, method: str, path: str, body: Any = None) -> Asked:
        reply = await served.call(method, f"{root}{path.format(batch=batch_id)}", json=body, headers=headers)
        return Asked(name, reply.status, reply.json)

    made = await ask("create", "POST", "/batches", {"name": "my_batch"})
    batch_id = made.body["batch_id"]
    yield Asked(made.name, made.status, settled(made.body, batch_id))
    calls = [
        ("add", "POST", "/batches/{batch}/requests", {"batch_requests": REQUESTS}),
        ("requests_pending", "GET", "/batches/{batch}/requests?limit=1", None),
        ("get_pending", "GET", "/batches/{batch}", None),
        ("results_none", "GET", "/batches/{batch}/results", None),
    ]
    for call in calls:
        asked = await ask(*call)
        yield Asked(asked.name, asked.status, settled(asked.body, batch_id))
    async with working(folder, concurrency=1):
        await until_done(served, batch_id, 2)
    for name, method, path in (
        ("results", "GET", "/batches/{batch}/results?limit=1000"),
        ("requests", "GET", "/batches/{batch}/requests"),
        ("get", "GET", "/batches/{batch}"),
        ("list", "GET", "/batches?limit=10"),
        ("cancel", "POST", "/batches/{batch}:cancel"),
        ("get_unknown", "GET", "/batches/unknown/requests"),
        ("add_to_cancelled", "POST", "/batches/{batch}/requests"),
    ):
        asked = await ask(name, method, path, {"batch_requests": REQUESTS} if name == "add_to_cancelled" else None)
        yield Asked(asked.name, asked.status, settled(asked.body, batch_id))


async def test_every_call_under_xais_path_answers_as_the_golden_file_has_it(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        found = {each.name: [each.status, each.body] async for each in walk(served, tmp_path, "/xai/v1", {})}

    assert found == GOLDEN


async def test_every_call_at_the_root_answers_the_same_and_more(tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        found = {each.name: [each.status, each.body] async for each in walk(served, tmp_path, "/v1", {})}

    for name, (status, body) in GOLDEN.items():
        assert found[name][0] == status
        assert_within(body, found[name][1], name)


def assert_within(part: Any, whole: Any, place: str) -> None:
    """Every key of the part is in the whole, with the same value."""
    if isinstance(part, dict):
        assert part.keys() <= whole.keys(), place
        for key, value in part.items():
            assert_within(value, whole[key], f"{place}.{key}")
    elif isinstance(part, list):
        assert len(part) == len(whole), place
        for number, (one, other) in enumerate(zip(part, whole, strict=True)):
            assert_within(one, other, f"{place}[{number}]")
    else:
        assert part == whole, place


@pytest.mark.parametrize(
    ("call", "keys"),
    [
        ("create", {"batch_id", "create_api_key_id", "create_time", "name", "state"}),
        ("list", {"batches"}),
        ("get", {"batch_id", "create_api_key_id", "create_time", "name", "state"}),
        ("requests", {"batch_request_metadata"}),
        ("results", {"results"}),
        ("cancel", {"batch_id", "create_api_key_id", "create_time", "name", "state"}),
    ],
)
def test_golden_answers_have_what_the_page_lists(call: str, keys: set[str]) -> None:
    status, body = GOLDEN[call]

    assert status == 200
    assert keys <= body.keys()
