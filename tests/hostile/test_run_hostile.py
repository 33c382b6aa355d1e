"""A run against a peer that misbehaves in every named way: each line ends as the one line that its case stands for."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import orjson
import pytest

from batchrunner.models import OnUnknown
from batchrunner.results import ResultLines
from batchrunner.settings import Settings
from tests.hostile.cases import Then, Words
from tests.hostile.run_cases import (
    ASSET_BYTES_MAX,
    CASES,
    HTML,
    IDLE_S,
    MEDIA,
    ONCE,
    REPLY_BYTES_MAX,
    STALLS,
    TOTAL_S,
    TRIES,
    Failed,
    LineCase,
    line,
    ok,
    refused,
)
from tests.hostile.running import BATCH, Ended, OutagePeer, run_cases

pytestmark = pytest.mark.slow

QUICK = Settings(
    max_tries=TRIES,
    retry_after_max_s=0.02,
    reply_bytes_max=REPLY_BYTES_MAX,
    asset_bytes_max=ASSET_BYTES_MAX,
    journal_tick_s=0.01,
)


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One run of all cases."""
    return run_cases(tmp_path_factory.mktemp("hostile"), CASES, QUICK)


def expected_line(case: LineCase, cases: list[LineCase]) -> bytes:
    """The whole line, with the id that follows from batch and line number."""
    line_id = ResultLines(BATCH).id(cases.index(case) + 1)
    return b'{"id":"%b","custom_id":%b,%b' % (line_id.encode(), orjson.dumps(case.custom_id), case.expected.rest)


def found_line(case: LineCase, ended: Ended) -> bytes:
    """The line with the case's custom_id, the peer's address and the elapsed time made the same for every run."""
    lines = ended.output if case.expected.is_output else ended.errors
    mine = [raw for raw in lines if orjson.dumps(case.custom_id) in raw[: 64 + len(case.custom_id) * 4]]
    assert len(mine) == 1, f"{case.name} is not once in its file"
    if not isinstance(case.expected, Failed):
        return mine[0]
    return re.sub(rb"after \d+\.\d s", b"after <t>", mine[0].replace(ended.peer.encode(), b"<peer>"))


def check(case: LineCase, cases: list[LineCase], ended: Ended) -> None:
    found = found_line(case, ended)

    assert found == expected_line(case, cases)
    assert b"sk-secret" not in found
    if case.sends is not None:
        assert ended.sends[case.name] == case.sends


def named(cases: list[LineCase]) -> list:
    return [pytest.param(case, id=case.name) for case in cases]


@pytest.mark.parametrize("case", named(CASES))
def test_line_ends_as_its_case_says(case: LineCase, ended: Ended) -> None:
    check(case, CASES, ended)


@pytest.fixture(scope="module")
def stalled(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One run of all that falls silent."""
    settings = replace(QUICK, request_timeout_s=TOTAL_S, idle_timeout_s=IDLE_S)
    return run_cases(tmp_path_factory.mktemp("stalls"), STALLS, settings)


@pytest.mark.parametrize("case", named(STALLS))
def test_line_whose_answer_does_not_come_ends_in_time(case: LineCase, stalled: Ended) -> None:
    check(case, STALLS, stalled)


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One run of lines that may be sent only once."""
    return run_cases(tmp_path_factory.mktemp("once"), ONCE, QUICK, on_unknown=OnUnknown.FAIL)


@pytest.mark.parametrize("case", named(ONCE))
def test_line_that_may_be_sent_once_ends_as_its_case_says(case: LineCase, once: Ended) -> None:
    check(case, ONCE, once)


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """One run of answers that are files."""
    return run_cases(tmp_path_factory.mktemp("media"), MEDIA, QUICK)


@pytest.mark.parametrize("case", named(MEDIA))
def test_answer_that_is_a_file_is_kept_beside_the_output(case: LineCase, media: Ended) -> None:
    check(case, MEDIA, media)


def test_every_asset_is_whole_and_in_a_line(media: Ended) -> None:
    bodies = [orjson.loads(raw)["response"]["body"] for raw in media.output]
    named_assets = {each["url"].removeprefix("assets/"): each for each in bodies if each.get("object") == "asset"}

    assert named_assets.keys() == media.assets.keys()
    for name, content in media.assets.items():
        assert named_assets[name]["bytes"] == len(content)
        assert named_assets[name]["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(Words(b"", then=Then.RESET), id="reset"),
        pytest.param(Words(refused("502 Bad Gateway", HTML)), id="bad gateway"),
    ],
)
def test_outage_behind_a_gateway_fails_not_even_the_last_line(words: Words, tmp_path: Path) -> None:
    good = Words(ok(Connection="close"), then=Then.HANG_UP)
    cases = [line(f"line {number}", good) for number in range(6)]
    peer = OutagePeer(cases, answers=5, refusals=4, words=words)

    outlived = run_cases(tmp_path, cases, replace(QUICK, max_tries=1), peer=peer)

    assert outlived.errors == []
    assert len(outlived.output) == 6


def test_every_line_is_in_one_file_once_in_input_order(ended: Ended) -> None:
    wanted = [case.custom_id for case in CASES]
    output = [orjson.loads(raw)["custom_id"] for raw in ended.output]
    errors = [orjson.loads(raw)["custom_id"] for raw in ended.errors]

    assert sorted(output + errors) == sorted(wanted)
    assert output == [each for each in wanted if each in output]
    assert errors == [each for each in wanted if each in errors]


def test_there_are_enough_cases_and_no_name_twice() -> None:
    names = [case.name for case in CASES]

    assert len(set(names)) == len(names)
    assert len({case.custom_id for case in CASES}) == len(names)
    assert len(names) >= 40
