"""The official SDKs, new and old, against a real server with keys, workers and a simulated upstream behind it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.cli.calling import batch_server, call, chat_line, simulator
from tests.sdk.flow import STORIES
from tests.sdk.packages import NODE, OLD_NODE, OLD_PYTHON, node, old_python

FOLDER = Path(__file__).parent
# Sends every request twenty times as refused: the line fails.
FAILS = ["400"] * 20
ASYNC_ONLY = "async_client"
TOLD = {
    "python": tuple(STORIES),
    "node": (*(name for name in STORIES if name != ASYNC_ONLY), "cancel_may_be_repeated"),
}
FLOW_S = 240

pytestmark = [pytest.mark.slow, pytest.mark.real]


@dataclass(frozen=True, slots=True)
class Sdk:
    """A client: how its stories are begun, and which version has to say that it told them."""

    language: str
    version: str

    def command(self) -> tuple[list[str], dict[str, str]]:
        if self.language == "python":
            older = {"PYTHONPATH": str(old_python())} if self.version == OLD_PYTHON else {}
            return [sys.executable, str(FOLDER / "flow.py")], older
        if shutil.which("node") is None:
            pytest.skip(
                "NODE IS NOT INSTALLED: nothing of openai-node is tested here; on Debian: apt-get install nodejs"
            )
        return ["node", str(FOLDER / "flow.mjs"), str(node(self.version))], {}


SDKS = (Sdk("python", version("openai")), Sdk("python", OLD_PYTHON), Sdk("node", NODE), Sdk("node", OLD_NODE))
Ends = Callable[[Sdk], dict[str, str]]


@dataclass(frozen=True, slots=True)
class Ground:
    base_url: str
    data: Path
    input: Path


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    folder = tmp_path_factory.mktemp("clients")
    data, path = folder / "served", folder / "in né.jsonl"
    path.write_bytes(
        b"".join([*(chat_line(f"good-{number}") for number in range(30)), chat_line("bad", simulate=FAILS)])
    )
    # The first key closes the server to everybody without one.
    assert call("keys", "create", "--data", data).code == 0
    with simulator() as upstream, batch_server(data, upstream, "--workers", "1") as base_url:
        yield Ground(base_url, data, path)


@pytest.fixture(scope="module")
def ends(ground: Ground) -> Ends:
    """Tell how each story ended with an SDK, which has a tenant of its own."""
    known: dict[Sdk, dict[str, str]] = {}

    def told(sdk: Sdk) -> dict[str, str]:
        if sdk not in known:
            command, more = sdk.command()
            tenant = f"{sdk.language}-{sdk.version}".replace(".", "-")
            key = call("keys", "create", "--data", ground.data, "--tenant", tenant).out.strip()
            environment = os.environ | {"OPENAI_API_KEY": key} | more
            command = [*command, ground.base_url, str(ground.input)]
            ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=FLOW_S, check=False)
            assert ran.returncode == 0, ran.stdout + ran.stderr
            said = json.loads(ran.stdout)
            assert said["version"] == sdk.version
            known[sdk] = said["ends"]
        return known[sdk]

    return told


def cases() -> Iterator[object]:
    for sdk in SDKS:
        for name in TOLD[sdk.language]:
            marks = [pytest.mark.long] if sdk.version == OLD_NODE else []
            yield pytest.param(sdk, name, id=f"{sdk.language}-{sdk.version}-{name}", marks=marks)


@pytest.mark.parametrize(("sdk", "name"), tuple(cases()))
def test_a_story_ends_as_with_the_original(ends: Ends, sdk: Sdk, name: str) -> None:
    assert ends(sdk)[name] == "", f"\n{ends(sdk)[name]}"


@pytest.mark.parametrize("sdk", [pytest.param(each, id=f"{each.language}-{each.version}") for each in SDKS[:3]])
def test_no_story_is_left_out(ends: Ends, sdk: Sdk) -> None:
    assert tuple(ends(sdk)) == TOLD[sdk.language]
