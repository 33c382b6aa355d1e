"""The command `validate`."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import zstandard

from tests.cli.calling import ROOT, call, chat_line

SAMPLES = ROOT / "sample_inputs"
CHAT = "/v1/chat/completions"


@pytest.fixture(autouse=True)
def _no_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def expected() -> list[tuple[int, str, str | None]]:
    rows = json.loads((SAMPLES / "every_error.expected.json").read_text())
    return [(row["line"], row["code"], row["param"]) for row in rows]


def test_every_problem_of_the_sample_is_printed_and_exits_5():
    called = call("validate", SAMPLES / "every_error.jsonl", "--endpoint", CHAT)

    printed = [line.split(": ", 2) for line in called.out.splitlines()]
    assert called.code == 5
    assert sorted((int(where.removeprefix("line ")), code) for where, code, _ in printed) == [
        (line, code) for line, code, _ in expected()
    ]
    assert "40 lines, 37 requests" in called.err
    assert "32 problems" in called.err


@pytest.mark.parametrize("arguments", [("validate",), ("run", "-o", "out.jsonl", "-u", "http://127.0.0.1:9/v1")])
@pytest.mark.parametrize("endpoint", ["chat/completions", "http://localhost/v1/chat/completions", "/v1/../admin", ""])
def test_an_endpoint_that_no_line_may_name_is_a_usage_error(tmp_path, arguments, endpoint):
    (tmp_path / "in.jsonl").write_bytes(chat_line("a"))

    called = call(*arguments, "in.jsonl", "--endpoint", endpoint)

    assert called.code == 2
    assert f"error: --endpoint {endpoint}: lines may go to /v1/chat/completions, " in called.err
    assert not (tmp_path / "out.jsonl.run").exists()


def test_json_is_one_object_with_every_problem():
    called = call("validate", SAMPLES / "every_error.jsonl", "--endpoint", CHAT, "--json")

    found = called.json
    assert called.code == 5
    assert found["is_valid"] is False
    assert found["problem_count"] == len(found["problems"]) == 32
    assert sorted((each["line"], each["code"], each["param"]) for each in found["problems"]) == expected()
    assert (found["lines"], found["requests"]) == (40, 37)
    assert found["bytes"] == (SAMPLES / "every_error.jsonl").stat().st_size


def test_a_sound_file_exits_0_and_names_models_and_endpoints():
    called = call("validate", SAMPLES / "mixed.jsonl", "--json")

    found = called.json
    assert called.code == 0
    assert found["problems"] == []
    assert found["model"] is None
    assert found["models"] == {"small-chat": 10, "large-chat": 5, "small-embedding": 5, "small-text": 5}
    assert sum(found["endpoints"].values()) == 25
    assert "no problems" in called.err


def repeated(path: Path) -> list[int]:
    """Write 5,000 lines, of which every 500th repeats the first line's id; gives the numbers of the repeats."""
    repeats = list(range(500, 5001, 500))
    names = ("same" if number in (1, *repeats) else f"line-{number}" for number in range(1, 5001))
    path.write_bytes(b"".join(map(chat_line, names)))
    return repeats


@pytest.mark.parametrize("form", ["plain", "gz", "zst", "stdin"])
def test_repeated_ids_are_confirmed_whatever_the_input_comes_in(tmp_path, form):
    plain = tmp_path / "in.jsonl"
    repeats = repeated(plain)
    content = plain.read_bytes()
    (tmp_path / "in.jsonl.gz").write_bytes(gzip.compress(content))
    (tmp_path / "in.jsonl.zst").write_bytes(zstandard.compress(content))
    names = {"plain": plain, "gz": tmp_path / "in.jsonl.gz", "zst": tmp_path / "in.jsonl.zst", "stdin": "-"}

    called = call("validate", names[form], "--json", stdin=content)

    assert called.code == 5
    assert [(each["line"], each["code"]) for each in called.json["problems"]] == [
        (number, "duplicate_custom_id") for number in repeats
    ]


def test_more_problems_than_a_batch_lists_are_all_printed(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"{}\n" * 3000)

    called = call("validate", path)

    assert called.code == 5
    assert len(called.out.splitlines()) == 3000
    assert called.out.splitlines()[-1].startswith("line 3000: missing_required_parameter: ")


def test_an_empty_file_is_a_problem_of_the_file(tmp_path):
    path = tmp_path / "in.jsonl"
    path.touch()

    called = call("validate", path)

    assert called.code == 5
    assert called.out.startswith("empty_file: ")


def test_names_from_the_file_cannot_steer_the_terminal(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(chat_line("a", model="\x1b[31mred" + "x" * 500))

    called = call("validate", path)

    assert called.code == 0
    assert "\x1b" not in called.err
    assert "\\x1b[31mred" in called.err


def test_a_missing_file_is_named():
    called = call("validate", "nowhere.jsonl")

    assert called.code == 1
    assert called.out == ""
    assert "INPUT nowhere.jsonl is not there" in called.err


def test_a_broken_gzip_is_a_usage_error(tmp_path):
    path = tmp_path / "in.jsonl.gz"
    path.write_bytes(b"not packed at all")

    called = call("validate", path)

    assert called.code == 2
    assert "cannot be unpacked" in called.err
