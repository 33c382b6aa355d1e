"""Requests that are answered at once, by real processes: with the official SDK, past running batches, over a death."""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest

from tests.cli.calling import ROOT
from tests.e2e.harness import start
from tests.e2e.served import Server, Site, site

pytestmark = pytest.mark.slow

WINDOW = 8
KEY = "sk-of-the-upstream-alone"
QUESTION: Any = [{"role": "user", "content": "what is asked at once"}]


async def new_key(here: Site, *flags: str) -> str:
    """Make an API key; gives its secret."""
    made = await (await start(["keys", "create", "--data", str(here.data), *flags], here.folder, {})).ended()
    assert made.code == 0, made.stderr
    return made.stdout.decode().strip()


@contextlib.asynccontextmanager
async def open_streams(server: Server, count: int) -> AsyncIterator[None]:
    """Have streams that have begun and do not end; at the end of the block their callers hang up."""
    body = {"model": "m", "stream": True, "messages": QUESTION}
    async with contextlib.AsyncExitStack() as stack:
        for _ in range(count):
            answer = await server.session.post(f"{server.base_url}/chat/completions", json=body)
            stack.callback(answer.close)
            assert (await answer.content.readany()).startswith(b"data: ")
        yield


async def window_is(server: Server, batch_id: str, window: int) -> None:
    """Wait until the workers' part of the window is so large; the API may be gone for a moment."""

    async def ask() -> Any:
        with contextlib.suppress(aiohttp.ClientError):
            return (await server.get(f"/batches/{batch_id}"))["progress"].get("window")

    await server.when(ask, lambda found: found == window)


async def test_official_sdk_streams_and_sends_files_with_the_key_of_this_server(tmp_path: Path) -> None:
    async with site(tmp_path, api_key=KEY) as here:
        key, reader = await new_key(here), await new_key(here, "--scopes", "read")
        server = await here.serve("--workers", "1", OPENAI_API_KEY=KEY)
        async with openai.AsyncOpenAI(base_url=server.base_url, api_key=key, max_retries=0) as client:
            whole = await client.chat.completions.create(model="m", messages=QUESTION)
            stream = await client.chat.completions.create(model="m", messages=QUESTION, stream=True)
            said = "".join([event.choices[0].delta.content or "" async for event in stream])
            heard = await client.audio.transcriptions.create(model="m", file=("a.wav", bytes(100_000)))
            with pytest.raises(openai.PermissionDeniedError):
                await client.with_options(api_key=reader).embeddings.create(model="m", input="a")
            with pytest.raises(openai.AuthenticationError):
                await client.with_options(api_key=KEY).embeddings.create(model="m", input="a")
            with pytest.raises(openai.NotFoundError) as missing:
                await client.chat.completions.create(model="missing-model", messages=QUESTION)
        ended = await server.stop()
        assert here.simulator.stats().ok == 3

    assert said.startswith("echo:")
    assert said.endswith("what is asked at once")
    assert (whole.choices[0].message.content or "").endswith("what is asked at once")
    assert heard.text.startswith("echo:")
    assert missing.value.code == "model_not_found"
    assert ended.code == 0
    for secret in (KEY, key, "asked at once", "echo:"):
        assert secret not in ended.stderr


async def test_batches_leave_room_while_requests_are_answered_at_once(tmp_path: Path) -> None:
    async with site(tmp_path, latency="500ms", stream_interval_s=600.0) as here:
        server = await here.serve("--workers", "1", "--concurrency", str(WINDOW))
        batch_id = await server.submit(here.write_input(10_000))
        await window_is(server, batch_id, WINDOW)

        async with open_streams(server, 3):
            await window_is(server, batch_id, WINDOW - 3)
        await here.simulator.wait_until(lambda stats: stats.abandoned == 3)
        await window_is(server, batch_id, WINDOW)

        async with open_streams(server, 5):
            await window_is(server, batch_id, WINDOW - 5)
            server.api().kill()
            await window_is(server, batch_id, WINDOW)
        await here.simulator.wait_until(lambda stats: stats.abandoned == 8)

        await server.post(f"/batches/{batch_id}/cancel")
        batch = await server.ended_batch(batch_id)
        await here.check(server, batch)
        assert (await server.stop()).code == 0


async def test_stream_under_way_is_whole_when_the_server_is_stopped(tmp_path: Path) -> None:
    async with site(tmp_path, stream_interval_s=0.1) as here:
        server = await here.serve("--workers", "1")
        body = {"model": "m", "stream": True, "messages": QUESTION}
        async with server.session.post(f"{server.base_url}/chat/completions", json=body) as answer:
            first = await answer.content.readany()
            server.command.process.terminate()
            rest = await answer.content.read()
        ended = await server.ended()

    assert (first + rest).endswith(b"data: [DONE]\n\n")
    assert ended.code == 0


async def test_the_page_works_as_printed(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "live.md").read_text()
    ((shell,), (snippet,)) = (re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) for language in ("sh", "python"))
    curl = shell[shell.index("curl ") :]
    async with site(tmp_path) as here:
        server = await here.serve("--workers", "1")
        said = []
        for command in (["sh", "-c", curl], [sys.executable, "-c", snippet]):
            printed = [each.replace("http://127.0.0.1:8080/v1", server.base_url) for each in command]
            ran = await asyncio.create_subprocess_exec(
                *printed, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
            )
            out, err = await ran.communicate()
            assert ran.returncode == 0, err
            said.append(out.decode())
        assert here.simulator.stats().ok == 2

    assert said[0].endswith("data: [DONE]\n\n")
    assert re.fullmatch(r"echo:[0-9a-f]{16} Hello", said[1])
