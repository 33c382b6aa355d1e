"""What `run` says to people, and the inputs that it has to spool first."""

from __future__ import annotations

import gzip
import json
import logging
import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from batchrunner.cli.panel import Panel, bar
from batchrunner.errors import DiskFull
from tests.cli.calling import ENVIRONMENT, ROOT, Called, call, chat_line, finish, simulator, spawn

EVERY_ERROR = ROOT / "sample_inputs" / "every_error.jsonl"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with simulator("--latency", "1ms") as address:
        yield address


def run_in(folder: Path, *arguments: object) -> Called:
    return finish(spawn("run", *arguments, cwd=folder, env=ENVIRONMENT))


@pytest.mark.slow
def test_a_packed_input_runs_from_a_relative_path(url, tmp_path):
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(chat_line("a") + chat_line("b")))

    called = run_in(tmp_path, "in.jsonl.gz", "-o", "out.jsonl", "-u", url)

    assert called.code == 0, called.err
    names = [json.loads(line)["custom_id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert names == ["a", "b"]


@pytest.mark.slow
def test_attempts_that_were_made_good_are_no_errors_of_a_finished_run(url, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(chat_line("a", simulate=["500"]))

    called = run_in(tmp_path, "in.jsonl", "-o", "out.jsonl", "-u", url)
    again = run_in(tmp_path, "in.jsonl", "-o", "out.jsonl", "-u", url, "--json")

    assert called.code == 0, called.err
    assert "1 retry, " in called.err
    assert "500:" not in called.err
    assert again.json["top_errors"] == []


@pytest.mark.slow
def test_attempts_before_the_end_are_called_attempts(url, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(chat_line("a", simulate="always:401"))

    called = run_in(tmp_path, "in.jsonl", "-o", "out.jsonl", "-u", url)

    assert called.code == 4, called.err
    assert "  401: 1 attempt\n" in called.err


def check_stop(folder: Path, arguments: tuple[str, ...], *, code: int, error: str, hint: str) -> None:
    """Check that a run stops with a hint and, below it, the command that goes on."""
    called = run_in(folder, *arguments)
    told = run_in(folder, *arguments, "--json")

    assert (called.code, told.code) == (code, code), called.err
    assert called.err.splitlines()[-2].startswith(f"  hint: {hint}")
    assert called.err.splitlines()[-1] == f"  next: batchrunner run {' '.join(arguments)}"
    assert told.json["error"]["code"] == error
    assert told.json["error"]["hint"].startswith(hint)


@pytest.mark.slow
def test_a_refused_key_comes_with_what_to_do_and_what_comes_next(url, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(chat_line("a", simulate="always:401"))
    arguments = ("in.jsonl", "-o", "out.jsonl", "-u", url, "--api-key-env", "MY_KEY")
    doctor = f"batchrunner doctor -u {url} --api-key-env MY_KEY"
    hint = f"Set the key in MY_KEY, or name another variable with --api-key-env NAME; try it with `{doctor}`"

    check_stop(tmp_path, arguments, code=4, error="authentication_refused", hint=hint)


@pytest.mark.slow
def test_an_unknown_model_comes_with_what_to_do_and_what_comes_next(url, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(chat_line("a", model="missing-model"))
    arguments = ("in.jsonl", "-o", "out.jsonl", "-u", url)
    hint = f"See its models with `batchrunner doctor -u {url}`"

    check_stop(tmp_path, arguments, code=6, error="model_unknown", hint=hint)


@pytest.mark.slow
def test_an_upstream_that_is_not_there_is_named_with_what_to_do(tmp_path):
    (tmp_path / "in.jsonl").write_bytes(chat_line("a"))
    patience = ENVIRONMENT | {"BATCHRUNNER_FIRST_CONTACT_S": "100ms"}
    arguments = ("run", "in.jsonl", "-o", "out.jsonl", "-u", "http://127.0.0.1:9/v1")

    called = finish(spawn(*arguments, cwd=tmp_path, env=patience))

    assert called.code == 1
    error, hint, following = called.err.splitlines()[-3:]
    assert error.startswith("  error: cannot connect to 127.0.0.1:9")
    assert "`batchrunner doctor -u http://127.0.0.1:9/v1`" in hint
    assert following == f"  next: batchrunner {' '.join(arguments)}"


@pytest.mark.slow
def test_a_rejected_input_is_called_so(url, tmp_path):
    called = run_in(tmp_path, EVERY_ERROR, "-o", "out.jsonl", "-u", url)

    assert called.code == 5
    assert "input invalid: 31 problems, nothing was sent\n" in called.err
    assert f"next: batchrunner validate {EVERY_ERROR}" in called.err


@pytest.mark.slow
def test_the_command_of_the_first_line_can_be_typed_as_it_stands(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in.jsonl").write_bytes(chat_line("a"))

    called = call("run", "in.jsonl", "-o", "my results.jsonl", "-u", url)
    command = called.err.splitlines()[0].partition("batchrunner ")[2]
    shown = call(*shlex.split(command))

    assert (called.code, shown.code) == (0, 0), shown.err
    assert "1 lines; the run has ended" in shown.err


@pytest.mark.slow
def test_the_command_after_a_rejection_finds_the_same_problems(url, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ("run", "-", "-o", "out.jsonl", "-u", url, "--endpoint", "/v1/embeddings")

    rejected = call(*arguments, stdin=chat_line("a"))
    command = rejected.err.splitlines()[-1].removeprefix("  next: batchrunner ")
    validated = call(*shlex.split(command))

    assert (rejected.code, validated.code) == (5, 5), command
    assert validated.out.splitlines() == [line for line in rejected.err.splitlines() if line.startswith("line 1: ")]


@pytest.mark.slow
def test_an_input_edited_in_mid_run_is_to_be_put_back(url, tmp_path):
    source = tmp_path / "in.jsonl"
    original = chat_line("a") + chat_line("b")
    source.write_bytes(original)
    run_in(tmp_path, "in.jsonl", "-o", "out.jsonl", "-u", url, "--limit", 1)
    known = source.stat()
    with source.open("r+b") as stream:
        stream.write(original.replace(b"Say", b"say"))
    os.utime(source, ns=(known.st_atime_ns, known.st_mtime_ns))

    edited = run_in(tmp_path, "in.jsonl", "-o", "out.jsonl", "-u", url)
    with source.open("r+b") as stream:
        stream.write(original)
    mended = run_in(tmp_path, "in.jsonl", "-o", "out.jsonl", "-u", url)

    assert edited.code == 5
    assert "put the original back, then run the same command again" in edited.err
    assert "next: batchrunner run in.jsonl -o out.jsonl" in edited.err
    assert mended.code == 0, mended.err


@pytest.mark.slow
def test_the_order_may_change_between_tries(url, tmp_path):
    lines = [chat_line("a"), chat_line("late", simulate=["500", "500", "500"]), chat_line("early")]
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines))
    run_in(tmp_path, "in.jsonl", "-o", "out.jsonl", "-u", url, "--limit", 1)

    called = run_in(tmp_path, "in.jsonl", "-o", "out.jsonl", "-u", url, "--order", "completion")

    assert called.code == 0, called.err
    names = [json.loads(line)["custom_id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert names == ["a", "early", "late"]


@pytest.mark.slow
def test_a_clean_stop_leaves_no_line_to_be_sent_again(url, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(b"".join(chat_line(f"c{number}") for number in range(40)))

    held = run_in(tmp_path, "in.jsonl", "-o", "out.jsonl", "-u", url, "--limit", 7, "--json")
    whole = run_in(tmp_path, "in.jsonl", "-o", "out.jsonl", "-u", url, "--json")

    assert (held.code, whole.code) == (6, 0), whole.err
    assert (held.json["re_executed"], whole.json["re_executed"]) == (0, 0)


@pytest.mark.slow
def test_a_refused_key_leaves_no_line_to_be_sent_again(url, tmp_path):
    lines = [chat_line(f"c{number}", simulate="always:401") for number in range(40)]
    (tmp_path / "in.jsonl").write_bytes(b"".join(lines))

    first = run_in(tmp_path, "in.jsonl", "-o", "out.jsonl", "-u", url, "--json")
    again = run_in(tmp_path, "in.jsonl", "-o", "out.jsonl", "-u", url, "--json")

    assert (first.code, again.code) == (4, 4), again.err
    assert again.json["re_executed"] == 0


@pytest.mark.slow
def test_refused_lines_alone_are_not_offered_for_a_retry(url, tmp_path):
    called = run_in(tmp_path, EVERY_ERROR, "-o", "out.jsonl", "-u", url, "--on-invalid", "skip")

    assert called.code == 3, called.err
    assert "next: batchrunner errors out.jsonl.run\n" in called.err


@pytest.mark.slow
def test_a_streamed_run_that_is_over_prints_its_lines_again(url, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(chat_line("a"))

    first = run_in(tmp_path, "in.jsonl", "-o", "-", "-u", url)
    again = run_in(tmp_path, "in.jsonl", "-o", "-", "-u", url)

    assert first.json["custom_id"] == "a"
    assert again.out == first.out
    assert "missing" not in again.err


@pytest.mark.slow
def test_a_streamed_run_with_failed_lines_prints_its_lines_again(url, tmp_path):
    (tmp_path / "in.jsonl").write_bytes(chat_line("a") + chat_line("b", simulate=["always:400"]))

    first = run_in(tmp_path, "in.jsonl", "-o", "-", "-u", url)
    again = run_in(tmp_path, "in.jsonl", "-o", "-", "-u", url)

    assert (first.code, again.code) == (3, 3), first.err
    assert again.out == first.out != ""
    assert "missing" not in again.err


def test_the_bar_of_the_panel_has_a_line_of_its_own():
    console = Console(width=80)

    with console.capture() as captured:
        console.print(bar(done=1, total=4))
        console.print("next")

    assert captured.get().splitlines()[-1] == "next"


def log_of_a_failure(error):
    """What the panel says of a step that failed, with a log record before it that the panel tells by itself."""
    said: list[str] = []
    panel = Panel(is_json=False)
    logger = logging.getLogger("batchrunner.worker")
    panel._log._say = said.append
    with panel:
        logger.warning("waiting: %s", error, extra={"action": "worker_waits"})
        try:
            raise error
        except type(error):
            logger.exception("step failed", extra={"action": "task_failed"})
    return said


def test_log_records_of_expected_errors_are_one_line_of_the_panel():
    assert log_of_a_failure(DiskFull("no space left")) == ["step failed: disk_full: no space left"]


def test_log_records_of_errors_that_nobody_expects_keep_their_traceback():
    (said,) = log_of_a_failure(ZeroDivisionError("odd"))

    assert said.startswith("step failed\nTraceback")


@pytest.mark.parametrize("arguments", [["--help"], ["completion", "--help"]])
def test_help_keeps_the_lines_of_examples(arguments):
    called = call(*arguments)

    assert "\\b" not in called.out
    assert any(line.strip().startswith(("batchrunner run in.jsonl", "zsh: ")) for line in called.out.splitlines())
