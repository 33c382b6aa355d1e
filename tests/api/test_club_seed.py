"""Every curl line of inference.club's pages, as printed but for the host, with a key in its variable: each answer is
what the golden file has, but for times and addresses.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.batching import working
from tests.api.club import chat, created, until_done, until_over
from tests.api.serving import Served, serving

FOLDER = Path(__file__).parent / "golden_club"
HOST = "https://api.inference.club"
CALL = re.compile(r"^## (\w+)\n(.*?)\n(?=\n## |\Z)", re.DOTALL | re.MULTILINE)
CALLS = dict(CALL.findall((FOLDER / "calls.txt").read_text(encoding="utf-8")))
GOLDEN = json.loads((FOLDER / "reference.json").read_text(encoding="utf-8"))
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")
TIMES = frozenset({"created", "created_at"})


def settled(value: Any, served: Served, key: str = "") -> Any:
    """Put words in the place of what differs from run to run."""
    if isinstance(value, dict):
        return {name: settled(each, served, name) for name, each in value.items()}
    if isinstance(value, list):
        return [settled(each, served) for each in value]
    if isinstance(value, str):
        return TIME.sub("<time>", value.replace(served.base, "<host>"))
    return "<time>" if key in TIMES and value is not None else value


async def curl(served: Served, name: str, root: str = "") -> Any:
    """Run a line of the page, and give the status and what came."""
    line = CALLS[name].replace(HOST, served.base + root) + " --silent --write-out '\\n%{http_code}'"
    assert served.secret is not None
    environment = os.environ | {"INFERENCE_CLUB_KEY": served.secret}
    ran = await asyncio.create_subprocess_exec("sh", "-c", line, env=environment, stdout=asyncio.subprocess.PIPE)
    out, _ = await ran.communicate()
    assert ran.returncode == 0, line
    body, _, status = out.rpartition(b"\n")
    return [int(status), settled(json.loads(body), served)]


async def fill(served: Served) -> None:
    """Have another tenant make what is in the way, so that batch 7 and job 42 are those of the page."""
    stranger = served.add_key("stranger")
    served.secret, own = stranger, served.secret
    for count in (9, 8, 8, 8, 8):
        await created(served, *(chat(str(number)) for number in range(count)))
    served.secret = own


async def walk(served: Served, folder: Path, root: str = "") -> AsyncIterator[tuple[str, Any]]:
    """Send the lines in an order in which each has something to show."""
    await fill(served)
    for name in ("submit_job", "list_jobs", "get_job", "cancel_job", "retry_job"):
        yield name, await curl(served, name, root)
    for name in ("create_batch", "list_batches", "get_batch"):
        yield name, await curl(served, name, root)
    async with working(folder):
        await until_done(served, "7")
        await until_over(served, "42")
    for name in ("get_job", "list_jobs", "get_batch", "list_batches", "cancel_batch", "cancel_job", "retry_job"):
        yield f"{name}_done", await curl(served, name, root)


async def answers(folder: Path, root: str = "") -> dict[str, Any]:
    async with serving(folder, is_open=False) as served:
        served.secret = served.add_key("acme")
        return {name: answer async for name, answer in walk(served, folder, root)}


async def test_every_line_answers_as_the_golden_file_has_it_under_the_path(tmp_path: Path) -> None:
    assert await answers(tmp_path, "/club") == GOLDEN


async def test_every_line_answers_so_at_the_root_whose_list_has_more(tmp_path: Path) -> None:
    found = await answers(tmp_path)

    for name in ("list_batches", "list_batches_done"):
        status, page = found.pop(name)
        (row,), (expected,) = page["data"], GOLDEN[name][1]["data"]
        assert status == 200
        for key in ("id", "label", "total", "queued", "processing", "processed", "failed", "created_at", "object"):
            assert row[key] == expected[key], key
    assert found == {name: answer for name, answer in GOLDEN.items() if not name.startswith("list_batches")}


BATCH = {"id", "label", "status", "total", "queued", "processing", "processed", "failed"}


@pytest.mark.parametrize(
    ("name", "status", "keys"),
    [
        ("create_batch", 202, BATCH | {"created"}),
        ("get_batch", 200, BATCH | {"jobs"}),
        ("get_batch_done", 200, BATCH | {"jobs"}),
        ("submit_job", 202, {"id", "object", "status", "inference_type", "model", "created", "queued_at"}),
        ("get_job_done", 200, {"id", "object", "status", "inference_type", "model", "created", "result_url"}),
        ("cancel_job", 200, {"id", "status", "canceled"}),
        ("list_jobs_done", 200, {"data"}),
    ],
)
def test_golden_answers_have_what_the_pages_print(name: str, status: int, keys: set[str]) -> None:
    found_status, body = GOLDEN[name]

    assert found_status == status
    assert keys <= body.keys()
