"""Schemathesis against a whole server by its own description: refusals are as described, and nothing is a 5xx."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.api.fuzz_hooks import KNOWN
from tests.cli.calling import ENVIRONMENT, batch_server, chat_line, simulator

CONFIG = Path(__file__).with_name("schemathesis.toml")
FAILS = ["400"] * 20
COUNT = r"(\d+) generated"
# Quick runs have one seed, so that they find again what they found, and end by count: on a busy machine seconds go by
# before the first request.
QUICK = ("--phases", "coverage,fuzzing", "--max-examples", "2", "--seed", "1")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    with simulator() as upstream, batch_server(tmp_path / "served", upstream, "--workers", "1") as base_url:
        yield base_url.removesuffix("/v1")


def post(root: str, path: str, **body: Any) -> dict[str, Any]:
    """POST JSON to the server."""
    request = urllib.request.Request(root + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        said: dict[str, Any] = json.load(answer)
        return said


def get(root: str, path: str) -> dict[str, Any]:
    with urllib.request.urlopen(root + path, timeout=30) as answer:
        said: dict[str, Any] = json.load(answer)
        return said


def lay(root: str) -> dict[str, list[str]]:
    """Make objects in every state; gives their ids by the path parameter that takes them."""
    lines = [json.loads(chat_line(f"line-{number}")) for number in range(5)]
    lines.append(json.loads(chat_line("bad", simulate=FAILS)))
    order = {"endpoint": "/v1/chat/completions", "completion_window": "24h"}
    ended = [post(root, "/v1/batches", **order, requests=lines)["id"] for _ in range(4)]
    ended.append(post(root, "/v1/batches", **order, requests=[lines[0], lines[0]])["id"])
    waiting = [post(root, "/v1/batches", **order, requests=lines, priority=1)["id"] for _ in range(2)]
    for each in waiting:
        post(root, f"/v1/batches/{each}/pause")
    for each in ended:
        while get(root, f"/v1/batches/{each}")["status"] not in {"completed", "failed"}:
            pass
    jobs = jobs_of(root)
    announced = {"bytes": 0, "filename": "a.txt", "mime_type": "text/plain", "purpose": "user_data"}
    uploads = [post(root, "/v1/uploads", **announced)["id"] for _ in range(6)]
    done = post(root, f"/v1/uploads/{uploads[0]}/complete", part_ids=[])
    post(root, f"/v1/uploads/{uploads[1]}/cancel")
    shown = [get(root, f"/v1/batches/{each}") for each in ended]
    files = [each[name] for each in shown for name in ("output_file_id", "error_file_id", "input_file_id")]
    return {
        "batch_id": ended + waiting,
        "ended_batch_id": ended,
        "file_id": [each for each in files if each] + [done["file"]["id"]],
        "upload_id": uploads,
        "job_id": jobs,
        "asset_id": jobs,
    }


def jobs_of(root: str) -> list[str]:
    """Have jobs that are done, failed and canceled."""
    asked = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    bodies = [("chat/completions", asked), ("chat/completions", asked | {"simulate": FAILS})]
    bodies.append(("images/generations", {"prompt": "x", "response_format": "b64_json"}))
    made = [post(root, f"/v1/{url}", **body, **{"async": True})["id"] for url, body in bodies]
    while get(root, "/api/inference/queue/summary")["active"]:
        pass
    canceled = post(root, "/v1/chat/completions", **asked, **{"async": True})["id"]
    post(root, f"/v1/jobs/{canceled}/cancel")
    return [*made, canceled]


def fuzz(root: str, folder: Path, *flags: str) -> str:
    """Let schemathesis loose; gives what it said."""
    program = str(Path(sys.executable).with_name("schemathesis"))
    command = [program, "--config-file", str(CONFIG), "run", f"{root}/openapi.json", "--no-color"]
    command += ["--continue-on-failure", "--request-timeout", "10", *flags]
    environment = ENVIRONMENT | {"SCHEMATHESIS_HOOKS": "tests.api.fuzz_hooks", KNOWN: json.dumps(lay(root))}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def check(root: str, said: str, count_min: int) -> None:
    """See that each operation was tried, and that the server is well."""
    selected, tested, generated = (re.search(words, said) for words in (r"Selected: (\d+)/", r"Tested: (\d+)", COUNT))
    assert selected is not None, said
    assert tested is not None, said
    assert generated is not None, said
    assert int(selected[1]) == int(tested[1]) >= 25
    assert int(generated[1]) >= count_min, said
    assert get(root, "/readyz")["status"] == "ready"


@pytest.mark.slow
def test_described_requests_are_answered_as_described(server: str, tmp_path: Path) -> None:
    said = fuzz(server, tmp_path, *QUICK)

    check(server, said, 300)


@pytest.mark.long
def test_many_more_requests_are_answered_as_described(server: str, tmp_path: Path) -> None:
    said = fuzz(server, tmp_path, "--max-time", "600", "--max-examples", "300")

    check(server, said, 3_000)
