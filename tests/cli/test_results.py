"""The command `results`, on real runs: finished, going on, and killed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.cli.calling import Called, call, chat_line, finish, simulator, spawn

GOOD = [f"good-{number}" for number in range(30)]
BAD = [f"bad-{number}" for number in range(5)]


def write_input(path: Path, *more: bytes) -> None:
    bad = [chat_line(name, simulate=["400"] * 20) for name in BAD]
    path.write_bytes(b"".join([*map(chat_line, GOOD), *bad, *more]))


def run(folder: Path, url: str, *options: object) -> Called:
    return finish(spawn("run", folder / "in.jsonl", "-o", folder / "out.jsonl", "-u", url, *options))


def ids(called: Called) -> list[str]:
    return [json.loads(line)["custom_id"] for line in called.out.splitlines()]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that has ended."""
    folder = tmp_path_factory.mktemp("finished")
    write_input(folder / "in.jsonl")
    with simulator("--latency", "1ms") as url:
        assert run(folder, url).code == 3
    return folder


@pytest.mark.slow
def test_a_finished_run_gives_every_line(finished):
    called = call("results", finished / "out.jsonl.run")

    assert called.code == 0
    assert sorted(ids(called)) == sorted(GOOD + BAD)
    assert "35 lines; the run has ended" in called.err


@pytest.mark.slow
@pytest.mark.parametrize(("flag", "names"), [("--failed", BAD), ("--succeeded", GOOD)])
def test_lines_of_one_kind_only(finished, flag, names):
    assert sorted(ids(call("results", finished / "out.jsonl.run", flag))) == sorted(names)


@pytest.mark.slow
def test_lines_are_those_of_the_output_byte_for_byte(finished):
    called = call("results", finished / "out.jsonl", "--succeeded")

    assert sorted(called.out.splitlines()) == sorted((finished / "out.jsonl").read_text().splitlines())


@pytest.mark.slow
def test_they_can_go_to_a_file_but_not_over_the_runs_own(finished, tmp_path):
    called = call("results", finished / "out.jsonl.run", "-o", tmp_path / "copy.jsonl")
    before = (finished / "out.jsonl").read_bytes()
    refused = call("results", finished / "out.jsonl.run", "-o", finished / "out.jsonl")

    assert called.out == ""
    assert len((tmp_path / "copy.jsonl").read_text().splitlines()) == 35
    assert refused.code == 2
    assert "is a file of the run itself" in refused.err
    assert (finished / "out.jsonl").read_bytes() == before


@pytest.mark.slow
def test_following_a_finished_run_ends_at_once(finished):
    called = call("results", finished / "out.jsonl.run", "--follow")

    assert called.code == 0
    assert len(ids(called)) == 35


@contextmanager
def going_on(folder: Path) -> Iterator[Iterator[str]]:
    """A run whose last line is never answered, and the lines that a follower of it prints."""
    write_input(folder / "in.jsonl", chat_line("endless", simulate=["stall"]))
    with simulator("--latency", "1ms") as url:
        running = spawn("run", folder / "in.jsonl", "-o", folder / "out.jsonl", "-u", url)
        assert running.stderr is not None
        # It says so once its folder is there.
        assert "starting" in running.stderr.readline()
        with spawn("results", folder / "out.jsonl.run", "--follow") as follower:
            assert follower.stdout is not None
            try:
                yield iter(follower.stdout.readline, "")
            finally:
                running.kill()
                running.communicate()
                follower.wait(timeout=60)


@pytest.mark.slow
def test_a_run_that_goes_on_is_followed_and_left_alone_until_it_is_killed(tmp_path):
    with going_on(tmp_path) as lines:
        seen = [json.loads(next(lines))["custom_id"] for _ in GOOD + BAD]
        meanwhile = call("results", tmp_path / "out.jsonl.run")
    after = call("results", tmp_path / "out.jsonl.run")

    assert sorted(seen) == sorted(GOOD + BAD)
    assert ids(meanwhile) == seen
    assert "the run goes on" in meanwhile.err
    assert ids(after) == seen
    assert "no process works on this run" in after.err


@pytest.mark.slow
def test_a_line_that_was_tried_again_counts_by_its_last_result(tmp_path):
    write_input(tmp_path / "in.jsonl", chat_line("healed", simulate=["400"]))
    with simulator("--latency", "1ms") as url:
        assert run(tmp_path, url).code == 3
        assert run(tmp_path, url, "--retry-failed").code == 3

    called = call("results", tmp_path / "out.jsonl.run")
    succeeded = call("results", tmp_path / "out.jsonl.run", "--succeeded")

    assert call("verify", tmp_path / "in.jsonl", tmp_path / "out.jsonl").code == 0
    assert sorted(ids(called)) == sorted([*GOOD, *BAD, "healed"])
    assert sorted(ids(succeeded)) == sorted([*GOOD, "healed"])


def test_a_folder_without_a_run_is_named(tmp_path):
    called = call("results", tmp_path)

    assert called.code == 1
    assert called.out == ""
    assert f"{tmp_path / 'run.json'} is not there" in called.err


def test_nothing_is_made_where_nothing_is(tmp_path):
    called = call("results", tmp_path / "typo.run")

    assert called.code == 1
    assert not (tmp_path / "typo.run").exists()


def test_the_id_of_a_servers_batch_is_looked_up_on_the_server(monkeypatch):
    monkeypatch.setattr("batchrunner.client.FIRST_CONTACT_S", 0.0)
    called = call("results", "batch_0123456789abcdef", "--server", "http://127.0.0.1:9")

    assert called.code == 1
    assert "cannot connect to http://127.0.0.1:9/v1" in called.err
    assert "Is `batchrunner serve` running there" in called.err
