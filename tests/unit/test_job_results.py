"""The media of a job's answer: where they are, in which order, and what is no medium at all."""

from __future__ import annotations

import base64
from datetime import UTC, datetime

import orjson
import pytest

from batchrunner.job_results import (
    EncodedMedium,
    JobResult,
    LinkedMedium,
    StoredMedium,
    begins_with_medium,
    content_type_of,
    media_of,
)
from batchrunner.jobs import InferenceType, Job
from batchrunner.lifecycle import JobStatus
from batchrunner.models import BatchId, RecordKind
from batchrunner.results import ResultLines
from batchrunner.simulate.media import mp3, mp4, png, wav

MOMENT = datetime(2026, 1, 1, tzinfo=UTC)
JOB = Job(
    url="/v1/images/generations",
    inference_type=InferenceType.IMAGE,
    model="m",
    number=42,
    batch_id=BatchId("7"),
    line_number=3,
    is_single=True,
    status=JobStatus.PROCESSED,
    created_at=MOMENT,
    queued_at=MOMENT,
    ended_at=MOMENT,
    retry_count=0,
)
SUM = "0123456789abcdef01234567"
PICTURE = png("x", b"abc")
ENCODED = base64.b64encode(PICTURE).decode()


def answered(body: object, kind: RecordKind = RecordKind.SUCCEEDED) -> JobResult:
    line = ResultLines(JOB.batch_id).answered(JOB.line_number, "job-1", 200, None, orjson.dumps(body))
    return JobResult(kind=kind, line=line)


@pytest.mark.parametrize(
    ("body", "media"),
    [
        ({"data": [{"url": "https://h.example/1.png"}]}, (LinkedMedium(url="https://h.example/1.png"),)),
        (
            {"created": 1, "data": [{"b64_json": ENCODED}, {"url": "http://h.example/2.png", "b64_json": None}]},
            (EncodedMedium(encoded=ENCODED), LinkedMedium(url="http://h.example/2.png")),
        ),
        ({"data": [{"url": f"data:image/png;base64,{ENCODED}"}]}, (EncodedMedium(encoded=ENCODED),)),
        ({"audio": {"data": ENCODED, "format": "wav"}}, (EncodedMedium(encoded=ENCODED),)),
        ({"audio": {"url": "https://h.example/a.mp3"}}, (LinkedMedium(url="https://h.example/a.mp3"),)),
        ({"video": {"url": "https://h.example/v.mp4"}}, (LinkedMedium(url="https://h.example/v.mp4"),)),
        ({"object": "video", "url": "https://h.example/v.mp4"}, (LinkedMedium(url="https://h.example/v.mp4"),)),
    ],
)
def test_media_are_found_in_the_order_in_which_they_stand(body, media):
    assert media_of(JOB, answered(body)) == media


@pytest.mark.parametrize(
    "body",
    [
        {"choices": [{"message": {"content": "hello"}}]},
        {"data": [{"embedding": [1.0]}]},
        {"data": {"url": "https://h.example/1.png"}},
        {"data": [1, 2]},
        {"audio": "loud"},
        [1, 2],
        "text",
        None,
        {"data": [{"url": "javascript:alert(1)"}, {"url": "ftp://h.example/x"}, {"url": "file:///etc/passwd"}]},
        {"data": [{"url": "data:text/html,<b>"}, {"url": "https://h.example/a\nb"}, {"url": ""}]},
        {"data": [{"url": "https://h.example/" + "x" * 10_000}]},
        {"data": [{"b64_json": "not base64"}]},
        {"data": [{"b64_json": base64.b64encode(b"an excuse instead of a picture").decode()}]},
        {"data": [{"b64_json": ENCODED[:-1]}]},
        {"data": [{"url": "/files/1.png"}]},
        {"data": [{"url": "data:image/png;base64,PGh0bWw+"}]},
        {"audio": {"data": base64.b64encode(b"\0" * 64).decode()}},
        {"video": {"b64_json": "\u00e9aaa"}},
        {"data": [{"b64_json": ENCODED}, {"b64_json": "none"}]},
    ],
)
def test_what_is_no_medium_is_left_out(body):
    assert media_of(JOB, answered(body)) == ()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"data": [{"b64_json": ENCODED}]}, True),
        ({"data": [{"url": f"data:image/png;base64,{ENCODED}"}]}, True),
        ({"audio": {"data": base64.b64encode(mp3("x")).decode()}}, True),
        ({"data": [{"b64_json": base64.b64encode(b"an excuse instead of a picture").decode() * 9}]}, False),
        ({"data": [{"b64_json": "none"}]}, False),
        ({"data": [{"text": ENCODED}]}, False),
    ],
)
def test_the_beginning_of_a_long_answer_tells_whether_it_holds_a_medium(body, expected):
    assert begins_with_medium(answered(body).line[:400]) is expected


def test_an_answer_that_failed_has_no_media():
    body = {"data": [{"url": "https://h.example/1.png"}]}

    assert media_of(JOB, answered(body, RecordKind.FAILED)) == ()


def test_a_kept_answer_is_one_medium_with_its_own_type():
    body = {"object": "asset", "id": f"asset_3_{SUM}", "content_type": "audio/mpeg", "bytes": 5, "url": "assets/x"}

    assert media_of(JOB, answered(body)) == (
        StoredMedium(blob=f"assets/7/asset_3_{SUM}.mp3", content_type="audio/mpeg"),
    )


@pytest.mark.parametrize("content_type", ["text/html", "image/svg+xml", "application/pdf", "audio/mpeg; x=1"])
def test_a_type_that_may_do_harm_is_told_to_nobody(content_type):
    body = {"object": "asset", "id": f"asset_3_{SUM}", "content_type": content_type}

    (medium,) = media_of(JOB, answered(body))

    assert medium == StoredMedium(blob=f"assets/7/asset_3_{SUM}.bin", content_type="application/octet-stream")


@pytest.mark.parametrize(
    "asset_id", [f"asset_4_{SUM}", f"../8/asset_3_{SUM}", "asset_3_x", f"asset_3_{SUM}/../../x", "", None]
)
def test_an_upstream_cannot_name_what_is_not_of_its_line(asset_id):
    body = {"object": "asset", "id": asset_id, "content_type": "audio/mpeg"}

    assert media_of(JOB, answered(body)) == ()


def test_base64_is_read_with_line_breaks_and_refused_when_it_is_none():
    assert EncodedMedium(encoded="aGVs\nbG8=\n").decoded() == b"hello"
    with pytest.raises(ValueError):
        EncodedMedium(encoded="aGVsb").decoded()
    with pytest.raises(ValueError):
        EncodedMedium(encoded="\u00e9aaa").decoded()


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (PICTURE, "image/png"),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "image/jpeg"),
        (b"GIF89a\1\0", "image/gif"),
        (b"RIFF\1\0\0\0WEBPVP8 ", "image/webp"),
        (wav("x", 3), "audio/wav"),
        (mp3("x"), "audio/mpeg"),
        (mp3("x")[-96:], "audio/mpeg"),
        (b"\xff\xf1\x50\x80", "audio/aac"),
        (b"fLaC\0", "audio/flac"),
        (b"OggS\0", "audio/ogg"),
        (mp4("x"), "video/mp4"),
        (b"\x1a\x45\xdf\xa3\x01", "video/webm"),
        (b"<!doctype html><script>", "application/octet-stream"),
        (b"<svg xmlns=", "application/octet-stream"),
        (b"", "application/octet-stream"),
        (b"\xff", "application/octet-stream"),
    ],
)
def test_the_type_follows_from_the_first_bytes(content, content_type):
    assert content_type_of(content) == content_type
