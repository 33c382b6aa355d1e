"""Events off the wire and openai-node's own verifier: every type, with rotated secrets, and no forgery."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from batchrunner.deliveries import EventType
from tests.api.receiving import carrying, receiving
from tests.api.serving import Served, serving
from tests.sdk.packages import NODE, OLD_NODE, node

SCRIPT = Path(__file__).with_name("unwrap.mjs")
UNWRAP_S = 60
# What the script does to each event, and one secret that ended at once.
TAMPERED_EACH = 5

pytestmark = [pytest.mark.slow, pytest.mark.real]


async def secrets_of(api: Served, endpoint: Any) -> tuple[list[str], str]:
    """Give the secrets of an endpoint that was rotated three times: those that sign, and one that does no more."""
    path = f"/v1/webhook_endpoints/{endpoint['id']}/rotate_secret"
    made = [endpoint["signing_secret"]]
    for is_kept in (False, True, True):
        reply = await api.call("POST", path, json={"keep_old_secret_active_for_24_hours": is_kept})
        made.append(reply.json["signing_secret"])
    return made[1:], made[0]


@pytest.mark.parametrize("version", [NODE, pytest.param(OLD_NODE, marks=pytest.mark.long)])
async def test_openai_node_verifies_every_event_and_refuses_forgeries(tmp_path: Path, version: str) -> None:
    if shutil.which("node") is None:
        pytest.skip("NODE IS NOT INSTALLED: openai-node verifies nothing here; on Debian: apt-get install nodejs")
    (tmp_path / "server").mkdir()
    taken: list[dict[str, object]] = []
    async with serving(tmp_path / "server") as api, receiving() as receiver, carrying(api):
        for count, kind in enumerate(sorted(EventType), start=1):
            wanted = {"name": "mine", "url": f"{receiver.base}/hook", "event_types": [kind]}
            made = (await api.call("POST", "/v1/webhook_endpoints", json=wanted)).json
            secrets, ended = await secrets_of(api, made)
            await api.call("POST", "/v1/webhook_events", json={"type": kind})
            got = (await receiver.wait(count))[-1]
            body = got.body.decode()
            taken.append({"headers": got.headers, "body": body, "secrets": secrets, "strangers": [ended]})

    (tmp_path / "got.json").write_text(json.dumps(taken), encoding="utf-8")
    command = ["node", str(SCRIPT), str(node(version)), str(tmp_path / "got.json")]
    ran = await asyncio.to_thread(
        subprocess.run, command, capture_output=True, text=True, timeout=UNWRAP_S, check=False
    )

    assert ran.returncode == 0, ran.stdout + ran.stderr
    said = json.loads(ran.stdout)
    assert said["version"] == version
    assert [each[0] for each in said["verified"]] == [kind for kind in sorted(EventType) for _ in range(3)]
    assert {each[2] for each in said["verified"]} == {"batch_test"}
    assert said["refused"] == len(EventType) * TAMPERED_EACH
