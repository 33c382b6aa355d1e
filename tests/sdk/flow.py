"""What users of openai-python do with a batch server, with the newest client and an old one alike: it runs in a process
of its own, with whichever `openai` is on its path, and reports how each story ended.
"""

from __future__ import annotations

import asyncio
import hashlib
import http.client
import importlib
import itertools
import json
import os
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import openai
import pytest

TERMINAL = {"completed", "failed", "expired", "cancelled"}
WAIT_S = 60.0
ENDPOINT: Final = "/v1/chat/completions"
IS_NEW = hasattr(openai, "DefaultHttpx2Client")
BOUNDARY = "----flow"
# A walk that never ends is what an old client does with a page that repeats itself.
WALK_MAX = 1000


@dataclass(frozen=True)
class Ground:
    """A server, a key of it, and an input of some lines of which the last one fails."""

    client: openai.OpenAI
    base_url: str
    key: str
    path: Path
    folder: Path

    def watching(self, *, on_response: Callable[[Any], None], max_retries: int = 2) -> openai.OpenAI:
        """Give a client that shows each of its responses."""
        client = getattr(openai, "DefaultHttpx2Client" if IS_NEW else "DefaultHttpxClient")
        seeing = client(event_hooks={"response": [on_response]})
        return openai.OpenAI(base_url=self.base_url, api_key=self.key, http_client=seeing, max_retries=max_retries)

    def batch_of(self, file_id: str, **fields: Any) -> Any:
        return self.client.batches.create(input_file_id=file_id, endpoint=ENDPOINT, completion_window="24h", **fields)

    def upload(self) -> Any:
        with self.path.open("rb") as stream:
            return self.client.files.create(file=stream, purpose="batch")

    def ended(self, batch_id: str) -> Any:
        """Wait for the end of a batch, which is the end of its events."""
        address = urlsplit(self.base_url)
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=WAIT_S)
        try:
            connection.request(
                "GET", f"{address.path}/batches/{batch_id}/events", headers={"Authorization": f"Bearer {self.key}"}
            )
            connection.getresponse().read()
        finally:
            connection.close()
        batch = self.client.batches.retrieve(batch_id)
        assert batch.status in TERMINAL, batch
        return batch


Story = Callable[[Ground], None]
STORIES: dict[str, Story] = {}


def story(told: Story) -> Story:
    STORIES[told.__name__] = told
    return told


def ids_of(jsonl: str | bytes) -> list[str]:
    return [json.loads(line)["custom_id"] for line in jsonl.splitlines()]


@story
def whole_flow(ground: Ground) -> None:
    wanted = ids_of(ground.path.read_bytes())
    file = ground.client.files.wait_for_processing(ground.upload().id)
    assert (file.status, file.purpose, file.filename) == ("processed", "batch", ground.path.name)
    assert file.bytes == ground.path.stat().st_size

    made = ground.batch_of(file.id, metadata={"team": "search"})
    assert (made.status, made.input_file_id, made.metadata) == ("validating", file.id, {"team": "search"})
    batch = ground.ended(made.id)

    assert batch.status == "completed"
    assert (batch.request_counts.total, batch.request_counts.failed) == (len(wanted), 1)
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at <= batch.expires_at
    output, errors = (ground.client.files.content(each).text for each in (batch.output_file_id, batch.error_file_id))
    assert ids_of(output) + ids_of(errors) == wanted
    first = json.loads(output.splitlines()[0])
    assert first["response"]["status_code"] == 200
    assert first["response"]["body"]["choices"][0]["message"]["content"]
    assert json.loads(errors)["response"]["status_code"] == 400
    assert ground.client.files.retrieve(batch.output_file_id).purpose == "batch_output"
    assert ground.client.files.delete(file.id).deleted is True


