"""The commands that talk to a batch server: submit, status, results ID, errors ID and cancel, against a real one."""

from __future__ import annotations

import gzip
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest

from batchrunner.cli.exits import ExitCode, exit_code_of
from batchrunner.cli.remote import exit_code_of_batch, status_text
from batchrunner.client import Counts, LiveProgress, RemoteBatch
from batchrunner.clock import SystemClock
from batchrunner.errors import KeyRefused, PermissionRefused
from tests.cli.calling import ENVIRONMENT, Called, batch_server, call, chat_line, simulator, spawn
from tests.invariants import check_run

GOOD = [f"good-{number}" for number in range(40)]
BAD = [f"bad-{number}" for number in range(5)]
SLOW_LINES = 400


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with (
        simulator("--latency", "20ms", "--slots", "4") as url,
        batch_server(folder / "served", url, "--workers", "1", "--concurrency", "4") as base_url,
    ):
        yield base_url


@pytest.fixture(autouse=True)
def _environment(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHRUNNER_SERVER", server)


@pytest.fixture(scope="module")
def ended(server: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """An input, and the id of its batch, which has ended with some failed lines."""
    folder = tmp_path_factory.mktemp("ended")
    bad = [chat_line(name, simulate=["400"] * 20) for name in BAD]
    (folder / "in.jsonl").write_bytes(b"".join([*map(chat_line, GOOD), *bad]))
    submitted = call("submit", folder / "in.jsonl", "--server", server, "--wait", "--metadata", "team=search")
    assert submitted.code == 3, submitted.err
    return folder / "in.jsonl", submitted.out.strip()


def slow_batch(folder: Path) -> tuple[Path, str]:
    path = folder / "slow.jsonl"
    path.write_bytes(b"".join(chat_line(f"slow-{number}") for number in range(SLOW_LINES)))
    submitted = call("submit", path)
    assert submitted.code == 0, submitted.err
    return path, submitted.out.strip()


def shown(batch_id: str) -> dict[str, Any]:
    found: dict[str, Any] = call("status", batch_id, "--json").json
    return found


def until_done(batch_id: str, count: int) -> None:
    while shown(batch_id)["request_counts"]["completed"] < count:
        pass


@pytest.mark.slow
def test_submit_prints_the_id_and_says_how_to_follow(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(chat_line("a"))

    submitted = call("submit", tmp_path / "in.jsonl")

    assert submitted.code == 0
    assert submitted.out.startswith("batch_")
    assert submitted.err == f"follow it: batchrunner status {submitted.out.strip()} --wait\n"


@pytest.mark.slow
def test_json_is_one_object_the_batch(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(chat_line("a"))

    fields = ["--metadata", "team=search", "--metadata", "a=b=c", "--priority", "3", "--window", "2h"]
    submitted = call("submit", tmp_path / "in.jsonl", "--wait", "--json", *fields)

    assert submitted.code == 0
    assert submitted.json["status"] == "completed"
    assert submitted.json["metadata"] == {"team": "search", "a": "b=c"}
    assert submitted.json["priority"] == 3
    assert submitted.json["completion_window"] == "2h"
    assert submitted.json["endpoint"] == "/v1/chat/completions"


@pytest.mark.slow
def test_results_of_an_ended_batch_are_its_two_files(ended: tuple[Path, str], tmp_path: Path) -> None:
    source, batch_id = ended

    fetched = call("results", batch_id, "-o", tmp_path / "out.jsonl")

    assert (fetched.code, fetched.out) == (0, "")
    checked = check_run(source, tmp_path / "out.jsonl", tmp_path / "out.errors.jsonl")
    assert checked.succeeded == GOOD
    assert checked.failed == BAD
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.errors.jsonl", "out.jsonl"]
    streamed = call("results", batch_id)
    assert streamed.out.encode() == (tmp_path / "out.jsonl").read_bytes() + (tmp_path / "out.errors.jsonl").read_bytes()
    failed = call("results", batch_id, "--failed", "-o", tmp_path / "failed.jsonl")
    assert failed.code == 0
    assert (tmp_path / "failed.jsonl").read_bytes() == (tmp_path / "out.errors.jsonl").read_bytes()


@pytest.mark.slow
def test_download_goes_on_behind_what_an_earlier_one_left(ended: tuple[Path, str], tmp_path: Path) -> None:
    _, batch_id = ended
    call("results", batch_id, "-o", tmp_path / "whole.jsonl")
    whole = (tmp_path / "whole.jsonl").read_bytes()
    # What is there already is not asked for again: these bytes would not come from the server.
    part = tmp_path / f".out.jsonl.{shown(batch_id)['output_file_id']}.part"
    part.write_bytes(b"#" * 1000)

    assert call("results", batch_id, "--succeeded", "-o", tmp_path / "out.jsonl").code == 0

    assert (tmp_path / "out.jsonl").read_bytes() == b"#" * 1000 + whole[1000:]
    assert not part.exists()


@pytest.mark.slow
def test_results_while_it_runs_are_added_to_and_become_the_batches_own_files(tmp_path: Path) -> None:
    source, batch_id = slow_batch(tmp_path)
    out, seen = tmp_path / "out.jsonl", []
    until_done(batch_id, 20)

    first = call("results", batch_id, "-o", out)
    seen.append(out.read_bytes())
    until_done(batch_id, 100)
    # A crash in the middle of a page leaves half a line behind what the mark says.
    with out.open("ab") as stream:
        stream.write(b'{"half')
    call("results", batch_id, "-o", out)
    seen.append(out.read_bytes())

    assert "the batch goes on" in first.err
    assert seen[1].startswith(seen[0])
    lines = [json.loads(line)["custom_id"] for line in seen[1].splitlines()]
    assert len(lines) == len(set(lines)) >= 100
    followed = call("results", batch_id, "-o", out, "--follow")
    assert followed.code == 0
    assert check_run(source, out, tmp_path / "out.errors.jsonl").failed == []
    assert sorted(each.name for each in tmp_path.iterdir()) == ["out.jsonl", "slow.jsonl"]


@pytest.mark.slow
def test_stdout_can_follow_a_batch_to_its_end(tmp_path: Path) -> None:
    _, batch_id = slow_batch(tmp_path)

    followed = call("results", batch_id, "--follow")

    names = [json.loads(line)["custom_id"] for line in followed.out.splitlines()]
    assert sorted(names) == sorted(f"slow-{number}" for number in range(SLOW_LINES))
    assert shown(batch_id)["status"] in {"finalizing", "completed"}


@pytest.mark.slow
def test_interrupted_wait_leaves_the_batch_running_and_says_so(tmp_path: Path, server: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"".join(chat_line(f"slow-{number}") for number in range(SLOW_LINES)))
    with spawn("submit", path, "--wait", env=ENVIRONMENT | {"BATCHRUNNER_SERVER": server}) as waiting:
        assert waiting.stdout is not None
        batch_id = waiting.stdout.readline().strip()
        waiting.send_signal(signal.SIGINT)
        _, talk = waiting.communicate(timeout=60)

    assert waiting.returncode == 130
    assert f"the batch goes on: batchrunner status {batch_id} --wait" in talk
    assert shown(batch_id)["status"] in {"validating", "in_progress"}
    cancelled = call("cancel", batch_id)
    again = call("cancel", batch_id)
    assert (cancelled.code, again.code) == (0, 0)
    assert call("status", batch_id, "--wait").code == 3
    assert shown(batch_id)["status"] == "cancelled"


@pytest.mark.slow
def test_cancel_of_what_has_ended_says_how_it_is(ended: tuple[Path, str]) -> None:
    cancelled = call("cancel", ended[1])

    assert cancelled.code == 1
    assert "Cannot cancel a batch with status 'completed'." in cancelled.err
    assert "hint: " in cancelled.err


@pytest.mark.slow
def test_errors_are_grouped_by_the_server(ended: tuple[Path, str]) -> None:
    text, found = call("errors", ended[1]), call("errors", ended[1], "--json").json

    assert text.code == 0
    assert text.out.startswith("5 x 400 ")
    assert found["total"] == 5
    assert [each["custom_id"] for each in found["groups"][0]["samples"]] == BAD[:3]


@pytest.mark.slow
def test_status_without_an_id_lists_the_newest(ended: tuple[Path, str]) -> None:
    listed = call("status")

    assert listed.code == 0
    assert f"{ended[1]} completed: 45 of 45 lines done, 5 failed" in listed.out.splitlines()


@pytest.mark.slow
def test_refused_input_ends_with_every_problem_and_its_own_code(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_bytes(chat_line("a") + chat_line("a") + b"nonsense\n")

    submitted = call("submit", tmp_path / "in.jsonl", "--wait")

    assert submitted.code == 5
    assert "line 3: invalid_json_line" in submitted.err
    assert "failed: nothing was sent" in submitted.err
    assert "duplicate" in call("errors", submitted.out.strip()).out


@pytest.mark.slow
def test_packed_input_and_stdin_are_sent_plain(tmp_path: Path) -> None:
    packed = tmp_path / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(chat_line("packed")))

    submitted = call("submit", packed, "--wait")
    piped = call("submit", "-", "--wait", stdin=chat_line("piped"))

    assert (submitted.code, piped.code) == (0, 0)
    assert json.loads(call("results", piped.out.strip()).out)["custom_id"] == "piped"


def refused(*arguments: object) -> Called:
    called = call(*arguments)
    assert called.out == ""
    assert "hint: " in called.err
    return called


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "code", "words"),
    [
        (b"", 5, "FILE has no line"),
        (b"nonsense\n", 5, "is not JSON"),
        (b'{"custom_id":"a"}\n', 2, "does not say where it goes"),
        (None, 2, "is not there"),
    ],
)
def test_file_that_is_none_is_refused_before_it_is_sent(
    tmp_path: Path, content: bytes | None, code: int, words: str
) -> None:
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)

    called = refused("submit", tmp_path / "in.jsonl")

    assert called.code == code
    assert words in called.err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["status", "batch_of_nobody"], 1),
        (["results", "batch_of_nobody"], 1),
        (["errors", "batch_of_nobody"], 1),
        (["cancel", "batch_of_nobody"], 1),
        (["status", "--wait"], 2),
        (["status", "batch_1", "--server", "ftp://x"], 2),
    ],
)
def test_what_cannot_be_done_says_what_to_do(arguments: list[str], code: int) -> None:
    assert refused(*arguments).code == code


