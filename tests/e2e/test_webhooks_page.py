"""The page on webhooks does what it says: its quickstart in two shells, and its receivers on events off the wire."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from batchrunner.webhooks import secret_of
from tests.api.receiving import Got, carrying, receiving
from tests.api.serving import serving
from tests.sdk.packages import NODE
from tests.sdk.packages import node as node_sdk

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "webhooks.md").read_text(encoding="utf-8")
LIMIT_S = 90.0

pytestmark = pytest.mark.slow


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def free_ports(count: int) -> list[str]:
    taken = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(each.getsockname()[1]) for each in taken]
    for each in taken:
        each.close()
    return ports


def is_listening(port: str) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("localhost", int(port))) == 0


@asynccontextmanager
async def shell(folder: Path, script: str, environment: dict[str, str]) -> AsyncIterator[asyncio.subprocess.Process]:
    """Run a script with all that it starts until the block ends."""
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", script, cwd=folder, env=environment, stdout=asyncio.subprocess.PIPE, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


async def test_quickstart_in_two_shells_works_as_printed(tmp_path: Path) -> None:
    first, second, *_ = blocks("sh")
    upstream, server, receiver = free_ports(3)
    (tmp_path / "receiver.py").write_text(blocks("python")[0].replace("3000", receiver))
    first = first.replace("9000", upstream).replace("3000", receiver)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BATCHRUNNER_", "OPENAI_"))}
    environment = kept | {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        # The page's server has the port that it has by default.
        "BATCHRUNNER_PORT": server,
        "BATCHRUNNER_SERVER": f"http://127.0.0.1:{server}/v1",
    }

    async with asyncio.timeout(LIMIT_S), shell(tmp_path, f"{first}\nwait", environment) as listening:
        assert listening.stdout is not None
        async with shell(tmp_path, f"{second}\nwait", environment) as receiving_shell:
            assert receiving_shell.stdout is not None
            said = [(await receiving_shell.stdout.readline()).decode() for _ in range(2)]
            # The receiver answers after it has printed.
            shown = (await listening.stdout.readline()).decode()

    assert "batch.completed batch_test\n" in said
    assert re.search(r" batch\.completed evt_\w+ -> 200 in \d+ ms\n$", shown)


async def one_event(tmp_path: Path) -> tuple[Got, str]:
    """Take an event off the wire; gives the secret as well."""
    async with serving(tmp_path) as api, receiving() as receiver, carrying(api):
        secret = (await api.call("GET", "/v1/webhook_secret")).json["signing_secret"]
        await api.call("POST", "/v1/webhook_events", json={"type": "batch.completed", "url": receiver.base})
        (got,) = await receiver.wait(1)
    return got, secret


@pytest.mark.parametrize(("end", "code"), [(b"", 0), (b" ", 1)])
async def test_openssl_by_hand_tells_true_from_forged(tmp_path: Path, end: bytes, code: int) -> None:
    got, secret = await one_event(tmp_path)
    (tmp_path / "body.json").write_bytes(got.body + end)
    environment = dict(os.environ) | {
        "OPENAI_WEBHOOK_SECRET": secret,
        "id": got.id,
        "timestamp": got.headers["webhook-timestamp"],
        "signature": got.headers["webhook-signature"],
    }

    process = await asyncio.create_subprocess_exec("bash", "-c", blocks("sh")[2], cwd=tmp_path, env=environment)

    assert await process.wait() == code


async def test_curl_by_hand_sends_what_verifies(tmp_path: Path) -> None:
    secret = secret_of("17" * 32)
    environment = dict(os.environ) | {"OPENAI_WEBHOOK_SECRET": secret}
    async with receiving() as receiver:
        script = blocks("sh")[3].replace("http://localhost:3000", receiver.base)
        async with shell(tmp_path, script, environment) as curl:
            out, _ = await curl.communicate()

    (got,) = receiver.got
    assert (curl.returncode, out) == (0, b"200\n")
    event: Any = openai.OpenAI(api_key="none").webhooks.unwrap(got.body, got.headers, secret=secret)
    assert (event.type, event.data.id) == ("batch.completed", "batch_by_hand")


@pytest.mark.real
@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed: the page's receiver is not tried")
@pytest.mark.parametrize("kind", ["batch.completed", "batch.failed", "batch.expired", "batch.cancelled"])
async def test_the_node_sdk_takes_our_events_and_refuses_forged_ones(tmp_path: Path, kind: str) -> None:
    (port,) = free_ports(1)
    folder = tmp_path / "node"
    folder.mkdir()
    (folder / "node_modules").symlink_to(node_sdk(NODE) / "node_modules")
    (folder / "receiver.mjs").write_text(blocks("js")[0].replace("3000", port))

    async with serving(tmp_path) as api, carrying(api), asyncio.timeout(LIMIT_S):
        secret = (await api.call("GET", "/v1/webhook_secret")).json["signing_secret"]
        environment = dict(os.environ) | {"OPENAI_WEBHOOK_SECRET": secret}
        async with shell(folder, "exec node receiver.mjs 2>&1", environment) as node:
            assert node.stdout is not None
            url = f"http://localhost:{port}/"
            # A first attempt before it listens would be followed by the next in seconds, and by a third in minutes.
            while not is_listening(port):
                await api.call("GET", "/healthz")
            await api.call("POST", "/v1/webhook_events", json={"type": kind, "url": url})
            said = (await node.stdout.readline()).decode()
            assert said == f"{kind} batch_test\n"
            await api.call("POST", "/v1/webhook_secret/rotate")
            await api.call("POST", "/v1/webhook_events", json={"type": kind, "url": url})
            forged = (await node.stdout.readline()).decode()

    assert forged.startswith("refused: ")
    assert "signature" in forged
