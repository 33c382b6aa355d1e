"""inference.net's batch documents as they are printed: only host and key are replaced.

Source: the seed documents; `inference_net/` holds what they print.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest

from batchrunner.simulate import expected_reply
from tests.api.receiving import receiving
from tests.cli.calling import ROOT
from tests.e2e.served import Server, site
from tests.sdk.packages import NODE, node

PRINTED = Path(__file__).parent / "inference_net"
LINES = PRINTED / "batch-input.jsonl"
EXAMPLE = (PRINTED / "example.ts").read_text()
HOST, AFTER = "https://batch.inference.net/v1", "http://127.0.0.1:8080/v1"
PAGE = (ROOT / "docs" / "inference-net.md").read_text()
KINDS = {"chat-1": "/v1/chat/completions", "embed-1": "/v1/embeddings"}
PROGRAM_S = 120

pytestmark = pytest.mark.slow


def client_of(server: Server) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=server.base_url, api_key="any", max_retries=0)


def body_of(line: bytes) -> bytes:
    """Give the bytes of a printed line's body, which is its last member."""
    return line.partition(b'"body":')[2].removesuffix(b"}")


def results_of(output: bytes) -> dict[str, Any]:
    results = map(orjson.loads, output.splitlines())
    return {each["custom_id"]: each["response"]["body"] for each in results}


async def test_chat_and_embedding_lines_without_url_run_in_one_batch_of_another_endpoint(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        server = await here.serve("--workers", "1")
        async with client_of(server) as client:
            file = await client.files.create(file=LINES, purpose="batch")
            made = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
            ended = await server.ended_batch(made.id)
            output = (await client.files.content(ended["output_file_id"])).content
        bodies = {orjson.loads(line)["custom_id"]: body_of(line) for line in LINES.read_bytes().splitlines()}

        assert made.status == "validating"
        assert (ended["status"], ended["request_counts"]["completed"]) == ("completed", 2)
        assert ended["error_file_id"] is None
        answers = results_of(output)
        for custom_id, url in KINDS.items():
            # The very bytes, nulls and all, came to the endpoint that they are for.
            assert b"null" in bodies[custom_id] or custom_id == "embed-1"
            assert here.simulator.seen(bodies[custom_id]).ok == 1
            assert expected_reply(bodies[custom_id], url) in str(answers[custom_id])


async def outcome(folder: Path, *command: str) -> list[str]:
    """Run a program beside the printed lines; gives the words that it prints."""
    shutil.copy(LINES, folder)
    environment = os.environ | {"INFERENCE_API_KEY": "any"}
    pipe = asyncio.subprocess.PIPE
    ran = await asyncio.create_subprocess_exec(*command, cwd=folder, env=environment, stdout=pipe, stderr=pipe)
    async with asyncio.timeout(PROGRAM_S):
        out, err = await ran.communicate()
    assert ran.returncode == 0, out.decode() + err.decode()
    return out.decode().split()


@pytest.mark.real
async def test_the_typescript_example_makes_a_batch_that_ends_well(tmp_path: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("NODE IS NOT INSTALLED: the printed example is not tested here; on Debian: apt-get install nodejs")
    async with site(tmp_path) as here:
        server = await here.serve("--workers", "1")
        assert EXAMPLE.count(HOST) == 1
        # There is no type in it, so it is JavaScript as well.
        (tmp_path / "example.mjs").write_text(EXAMPLE.replace(HOST, server.base_url))
        (tmp_path / "node_modules").symlink_to(node(NODE) / "node_modules")
        batch_id, status = await outcome(tmp_path, "node", "example.mjs")
        ended = await server.ended_batch(batch_id)

    assert status == "validating"
    assert (ended["status"], ended["request_counts"]["completed"]) == ("completed", 1)


async def test_the_python_of_the_page_makes_a_batch_that_ends_well(tmp_path: Path) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    async with site(tmp_path) as here:
        server = await here.serve("--workers", "1")
        batch_id, status = await outcome(tmp_path, sys.executable, "-c", snippet.replace(AFTER, server.base_url))
        ended = await server.ended_batch(batch_id)

    assert status == "validating"
    assert (ended["status"], ended["request_counts"]["completed"]) == ("completed", 2)


async def test_the_older_document_runs_with_urls_metadata_and_a_webhook(tmp_path: Path) -> None:
    async with receiving() as receiver, site(tmp_path) as here:
        server = await here.serve("--workers", "1")
        path = here.write_input(3)
        async with client_of(server) as client:
            file = await client.files.create(file=path, purpose="batch")
            first, second = [
                await client.batches.create(
                    input_file_id=file.id,
                    endpoint="/v1/chat/completions",
                    completion_window="24h",
                    metadata={"description": "nightly eval job"},
                    extra_body={"webhook_url": f"{receiver.base}/hook"},
                )
                for _ in range(2)
            ]
            got = await receiver.wait(2)
            ended = await client.batches.retrieve(first.id)
            newest = await client.batches.list(limit=1)
            older = await client.batches.list(limit=1, after=newest.data[0].id)
            with pytest.raises(openai.ConflictError):
                await client.batches.cancel(first.id)
            await here.check(server, await server.get(f"/batches/{first.id}"))

    assert (ended.status, ended.metadata) == ("completed", {"description": "nightly eval job"})
    assert [page.data[0].id for page in (newest, older)] == [second.id, first.id]
    assert {each.event["type"] for each in got} == {"batch.completed"}
    assert {each.event["data"]["id"] for each in got} == {first.id, second.id}


@pytest.mark.parametrize("path", ["/v1", "/openai/v1"])
async def test_lines_need_a_url_where_the_server_is_as_strict_as_openai(tmp_path: Path, path: str) -> None:
    async with site(tmp_path) as here:
        server = await here.serve("--workers", "1")
        async with client_of(server).with_options(base_url=server.root + path) as client:
            file = await client.files.create(file=LINES, purpose="batch")
            made = await client.batches.create(
                input_file_id=file.id, endpoint="/v1/completions", completion_window="24h"
            )
        ended = await server.ended_batch(made.id)

    assert ended["status"] == ("completed" if path == "/v1" else "failed")
    if path == "/openai/v1":
        assert {each["param"] for each in ended["errors"]["data"]} == {"url"}


def test_the_page_changes_the_host_and_nothing_else() -> None:
    before, after = re.findall(r"```ts\n(.*?)```", PAGE, re.DOTALL)

    assert EXAMPLE.startswith(before)
    assert after == before.replace(HOST, AFTER)
