"""openai-python's own tests of files, uploads and batches, run against a real server of ours."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

import batchrunner
from batchrunner.errors import NotFound
from batchrunner.models import LOCAL_TENANT, BatchId, FileId
from tests.cli.calling import batch_server
from tests.sdk.official_plugin import BATCH, FILE, FOLDER, UPLOAD, Rows, refusals
from tests.sdk.packages import official_suite

SUITES = ("test_files.py", "test_uploads.py", "uploads/test_parts.py", "test_batches.py")
# An upstream where nobody is: without workers nothing is sent.
NOWHERE = "http://127.0.0.1:9/v1"
PRODUCT = Path(batchrunner.__file__).parent
# Their client for aiohttp has no mock.
SKIP = "aiohttp client is not compatible with respx2_mock"
CONTENT_WAYS = ("method", "raw_response", "streaming_response")
# A product that knew an id by heart would compare with it, or make one of it.
ID_TYPES = {"FileId", "BatchId", "UploadId", "PartId"}

pytestmark = [pytest.mark.slow, pytest.mark.real]


@dataclass(frozen=True, slots=True)
class Report:
    """What pytest said of each test, by file; an empty text is a test that passed."""

    outcomes: dict[str, dict[str, str]]
    talk: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("official") / "served"


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[str]:
    # Workers would bring the rows to their end before the tests come to them.
    with batch_server(folder, NOWHERE, "--workers", "0") as base_url:
        yield base_url


@pytest.fixture(scope="module")
def report(server: str, folder: Path) -> Report:
    source, written = official_suite(), folder.parent / "report.xml"
    command = [sys.executable, "-m", "pytest", "-p", "official_plugin", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["-q", "--tb=short", f"--junitxml={written}", "-o", "junit_family=xunit1"]
    command += [f"tests/api_resources/{name}" for name in SUITES]
    environment = os.environ | {
        "TEST_API_BASE_URL": server,
        "PYTHONPATH": str(Path(__file__).parent),
        FOLDER: str(folder),
    }
    ran = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert written.exists(), ran.stdout + ran.stderr
    outcomes: dict[str, dict[str, str]] = {name: {} for name in SUITES}
    for case in ET.parse(written).iter("testcase"):
        name = str(case.get("file")).removeprefix("tests/api_resources/")
        trouble = "".join(f"{each.tag}: {each.get('message')}\n{each.text}" for each in case)
        outcomes[name][f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"] = trouble
    return Report(outcomes, ran.stdout[-4000:])


@pytest.mark.parametrize("suite", SUITES)
def test_official_tests_pass_but_those_that_a_server_must_refuse(report: Report, suite: str) -> None:
    outcomes = report.outcomes[suite]

    troubles = {test: end for test, end in outcomes.items() if end and SKIP not in end}

    assert not troubles, "\n".join(f"{test}\n{end}" for test, end in troubles.items())
    assert len(outcomes) >= 20, report.talk


def test_list_of_refusals_names_only_tests_that_ran(report: Report) -> None:
    ran = {
        f"tests/api_resources/{file}::{test.split('[')[0]}" for file, tests in report.outcomes.items() for test in tests
    }

    assert set(refusals()) <= ran


def test_suite_skips_nothing_but_what_it_cannot_mock_itself(report: Report) -> None:
    skipped = {
        f"{file}::{test}" for file, tests in report.outcomes.items() for test, end in tests.items() if SKIP in end
    }

    assert skipped == {f"test_files.py::TestAsyncFiles::test_{way}_content[aiohttp]" for way in CONTENT_WAYS}


def test_rows_of_the_suite_are_there_only_when_a_test_lays_them(tmp_path: Path) -> None:
    rows = Rows(tmp_path)
    scope = rows.store.scope(LOCAL_TENANT)
    try:
        for look in (lambda: scope.file(FileId(FILE)), lambda: scope.batch(BatchId(BATCH))):
            with pytest.raises(NotFound):
                look()
        rows.lay()
        rows.lay()

        assert scope.file(FileId(FILE)).purpose == "batch"
        assert scope.batch(BatchId(BATCH)).status == "validating"
    finally:
        rows.close()


def test_product_knows_none_of_the_ids_that_the_tests_name() -> None:
    """Some of them are names of columns and parameters too, so it is where they stand that tells."""
    for path in sorted(PRODUCT.rglob("*.py")):
        text = path.read_text()
        assert UPLOAD not in text, path
        for node in ast.walk(ast.parse(text)):
            assert not set(_told_apart(node)) & {FILE, BATCH, "input_file_id"}, f"{path}:{getattr(node, 'lineno', 0)}"


def _told_apart(node: ast.AST) -> Iterator[object]:
    """Give the constants that a piece of code compares something with, or makes an id of."""
    match node:
        case ast.Compare():
            operands = [node.left, *node.comparators]
        case ast.MatchValue():
            operands = [node.value]
        case ast.Call(func=ast.Name(id=name)) if name in ID_TYPES:
            operands = node.args
        case _:
            return
    for operand in operands:
        for each in operand.elts if isinstance(operand, ast.Tuple | ast.List | ast.Set) else [operand]:
            if isinstance(each, ast.Constant):
                yield each.value
