"""One input line: every refusal of the catalogue, what is tolerated, and that no bytes whatever can make it raise."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrunner import lines
from batchrunner.errors import InputChanged
from batchrunner.lines import (
    CHAT_COMPLETIONS,
    COMPLETIONS,
    EMBEDDINGS,
    ENDPOINTS,
    NEEDS,
    LineRules,
    ProblemCode,
    is_blank,
    is_utf8,
    model_of,
    parse_line,
    quoted,
    reparse,
)
from batchrunner.models import LineProblem, RequestLine

BODY = {"model": "m", "messages": [{"role": "user", "content": "Grüße, 東京"}]}
LINE = {"custom_id": "a", "method": "POST", "url": CHAT_COMPLETIONS, "body": BODY}
CHAT = LineRules(endpoint=CHAT_COMPLETIONS, wants_url=True)
MIXED = LineRules()
JSON_PROBLEM = "This line is not parseable as valid JSON"


def encode(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode()


def changed(**fields: object) -> bytes:
    """A good line with fields replaced; `...` drops one."""
    return encode({name: value for name, value in (LINE | fields).items() if value is not ...})


def with_body(**fields: object) -> bytes:
    return changed(body={name: value for name, value in (BODY | fields).items() if value is not ...})


def nested(depth: int, openers: str = "[") -> bytes:
    """A good line whose whole depth is `depth`."""
    closers = {"[": "]", '{"a":': "}"}
    inner = depth - 2
    return with_body().replace(b'"model"', f'"x": {openers * inner}{"0"}{closers[openers] * inner}, "model"'.encode())


def problem(raw: bytes, rules: LineRules = CHAT) -> LineProblem:
    found = parse_line(raw, 7, rules)
    assert isinstance(found, LineProblem), found
    assert found.line_number == 7
    return found


def accepted(raw: bytes, rules: LineRules = CHAT) -> RequestLine:
    found = parse_line(raw, 7, rules)
    assert isinstance(found, RequestLine), found
    return found


CATALOGUE: dict[str, tuple[bytes, str, str | None, str]] = {
    "no JSON": (b"{this is not JSON", "invalid_json_line", None, f"{JSON_PROBLEM}."),
    "cut short": (changed()[:-3], "invalid_json_line", None, f"{JSON_PROBLEM}."),
    "two values": (changed() + b" {}", "invalid_json_line", None, f"{JSON_PROBLEM}."),
    "not a number": (with_body(n=float("nan")), "invalid_json_line", None, f"{JSON_PROBLEM}."),
    "infinity": (with_body(n=float("inf")), "invalid_json_line", None, f"{JSON_PROBLEM}."),
    "lone surrogate": (with_body(n="x").replace(b'"x"', b'"\\ud800"'), "invalid_json_line", None, f"{JSON_PROBLEM}."),
    "raw NUL": (with_body(n="x").replace(b'"x"', b'"\0"'), "invalid_json_line", None, f"{JSON_PROBLEM}."),
    "mark in the middle": (b"\xef\xbb\xbf" + changed(), "invalid_json_line", None, f"{JSON_PROBLEM}."),
    "array": (
        b" [1]",
        "invalid_json_line",
        None,
        f"{JSON_PROBLEM}: expected an object, but got an array instead.",
    ),
    "bad UTF-8 in a skipped part": (
        b'{"x": "\xff", ' + changed()[1:],
        "invalid_json_line",
        None,
        f"{JSON_PROBLEM}: its byte 7 is not valid UTF-8.",
    ),
    "too deep": (
        nested(129),
        "too_deeply_nested",
        None,
        "This line is nested too deeply: at most 128 levels are allowed.",
    ),
    "far too deep": (
        nested(2000),
        "too_deeply_nested",
        None,
        "This line is nested too deeply: at most 128 levels are allowed.",
    ),
    "no custom_id": (
        changed(custom_id=...),
        "missing_required_parameter",
        "custom_id",
        "Missing required parameter: 'custom_id'.",
    ),
    "null custom_id": (
        changed(custom_id=None),
        "missing_required_parameter",
        "custom_id",
        "Missing required parameter: 'custom_id'.",
    ),
    "no method": (
        changed(method=...),
        "missing_required_parameter",
        "method",
        "Missing required parameter: 'method'.",
    ),
    "no url": (changed(url=...), "missing_required_parameter", "url", "Missing required parameter: 'url'."),
    "no body": (changed(body=...), "missing_required_parameter", "body", "Missing required parameter: 'body'."),
    "custom_id is an integer": (
        changed(custom_id=17),
        "invalid_type",
        "custom_id",
        "Invalid type for 'custom_id': expected a string, but got an integer instead.",
    ),
    "method is a decimal number": (
        changed(method=1.5),
        "invalid_type",
        "method",
        "Invalid type for 'method': expected a string, but got a decimal number instead.",
    ),
    "url is an array": (
        changed(url=[CHAT_COMPLETIONS]),
        "invalid_type",
        "url",
        "Invalid type for 'url': expected a string, but got an array instead.",
    ),
    "body is a boolean": (
        changed(body=True),
        "invalid_type",
        "body",
        "Invalid type for 'body': expected an object, but got a boolean instead.",
    ),
    "empty custom_id": (changed(custom_id=""), "invalid_custom_id", "custom_id", "Invalid 'custom_id': it is empty."),
    "long custom_id": (
        changed(custom_id="é" * 513),
        "invalid_custom_id",
        "custom_id",
        "Invalid 'custom_id': it is 513 characters long, at most 512 are allowed.",
    ),
    "NUL in custom_id": (
        changed(custom_id="a\0b"),
        "invalid_custom_id",
        "custom_id",
        "Invalid 'custom_id': it holds a NUL character.",
    ),
    "method GET": (
        changed(method="GET"),
        "invalid_method",
        "method",
        "Invalid method: 'GET'. Only 'POST' is supported.",
    ),
    "method in small letters": (
        changed(method="post\n"),
        "invalid_method",
        "method",
        "Invalid method: 'post\\n'. Only 'POST' is supported.",
    ),
    "url of another endpoint": (
        changed(url=EMBEDDINGS),
        "invalid_url",
        "url",
        "The URL provided for this request does not match the batch endpoint.",
    ),
    "unknown url": (
        changed(url="/v1/chat/completion"),
        "url_not_found",
        "url",
        "The provided url '/v1/chat/completion' is not supported by the Batch API.",
    ),
    "streaming": (
        with_body(stream=True),
        "streaming_unsupported",
        "body.stream",
        "Chat Completions: Streaming is not supported in the Batch API.",
    ),
    "stream is a word": (
        with_body(stream="true"),
        "invalid_type",
        "body.stream",
        "Invalid type for 'body.stream': expected a boolean, but got a string instead.",
    ),
    "no model": (with_body(model=...), "invalid_request", "body.model", "Model parameter is required."),
    "null model": (with_body(model=None), "invalid_request", "body.model", "Model parameter is required."),
    "empty model": (with_body(model=""), "invalid_request", "body.model", "Model parameter is required."),
    "model is an object": (
        with_body(model={}),
        "invalid_type",
        "body.model",
        "Invalid type for 'body.model': expected a string, but got an object instead.",
    ),
    "no messages": (with_body(messages=...), "invalid_request", "body.messages", "Messages parameter is required."),
    "null messages": (with_body(messages=None), "invalid_request", "body.messages", "Messages parameter is required."),
}


@pytest.mark.parametrize(("raw", "code", "param", "message"), CATALOGUE.values(), ids=CATALOGUE)
def test_a_bad_line_is_refused_with_code_param_and_message(raw, code, param, message) -> None:
    found = problem(raw)

    assert (found.code, found.param, found.message) == (code, param, message)


@pytest.mark.parametrize("url", ["http://h/v1/chat/completions", "/v1/../admin", "/v1/chat/completions?x=1", "", "//h"])
@pytest.mark.parametrize("end", ["", "\\", "\r\n", "/"])
def test_only_listed_paths_are_urls(url: str, end: str) -> None:
    found = problem(changed(url=url + end), MIXED)

    assert (found.code, found.param) == (ProblemCode.URL_NOT_FOUND, "url")
    assert found.message.isprintable()


def test_the_first_failing_check_is_the_one_reported() -> None:
    """JSON, the four parameters, then their values, then the body."""
    everything_wrong = {"method": "GET", "url": "/v1/none", "body": {"stream": True}}
    order = []

    for mended in ({}, {"custom_id": "a"}, {"method": "POST"}, {"url": CHAT_COMPLETIONS}, {"body": BODY}):
        everything_wrong |= mended
        found = parse_line(encode(everything_wrong), 1, CHAT)
        order.append(found.code if isinstance(found, LineProblem) else "accepted")

    assert order == [
        "missing_required_parameter",
        "invalid_method",
        "url_not_found",
        "streaming_unsupported",
        "accepted",
    ]


def test_a_refused_line_is_reported_under_its_id_wherever_it_stands() -> None:
    assert problem(changed(method="GET")).custom_id == "a"
    assert problem(changed(custom_id="x" * 600)).custom_id is None


def test_a_line_over_the_limit_is_refused_and_one_at_the_limit_is_not() -> None:
    raw = changed()

    found = problem(raw, replace(CHAT, line_bytes_max=len(raw) - 1))

    assert found.code == ProblemCode.LINE_TOO_LONG
    assert found.message == f"This line is {len(raw)} bytes long, at most {len(raw) - 1} bytes are allowed."
    accepted(raw, replace(CHAT, line_bytes_max=len(raw)))


@pytest.mark.parametrize("openers", ["[", '{"a":'])
def test_depth_is_counted_exactly(openers: str) -> None:
    accepted(nested(128, openers))
    assert problem(nested(129, openers)).code == ProblemCode.TOO_DEEPLY_NESTED
    assert problem(nested(9), replace(CHAT, depth_max=8)).code == ProblemCode.TOO_DEEPLY_NESTED


def test_brackets_in_strings_and_side_by_side_are_no_depth() -> None:
    accepted(with_body(x="[{" * 500))
    accepted(with_body(x='\\"[' * 500))
    accepted(with_body(x=[[0], {}] * 500))


@pytest.mark.parametrize(
    "raw",
    [
        changed() + b"\r",
        b" \t" + changed() + b"  ",
        with_body(n=None, temperature=None, stream=None),
        with_body(stream=False),
        with_body(n=int("9" * 400)),
        with_body(n="x").replace(b'"x"', b"1e999"),
        with_body(n="x").replace(b'"x"', b'"\\ud83d\\ude00"'),
        changed(extra={"any": "thing"}),
        changed(custom_id="\u0001\u2028'\"\\"),
        changed(custom_id="é" * 512),
    ],
)
def test_what_is_valid_is_forwarded_byte_by_byte(raw: bytes) -> None:
    found = accepted(raw)

    assert found.body in raw
    assert found.body.startswith(b'{"model"')
    assert found.body.endswith(b"}")
    assert reparse(raw, 7, CHAT) == found


def test_a_repeated_key_counts_by_its_last_value_and_is_forwarded_as_it_stands() -> None:
    doubled = b'{"model": "first", "model": "last", "messages": []}'
    raw = changed(body="HERE").replace(b'"HERE"', doubled)

    found = accepted(raw)

    assert found.body == doubled
    assert model_of(found) == "last"
    assert problem(raw[:-1] + b', "method": "GET"}').code == ProblemCode.INVALID_METHOD


@pytest.mark.parametrize(
    ("endpoint", "body", "url"),
    [
        (None, {"messages": []}, CHAT_COMPLETIONS),
        (None, {"input": "x"}, EMBEDDINGS),
        (None, {"prompt": "x"}, COMPLETIONS),
        (None, {"messages": None, "prompt": "x"}, COMPLETIONS),
        (COMPLETIONS, {"messages": []}, CHAT_COMPLETIONS),
        (COMPLETIONS, {"input": "x"}, EMBEDDINGS),
        ("/v1/responses", {"input": "x"}, "/v1/responses"),
        ("/v1/score", {"text_1": "x"}, "/v1/score"),
    ],
)
def test_a_missing_url_follows_from_the_body_and_then_from_the_batch(endpoint, body, url) -> None:
    rules = LineRules(endpoint=endpoint, wants_url=False)
    raw = changed(url=..., body={"model": "m", **body})

    assert accepted(raw, rules).url == url
    assert reparse(raw, 7, rules).url == url


def test_a_missing_url_that_nothing_tells_is_missed() -> None:
    assert problem(changed(url=..., body={"model": "m"}), MIXED).param == "url"


def test_the_first_line_decides_whether_every_line_needs_a_url() -> None:
    with_url, without_url, no_object = changed(), changed(url=...), b"[]"

    assert MIXED.learn_url(no_object).wants_url is None
    assert problem(without_url, MIXED.learn_url(with_url)).code == ProblemCode.MISSING_REQUIRED_PARAMETER
    accepted(without_url, MIXED.learn_url(without_url).learn_url(with_url))
    accepted(with_url, MIXED.learn_url(without_url))


def test_a_batch_may_let_its_lines_mix() -> None:
    embedding = changed(url=EMBEDDINGS, body={"model": "m", "input": "x"})

    assert accepted(embedding, MIXED).url == EMBEDDINGS
    assert accepted(embedding, replace(CHAT, is_url_equal_to_endpoint=False)).url == EMBEDDINGS
    assert problem(embedding, CHAT).code == ProblemCode.INVALID_URL


def test_strict_rules_want_a_url_and_one_model() -> None:
    strict = LineRules(endpoint=CHAT_COMPLETIONS, is_strict=True)
    learned = strict.learn_model(accepted(changed(), strict))

    found = problem(with_body(model="other"), learned)

    assert problem(changed(url=...), strict).param == "url"
    assert (found.code, found.param) == (ProblemCode.MISMATCHED_MODEL, "body.model")
    assert found.message == (
        "The model 'other' for this request does not match the rest of the batch. "
        "Each batch must contain requests for a single model."
    )
    accepted(changed(), learned)


@pytest.mark.parametrize("url", ENDPOINTS)
def test_each_endpoint_takes_its_usual_body_and_misses_what_it_needs(url: str) -> None:
    needs = NEEDS[url]
    whole: dict[str, Any] = {"model": "m"} | dict.fromkeys(needs.fields[:1], "x")

    accepted(changed(url=url, body=whole), MIXED)
    for name in whole if needs.has_model else needs.fields[:1]:
        rest = {key: value for key, value in whole.items() if key != name}
        found = problem(changed(url=url, body=rest), MIXED)
        assert (found.code, found.param) == (ProblemCode.INVALID_REQUEST, f"body.{name}")


def test_responses_may_use_a_stored_prompt_instead_of_input() -> None:
    accepted(changed(url="/v1/responses", body={"model": "m", "prompt": {"id": "p"}}), MIXED)


def test_reparse_refuses_what_cannot_have_been_validated() -> None:
    for raw in (b"", b"{}", changed(method="GET"), changed(url=..., body={"model": "m"})):
        with pytest.raises(InputChanged, match="line 7"):
            reparse(raw, 7, MIXED)


@pytest.mark.parametrize("raw", [b"", b" ", b"\r", b" \t\r"])
def test_lines_of_white_space_are_blank(raw: bytes) -> None:
    assert is_blank(raw)
    assert not is_blank(raw + b"{}")


def test_a_value_in_a_message_is_cut_and_escaped() -> None:
    assert quoted("a\x1b[31m\n\u202e") == "'a\\x1b[31m\\n\\u202e'"
    assert quoted("x" * 600) == "'" + "x" * 512 + "...'"


@given(st.binary())
def test_utf8_is_told_as_the_decoder_tells_it(raw: bytes) -> None:
    try:
        raw.decode()
        expected = True
    except UnicodeDecodeError:
        expected = False

    assert is_utf8(raw) is expected


@pytest.mark.parametrize("tail", [b"", b"\xff", b"\xc3", "é".encode()])
def test_utf8_of_a_long_line_is_told_in_slices(tail: bytes) -> None:
    """Characters of two bytes lie across every border between slices."""
    raw = b"x" + "é".encode() * (1 << 20) + tail

    assert is_utf8(raw) is (tail in {b"", "é".encode()})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
URLS = st.sampled_from([CHAT_COMPLETIONS, EMBEDDINGS, COMPLETIONS, "/v1/videos", "/v1/responses"])
BODIES = st.fixed_dictionaries(
    {},
    optional={
        "model": st.just("m") | JSON,
        "messages": st.just([]) | JSON,
        "input": JSON,
        "prompt": JSON,
        "stream": st.booleans() | JSON,
        "n": JSON,
    },
)
LINES = st.fixed_dictionaries(
    {},
    optional={
        "custom_id": st.just("a") | JSON,
        "method": st.just("POST") | JSON,
        "url": URLS | JSON,
        "body": BODIES | JSON,
        "extra": JSON,
    },
)
RULES = st.builds(
    LineRules,
    endpoint=st.none() | URLS,
    wants_url=st.sampled_from([None, True, False]),
    model=st.sampled_from([None, "m"]),
    is_strict=st.booleans(),
    is_url_equal_to_endpoint=st.booleans(),
    depth_max=st.sampled_from([3, 128]),
)


@given(st.binary() | LINES.map(lambda value: json.dumps(value).encode()), RULES)
def test_any_bytes_are_judged_and_the_quick_way_agrees_with_the_thorough_one(raw: bytes, rules: LineRules) -> None:
    found = parse_line(raw, 3, rules)

    assert found == lines._inspect(raw, 3, rules)
    assert found.line_number == 3
    if isinstance(found, RequestLine):
        assert reparse(raw, 3, rules) == found
        assert msgspec.json.decode(found.body) == msgspec.json.decode(raw)["body"]
    else:
        assert found.code in set(ProblemCode)
        assert found.message.isprintable()


@given(st.text(min_size=1, max_size=20).filter(lambda text: "\0" not in text), BODIES)
def test_a_good_line_comes_out_as_it_went_in(custom_id: str, body: dict[str, Any]) -> None:
    body = {**body, "model": "m", "messages": [], "stream": False}
    raw = json.dumps(LINE | {"custom_id": custom_id, "body": body}).encode()

    found = accepted(raw)

    assert (found.custom_id, found.url, found.body) == (custom_id, CHAT_COMPLETIONS, json.dumps(body).encode())


@pytest.mark.parametrize("character", ["é", "東", "\U0001f600"])
def test_utf8_is_checked_across_the_slices_it_is_decoded_in(character: str) -> None:
    code = character.encode()
    for before in range(lines._UTF8_SLICE_BYTES - 4, lines._UTF8_SLICE_BYTES + 1):
        whole = b"a" * before + code + b"b" * lines._UTF8_SLICE_BYTES + code

        assert lines.is_utf8(whole)
        assert not lines.is_utf8(whole[:-1])
        assert not lines.is_utf8(whole[: before + 1])
        assert not lines.is_utf8(whole[: before + 1] + whole)
