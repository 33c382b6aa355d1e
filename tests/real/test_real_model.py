"""A real language model behind llama.cpp's own server answers a file of prompts."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.e2e.harness import chat_line, start
from tests.invariants import check_shape, check_summary

pytestmark = pytest.mark.real

SERVER = Path(__file__).with_name("llama_server.py")
PROMPTS = 20
LOADING_S = 60.0
# Two cores that have other work as well.
ANSWERING_S = 240.0


@pytest.fixture
async def server_url() -> AsyncIterator[str]:
    """A llama.cpp server of its own; it ends with its stdin."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SERVER),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(LOADING_S):
            url = (await process.stdout.readline()).decode().strip()
        yield url
    finally:
        process.stdin.close()
        await process.wait()


def prompt_line(number: int) -> bytes:
    """One request, small enough for two slow cores."""
    messages = [{"role": "user", "content": f"Say the number {number} in words."}]
    return chat_line(number, model="smollm2", messages=messages, max_tokens=12, temperature=0, seed=number)


async def test_real_model_answers_every_prompt(tmp_path: Path, server_url: str) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"".join(prompt_line(number) for number in range(PROMPTS)))

    command = await start(["run", "in.jsonl", "-o", "out.jsonl", "-u", server_url, "--json"], tmp_path, {})
    ended = await command.ended(within_s=ANSWERING_S)

    assert ended.code == 0, ended.stderr
    assert not (tmp_path / "out.errors.jsonl").exists()
    lines = [json.loads(raw) for raw in (tmp_path / "out.jsonl").read_bytes().splitlines()]
    for line in lines:
        check_shape("output_line", line)
    assert [line["custom_id"] for line in lines] == [f"request-{number:05}" for number in range(PROMPTS)]
    bodies = [line["response"]["body"] for line in lines]
    assert all(body["object"] == "chat.completion" for body in bodies)
    assert all(body["choices"][0]["message"]["content"].strip() for body in bodies)
    check_usage(ended.stdout, bodies)


def check_usage(summary: bytes, bodies: list[dict]) -> None:
    """What the run summed up is what the model reported, line by line."""
    found = json.loads(summary)
    check_summary(found)

    assert found["usage"]["input_tokens"] == sum(body["usage"]["prompt_tokens"] for body in bodies)
    assert found["usage"]["output_tokens"] == sum(body["usage"]["completion_tokens"] for body in bodies)
    assert 0 < found["usage"]["output_tokens"] <= 12 * PROMPTS
