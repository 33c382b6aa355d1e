"""The command `errors`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from batchrunner.grouping import COMMAND_LINE, SERVER, hint_for, normalise, read_failure
from batchrunner.lines import ProblemCode
from batchrunner.models import LineCode
from tests.cli.calling import call, chat_line, finish, simulator, spawn


def error_line(
    number: int, *, code: str | None = None, message: str = "", status: int = 0, body: object = None
) -> bytes:
    line = {
        "id": f"batch_req_{number:032x}",
        "custom_id": f"line-{number}",
        "response": {"status_code": status, "request_id": None, "body": body} if status else None,
        "error": {"code": code, "message": message} if code else None,
    }
    return json.dumps(line).encode() + b"\n"


def openai(message: str, code: str | None, kind: str = "invalid_request_error") -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


@pytest.fixture
def errors(tmp_path: Path) -> Path:
    path = tmp_path / "out.errors.jsonl"
    path.write_bytes(
        b"".join(
            [
                *(error_line(n, code="request_timeout", message=f"gave up after {n} tries") for n in range(7)),
                *(
                    error_line(n, status=429, body=openai(f"Limit of {n} reached", "rate_limit_exceeded"))
                    for n in range(4)
                ),
                error_line(
                    50, status=404, body={"object": "error", "message": "no `small`", "type": "NotFound", "code": 404}
                ),
                error_line(
                    51, status=404, body={"object": "error", "message": "no `large`", "type": "NotFound", "code": 404}
                ),
                error_line(60, status=422, body={"detail": [{"loc": ["body", "messages"], "msg": "required"}]}),
            ]
        )
    )
    return path


def test_failures_are_grouped_with_counts_samples_and_hints(errors):
    called = call("errors", errors, "--json")

    groups = called.json["groups"]
    assert called.code == 0
    assert called.json["total"] == 14
    assert [(each["code"], each["message"], each["count"]) for each in groups] == [
        ("request_timeout", "gave up after <n> tries", 7),
        ("429 rate_limit_exceeded", "Limit of <n> reached", 4),
        ("404 NotFound", "no <text>", 2),
        ("422", "[{<text>:[<text>,<text>],<text>:<text>}]", 1),
    ]
    assert [each["custom_id"] for each in groups[0]["samples"]] == ["line-0", "line-1", "line-2"]
    assert groups[0]["samples"][1]["id"] == f"batch_req_{1:032x}"
    assert "--request-timeout" in groups[0]["hint"]
    assert "--rpm" in groups[1]["hint"]
    assert "doctor" in groups[2]["hint"]


def test_the_text_form_says_the_same(errors):
    called = call("errors", errors)

    assert "7 x request_timeout: gave up after <n> tries\n    such as line-0 (batch_req_0" in called.out
    assert "14 failed lines in 4 groups" in called.err


@pytest.mark.parametrize(
    ("message", "normal"),
    [
        ("took 1.5 s of 30,000", "took <n> s of <n>"),
        ("request req_0a1b2c3d4e failed", "request <id> failed"),
        ("trace 123e4567-e89b-12d3-a456-426614174000", "trace <uuid>"),
        ("at 0x7ffe12ab, digest deadbeef01", "at <id>, digest <id>"),
        ("model 'gpt-x' and \"other\"", "model <text> and <text>"),
        ("an effaced facade", "an effaced facade"),
        ("two\nlines\x1b[31m", "two lines [<n>m"),
        ("x" * 400, "x" * 300 + "..."),
    ],
)
def test_what_differs_between_equal_failures_is_replaced(message, normal):
    assert normalise(message) == normal


@pytest.mark.parametrize(
    ("status", "body", "part"),
    [
        (400, openai("This model's maximum context length is 4096 tokens", "context_length_exceeded"), "context"),
        (400, {"object": "error", "message": "maximum context length is 2048 tokens", "code": 400}, "context"),
        (404, openai("The model `x` does not exist", "model_not_found"), "doctor"),
        (400, {"message": "model x not found"}, "doctor"),
        (401, openai("Incorrect API key", "invalid_api_key"), "OPENAI_API_KEY"),
        (429, "slow down", "--rpm"),
        (418, None, "refuses"),
        (308, None, "final address"),
        (502, "<html>bad gateway</html>", "log"),
        (599, [], "log"),
    ],
)
def test_hints_by_answer(status, body, part):
    failure = read_failure({"custom_id": "a", "response": {"status_code": status, "body": body}, "error": None})

    assert part in hint_for(failure, COMMAND_LINE)


@pytest.mark.parametrize("code", [*LineCode, *ProblemCode])
def test_each_of_our_own_codes_has_a_hint_of_its_own(code):
    failure = read_failure({"custom_id": "a", "response": None, "error": {"code": str(code), "message": "m"}})

    unknown = read_failure({"custom_id": "a", "error": {"code": "news", "message": "m"}})
    for door in (COMMAND_LINE, SERVER):
        assert hint_for(failure, door) != hint_for(unknown, door)


@pytest.mark.parametrize("code", [*LineCode, *ProblemCode, "news"])
def test_hints_of_the_server_name_no_flag_of_the_command_line(code):
    failure = read_failure({"custom_id": "a", "response": None, "error": {"code": str(code), "message": "m"}})

    assert "--" not in hint_for(failure, SERVER)


def test_endless_different_messages_do_not_make_endless_groups(tmp_path):
    path = tmp_path / "e.jsonl"
    words = ("".join(chr(97 + int(digit)) for digit in str(number)) for number in range(3000))
    path.write_bytes(b"".join(error_line(1, code="connection_error", message=f"word {word}") for word in words))

    found = call("errors", path, "--json").json

    assert found["total"] == 3000
    assert len(found["groups"]) == 1001
    assert found["groups"][0]["message"] == "(other messages)"
    assert sum(each["count"] for each in found["groups"]) == 3000


def test_a_file_of_something_else_exits_2_and_names_the_line(tmp_path):
    path = tmp_path / "e.jsonl"
    path.write_bytes(error_line(1, code="connection_error") + b'{"torn": ')

    called = call("errors", path)

    assert called.code == 2
    assert "line 2 of the errors is not JSON" in called.err


@pytest.mark.parametrize(
    ("line", "says"),
    [(chat_line("a"), "line 2 is not a result line"), (error_line(2, status=200, body={}), "line 2 has not failed")],
    ids=["input", "output"],
)
def test_a_file_of_other_lines_exits_2_and_names_the_first(tmp_path, line, says):
    path = tmp_path / "e.jsonl"
    path.write_bytes(error_line(1, code="connection_error") + line)

    called = call("errors", path)

    assert called.code == 2
    assert says in called.err


def test_a_missing_run_exits_1(tmp_path):
    assert call("errors", tmp_path / "nothing.run").code == 1


@pytest.mark.slow
def test_a_run_folder_tells_the_same_before_and_after_its_end(tmp_path):
    bad = [chat_line(f"bad-{number}", simulate=["404"] * 9) for number in range(3)]
    stuck = chat_line("stuck", simulate=["stall", "ok"])
    (tmp_path / "in.jsonl").write_bytes(b"".join([*bad, b"{refused\n", stuck, chat_line("good")]))
    command = ("run", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--on-invalid", "skip", "-u")
    with simulator("--latency", "1ms") as url:
        running = spawn(*command, url)
        assert running.stderr is not None
        running.stderr.readline()
        follower = spawn("results", tmp_path / "out.jsonl.run", "--follow")
        assert follower.stdout is not None
        for _ in range(4):
            follower.stdout.readline()
        running.kill()
        running.communicate()
        follower.communicate(timeout=60)
        before = call("errors", tmp_path / "out.jsonl.run", "--json").json
        ended = finish(spawn(*command, url))
    after = call("errors", tmp_path / "out.jsonl.run", "--json").json
    by_output = call("errors", tmp_path / "out.jsonl", "--json").json

    assert ended.code == 3
    assert by_output == after
    assert [(each["code"], each["count"]) for each in before["groups"]] == [("404 invalid_request_error", 3)]
    assert {each["code"]: each["count"] for each in after["groups"]} == {
        "404 invalid_request_error": 3,
        "invalid_json_line": 1,
    }