@story
def pages_end(ground: Ground) -> None:
    files = [ground.client.files.create(file=b"a few bytes", purpose="user_data").id for _ in range(5)]
    listing = ground.client.files.list(purpose="user_data", limit=2, order="asc")
    assert [each.id for each in itertools.islice(listing, WALK_MAX)] == files
    ids: list[str] = []
    after: dict[str, str] = {}
    for _ in range(WALK_MAX):
        raw = ground.client.files.with_raw_response.list(purpose="user_data", limit=2, extra_query=after)
        page = json.loads(raw.content)
        ids += [each["id"] for each in page["data"]]
        if not page["has_more"]:
            break
        after = {"after": page["last_id"]}
    assert ids == files[::-1]

    batches = [ground.batch_of("file-that-nobody-sent").id for _ in range(3)]
    found = [each.id for each in itertools.islice(ground.client.batches.list(limit=2), WALK_MAX)]
    assert found[:3] == batches[::-1]
    assert len(found) == len(set(found))
    for each in files:
        ground.client.files.delete(each)


@story
def final_conflict_costs_one_request(ground: Ground) -> None:
    batch = ground.ended(ground.batch_of(ground.upload().id).id)
    statuses: list[int] = []
    client = ground.watching(on_response=lambda answer: statuses.append(answer.status_code))
    with pytest.raises(openai.ConflictError) as refusal:
        client.batches.cancel(batch.id)
    assert statuses == [409]
    assert "Cannot cancel a batch with status 'completed'." in refusal.value.message


@story
def running_conflict_is_tried_again(ground: Ground) -> None:
    """Two uploads under one Idempotency-Key, the first of which is slow: the second waits, and both are one file."""
    statuses: list[int] = []
    for number in range(20):
        statuses = conflict(ground, f"slow-{openai.__version__}-{number}")
        # Whichever came first holds the key; sooner or later that is the slow one.
        if 409 in statuses:
            break
    assert set(statuses) == {200, 409}
    assert statuses[-1] == 200


def conflict(ground: Ground, key: str) -> list[int]:
    """Upload one file twice at once; gives what the SDK was answered."""
    statuses: list[int] = []
    is_refused, half_sent = threading.Event(), threading.Event()

    def see(answer: Any) -> None:
        statuses.append(answer.status_code)
        if answer.status_code == 409:
            is_refused.set()

    client = ground.watching(on_response=see, max_retries=5)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(slow_upload, ground, key, is_refused, half_sent)
        try:
            assert half_sent.wait(WAIT_S)
            with ground.path.open("rb") as stream:
                same, headers = ("same.jsonl", stream), {"Idempotency-Key": key}
                file = client.files.create(file=same, purpose="batch", extra_headers=headers)
        finally:
            is_refused.set()
        assert slow.result() == file.id
    return statuses


