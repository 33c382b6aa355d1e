"""xAI's words: answers under the key of their kind, failures by gRPC's numbers, Responses as chat completions."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from batchrunner.api.envelope import Refusal
from batchrunner.api.xai_words import URLS, XaiError, result_of, url_of
from batchrunner.lines import ProblemCode
from batchrunner.models import BatchId, LineCode, LineProblem
from batchrunner.results import ResultLines
from batchrunner.settings import ENDPOINTS

LINES = ResultLines(BatchId("b1"))
CHAT = {"object": "chat.completion", "choices": []}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1700000000,
    "model": "m",
    "status": "completed",
    "output": [
        {"type": "reasoning", "summary": []},
        {"type": "message", "content": [{"type": "output_text", "text": "Hel"}, {"type": "output_text", "text": "lo"}]},
    ],
    "usage": {"input_tokens": 3, "output_tokens": 4, "total_tokens": 7, "cost_in_usd_ticks": 12},
}


def shown(line: bytes, url: str | None = "/v1/chat/completions") -> dict[str, Any]:
    return dict(json.loads(msgspec.json.encode(result_of(line, url))))


def answered(body: object, status: int = 200) -> bytes:
    return LINES.answered(1, "a", status, "req", json.dumps(body).encode())


@pytest.mark.parametrize("url", ENDPOINTS)
def test_every_answer_stands_under_one_key(url: str) -> None:
    key = "image_generation" if "/images/" in url else "video_generation" if "/videos" in url else "chat_get_completion"

    found = shown(answered({"x": [1]}), url)

    assert found == {"batch_request_id": "a", "batch_result": {"response": {key: {"x": [1]}}}}


@pytest.mark.parametrize(
    ("body", "key"),
    [
        (CHAT, "chat_get_completion"),
        ({"created": 1, "data": [{"b64_json": "x"}]}, "image_generation"),
        ({"data": [{"url": "x"}]}, "image_generation"),
        ({"data": [{"embedding": [1]}]}, "chat_get_completion"),
        ({"video": {"url": "x"}}, "video_generation"),
        ({"object": "video", "id": "v"}, "video_generation"),
        ([1], "chat_get_completion"),
        ({"data": []}, "chat_get_completion"),
    ],
)
def test_where_the_input_is_gone_the_answer_tells_its_kind(body: object, key: str) -> None:
    assert shown(answered(body), None)["batch_result"] == {"response": {key: body}}


@pytest.mark.parametrize("kind", URLS)
def test_every_kind_goes_to_an_endpoint_that_lines_may_name(kind: str) -> None:
    assert url_of(kind, msgspec.Raw(b"{}")) in ENDPOINTS


@pytest.mark.parametrize(
    ("body", "url"), [(b'{"video":{}}', "edits"), (b'{"video":null}', "generations"), (b"7", "generations")]
)
def test_a_video_of_a_video_is_an_edit(body: bytes, url: str) -> None:
    assert url_of("video_generation", msgspec.Raw(body)) == f"/v1/videos/{url}"


def test_a_response_becomes_a_chat_completion() -> None:
    found = shown(answered(RESPONSE), "/v1/responses")["batch_result"]["response"]["chat_get_completion"]

    assert found == {
        "id": "resp_1",
        "created": 1700000000,
        "model": "m",
        "choices": [
            {
                "message": {"content": "Hello", "refusal": None, "role": "assistant"},
                "finish_reason": "stop",
                "index": 0,
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "total_tokens": 7,
            "prompt_tokens_details": None,
            "completion_tokens_details": None,
            "cost_in_usd_ticks": 12,
        },
        "object": "chat.completion",
    }


def test_tool_calls_refusals_and_cut_answers_are_kept() -> None:
    call = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": "{}"}
    refusal = {"type": "message", "content": [{"type": "refusal", "refusal": "no"}]}
    found = shown(answered(RESPONSE | {"output": [call, refusal], "usage": None}), "/v1/responses")
    cut = shown(answered(RESPONSE | {"status": "incomplete"}), "/v1/responses")

    chat = found["batch_result"]["response"]["chat_get_completion"]
    choice = chat["choices"][0]
    assert choice["message"]["tool_calls"] == [
        {"id": "c1", "function": {"name": "look", "arguments": "{}"}, "type": "function"}
    ]
    assert (choice["message"]["content"], choice["message"]["refusal"]) == (None, "no")
    assert (choice["finish_reason"], chat["usage"]) == ("tool_calls", None)
    assert cut["batch_result"]["response"]["chat_get_completion"]["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("status", "code"),
    [(400, 3), (401, 16), (403, 7), (404, 5), (408, 4), (409, 10), (422, 3), (429, 8), (500, 13), (503, 14), (504, 4)],
)
def test_a_refusal_of_the_upstream_is_told_twice(status: int, code: int) -> None:
    found = shown(answered({"error": {"message": "no such thing"}}, status))

    assert found["batch_result"] == {"error": {"code": code, "message": "no such thing"}}
    assert found["error_message"] == "no such thing"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": "plain"}, "plain"),
        ({"code": "x", "error": "plain"}, "plain"),
        ("<html>", "The upstream answered HTTP 502."),
        ({"error": {"message": "no such model", "code": 404}}, "no such model"),
        ({"object": "error", "message": "too long", "code": 400}, "too long"),
        ({"error": {"code": 7}}, "The upstream answered HTTP 502."),
    ],
)
def test_whatever_an_upstream_says_there_is_a_message(body: object, message: str) -> None:
    assert shown(answered(body, 502))["error_message"] == message


@pytest.mark.parametrize("code", LineCode)
def test_every_code_of_ours_has_a_number(code: LineCode) -> None:
    found = shown(LINES.failed(1, "a", code=code, message="why"))

    assert found["error_message"] == "why"
    assert found["batch_result"]["error"]["code"] != 3
    is_cancelled = found["batch_result"]["error"]["code"] == 1
    assert is_cancelled is (code is LineCode.BATCH_CANCELLED)


def test_a_line_that_was_refused_has_an_invalid_argument() -> None:
    problem = LineProblem(ProblemCode.INVALID_JSON_LINE, "no JSON", None, 3, None)

    found = shown(LINES.refused(problem))

    assert found["batch_request_id"] is None
    assert found["batch_result"]["error"] == {"code": 3, "message": "no JSON"}


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 408, 409, 410, 413, 415, 422, 429, 499, 500, 502, 503])
def test_every_status_has_a_word(status: int) -> None:
    error = XaiError.of(Refusal("why", status=status))

    assert error.error == "why"
    assert error.code
