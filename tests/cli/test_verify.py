"""The command `verify`: an independent ledger has to notice every way in which files can be wrong."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import batchrunner.cli.verify as verify_module
from tests.cli.calling import Called, call, chat_line


def success(custom_id: object) -> bytes:
    line = {"id": "batch_req_0", "custom_id": custom_id, "response": {"status_code": 200, "body": {}}, "error": None}
    return json.dumps(line).encode() + b"\n"


def failure(custom_id: object, code: str = "request_timeout") -> bytes:
    error = {"code": code, "message": "it failed"}
    return json.dumps({"id": "batch_req_0", "custom_id": custom_id, "response": None, "error": error}).encode() + b"\n"


def refusal(custom_id: object, status: int = 400) -> bytes:
    response = {"status_code": status, "request_id": None, "body": {"error": {"message": "no"}}}
    line = {"id": "batch_req_0", "custom_id": custom_id, "response": response, "error": None}
    return json.dumps(line).encode() + b"\n"


@dataclass(slots=True)
class Files:
    """The three files of a run in a folder of their own."""

    folder: Path

    @property
    def paths(self) -> tuple[Path, Path, Path]:
        return self.folder / "in.jsonl", self.folder / "out.jsonl", self.folder / "out.errors.jsonl"

    def write(self, lines: list[bytes], output: list[bytes], errors: list[bytes] | None = None) -> Files:
        for path, content in zip(self.paths, (lines, output, errors), strict=True):
            if content is not None:
                path.write_bytes(b"".join(content))
        return self

    def verify(self) -> Called:
        return call("verify", *self.paths[:2], "--json")


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


ABC = [chat_line(name) for name in "abc"]


def test_each_line_once_is_clean(files):
    files.write(ABC, [success("a"), success("c")], [failure("b")])

    called = files.verify()

    assert called.code == 0
    assert called.json["is_clean"] is True
    assert [called.json[role]["lines"] for role in ("input", "output", "errors")] == [3, 2, 1]
    assert called.json["is_in_input_order"] is True
    assert called.json["manifest"] is None


def test_an_absent_errors_file_is_an_empty_one(files):
    called = files.write(ABC, [success(name) for name in "abc"]).verify()

    assert called.code == 0
    assert called.json["errors"] == {"path": None, "lines": 0, "sha256": hashlib.sha256().hexdigest()}


def test_an_errors_file_that_is_named_must_be_there(files):
    files.write(ABC, [success(name) for name in "abc"])

    called = call("verify", *files.paths)

    assert called.code == 1
    assert "out.errors.jsonl is not there" in called.err


def test_any_other_order_is_told_and_no_fault(files):
    called = files.write(ABC, [success(name) for name in "cab"]).verify()

    assert called.code == 0
    assert called.json["is_in_input_order"] is False


BROKEN = {
    "missing": ([success("a"), success("b")], [], {"missing": 1}),
    "twice in the output": ([success("a"), success("a"), success("b"), success("c")], [], {"doubled": 1}),
    "in both files": ([success("a"), success("b"), success("c")], [failure("b")], {"doubled": 1}),
    "twice in the errors": ([success("a"), success("b")], [failure("c"), failure("c")], {"doubled": 1}),
    "foreign": ([success(name) for name in "abcx"], [failure("y")], {"foreign": 2}),
    "swapped for another": ([success(name) for name in "abx"], [], {"missing": 1, "foreign": 1}),
    "torn": ([success("a"), success("b"), success("c")[:-30]], [], {"broken": 1, "missing": 1}),
    "no result line": ([success("a"), success("b"), success("c"), b"[1]\n"], [], {"broken": 1}),
    "a number as id": ([success("a"), success("b"), success("c"), success(7)], [], {"broken": 1}),
    "no id in the output": ([success("a"), success("b"), success("c"), success(None)], [], {"broken": 1}),
    "a failure in the output": ([success("a"), success("b"), refusal("c")], [], {"misfiled": 1}),
    "a success in the errors": ([success("a"), success("b")], [success("c")], {"misfiled": 1}),
    "a refusal of nothing": ([success("a"), success("b"), success("c")], [failure(None)], {"foreign": 1}),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_ledger_exits_1_and_says_how(files, case):
    output, errors, counts = BROKEN[case]

    called = files.write(ABC, output, errors).verify()

    found = {kind: called.json[kind]["count"] for kind in ("missing", "doubled", "foreign", "broken", "misfiled")}
    assert called.code == 1
    assert called.json["is_clean"] is False
    assert {kind: count for kind, count in found.items() if count} == counts


def test_findings_name_id_file_and_line(files):
    torn = success("c")[:-30]
    files.write(ABC, [success("a"), success("a"), torn], [failure("x")])

    called = call("verify", *files.paths[:2])

    assert called.code == 1
    assert 'missing: input:2: "b"' in called.out
    assert 'doubled: input:1, output:1, output:2: "a"' in called.out
    assert 'foreign: errors:1: "x"' in called.out
    assert "broken: output:3: not JSON, perhaps torn" in called.out
    assert called.out.splitlines()[-1].startswith("BROKEN: 3 input lines, 3 output + 1 error lines")


def test_refused_lines_without_an_id_match_by_number(files):
    lines = [chat_line("a"), b"{not json\n", b'{"custom_id": 7}\n', b'{"custom_id": ""}\n', b"\n", b"  \r\n"]
    files.write(lines, [success("a")], [failure(None, "invalid_json_line")] * 3)

    called = files.verify()

    assert called.code == 0
    assert called.json["matched_by_count"] == 3


def test_a_refused_line_that_is_not_accounted_for_is_missing(files):
    files.write([chat_line("a"), b"{not json\n", b"neither\n"], [success("a")], [failure(None, "invalid_json_line")])

    called = files.verify()

    assert called.code == 1
    assert called.json["missing"]["count"] == 1


def test_a_repeated_id_has_one_success_and_an_error_for_each_repeat(files):
    lines = [chat_line("a"), chat_line("a"), chat_line("a")]

    good = files.write(lines, [success("a")], [failure("a", "duplicate_custom_id")] * 2).verify()
    twice = files.write(lines, [success("a")] * 2, [failure("a", "duplicate_custom_id")]).verify()

    assert good.code == 0
    assert twice.code == 1
    assert twice.json["doubled"]["count"] == 1


def test_byte_order_mark_line_breaks_and_a_missing_last_newline_are_fine(files):
    lines = [b"\xef\xbb\xbf" + chat_line("a"), chat_line("b").rstrip() + b"\r\n", chat_line("c").rstrip()]

    called = files.write(lines, [success(name) for name in "abc"]).verify()

    assert called.code == 0
    assert called.json["input"]["lines"] == 3


def test_equal_hashes_are_told_apart_by_the_real_ids(files, monkeypatch):
    monkeypatch.setattr(verify_module, "hash", lambda _: 1, raising=False)

    good = files.write(ABC, [success("a"), success("c")], [failure("b")]).verify()
    bad = files.write(ABC, [success("a"), success("c")], [failure("c")]).verify()

    assert good.code == 0
    assert bad.code == 1
    assert (bad.json["missing"]["count"], bad.json["doubled"]["count"]) == (1, 1)


def test_beyond_what_is_confirmed_and_shown_the_counts_hold(files, monkeypatch):
    monkeypatch.setattr(verify_module, "_CONFIRMED_MAX", 50)
    lines = [chat_line(f"id-{number}") for number in range(400)]
    output = [success(f"id-{number}") for number in range(100)] + [success(f"other-{number}") for number in range(70)]

    called = files.write(lines, output).verify()

    assert called.code == 1
    assert called.json["missing"]["count"] == 300
    assert called.json["foreign"]["count"] == 70
    assert len(called.json["missing"]["first"]) <= 20


def test_packed_files_are_read_too(files):
    files.write(ABC, [success(name) for name in "abc"])
    packed = files.folder / "in.jsonl.gz"
    packed.write_bytes(gzip.compress(files.paths[0].read_bytes()))

    assert call("verify", packed, files.paths[1]).code == 0


def manifest(files: Files, **changes: str) -> None:
    given_path, output, errors = files.paths
    folder = files.folder / "out.jsonl.run"
    folder.mkdir()
    roles = {"input": given_path, "output": output, "errors": errors}
    entries: dict[str, object] = {
        role: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()} if path.exists() else None
        for role, path in roles.items()
    }
    entries |= {role: {"sha256": digest} for role, digest in changes.items()}
    (folder / "manifest.json").write_text(json.dumps(entries))


def test_files_are_held_against_the_manifest(files):
    files.write(ABC, [success(name) for name in "abc"])
    manifest(files)

    called = files.verify()

    assert called.code == 0
    assert called.json["manifest"] == {"input": True, "output": True, "errors": True}


@pytest.mark.parametrize("role", ["input", "output"])
def test_a_file_that_is_not_the_manifests_is_broken(files, role):
    files.write(ABC, [success(name) for name in "abc"])
    manifest(files, **{role: "0" * 64})

    called = call("verify", *files.paths[:2])

    assert called.code == 1
    assert f"manifest: the {role} file is not the one that the run wrote down" in called.out


def test_a_changed_answer_is_noticed_by_its_checksum_alone(files):
    files.write(ABC, [success(name) for name in "abc"])
    manifest(files)
    files.paths[1].write_bytes(files.paths[1].read_bytes().replace(b'"body": {}', b'"body": 12'))

    called = files.verify()

    assert called.code == 1
    assert called.json["manifest"] == {"input": True, "output": False, "errors": True}


names = st.lists(st.sampled_from("abcd"), max_size=7)


@settings(max_examples=150, deadline=None)
@given(
    asked=names,
    succeeded=names,
    failed=st.lists(st.sampled_from([*"abcd", None]), max_size=5),
    unnamed=st.integers(0, 2),
)
def test_the_verdict_is_that_of_plain_counting(asked, succeeded, failed, unnamed):
    with TemporaryDirectory() as folder:
        files = Files(Path(folder))
        lines = [chat_line(name) for name in asked] + [b"[]\n"] * unnamed
        files.write(lines, [success(name) for name in succeeded], [failure(name) for name in failed])
        called = files.verify()

    expected, outputs = Counter(asked), Counter(succeeded)
    found = outputs + Counter(name for name in failed if name is not None)
    missing = sum((expected - found).values())
    is_clean = not (found - expected) and max(outputs.values(), default=0) < 2
    is_clean = is_clean and missing + unnamed == failed.count(None)
    assert called.json["is_clean"] is is_clean
    assert called.code == (0 if is_clean else 1)