def slow_upload(ground: Ground, key: str, may_end: threading.Event, half_sent: threading.Event) -> str:
    """Upload the input with a pause in the middle, without any SDK; sent again while another one holds the key."""
    address = urlsplit(ground.base_url)
    content = ground.path.read_bytes()
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n--{BOUNDARY}\r\n'
    head += 'Content-Disposition: form-data; name="file"; filename="same.jsonl"\r\n\r\n'

    def body() -> Iterator[bytes]:
        yield head.encode() + content[: len(content) // 2]
        half_sent.set()
        may_end.wait(WAIT_S)
        yield content[len(content) // 2 :] + f"\r\n--{BOUNDARY}--\r\n".encode()

    headers = {
        "Authorization": f"Bearer {ground.key}",
        "Content-Type": f"multipart/form-data; boundary={BOUNDARY}",
        "Idempotency-Key": key,
        "Transfer-Encoding": "chunked",
    }
    for _ in range(20):
        connection = http.client.HTTPConnection(str(address.hostname), address.port, timeout=WAIT_S)
        try:
            connection.request("POST", f"{address.path}/files", body(), headers, encode_chunked=True)
            answer = connection.getresponse()
            said = json.loads(answer.read())
        finally:
            connection.close()
        if answer.status != 409:
            assert answer.status == 200, said
            return str(said["id"])
    raise AssertionError("the key stays taken")


@story
def lost_answer_makes_one_batch(ground: Ground) -> None:
    library = importlib.import_module("httpx2" if IS_NEW else "httpx")
    seen: list[tuple[str | None, str]] = []

    def lose_the_first(answer: Any) -> None:
        answer.read()
        seen.append((answer.request.headers.get("idempotency-key"), answer.json()["id"]))
        if len(seen) == 1:
            raise library.ReadError("the cable was pulled", request=answer.request)

    file_id = ground.upload().id
    client = ground.watching(on_response=lose_the_first)
    made = client.batches.create(
        input_file_id=file_id,
        endpoint=ENDPOINT,
        completion_window="24h",
        extra_headers={"Idempotency-Key": f"order-{openai.__version__}"},
    )

    assert seen == [(f"order-{openai.__version__}", made.id)] * 2
    newest = [each.id for each in ground.client.batches.list(limit=100).data if each.input_file_id == file_id]
    assert newest == [made.id]


@story
def downloads_stream(ground: Ground) -> None:
    batch = ground.ended(ground.batch_of(ground.upload().id).id)
    whole = ground.client.files.content(batch.output_file_id).read()

    with ground.client.files.with_streaming_response.content(batch.output_file_id) as answer:
        pieces = list(answer.iter_bytes(1000))
        assert answer.headers["content-length"] == str(len(whole))
    target = ground.folder / "written.jsonl"
    ground.client.files.content(batch.output_file_id).write_to_file(target)
    with ground.client.files.with_streaming_response.content(batch.output_file_id) as answer:
        lines = list(answer.iter_lines())

    assert b"".join(pieces) == whole == target.read_bytes()
    assert {len(each) for each in pieces[:-1]} == {1000}
    assert ids_of("\n".join(lines)) == ids_of(whole)


@story
def upload_comes_in_parts(ground: Ground) -> None:
    content = ground.path.read_bytes()
    md5 = hashlib.md5(content, usedforsecurity=False).hexdigest()
    done = ground.client.uploads.upload_file_chunked(
        file=ground.path, mime_type="application/jsonl", purpose="batch", part_size=len(content) // 3, md5=md5
    )
    assert (done.status, done.bytes) == ("completed", len(content))
    assert done.file is not None
    assert ground.client.files.content(done.file.id).read() == content
    assert ground.ended(ground.batch_of(done.file.id).id).status == "completed"

    fields: dict[str, Any] = {"filename": "b.txt", "mime_type": "text/plain", "purpose": "user_data"}
    upload = ground.client.uploads.create(bytes=6, **fields)
    second, first = (ground.client.uploads.parts.create(upload.id, data=each).id for each in (b"def", b"abc"))
    with pytest.raises(openai.BadRequestError) as refusal:
        ground.client.uploads.complete(upload.id, part_ids=[first])
    assert refusal.value.param == "bytes"
    file = ground.client.uploads.complete(upload.id, part_ids=[first, second]).file
    assert file is not None
    assert file.bytes == 6
    assert ground.client.uploads.cancel(ground.client.uploads.create(bytes=6, **fields).id).status == "cancelled"


@story
def errors_have_their_classes(ground: Ground) -> None:
    client = ground.client
    file_id = ground.upload().id
    stranger = openai.OpenAI(base_url=ground.base_url, api_key="brk_of_nobody")
    create: dict[str, Any] = {"input_file_id": file_id, "endpoint": ENDPOINT, "completion_window": "24h"}
    cases: list[tuple[Callable[[], object], type[openai.APIStatusError], str | None, str | None, str]] = [
        (lambda: client.files.retrieve("file-1"), openai.NotFoundError, "id", None, "No such File object: file-1"),
        (lambda: client.files.content("file-1"), openai.NotFoundError, "id", None, "No such File object: file-1"),
        (
            lambda: client.batches.retrieve("batch_1"),
            openai.NotFoundError,
            None,
            None,
            "No batch found with id 'batch_1'.",
        ),
        (
            lambda: client.batches.create(**{**create, "endpoint": "/v1/nothing"}),
            openai.BadRequestError,
            "endpoint",
            "invalid_value",
            "Invalid value: '/v1/nothing'.",
        ),
        (
            lambda: client.batches.create(**{**create, "metadata": {"tags": ["a"]}}),
            openai.BadRequestError,
            "metadata.tags",
            "invalid_type",
            "Invalid type for 'metadata.tags': expected a string, but got an array instead.",
        ),
        (
            lambda: client.files.create(file=b"no json", purpose="batch"),
            openai.BadRequestError,
            None,
            None,
            "Invalid file format for Batch API. Must be .jsonl",
        ),
        (
            lambda: client.files.list(limit=0),
            openai.BadRequestError,
            "limit",
            "integer_below_min_value",
            "Invalid 'limit'",
        ),
        (stranger.batches.list, openai.AuthenticationError, None, "invalid_api_key", "Incorrect API key"),
    ]
    for call, kind, param, code, words in cases:
        with pytest.raises(kind) as refusal:
            call()
        error = refusal.value
        assert (error.param, error.code, error.type) == (param, code, "invalid_request_error"), error
        assert words in error.message, error.message
        assert error.request_id
    assert client.files.retrieve(file_id)._request_id


@story
def refused_input_is_a_failed_batch(ground: Ground) -> None:
    content = ground.path.read_bytes().splitlines()[0]
    file = ground.client.files.create(file=("twice.jsonl", content + b"\n" + content + b"\n{"), purpose="batch")
    batch = ground.ended(ground.batch_of(file.id).id)
    assert batch.status == "failed"
    assert [(each.code, each.line) for each in batch.errors.data] == [
        ("duplicate_custom_id", 2),
        ("invalid_json_line", 3),
    ]
    missing = ground.ended(ground.batch_of("file-that-nobody-sent").id)
    assert (missing.status, missing.errors.data[0].param) == ("failed", "file_id")


@story
def azure_client(ground: Ground) -> None:
    root = ground.base_url.removesuffix("/v1")
    client = openai.AzureOpenAI(base_url=f"{root}/openai/v1", api_key=ground.key, api_version="2024-10-21")
    with ground.path.open("rb") as stream:
        file = client.files.create(file=stream, purpose="batch")
    batch = client.batches.create(input_file_id=file.id, endpoint=ENDPOINT, completion_window="24h")
    assert client.batches.retrieve(batch.id).id == batch.id
    assert ground.ended(batch.id).status == "completed"


@story
def async_client(ground: Ground) -> None:
    async def flow() -> None:
        async with openai.AsyncOpenAI(base_url=ground.base_url, api_key=ground.key) as client:
            files = await asyncio.gather(*(client.files.create(file=ground.path, purpose="batch") for _ in range(4)))
            await client.files.wait_for_processing(files[0].id)
            listed = Counter([each.id async for each in client.files.list(purpose="batch", limit=2)])
            assert all(listed[each.id] == 1 for each in files)
            batch = await client.batches.create(input_file_id=files[0].id, endpoint=ENDPOINT, completion_window="24h")
            batch = await client.batches.cancel(batch.id)
            assert batch.status in {"cancelling", "cancelled"}
            assert (await client.batches.cancel(batch.id)).id == batch.id
            batch = await asyncio.to_thread(ground.ended, batch.id)
            assert batch.status == "cancelled"

    asyncio.run(flow())


def tell(base_url: str, key: str, path: Path) -> dict[str, str]:
    """Tell all stories; an empty text is one that ended well."""
    ends = {}
    with tempfile.TemporaryDirectory() as folder:
        ground = Ground(openai.OpenAI(base_url=base_url, api_key=key), base_url, key, path, Path(folder))
        for name, told in STORIES.items():
            try:
                told(ground)
            except Exception:
                ends[name] = traceback.format_exc()
            else:
                ends[name] = ""
    return ends


if __name__ == "__main__":
    address, input_path = sys.argv[1:]
    print(
        json.dumps(
            {"version": openai.__version__, "ends": tell(address, os.environ["OPENAI_API_KEY"], Path(input_path))}
        )
    )
