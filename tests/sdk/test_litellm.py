"""LiteLLM, told that the server is xAI's, runs a batch of a file to its end and reads every result."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.calling import batch_server, chat_line, simulator
from tests.sdk.packages import litellm

FLOW = Path(__file__).parent / "litellm_flow.py"
NAMES = [f"request-{number}" for number in range(250)]

# It is some two hundred megabytes large, for one story.
pytestmark = [pytest.mark.long, pytest.mark.real]


def test_litellm_runs_an_xai_batch_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(map(chat_line, NAMES)) + chat_line("bad", simulate=["400"] * 20))
    # Its list of prices would otherwise come from the network.
    environment = os.environ | {"PYTHONPATH": str(litellm()), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}

    with simulator() as upstream, batch_server(tmp_path / "served", upstream) as base_url:
        command = [sys.executable, str(FLOW), base_url.removesuffix("/v1"), str(path)]
        ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)

    assert ran.returncode == 0, ran.stderr
    told = json.loads(ran.stdout.splitlines()[-1])
    lines = {each["custom_id"]: each for each in told.pop("lines")}
    assert told == {"status": "completed", "total": 251, "completed": 250, "failed": 1, "name": "nightly"}
    assert lines.pop("bad")["error"]["code"] == "3"
    assert sorted(lines) == sorted(NAMES)
    for name, each in lines.items():
        assert each["response"]["body"]["choices"][0]["message"]["content"].endswith(f" Say {name}.")
