"""Media of jobs over HTTP: who gets them, with which type, and what is none."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import pytest

from batchrunner.api import club_assets
from batchrunner.jobs import Job
from batchrunner.models import RecordKind, TenantId
from batchrunner.simulate.media import mp3, png
from tests.api.jobs import answer, jobs_made
from tests.api.serving import Served, serving

PICTURE = png("first", b"abc")
OTHER = png("second", b"xyz")


def b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


def path(job: Job, place: int = 0) -> str:
    return club_assets.asset_path(job.number, place)


async def test_each_medium_in_an_answer_has_a_number_of_its_own(api: Served):
    jobs = jobs_made(api, count=2)
    answer(
        api,
        jobs,
        [{"data": [{"b64_json": b64(PICTURE)}, {"b64_json": b64(OTHER)}]}, {"audio": {"data": b64(mp3("x"))}}],
    )

    first, second, third, sound = [
        await api.call("GET", each) for each in (path(jobs[0]), path(jobs[0], 1), path(jobs[0], 2), path(jobs[1]))
    ]

    assert path(jobs[0], 1) == f"/api/inference/assets/{jobs[0].number}-2/"
    assert (first.status, first.body, first.headers["Content-Type"]) == (200, PICTURE, "image/png")
    assert (second.status, second.body) == (200, OTHER)
    assert third.status == 404
    assert (sound.body, sound.headers["Content-Type"]) == (mp3("x"), "audio/mpeg")
    assert first.headers["X-Content-Type-Options"] == "nosniff"
    assert api.parts.held.size_bytes == 0


async def test_the_head_of_a_medium_tells_its_length_and_holds_nothing(api: Served):
    (job,) = jobs_made(api)
    answer(api, [job], [{"data": [{"b64_json": b64(PICTURE)}]}])

    head = await api.call("HEAD", path(job).rstrip("/"))

    assert (head.status, head.body, head.headers["Content-Length"]) == (200, b"", str(len(PICTURE)))
    assert api.parts.held.size_bytes == 0


async def test_a_kept_answer_comes_from_blobs_with_ranges_and_a_tag(api: Served):
    (job,) = jobs_made(api)
    sound = mp3("hello")
    asset_id = f"asset_{job.line_number}_{hashlib.sha256(sound).hexdigest()[:24]}"
    writer = api.parts.blobs.writer(f"assets/{job.batch_id}/{asset_id}.mp3")
    writer.write(sound)
    writer.commit()
    answer(api, [job], [{"object": "asset", "id": asset_id, "content_type": "audio/mpeg", "bytes": len(sound)}])

    whole = await api.call("GET", path(job))
    part = await api.call("GET", path(job), headers={"Range": "bytes=3-9"})
    again = await api.call("GET", path(job), headers={"If-None-Match": whole.headers["ETag"]})

    assert (whole.status, whole.body, whole.headers["Content-Type"]) == (200, sound, "audio/mpeg")
    assert (part.status, part.body) == (206, sound[3:10])
    assert again.status == 304


@pytest.mark.parametrize(
    "body",
    [
        {"data": [{"url": "https://h.example/1.png"}]},
        {"data": [{"b64_json": "not base64"}]},
        {"object": "asset", "id": "asset_1_0123456789abcdef01234567", "content_type": "audio/mpeg"},
        {"choices": []},
    ],
)
async def test_what_is_not_here_is_missing(api: Served, body):
    (job,) = jobs_made(api)
    answer(api, [job], [body])

    reply = await api.call("GET", path(job))

    assert (reply.status, reply.json["error"]["type"]) == (404, "not_found")
    assert api.parts.held.size_bytes == 0


@pytest.mark.parametrize(
    "given", ["not base64", "", b64(b"an excuse instead of a picture"), b64(PICTURE)[:-2], "/files/1.png"]
)
@pytest.mark.parametrize("padding", [0, 300_000])
async def test_what_is_no_medium_stays_in_the_result_of_a_job_that_is_done(api: Served, given: str, padding: int):
    (job,) = jobs_made(api)
    body = {"data": [{"b64_json": given, "more": "x" * padding}]}
    answer(api, [job], [body])

    shown = (await api.call("GET", f"/v1/jobs/{job.number}")).json
    listed = (await api.call("GET", "/v1/jobs")).json["data"][0]

    assert (shown["status"], shown["result"]) == ("PROCESSED", body)
    assert "result_url" not in shown
    assert "result_url" not in listed or (padding and given == b64(PICTURE)[:-2])


async def test_a_job_without_a_good_end_has_no_media(api: Served):
    (waiting,) = jobs_made(api)
    before = await api.call("GET", path(waiting))
    answer(api, [waiting], [{"data": [{"b64_json": b64(PICTURE)}]}], RecordKind.FAILED)
    (canceled,) = jobs_made(api)
    api.scope.cancel_job(canceled.number)
    answer(api, [canceled], [{"data": [{"b64_json": b64(PICTURE)}]}])

    after = [await api.call("GET", path(each)) for each in (waiting, canceled)]

    assert [each.status for each in (before, *after)] == [404, 404, 404]


@pytest.mark.parametrize(
    "asset_id", ["0", "01", "x", "1-0", "1-", "-1", "1-2-3", "9" * 19, "9" * 18, "%2e%2e", "1%2f2"]
)
async def test_an_id_that_means_nothing_is_missing(api: Served, asset_id):
    reply = await api.call("GET", f"/api/inference/assets/{asset_id}")

    assert reply.status == 404


async def test_another_tenant_sees_what_it_sees_of_missing_jobs(tmp_path: Path):
    async with serving(tmp_path, is_open=False) as api:
        mine, theirs = api.add_key("ana"), api.add_key("ben")
        (job,) = jobs_made(api, tenant=TenantId("ana"))
        answer(api, [job], [{"data": [{"b64_json": b64(PICTURE)}]}])

        own = await api.call("GET", path(job), secret=mine)
        other = await api.call("GET", path(job), secret=theirs)
        missing = await api.call("GET", "/api/inference/assets/999", secret=theirs)
        nobody = await api.call("GET", path(job))

    assert (own.status, own.body) == (200, PICTURE)
    assert other.status == missing.status == 404
    assert other.body == missing.body.replace(b"999", str(job.number).encode())
    assert nobody.status == 401


async def test_answers_that_do_not_fit_together_are_refused_for_now(api: Served):
    (job,) = jobs_made(api)
    answer(api, [job], [{"data": [{"b64_json": b64(PICTURE)}]}])
    api.parts.held.take(64 * 1024 * 1024)

    busy = await api.call("GET", path(job))
    api.parts.held.give_back(64 * 1024 * 1024)

    assert (busy.status, busy.headers["Retry-After"]) == (503, "1")
    assert (await api.call("GET", path(job))).body == PICTURE
