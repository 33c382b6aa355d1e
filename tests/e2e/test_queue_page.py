"""The queue page of a real server in a real browser: it needs no script, and its buttons do what they say."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import start
from tests.e2e.served import Server, Site, site
from tests.sdk.packages import browser

SCRIPT = Path(__file__).with_name("queue_page.mjs")
LIMIT_S = 120.0
PHONE_PIXELS = 360
EVIL = "<script>window.wasRun = 1</script><img src=x onerror='window.wasRun = 1'>"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.real,
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed: no browser looks at the page"),
]


async def browse(*arguments: str) -> Any:
    """Run the browser and give what it saw."""
    folder = await asyncio.to_thread(browser)
    # Where it keeps what it needs beside itself.
    environment = dict(os.environ) | {"TMPDIR": str(folder)}
    command = ("node", str(SCRIPT), str(folder), *arguments)
    process = await asyncio.create_subprocess_exec(
        *command, env=environment, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(LIMIT_S):
            out, talk = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode == 0, talk.decode()
    return json.loads(out)


async def make_key(here: Site) -> str:
    made = await (await start(["keys", "create", "--data", str(here.data)], here.folder, {})).ended()
    return made.stdout.decode().strip()


async def ask_for_job(server: Server) -> str:
    wanted = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "async": True}
    async with server.session.post(f"{server.base_url}/chat/completions", json=wanted) as answer:
        assert answer.status == 202
        return str((await answer.json())["id"])


async def test_a_person_looks_at_the_queue_and_cancels_a_batch(tmp_path: Path) -> None:
    async with site(tmp_path, latency="120s") as here:
        key = await make_key(here)
        server = await here.serve("--workers", "1", "--concurrency", "2")
        here.session.headers["Authorization"] = f"Bearer {key}"
        batch_id = await server.submit(here.write_input(20), metadata={"name": EVIL})
        await server.when(lambda: server.get(f"/batches/{batch_id}"), lambda batch: batch["progress"]["in_flight"] > 0)

        job = await ask_for_job(server)
        seen = await browse(server.root, key, batch_id, job)

        batch = await server.get(f"/batches/{batch_id}")
    phone, scripted = seen["onPhone"], seen["withScripts"]
    assert seen["withoutKey"] == 401
    assert batch["status"] in ("cancelling", "cancelled")
    # The page runs and loads nothing, the browser has nothing to complain of, and would say so if it had.
    assert scripted["complaints"] == phone["complaints"] == []
    assert "Content Security Policy" in scripted["refused"]
    assert (scripted["scripts"], scripted["wasRun"], scripted["heading"]) == (0, False, EVIL)
    assert {each.partition("/dashboard/queue")[0] for each in phone["requests"]} == {"GET ", "POST "}
    # It is loaded again by itself until somebody stops that.
    assert phone["status"] == 200
    assert phone["reloaded"] == f"{server.root}/dashboard/queue"
    assert phone["stopped"] == f"{server.root}/dashboard/queue?refresh=off"
    assert batch_id in phone["queue"]
    assert "Nothing moves" not in phone["queue"]
    assert (phone["Cancel"][0], phone["Cancel"][3]) == ("0 active", "1 canceled")
    assert (phone["Retry"][0], phone["Retry"][3]) == ("1 active", "0 canceled")
    # Everything is on a phone's screen, in the dark.
    assert all(0 <= each["left"] < each["right"] <= PHONE_PIXELS for each in (phone["table"], phone["graph"]))
    assert phone["graph"]["height"] > 100
    assert phone["paper"] == "rgb(21, 25, 30)"
    assert phone["steps"] == ["validate", "shards", "seal", "notify"]
    assert phone["states"] == ["done", "running", "waiting", "not needed"]
    assert phone["cancelled"] == {"url": f"{server.root}/dashboard/queue/batches/{batch_id}", "buttons": 0}
    assert phone["badge"] in ("cancelling", "cancelled")
