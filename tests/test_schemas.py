"""The published schemas are sound and tell good lines from bad; sample inputs are what their generator writes."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from jsonschema import Draft202012Validator

ROOT = Path(__file__).parents[1]
SCHEMAS = sorted(path for path in (ROOT / "schemas").glob("*.json") if path.name != "openapi.json")
SAMPLES = ROOT / "sample_inputs"
# What only a reading of the whole file, of the batch or of the bytes can tell.
BEYOND_ONE_LINE = {"duplicate_custom_id", "invalid_url", "too_deeply_nested", "missing_required_parameter url"}


def validator(name: str) -> Draft202012Validator:
    """Give the validator of one published schema."""
    return Draft202012Validator(json.loads((ROOT / "schemas" / f"{name}.json").read_text()))


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """Import the script that writes the sample inputs."""
    spec = importlib.util.spec_from_file_location("sample_inputs_generate", SAMPLES / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def answered(**changes: Any) -> dict[str, Any]:
    """Make an output line with some fields changed."""
    response = {"status_code": 200, "request_id": "req-1", "body": {"object": "chat.completion"}}
    return {"id": "batch_req_" + "a" * 32, "custom_id": "one", "response": response, "error": None} | changes


@pytest.mark.parametrize("path", SCHEMAS, ids=lambda path: path.stem)
def test_schema_is_valid_and_closed(path: Path) -> None:
    schema = json.loads(path.read_text())

    Draft202012Validator.check_schema(schema)

    assert schema["$id"].endswith(f"/{path.name}")
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize("name", ["chat", "chat_1000", "embeddings", "mixed"])
def test_sample_lines_fit_the_input_schema(name: str) -> None:
    check = validator("input_line")
    lines = (SAMPLES / f"{name}.jsonl").read_bytes().splitlines()

    problems = [
        (number, error.message) for number, raw in enumerate(lines, 1) for error in check.iter_errors(json.loads(raw))
    ]

    assert lines
    assert problems == []


def test_every_error_file_is_refused_by_the_schema_where_one_line_tells() -> None:
    check = validator("input_line")
    expected = json.loads((SAMPLES / "every_error.expected.json").read_bytes())
    refused = {each["line"]: each for each in expected}
    verdicts: dict[int, bool] = {}
    for number, raw in enumerate((SAMPLES / "every_error.jsonl").read_bytes().split(b"\n"), 1):
        if not raw.strip() or refused.get(number, {}).get("code") == "invalid_json_line":
            continue
        verdicts[number] = check.is_valid(json.loads(raw.removeprefix(b"\xef\xbb\xbf")))

    for number, is_valid in verdicts.items():
        problem = refused.get(number)
        told_elsewhere = problem and {problem["code"], f"{problem['code']} {problem['param']}"} & BEYOND_ONE_LINE
        assert is_valid == (problem is None or bool(told_elsewhere)), f"line {number}"


def test_sample_inputs_are_what_the_generator_writes(generator: ModuleType) -> None:
    written = {name: (SAMPLES / name).read_bytes() for name in generator.files()}

    assert written == generator.files()


def test_output_schema_takes_an_answer_and_an_asset() -> None:
    asset = {
        "object": "asset",
        "id": "asset-1",
        "content_type": "audio/mpeg",
        "bytes": 10,
        "sha256": "0" * 64,
        "url": "out.assets/asset-1",
    }
    broken_asset = {**asset, "sha256": "?"}

    verdicts = [
        validator("output_line").is_valid(answered(response={"status_code": 200, "request_id": None, "body": body}))
        for body in ({"object": "list"}, [1], asset, broken_asset)
    ]

    assert verdicts == [True, True, True, False]


@pytest.mark.parametrize(
    ("changes", "is_valid"),
    [
        ({"response": {"status_code": 400, "request_id": None, "body": {"error": {}}}}, True),
        ({"response": None, "error": {"code": "batch_expired", "message": "Too late."}}, True),
        ({"response": None, "custom_id": None, "error": {"code": "invalid_json_line", "message": "No JSON."}}, True),
        ({}, False),
        ({"response": None}, False),
        ({"response": None, "error": {"code": "made_up", "message": "?"}}, False),
        ({"error": {"code": "batch_expired", "message": "Too late."}}, False),
    ],
)
def test_error_schema_wants_either_an_answer_or_a_reason(changes: dict[str, Any], *, is_valid: bool) -> None:
    assert validator("error_line").is_valid(answered(**changes)) == is_valid
