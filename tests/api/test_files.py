"""Files over the wire: what the official SDKs send, and what they must get."""

from __future__ import annotations

import hashlib

import aiohttp.web
import pytest

from tests.api.serving import FORM_HEADERS, LINE, Served, form


async def test_uploaded_file_is_the_object_of_the_original(api: Served) -> None:
    reply = await api.upload(LINE * 3, prefix="/openai/v1", filename="in.jsonl")

    assert reply.status == 200
    assert reply.headers["Content-Type"] == "application/json"
    file = reply.json
    assert list(file) == [
        "id",
        "object",
        "bytes",
        "created_at",
        "expires_at",
        "filename",
        "purpose",
        "status",
        "status_details",
    ]
    assert file | {"id": "", "created_at": 0, "expires_at": 0} == {
        "id": "",
        "object": "file",
        "bytes": 3 * len(LINE),
        "created_at": 0,
        "expires_at": 0,
        "filename": "in.jsonl",
        "purpose": "batch",
        "status": "processed",
        "status_details": None,
    }
    assert file["id"].startswith("file-")
    assert file["expires_at"] - file["created_at"] == 30 * 86400


@pytest.mark.parametrize("name", ["in.txt", "upload", "jsonl"])
async def test_a_batch_file_of_another_name_is_taken_with_a_warning_and_by_strict_refused(
    api: Served, name: str
) -> None:
    taken = await api.upload(filename=name)
    other = await api.upload(filename=name, purpose="evals")
    strict = await api.upload(filename=name, prefix="/openai/v1")

    assert (taken.json["status"], taken.json["status_details"]) == ("processed", "The name does not end in .jsonl.")
    assert other.json["status_details"] is None
    assert strict.status == 400
    assert strict.json["error"]["message"] == "Invalid file format for Batch API. Must be .jsonl"
    assert (await api.upload(filename="IN.JSONL", prefix="/openai/v1")).status == 200


async def test_fields_may_come_after_the_file_chunked_without_a_length(api: Served) -> None:
    """As openai-node sends it."""
    raw = form(fields={"purpose": "batch"}, content=LINE * 2000, is_file_first=True)

    async def pieces():
        for start in range(0, len(raw), 1000):
            yield raw[start : start + 1000]

    reply = await api.call("POST", "/v1/files", body=pieces(), headers=FORM_HEADERS)

    assert reply.status == 200
    assert (reply.json["bytes"], reply.json["line_count"]) == (2000 * len(LINE), 2000)
    assert reply.json["sha256"] == hashlib.sha256(LINE * 2000).hexdigest()


async def test_what_was_uploaded_comes_back_byte_by_byte(api: Served) -> None:
    content = b"\xef\xbb\xbf" + LINE * 5000 + b"\r\n" + LINE.rstrip(b"\n")
    file = (await api.upload(content)).json

    reply = await api.call("GET", f"/v1/files/{file['id']}/content", headers={"Accept": "application/binary"})

    assert reply.status == 200
    assert reply.body == content
    assert reply.headers["Content-Type"] == "application/octet-stream"
    assert reply.headers["Content-Length"] == str(len(content))
    assert file["line_count"] == 5001


@pytest.mark.parametrize(
    ("asked", "expected", "content_range"),
    [
        ("bytes=0-4", b"01234", "bytes 0-4/36"),
        ("bytes=30-", b"uvwxyz", "bytes 30-35/36"),
        ("bytes=-3", b"xyz", "bytes 33-35/36"),
        ("bytes=-99", None, "bytes 0-35/36"),
        ("bytes=35-400", b"z", "bytes 35-35/36"),
    ],
)
async def test_a_range_is_given(api: Served, asked: str, expected: bytes | None, content_range: str) -> None:
    content = b"0123456789abcdefghijklmnopqrstuvwxyz"
    file = (await api.upload(content, purpose="fine-tune")).json

    reply = await api.call("GET", f"/v1/files/{file['id']}/content", headers={"Range": asked})

    assert reply.status == 206
    assert reply.body == (expected if expected is not None else content)
    assert reply.headers["Content-Range"] == content_range


