"""Failed lines found again in the input: by code, by id, but never a refused one."""

from __future__ import annotations

import json

import pytest

from batchrunner.blobs.local import LocalBlobs
from batchrunner.choosing import failed_ids, lines_of, write_chosen
from batchrunner.grouping import SERVER, FailureGroups

SOURCE = b'\xef\xbb\xbf{"custom_id":"a"}\n\n{"custom_id":"b"}\nno json\n{"custom_id":"a"}\r\n{"custom_id":"c"}'


def error_line(custom_id, code=None, status=None):
    error = {"code": code, "message": "m"} if code else None
    response = {"status_code": status, "body": {}} if status else None
    return json.dumps({"id": "r", "custom_id": custom_id, "response": response, "error": error}).encode() + b"\n"


ERRORS = [
    error_line("a", "batch_expired"),
    error_line("b", status=429),
    error_line("c", "duplicate_custom_id"),
    error_line(None, "invalid_json_line"),
]


@pytest.mark.parametrize(
    ("codes", "ids", "wanted"),
    [
        (None, None, {"a", "b"}),
        ({"429"}, None, {"b"}),
        ({"batch_expired", "500"}, None, {"a"}),
        (None, {"a", "c"}, {"a"}),
        ({"429"}, {"a"}, set()),
        ({"duplicate_custom_id"}, None, set()),
    ],
)
def test_failed_lines_are_chosen_by_code_and_id_but_refused_ones_never(codes, ids, wanted):
    assert failed_ids(ERRORS, codes=codes, custom_ids=ids) == wanted


def test_lines_are_chosen_by_the_code_under_which_they_are_grouped():
    def answered(custom_id, word):
        body = {"error": {"message": f"no {custom_id}", "type": "x", "param": None, "code": word}}
        line = {"id": "r", "custom_id": custom_id, "response": {"status_code": 400, "body": body}, "error": None}
        return json.dumps(line).encode() + b"\n"

    lines = [answered("a", "too_long"), answered("b", "no_such_voice"), *ERRORS]
    groups = FailureGroups(SERVER)
    for line in lines:
        groups.add(line)

    by_group = {group.code: failed_ids(lines, codes={group.code}) for group in groups.groups()}

    assert by_group["400 too_long"] == {"a"}
    assert by_group["400 no_such_voice"] == {"b"}
    assert by_group["429"] == {"b"}
    assert by_group["batch_expired"] == {"a"}
    assert failed_ids(lines, codes={"400"}) == {"a", "b"}


def chosen(tmp_path, wanted, *, refused=(), among=None, chunk=7, line_bytes_max=100):
    blobs = LocalBlobs(tmp_path)
    pieces = [SOURCE[start : start + chunk] for start in range(0, len(SOURCE), chunk)]
    count = write_chosen(blobs, "chosen/1", pieces, wanted, refused=refused, among=among, line_bytes_max=line_bytes_max)
    if not count:
        assert not blobs.exists("chosen/1")
        return []
    raw = blobs.read("chosen/1", 0, 1000)
    return [int.from_bytes(raw[place : place + 8], "little") for place in range(0, len(raw), 8)]


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_physical_line_numbers_are_written_however_the_input_is_cut(tmp_path, chunk):
    assert chosen(tmp_path, {"a", "c"}, chunk=chunk) == [1, 5, 6]


def test_refused_lines_and_lines_of_others_are_left_out(tmp_path):
    assert chosen(tmp_path / "1", {"a", "c"}, refused={5}) == [1, 6]
    assert chosen(tmp_path / "2", {"a", "c"}, among={5}) == [5]


def test_nothing_chosen_leaves_no_blob(tmp_path):
    assert chosen(tmp_path, {"z"}) == []


def test_lines_are_whole_however_they_come():
    assert list(lines_of([b"a\nb", b"", b"b\n", b"c"])) == [b"a\n", b"bb\n", b"c"]
