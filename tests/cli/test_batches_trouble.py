"""The commands for a batch server when something is in the way: keys, Ctrl-C, a server that is away or restarts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from batchrunner import client
from tests.cli.calling import (
    COMMAND,
    ENVIRONMENT,
    ROOT,
    Called,
    batch_server,
    call,
    chat_line,
    finish,
    simulator,
    spawn,
)
from tests.cli.terminal import Screen
from tests.invariants import check_run

LINE_COUNT = 400
# What each command is given besides the server; FILE stands for an input.
COMMANDS = (
    ["submit", "FILE"],
    ["submit", "FILE", "--wait", "--json"],
    ["status"],
    ["status", "batch_1"],
    ["status", "batch_1", "--wait", "--json"],
    ["results", "batch_1"],
    ["results", "batch_1", "-o", "out.jsonl"],
    ["errors", "batch_1", "--json"],
    ["cancel", "batch_1"],
)

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Keyed:
    """A server with keys: one of everything, one that may only look, one of another tenant."""

    base_url: str
    writer: str
    reader: str
    stranger: str


@pytest.fixture(scope="module")
def upstream() -> Iterator[str]:
    with simulator("--latency", "20ms", "--slots", "4") as url:
        yield url


@pytest.fixture(scope="module")
def keyed(upstream: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Keyed]:
    folder = tmp_path_factory.mktemp("keyed") / "served"

    def key(*flags: str) -> str:
        return call("keys", "create", "--data", folder, *flags).out.strip()

    secrets = key("--tenant", "ours"), key("--tenant", "ours", "--scopes", "read"), key("--tenant", "theirs")
    with batch_server(folder, upstream, "--workers", "1", "--concurrency", "4") as base_url:
        yield Keyed(base_url, *secrets)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(b"".join(chat_line(f"line-{number}") for number in range(LINE_COUNT)))


def called(command: list[str]) -> Called:
    return call(*("in.jsonl" if each == "FILE" else each for each in command))


def asked(base_url: str, key: str = "") -> dict[str, str]:
    """The environment of a command for that server."""
    return ENVIRONMENT | {"BATCHRUNNER_SERVER": base_url, "BATCHRUNNER_API_KEY": key}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
@pytest.mark.parametrize("key", ["", "br_of_nobody"])
def test_refused_key_is_exit_4_and_leaves_nothing(
    keyed: Keyed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], key: str
) -> None:
    monkeypatch.setenv("BATCHRUNNER_SERVER", keyed.base_url)
    monkeypatch.setenv("BATCHRUNNER_API_KEY", key)

    ended = called(command)

    assert (ended.code, ended.out) == (4, "")
    assert "hint: Set BATCHRUNNER_API_KEY to a key of this server." in ended.err
    assert [each.name for each in tmp_path.iterdir()] == ["in.jsonl"]


def test_key_that_may_only_look_submits_nothing(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHRUNNER_SERVER", keyed.base_url)
    monkeypatch.setenv("BATCHRUNNER_API_KEY", keyed.reader)

    assert called(["status"]).code == 0
    refused = called(["submit", "FILE"])

    assert (refused.code, refused.out) == (4, "")
    assert "hint: " in refused.err


def test_batch_of_another_tenant_is_an_unknown_one(keyed: Keyed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHRUNNER_SERVER", keyed.base_url)
    monkeypatch.setenv("BATCHRUNNER_API_KEY", keyed.writer)
    batch_id = called(["submit", "FILE"]).out.strip()
    assert batch_id.startswith("batch_")
    monkeypatch.setenv("BATCHRUNNER_API_KEY", keyed.stranger)

    for command in (["status", batch_id], ["results", batch_id], ["errors", batch_id], ["cancel", batch_id]):
        ended = called(command)
        assert (ended.code, ended.out) == (1, "")
        assert f"No batch found with id '{batch_id}'" in ended.err
    assert batch_id not in called(["status"]).out
    monkeypatch.setenv("BATCHRUNNER_API_KEY", keyed.writer)
    cancelled = called(["cancel", batch_id, "--json"])
    assert cancelled.json["status"] in {"cancelling", "cancelled"}


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_server_that_is_away_is_told_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setattr(client, "FIRST_CONTACT_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setenv("BATCHRUNNER_SERVER", address)

    ended = called(command)

    assert (ended.code, ended.out) == (1, "")
    assert f"cannot connect to http://{address}/v1: Connection refused\n" in ended.err
    assert "hint: Is `batchrunner serve` running there" in ended.err
    assert [each.name for each in tmp_path.iterdir()] == ["in.jsonl"]


def test_interrupt_before_the_batch_is_made_says_where_to_look(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with spawn("submit", "in.jsonl", "--server", address, env=ENVIRONMENT, cwd=tmp_path) as submitting:
            connection, _ = silent.accept()
            submitting.send_signal(signal.SIGINT)
            ended = finish(submitting)
            connection.close()

    assert (ended.code, ended.out) == (130, "")
    assert f"the newest batches: batchrunner status --server {address}" in ended.err


def test_wait_on_a_terminal_shows_one_line_and_interrupt_takes_it_away(keyed: Keyed, tmp_path: Path) -> None:
    (tmp_path / "long.jsonl").write_bytes(b"".join(chat_line(f"line-{number}") for number in range(10 * LINE_COUNT)))
    terminal, end = os.openpty()
    environment = asked(keyed.base_url, keyed.writer) | {"TERM": "xterm", "PYTHONPATH": str(ROOT)}
    command = [*COMMAND, "submit", "long.jsonl", "--wait"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=end) as waiting:
        os.close(end)
        sent = until_shown(terminal, b"lines/s")
        waiting.send_signal(signal.SIGINT)
        sent += until_shown(terminal, b"--wait")
        assert waiting.stdout is not None
        batch_id = waiting.stdout.read().decode().strip()
    os.close(terminal)
    screen = Screen()
    screen.feed(sent.decode())

    assert waiting.returncode == 130
    assert [row for row in screen.rows if row] == [
        f"interrupted; the batch goes on: batchrunner status {batch_id} --wait"
    ]
    found = finish(spawn("status", batch_id, env=environment))
    assert found.out.startswith(f"{batch_id} in_progress: ")
    assert finish(spawn("cancel", batch_id, env=environment)).code == 0


def until_shown(terminal: int, words: bytes) -> bytes:
    """Read what comes on a terminal up to some words."""
    sent = b""
    while words not in sent:
        sent += os.read(terminal, 65536)
    return sent


def asked_for(keyed: Keyed, method: str, path: str) -> Any:
    """Ask the server itself about a batch."""
    headers = {"Authorization": f"Bearer {keyed.writer}"}
    request = urllib.request.Request(f"{keyed.base_url}/batches/{path}", headers=headers, method=method)
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def test_interrupted_download_is_completed_by_the_same_command(keyed: Keyed, tmp_path: Path) -> None:
    environment = asked(keyed.base_url, keyed.writer)
    batch_id = finish(spawn("submit", "in.jsonl", env=environment, cwd=tmp_path)).out.strip()
    while asked_for(keyed, "GET", batch_id)["request_counts"]["completed"] < LINE_COUNT // 8:
        pass
    asked_for(keyed, "POST", f"{batch_id}/pause")
    fetch = ("results", batch_id, "-o", "out.jsonl", "--follow")
    with spawn(*fetch, env=environment, cwd=tmp_path) as following:
        while not (tmp_path / ".out.jsonl.mark").exists():
            assert following.poll() is None
        following.send_signal(signal.SIGINT)
        interrupted = finish(following)
    had = (tmp_path / "out.jsonl").read_bytes()
    asked_for(keyed, "POST", f"{batch_id}/resume")

    again = finish(spawn(*fetch, env=environment, cwd=tmp_path))

    assert (interrupted.code, interrupted.out) == (130, "")
    assert "the same command again goes on" in interrupted.err
    assert len(had.splitlines()) >= LINE_COUNT // 8
    assert again.code == 0
    assert (
        len(check_run(tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "none.jsonl").succeeded) == LINE_COUNT
    )
    assert sorted(each.name for each in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.long
def test_wait_outlasts_a_restart_of_the_server(upstream: str, tmp_path: Path) -> None:
    flags = ("--workers", "1", "--concurrency", "4")
    with batch_server(tmp_path / "served", upstream, *flags) as base_url:
        waiting = spawn("submit", "in.jsonl", "--wait", "--json", env=asked(base_url), cwd=tmp_path)
        while finish(spawn("status", env=asked(base_url))).out == "":
            assert waiting.poll() is None

    port = base_url.rpartition(":")[2].removesuffix("/v1")
    with batch_server(tmp_path / "served", upstream, *flags, "--port", port):
        ended = finish(waiting)

    assert ended.code == 0, ended.err
    batch = json.loads(ended.out)
    assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", LINE_COUNT)


@pytest.mark.parametrize("place", [".", "absent/out.jsonl"])
def test_output_that_can_be_no_file_is_refused_before_anything_is_asked(place: str) -> None:
    ended = call("results", "batch_1", "-o", place)

    assert (ended.code, ended.out) == (2, "")
    assert "no file can be there" in ended.err