@pytest.mark.parametrize("asked", ["bytes=0-1,4-5", "lines=1-2", "bytes=-", "bytes=5-2", "bytes=x-"])
async def test_what_is_no_single_range_gives_all(api: Served, asked: str) -> None:
    file = (await api.upload(b"0123456789", purpose="fine-tune")).json

    reply = await api.call("GET", f"/v1/files/{file['id']}/content", headers={"Range": asked})

    assert (reply.status, reply.body) == (200, b"0123456789")


async def test_an_unchanged_file_is_not_sent_again(api: Served) -> None:
    file = (await api.upload()).json
    path = f"/v1/files/{file['id']}/content"
    etag = (await api.call("HEAD", path)).headers["ETag"]

    same = await api.call("GET", path, headers={"If-None-Match": f'"other", {etag}'})
    ranged = await api.call("GET", path, headers={"Range": "bytes=1-2", "If-Range": etag})
    changed = await api.call("GET", path, headers={"Range": "bytes=1-2", "If-Range": '"other"'})

    assert (same.status, same.body) == (304, b"")
    assert (ranged.status, ranged.body) == (206, LINE[1:3])
    assert (changed.status, changed.body) == (200, LINE)


async def test_head_has_the_headers_of_get_and_no_body(api: Served) -> None:
    file = (await api.upload()).json

    for path in (f"/v1/files/{file['id']}", f"/v1/files/{file['id']}/content"):
        got = await api.call("GET", path)
        head = await api.call("HEAD", path)

        assert (head.status, head.body) == (200, b"")
        assert head.headers["Content-Length"] == got.headers["Content-Length"] == str(len(got.body))
        assert head.headers["Content-Type"] == got.headers["Content-Type"]


async def test_walk_of_old_clients_ends_in_an_empty_page(api: Served) -> None:
    """openai-python 1.60 ignores has_more and stops at an empty page only."""
    ids = [(await api.upload()).json["id"] for _ in range(5)]

    seen, after = [], ""
    while True:
        page = (await api.call("GET", f"/v1/files?limit=2&order=asc&purpose=batch{after}")).json
        if not page["data"]:
            break
        seen += [each["id"] for each in page["data"]]
        after = f"&after={seen[-1]}"

    assert seen == ids
    nothing = {"first_id": None, "last_id": None, "has_more": False, "pagination_token": None}
    assert page == {"object": "list", "data": []} | nothing


async def test_newest_come_first_and_a_deleted_cursor_still_works(api: Served) -> None:
    ids = [(await api.upload()).json["id"] for _ in range(4)]

    first = (await api.call("GET", "/v1/files?limit=2")).json
    await api.call("DELETE", f"/v1/files/{first['last_id']}")
    second = (await api.call("GET", f"/v1/files?limit=2&after={first['last_id']}")).json

    assert [each["id"] for each in first["data"]] == [ids[3], ids[2]]
    assert first["has_more"] is True
    assert [each["id"] for each in second["data"]] == [ids[1], ids[0]]
    assert second["has_more"] is False


async def test_list_filters_by_purpose(api: Served) -> None:
    await api.upload()
    other = (await api.upload(b"x", purpose="evals")).json["id"]

    page = (await api.call("GET", "/v1/files?purpose=evals")).json

    assert [each["id"] for each in page["data"]] == [other]


async def test_deleted_file_is_gone_for_every_verb(api: Served) -> None:
    """The Python SDK sends a content type without a body here."""
    file_id = (await api.upload()).json["id"]

    reply = await api.call("DELETE", f"/v1/files/{file_id}", headers={"Content-Type": "application/json"})

    assert (reply.status, reply.json) == (200, {"id": file_id, "object": "file", "deleted": True})
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("GET", "/validation")):
        assert (await api.call(method, f"/v1/files/{file_id}{path}")).status == 404


