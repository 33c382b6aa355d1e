"""A run whose batch was given up tells so, keeps what is paid, and begins nothing anew by itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchrunner.app import open_adapters
from batchrunner.lifecycle import BatchEvent
from batchrunner.models import LOCAL_TENANT
from tests.cli.calling import Called, call, chat_line, finish, simulator, spawn


def run(folder: Path, url: str, *options: object) -> Called:
    return finish(spawn("run", folder / "in.jsonl", "-o", folder / "out.jsonl", "-u", url, *options))


def give_up(folder: Path) -> None:
    """Do what the sweep does to a batch that was stuck for a day."""
    adapters = open_adapters(folder)
    scope = adapters.store.scope(LOCAL_TENANT)
    (batch,) = scope.batches(limit=9)
    assert scope.send(batch.id, BatchEvent.GAVE_UP)
    adapters.store.close()


@pytest.mark.slow
def test_run_that_was_given_up_says_so_and_pays_for_nothing_again(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(b"".join(map(chat_line, "abcd")))
    with simulator("--latency", "1ms") as url:
        assert run(tmp_path, url, "--limit", 2).code == 6
        give_up(tmp_path / "out.jsonl.run")

        told = run(tmp_path, url)
        told_again = run(tmp_path, url, "--json")
        kept = call("results", tmp_path / "out.jsonl.run")
        fresh = run(tmp_path, url, "--fresh")

    assert told.code == told_again.code == 1
    assert "this run was given up: The batch could not be brought to its end. Its data is kept." in told.err
    assert "--fresh starts over" in told.err
    assert "invalid" not in told.err
    assert (told_again.json["status"], told_again.json["exit_code"]) == ("failed", 1)
    assert told_again.json["error"]["code"] == "task_parked"
    assert told_again.json["counts"]["succeeded"] == 2
    assert not (tmp_path / "out.jsonl.errors.jsonl").exists()
    assert sorted(json.loads(line)["custom_id"] for line in kept.out.splitlines()) == ["a", "b"]
    assert fresh.code == 0
