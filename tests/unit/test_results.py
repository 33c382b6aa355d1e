"""Result lines are valid JSON on one line whatever the peer sent, and facts are read without ever raising."""

from __future__ import annotations

import json
import re
import tracemalloc
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrunner.models import NO_USAGE, BatchId, LineCode, LineProblem, Usage
from batchrunner.results import ReplyFacts, ResultLines, as_json, is_json, one_line, reply_facts

RESULTS = ResultLines(BatchId("batch_1"))
PLAIN = ReplyFacts(NO_USAGE, has_error=False)


def read(line: bytes) -> dict[str, Any]:
    """Parse a result line, which must be exactly one."""
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert b"\r" not in line
    value = orjson.loads(line)
    assert list(value) == ["id", "custom_id", "response", "error"]
    return value


def test_an_answer_is_spliced_in_as_it_came() -> None:
    body = '{"id":"x", "big":123456789012345678901234567890, "é":1.10}'.encode()

    line = RESULTS.answered(7, 'a"b', 200, "req-1", body)

    assert line == (
        b'{"id":"%b","custom_id":"a\\"b","response":{"status_code":200,"request_id":"req-1","body":%b},"error":null}\n'
        % (RESULTS.id(7).encode(), body)
    )


def test_an_answer_of_several_lines_becomes_one_and_keeps_its_digits() -> None:
    body = b'{\r\n  "n": 1.10,\n  "big": [123456789012345678901234567890, 2e400],\n  "s": "a\\n b"\n}\n'

    assert one_line(body) == b'{"n":1.10,"big":[123456789012345678901234567890,2e400],"s":"a\\n b"}'
    assert read(RESULTS.answered(1, "a", 200, None, body.replace(b", 2e400", b"")))["response"]["request_id"] is None


def test_deeply_nested_answers_become_one_line_too() -> None:
    for depth in (500, 990, 5000):
        body = b"[" * depth + b"\n" + b"]" * depth
        assert b"\n" not in one_line(body)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"error": {"message": "no"}}', {"error": {"message": "no"}}),
        (b"<html>\r\n502</html>", "<html>\r\n502</html>"),
        (b"", ""),
        (b"caf\xe9", "caf\ufffd"),
        (b'"\xff"', '"\ufffd"'),
        (b" {} \n", {}),
        (b"{}{}", "{}{}"),
        (b"[" * 5000, "[" * 5000),
    ],
)
def test_an_answer_that_is_not_2xx_may_have_any_body(body: bytes, expected: object) -> None:
    value = read(RESULTS.answered(1, "a", 502, "r", body))

    assert value["response"] == {"status_code": 502, "request_id": "r", "body": expected}
    assert value["error"] is None


def test_a_failure_without_an_answer_has_no_response() -> None:
    value = read(RESULTS.failed(3, "a", code=LineCode.BATCH_EXPIRED, message="too late"))

    assert (value["response"], value["error"]) == (None, {"code": "batch_expired", "message": "too late"})


def test_a_failure_keeps_the_answer_there_was() -> None:
    value = read(RESULTS.failed(3, "a", code="invalid_response", message="m", status=200, request_id="r", body=b"oops"))

    assert value["response"] == {"status_code": 200, "request_id": "r", "body": "oops"}
    assert value["error"] == {"code": "invalid_response", "message": "m"}


def test_a_failure_that_is_an_answer_has_no_error() -> None:
    value = read(RESULTS.failed(3, "a", code=None, message="", status=400, body=b'{"error":1}'))

    assert (value["response"]["status_code"], value["response"]["body"], value["error"]) == (400, {"error": 1}, None)


@pytest.mark.parametrize("param", ["body.model", None])
def test_a_refused_line_says_where_it_stands_and_which_field_is_at_fault(param: str | None) -> None:
    problem = LineProblem("invalid_type", "model is a number", param, 7, "a")
    line = json.loads(RESULTS.refused(problem))

    assert (line["id"], line["custom_id"], line["response"]) == (RESULTS.id(7), "a", None)
    assert line["error"] == {"code": "invalid_type", "message": "model is a number", "param": param, "line": 7}


def test_ids_are_the_same_each_time_and_differ_by_line_and_batch() -> None:
    others = [ResultLines(BatchId(name)) for name in ("batch_1", "batch_11", "batch_2" + "x" * 200)]
    ids = {results.id(number) for results in others for number in range(1, 200)}

    assert others[0].id(5) == RESULTS.id(5)
    assert len(ids) == 3 * 199
    assert all(re.fullmatch(r"batch_req_[0-9a-f]{32}", each) for each in ids)


def test_a_header_that_is_no_text_does_no_harm() -> None:
    assert read(RESULTS.answered(1, "a", 200, "r\udcff", b"{}"))["response"]["request_id"] == "r?"


