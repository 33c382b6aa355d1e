"""`run --json` prints one object that fits its schema, also when the command ends before it has begun."""

from __future__ import annotations

import json

import pytest
from jsonschema import Draft202012Validator

from batchrunner.cli.run_folder import RunFolder
from tests.cli.calling import ROOT, call, chat_line

SUMMARY = Draft202012Validator(json.loads((ROOT / "schemas" / "summary.json").read_text()))
NOWHERE = "http://127.0.0.1:9/v1"


@pytest.fixture(autouse=True)
def no_upstream_by_itself(monkeypatch):
    for name in ("OPENAI_BASE_URL", "BATCHRUNNER_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(chat_line("a"))
    return path


def check(called, *, code, error):
    SUMMARY.validate(called.json)
    assert (called.code, called.json["exit_code"], called.json["error"]["code"]) == (code, code, error)
    assert called.json["batch_id"] is None
    assert set(called.json["counts"].values()) == {0}


def test_a_missing_input_is_a_usage_error(tmp_path):
    called = call("run", tmp_path / "none.jsonl", "-o", tmp_path / "out.jsonl", "-u", NOWHERE, "--json")

    check(called, code=2, error="usage")
    assert "none.jsonl is not there" in called.json["error"]["message"]


def test_no_upstream_is_told_in_the_object(source, tmp_path):
    check(call("run", source, "-o", tmp_path / "out.jsonl", "--json"), code=2, error="usage")


def test_a_flag_that_does_not_fit_is_told_in_the_object(source):
    called = call("run", source, "--json", "--order", "alphabet")

    check(called, code=2, error="usage")


def test_a_run_that_is_going_on_is_told_in_the_object(source, tmp_path):
    folder = RunFolder(tmp_path / "out.jsonl.run")
    folder.lock()

    called = call("run", source, "-o", tmp_path / "out.jsonl", "-u", NOWHERE, "--json")

    folder.unlock()
    check(called, code=1, error="already_running")


def test_an_output_that_is_not_ours_is_told_in_the_object(source, tmp_path):
    (tmp_path / "out.jsonl").write_text("mine")

    check(call("run", source, "-o", tmp_path / "out.jsonl", "-u", NOWHERE, "--json"), code=2, error="output_exists")


def test_without_json_nothing_is_on_stdout(source, tmp_path):
    called = call("run", source, "-o", tmp_path / "out.jsonl")

    assert (called.code, called.out) == (2, "")


def test_a_mistyped_command_is_corrected():
    assert "Did you mean run?" in call("rn").err


@pytest.mark.parametrize("url", ["localhost:8000", "http://user:pw@host/v1"])
def test_fresh_keeps_the_old_state_in_place_when_the_url_is_wrong(source, tmp_path, url):
    state = tmp_path / "out.jsonl.run"
    state.mkdir()
    (state / "results").write_text("paid for")

    called = call("run", source, "-o", tmp_path / "out.jsonl", "-u", url, "--fresh")

    assert called.code == 2
    assert (state / "results").read_text() == "paid for"


def test_fresh_keeps_the_old_state_in_place_when_the_input_is_missing(tmp_path):
    state = tmp_path / "out.jsonl.run"
    state.mkdir()
    (state / "results").write_text("paid for")

    called = call("run", tmp_path / "none.jsonl", "-o", tmp_path / "out.jsonl", "-u", NOWHERE, "--fresh")

    assert called.code == 2
    assert (state / "results").read_text() == "paid for"