async def test_expiry_counts_from_creation(api: Served) -> None:
    fields = {"expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}

    file = (await api.upload(LINE, **fields)).json
    endless = (await api.upload(b"x", purpose="user_data")).json

    assert file["expires_at"] == file["created_at"] + 3600
    assert endless["expires_at"] is None


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("né %22q%22.jsonl", 'né "q".jsonl'),
        ("../../etc/passwd", "passwd"),
        ("C:\\\\temp\\\\a.jsonl", "a.jsonl"),
        ("a%0D%0ASet-Cookie: x=y", "aSet-Cookie: x=y"),
        ("", "upload"),
    ],
)
async def test_a_file_name_is_only_shown(api: Served, sent: str, kept: str) -> None:
    file = (await api.upload(filename=sent)).json

    reply = await api.call("GET", f"/v1/files/{file['id']}/content")

    assert file["filename"] == kept
    disposition = reply.headers["Content-Disposition"]
    assert disposition.startswith("attachment; filename=")
    assert disposition.isascii()
    assert disposition.count('"') == 2


async def test_slow_caller_has_to_take_little_at_a_time(api: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    content = LINE * 10_000
    file = (await api.upload(content)).json
    handed: list[int] = []
    real = aiohttp.web.StreamResponse.write

    async def write(response: aiohttp.web.StreamResponse, piece: bytes) -> None:
        handed.append(len(piece))
        await real(response, piece)

    monkeypatch.setattr(aiohttp.web.StreamResponse, "write", write)
    got = await api.call("GET", f"/v1/files/{file['id']}/content")

    assert got.body == content
    assert max(handed) <= 128 * 1024
    assert sum(handed) == len(content)


async def test_file_whose_bytes_are_missing_is_no_fault_of_the_caller(api: Served) -> None:
    file = (await api.upload(LINE)).json
    (blob,) = api.parts.blobs.list("files/")
    api.parts.blobs.delete(blob)

    replies = [await api.call("GET", f"/v1/files/{file['id']}/{what}") for what in ("validation", "content")]
    await api.call("DELETE", f"/v1/files/{file['id']}")
    deleted = await api.call("GET", f"/v1/files/{file['id']}/validation")

    assert [reply.status for reply in replies] == [503, 503]
    assert not any(blob.encode() in reply.body for reply in replies)
    assert deleted.status == 404


async def test_validation_lists_all_problems_and_is_kept(api: Served) -> None:
    content = LINE + b"no json\n" + LINE + b'{"custom_id":"b"}\n'
    file = (await api.upload(content)).json

    first = await api.call("GET", f"/v1/files/{file['id']}/validation")
    second = await api.call("GET", f"/v1/files/{file['id']}/validation")

    assert first.status == 200
    assert first.json["is_valid"] is False
    assert first.json["file_id"] == file["id"]
    assert (first.json["line_count"], first.json["problem_count"]) == (4, 3)
    assert [(each["line"], each["code"]) for each in first.json["problems"]] == [
        (2, "invalid_json_line"),
        (3, "duplicate_custom_id"),
        (4, "missing_required_parameter"),
    ]
    assert second.body == first.body
    assert len(list(api.parts.blobs.list("validations/"))) == 1


async def test_validation_of_a_sound_file_says_so(api: Served) -> None:
    file = (await api.upload()).json

    reply = await api.call("GET", f"/v1/files/{file['id']}/validation")

    assert reply.json == {
        "object": "file.validation",
        "file_id": file["id"],
        "is_valid": True,
        "line_count": 1,
        "problem_count": 0,
        "problems": [],
    }


async def test_a_refused_upload_leaves_no_bytes_that_stay(api: Served) -> None:
    await api.upload(b"no json\n")
    await api.upload(purpose="wrong")

    blobs = list(api.parts.blobs.list("files/"))
    freeable = api.parts.store.freeable_blobs(limit=10)

    assert set(blobs) <= set(freeable)