@pytest.mark.parametrize(
    ("body", "usage"),
    [
        (
            (
                b'{"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":7,"total_tokens":12,'
                b'"prompt_tokens_details":{"cached_tokens":2},"completion_tokens_details":{"reasoning_tokens":3}}}'
            ),
            Usage(5, 2, 7, 3),
        ),
        (
            (
                b'{"output":[],"error":null,"usage":{"input_tokens":5,"output_tokens":7,'
                b'"input_tokens_details":{"cached_tokens":2},"output_tokens_details":{"reasoning_tokens":3}}}'
            ),
            Usage(5, 2, 7, 3),
        ),
        (b'{"data":[],"usage":{"prompt_tokens":5,"total_tokens":5}}', Usage(5, 0, 0, 0)),
        (b'{"choices":[]}', NO_USAGE),
        (b'{"usage":null}', NO_USAGE),
        (b'{"usage":{"prompt_tokens":null,"prompt_tokens_details":null,"completion_tokens":4}}', Usage(0, 0, 4, 0)),
        (b'{"usage":{"prompt_tokens":"5","completion_tokens":4}}', Usage(0, 0, 4, 0)),
        (b'{"usage":{"prompt_tokens":-5,"completion_tokens":1e3,"output_tokens":6}}', Usage(0, 0, 6, 0)),
        (b'{"usage":{"prompt_tokens":' + b"9" * 400 + b',"completion_tokens":4}}', Usage(0, 0, 4, 0)),
        (b'{"usage":{"prompt_tokens":1,"prompt_tokens_details":[1]}}', Usage(1, 0, 0, 0)),
        (b'{"usage":[]}', NO_USAGE),
        (b'{"usage":"many"}', NO_USAGE),
        (b"[]", NO_USAGE),
        (b'"text"', NO_USAGE),
        (b' {"choices":[]}\r\n', NO_USAGE),
        (b'{"n":' + b"9" * 400 + b',"usage":{"prompt_tokens":1}}', Usage(1, 0, 0, 0)),
    ],
)
def test_usage_is_read_in_every_shape_and_doubted_where_it_cannot_be(body: bytes, usage: Usage) -> None:
    assert reply_facts(body) == ReplyFacts(usage, has_error=False)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"<html>",
        b'{"a":NaN}',
        b"{}{}",
        b'{"skipped":"\xff"}',
        b'["\xff"]',
        b"\xef\xbb\xbf{}",
        b"[" * 5000,
        b'{"a":' * 5000 + b"0" + b"}" * 5000,
        b'"\\ud800"',
        b"\0",
    ],
)
def test_what_is_not_json_has_no_facts(body: bytes) -> None:
    assert reply_facts(body) is None
    assert not is_json(body)


@pytest.mark.parametrize(
    ("body", "has_error"),
    [
        (b'{"error":{"message":"overloaded"}}', True),
        (b'{"error":"overloaded","usage":{"prompt_tokens":1}}', True),
        (b'{"error":null}', False),
        (b'{"error": null ,"choices":[]}', False),
        (b'{"error":{},"choices":[{}]}', False),
        (b'{"error":{},"data":[]}', False),
        (b'{"error":{},"output":[]}', False),
        (b'{"error":{},"choices":null}', True),
        (b'{"choices":[{"error":{}}]}', False),
    ],
)
def test_an_error_inside_a_200_is_seen_unless_there_is_an_answer_too(body: bytes, has_error) -> None:
    found = reply_facts(body)

    assert found is not None
    assert found.has_error is has_error


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
DETAILS = JSON | st.fixed_dictionaries({}, optional={"cached_tokens": JSON, "reasoning_tokens": JSON})
USAGE = JSON | st.fixed_dictionaries(
    {},
    optional={
        "prompt_tokens": JSON,
        "completion_tokens": JSON,
        "input_tokens": JSON,
        "output_tokens": JSON,
        "prompt_tokens_details": DETAILS,
        "output_tokens_details": DETAILS,
    },
)
REPLIES = JSON | st.fixed_dictionaries({}, optional={"usage": USAGE, "error": JSON, "choices": JSON, "output": JSON})


@given(REPLIES)
def test_any_json_has_facts_with_counts_that_can_be_summed(reply: object) -> None:
    found = reply_facts(json.dumps(reply, ensure_ascii=False).encode())

    assert found is not None
    counts = (
        found.usage.input_tokens,
        found.usage.cached_tokens,
        found.usage.output_tokens,
        found.usage.reasoning_tokens,
    )
    assert all(0 <= count <= 1 << 40 for count in counts)


@given(st.binary(), st.text(), st.text())
def test_any_bytes_make_a_readable_line(body: bytes, custom_id: str, message: str) -> None:
    answered = read(RESULTS.answered(1, custom_id, 500, custom_id, body))
    failed = read(RESULTS.failed(1, custom_id, code="c", message=message, status=200, body=body))

    assert answered["custom_id"] == failed["custom_id"] == custom_id
    assert failed["error"]["message"] == message
    assert answered["response"]["body"] == failed["response"]["body"]
    assert (reply_facts(body) is not None) == is_json(body)


@given(JSON, st.sampled_from([None, 2]))
def test_json_keeps_its_meaning_on_one_line(value: object, indent: int | None) -> None:
    spliced = as_json(json.dumps(value, indent=indent).encode())

    assert b"\n" not in spliced
    assert json.loads(spliced) == value


def test_line_of_a_large_answer_takes_no_second_copy_of_it() -> None:
    body = b'{"choices":[],"pad":"%b"}' % (b"x" * 4_000_000)
    results = ResultLines(BatchId("batch_1"))
    tracemalloc.start()
    try:
        made = results.answered(1, "a", 200, "req-1", body)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert len(made) < most_bytes < 1.1 * len(made)
