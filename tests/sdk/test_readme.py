"""The README's server quickstart as a reader types it: its commands, then its snippets unchanged."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli.calling import ROOT, batch_server, call, simulator
from tests.sdk.packages import NODE, node

SECTION = (ROOT / "README.md").read_text().split("\n## Batch server\n")[1].split("\n## ")[0]
ADDRESS = "http://127.0.0.1:8080/v1"
UPSTREAM = "http://localhost:9000/v1"
SAMPLE = ROOT / "sample_inputs" / "chat.jsonl"
COUNT = len(SAMPLE.read_bytes().splitlines())
SNIPPET_S = 120

pytestmark = [pytest.mark.slow, pytest.mark.real]


def blocks(language: str) -> list[str]:
    """Give the blocks of a language as they stand in the section."""
    return re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)


def commands(block: str) -> list[list[str]]:
    """Give the commands of a shell block, without the name of the program."""
    return [shlex.split(line, comments=True)[1:] for line in block.splitlines()]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Run the first commands of the section, at ports that are free; gives the address that the server prints."""
    simulate, serve = commands(blocks("sh")[0])
    assert simulate == ["simulate"]
    assert serve == ["serve", "-u", UPSTREAM]
    with simulator() as upstream, batch_server(tmp_path_factory.mktemp("readme"), upstream) as base_url:
        yield base_url


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder as the reader's clone."""
    (tmp_path / "sample_inputs").symlink_to(SAMPLE.parent)
    return tmp_path


def outcome(command: list[str], folder: Path) -> tuple[str, list[str]]:
    """Run a snippet; gives the line with the status, and the custom_ids of the lines behind it."""
    ran = subprocess.run(
        command, cwd=folder, env=os.environ, capture_output=True, text=True, timeout=SNIPPET_S, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    head, brace, lines = ran.stdout.partition('{"id":')
    return head, [json.loads(line)["custom_id"] for line in (brace + lines).splitlines() if line]


def sample_ids() -> list[str]:
    return [json.loads(line)["custom_id"] for line in SAMPLE.read_bytes().splitlines()]


def test_the_python_snippet_gives_results(address: str, folder: Path) -> None:
    (snippet,) = blocks("python")
    (folder / "batch.py").write_text(snippet.replace(ADDRESS, address))

    head, ids = outcome([sys.executable, "batch.py"], folder)

    assert snippet.count(ADDRESS) == 1
    assert head.startswith("completed BatchRequestCounts(")
    assert ids == sample_ids()


def test_the_node_snippet_gives_results(address: str, folder: Path) -> None:
    if shutil.which("node") is None:
        pytest.skip("NODE IS NOT INSTALLED: the README's snippet is not tested here; on Debian: apt-get install nodejs")
    (snippet,) = blocks("js")
    (folder / "batch.mjs").write_text(snippet.replace(ADDRESS, address))
    (folder / "node_modules").symlink_to(node(NODE) / "node_modules")

    head, ids = outcome(["node", "batch.mjs"], folder)

    assert snippet.count(ADDRESS) == 1
    assert head == f"completed {{ total: {COUNT}, completed: {COUNT}, failed: 0 }}\n"
    assert ids == sample_ids()


def test_the_commands_give_results(address: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("BATCHRUNNER_SERVER", address)
    submit, results = commands(blocks("sh")[1])

    submitted = call(*submit)
    fetched = call(*(submitted.out.strip() if each == "batch_..." else each for each in results))

    assert (submitted.code, fetched.code) == (0, 0), submitted.err + fetched.err
    assert call("verify", "sample_inputs/chat.jsonl", "out.jsonl").code == 0