@pytest.mark.parametrize(
    ("status", "failed", "code"),
    [
        ("completed", 0, ExitCode.OK),
        ("completed", 1, ExitCode.SOME_FAILED),
        ("cancelled", 0, ExitCode.SOME_FAILED),
        ("expired", 0, ExitCode.DEADLINE),
        ("failed", 0, ExitCode.TROUBLE),
    ],
)
def test_end_of_a_batch_has_the_exit_code_of_a_run(status: str, failed: int, code: ExitCode) -> None:
    batch = RemoteBatch(id="batch_1", status=status, request_counts=Counts(10, 10 - failed, failed))

    assert exit_code_of_batch(batch) is code


def test_refused_key_has_the_exit_code_of_authentication() -> None:
    assert {exit_code_of(KeyRefused("")), exit_code_of(PermissionRefused(""))} == {ExitCode.AUTHENTICATION}


def test_status_line_tells_what_holds_a_batch() -> None:
    now = SystemClock().now()
    batch = RemoteBatch(
        id="batch_1",
        status="in_progress",
        request_counts=Counts(1000, 10, 2),
        paused_reason="authentication",
        progress=LiveProgress(rate=20.4, in_flight=16),
    )

    assert status_text(batch, now=now) == (
        "batch_1 in_progress: 12 of 1,000 lines done, 2 failed, 16 in flight, 20 lines/s, paused: authentication"
    )


def test_a_batch_of_jobs_is_followed_to_its_end(server: str) -> None:
    def made(*prompts: str, **more: Any) -> str:
        requests = [
            {
                "endpoint": "/v1/chat/completions",
                "body": {"model": "m", "messages": [{"role": "user", "content": each}], **more},
            }
            for each in prompts
        ]
        asked = Request(f"{server}/batches", json.dumps({"requests": requests}).encode())
        with urlopen(asked) as answer:
            return str(json.load(answer)["id"])

    good, bad = made("one", "two"), made("three", simulate=["400"] * 20)

    followed = call("status", good, "--wait")
    assert (followed.code, "DONE: 2 lines, 2 succeeded" in followed.err) == (0, True), followed.err
    assert call("status", bad, "--wait").code == 3
    lines = call("results", good)
    assert (lines.code, lines.err) == (0, "2 lines; the batch has ended\n")
    assert [json.loads(line)["custom_id"] for line in lines.out.splitlines()] == ["requests[0]", "requests[1]"]
