"""What must hold of every run that has ended, however often it was killed: the last word of every end-to-end test."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
from jsonschema import Draft202012Validator

from batchrunner.members import renamed
from batchrunner.simulate import SimulatorStats, expected_reply

_SCHEMAS = Path(__file__).parents[1] / "schemas"


class _InputLine(msgspec.Struct):
    custom_id: str | None = None
    url: str = "/v1/chat/completions"
    body: msgspec.Raw = msgspec.Raw(b"")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """What a checked run came to: the custom_ids of its two files, each in file order, and the codes of its errors."""

    succeeded: list[str]
    failed: list[str | None]
    codes: Counter[str]


@cache
def schema(name: str) -> Draft202012Validator:
    """Give the validator of one published schema."""
    return Draft202012Validator(json.loads((_SCHEMAS / f"{name}.json").read_text()))


def check_shape(name: str, found: object) -> None:
    """Hold one object against its published schema."""
    problems = [f"{'/'.join(map(str, each.path))}: {each.message}" for each in schema(name).iter_errors(found)]

    assert problems == [], f"{name}: {problems}"


def check_run(
    input_path: Path,
    output_path: Path,
    errors_path: Path,
    *,
    sim_stats: SimulatorStats | None = None,
    repeats_max: int = 0,
    is_in_input_order: bool = True,
    aliases: Mapping[str, str] | None = None,
) -> Checked:
    """Prove the ledger of a finished run.

    Every request of the (plain) input is in exactly one of the two files, once, in input order; every line fits its
    schema; every answer is the one to its own prompt. With the simulator's counters: no more than `repeats_max` sends
    were needless. The manifest, when the run folder is beside OUTPUT, says the same. `aliases` are model names that
    were sent as others.
    """
    wanted = list(_input_lines(input_path))
    by_id = {line.custom_id: line for line in wanted}
    output, errors = list(_lines(output_path)), list(_lines(errors_path))
    for raw in output:
        check_shape("output_line", json.loads(raw))
    for raw in errors:
        check_shape("error_line", json.loads(raw))
    outputs, failures = [json.loads(raw) for raw in output], [json.loads(raw) for raw in errors]
    ids = Counter(each["custom_id"] for each in [*outputs, *failures])

    assert len(output) + len(errors) == len(wanted)
    assert ids == Counter(line.custom_id for line in wanted)
    assert len({each["id"] for each in [*outputs, *failures]}) == len(wanted)
    for raw, each in zip(output, outputs, strict=True):
        line = by_id[each["custom_id"]]
        marker = expected_reply(renamed(bytes(line.body), aliases or {}), line.url).encode()
        assert marker in raw, f"{each['custom_id']} has the answer of another prompt"
    if is_in_input_order:
        _check_order(wanted, outputs)
    _check_order(wanted, failures)
    if sim_stats is not None:
        assert sim_stats.repeats <= repeats_max, f"{sim_stats.repeats} needless sends, at most {repeats_max}"
    _check_manifest(output_path, len(output), len(errors))
    return Checked(
        succeeded=[each["custom_id"] for each in outputs],
        failed=[each["custom_id"] for each in failures],
        codes=Counter(_code_of(each) for each in failures),
    )


def _code_of(failure: dict[str, Any]) -> str:
    error, response = failure["error"], failure["response"]
    return str(error["code"] if error else response["status_code"])


def check_summary(summary: dict[str, Any]) -> None:
    """Hold the object that --json printed against its schema and its own sums."""
    check_shape("summary", summary)
    counts = dict(summary["counts"])

    assert counts.pop("total") == sum(counts.values())


def _check_manifest(output_path: Path, succeeded: int, failed: int) -> None:
    path = output_path.with_name(f"{output_path.name}.run") / "manifest.json"
    if not path.exists():
        return
    manifest = json.loads(path.read_bytes())
    check_shape("manifest", manifest)

    assert manifest["counts"]["total"] == succeeded + failed
    assert manifest["counts"]["succeeded"] == succeeded
    assert (manifest["output"] or {}).get("lines", 0) == succeeded
    assert (manifest["errors"] or {}).get("lines", 0) == failed


def _check_order(wanted: list[_InputLine], found: list[dict[str, Any]]) -> None:
    """The found custom_ids are those of the input with some left out."""
    rest = iter(line.custom_id for line in wanted)
    for each in found:
        assert each["custom_id"] in rest, f"{each['custom_id']} is out of order"


def _lines(path: Path) -> Iterator[bytes]:
    if path.exists():
        content = path.read_bytes()
        assert content.endswith(b"\n") or not content, f"{path} ends in the middle of a line"
        yield from content.split(b"\n")[:-1]


def _input_lines(path: Path) -> Iterator[_InputLine]:
    for raw in path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if raw.strip():
            try:
                yield msgspec.json.decode(raw, type=_InputLine)
            except msgspec.DecodeError:
                yield _InputLine()
