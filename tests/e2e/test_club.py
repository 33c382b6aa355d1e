"""inference.club's batches and jobs on a server as users have it: whoever was told a number gets the answer."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import orjson
import pytest

from batchrunner.simulate import expected_reply
from tests.e2e.following import Place
from tests.e2e.harness import chat_line
from tests.e2e.served import Server, Site, site
from tests.invariants import Checked, check_run

FLAGS = ("--workers", "1", "--concurrency", "64")
REPEATS_PER_KILL = 64 + 256
CHAT = "/v1/chat/completions"
ACTIVE = ("QUEUED", "PROCESSING")

pytestmark = pytest.mark.slow


def body_of(number: int, **extra: object) -> dict[str, Any]:
    """Give the body of a request with a prompt of its own."""
    return dict(json.loads(chat_line(number, **extra))["body"])


async def ask(place: Place, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    """Ask until an answer comes: the server may be gone for a while."""
    while True:
        async with (
            place.visit() as server,
            server.session.request(method, server.root + path, json=body, headers=headers) as answer,
        ):
            return answer.status, await answer.json()


async def ended_job(place: Place, job_id: str) -> dict[str, Any]:
    """Look at a job until it is over; each look is a whole request and paces the next."""
    while True:
        status, job = await ask(place, "GET", f"/v1/jobs/{job_id}")
        assert status == 200, job
        if job["status"] not in ACTIVE:
            return dict(job)


def assert_own_answer(job: dict[str, Any], body: dict[str, Any]) -> None:
    assert job["status"] == "PROCESSED", job
    said = job["result"]["choices"][0]["message"]["content"]
    # The client has written it so, and nothing has changed a byte.
    assert expected_reply(json.dumps(body).encode(), CHAT) in said, "it has the answer of another prompt"


async def done_batch(server: Server, batch_id: str) -> dict[str, Any]:
    """Wait until no job of a batch is active, by its events."""
    await server.ended_batch(batch_id)
    return dict(await server.get(f"/batches/{batch_id}"))


async def check_batch(here: Site, server: Server, batch_id: str, bodies: list[dict[str, Any]]) -> Checked:
    """Prove the ledger of a batch of jobs by its results, as a client of OpenAI's gets them."""
    lines = [
        {"custom_id": f"requests[{number}]", "method": "POST", "url": CHAT, "body": body}
        for number, body in enumerate(bodies)
    ]
    async with server.session.get(f"{server.base_url}/batches/{batch_id}/results") as answer:
        assert answer.headers["X-Incomplete"] == "false"
        found = (await answer.read()).splitlines(keepends=True)
    order = {line["custom_id"]: number for number, line in enumerate(lines)}
    found.sort(key=lambda line: order[orjson.loads(line)["custom_id"]])
    paths = [here.folder / name for name in ("asked.jsonl", "got.jsonl", "got.errors.jsonl")]
    paths[0].write_bytes(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
    for path, is_good in zip(paths[1:], (True, False), strict=True):
        path.write_bytes(b"".join(line for line in found if _is_good(line) is is_good))
    return check_run(*paths)


def _is_good(line: bytes) -> bool:
    response = orjson.loads(line)["response"]
    return response is not None and 200 <= response["status_code"] < 300


async def requests(here: Site, count: int) -> None:
    """Wait until so many have come to the upstream."""
    await here.simulator.wait_until(lambda stats: stats.total >= count)


async def test_a_batch_of_jobs_runs_to_its_end_and_what_failed_runs_again(tmp_path: Path) -> None:
    bodies = [body_of(number, **({"simulate": ["400"]} if number % 8 == 0 else {})) for number in range(256)]
    bodies[13]["simulate"] = "always:400"
    async with site(tmp_path, latency="5ms") as here:
        server = await here.serve(*FLAGS)
        asked = {"label": "all", "requests": [{"endpoint": CHAT, "body": body} for body in bodies]}
        status, made = await ask(Place(server), "POST", "/v1/batches", asked)
        assert (status, made["total"]) == (202, 256)
        first = await done_batch(server, made["id"])
        failed = [each["id"] for each in first["jobs"] if each["status"] == "FAILED"]
        for job_id in failed:
            status, job = await ask(Place(server), "POST", f"/v1/jobs/{job_id}/retry")
            assert (status, job["id"]) == (202, job_id)
        batch = await done_batch(server, made["id"])
        checked = await check_batch(here, server, batch["id"], bodies)
        for number in (0, 255):
            assert_own_answer(await ended_job(Place(server), batch["jobs"][number]["id"]), bodies[number])

        assert (first["status"], first["processed"], first["failed"]) == ("DONE", 256 - 33, 33)
        assert len(failed) == 33
        assert (batch["status"], batch["processed"], batch["failed"]) == ("DONE", 255, 1)
        assert [each["id"] for each in batch["jobs"]] == [each["id"] for each in first["jobs"]]
        assert checked.failed == ["requests[13]"]
        assert here.simulator.stats().total == 256 + 33
        assert (await server.stop()).code == 0


async def test_jobs_that_come_alone_outlive_kills_and_each_key_makes_one(tmp_path: Path) -> None:
    count, kills, callers = 240, 2, 16
    bodies = [body_of(number) for number in range(count)]
    numbers: dict[int, str] = {}
    waiting = list(range(count))[::-1]
    async with site(tmp_path, latency="30ms") as here:
        place = Place(await here.serve(*FLAGS))
        port = place.server.base_url.rpartition(":")[2].removesuffix("/v1")

        async def submit_all() -> None:
            while waiting:
                number = waiting.pop()
                key = {"Idempotency-Key": f"key-{number}"}
                status, job = await ask(place, "POST", CHAT, bodies[number] | {"async": True}, **key)
                assert status == 202, job
                numbers[number] = job["id"]

        async with asyncio.timeout(120), asyncio.TaskGroup() as group:
            for _ in range(callers):
                group.create_task(submit_all())
            for kill in range(1, kills + 1):
                await requests(here, kill * count // (kills + 2))
                await place.server.kill_all()
                await place.move(await here.serve(*FLAGS, "--port", port))
        async with asyncio.timeout(120):
            for number, job_id in numbers.items():
                assert_own_answer(await ended_job(place, job_id), bodies[number])
        _, summary = await ask(place, "GET", "/api/inference/queue/summary")

        assert len(set(numbers.values())) == count
        assert (summary["jobs"]["PROCESSED"], sum(summary["jobs"].values())) == (count, count)
        assert (summary["active"], summary["worker_stalled"]) == (0, False)
        assert here.simulator.stats().repeats <= REPEATS_PER_KILL * kills
        assert (await place.server.stop()).code == 0


@pytest.mark.parametrize("point", [pytest.param("job.stored", marks=pytest.mark.long), "job.joined"])
async def test_an_api_that_dies_while_jobs_are_made_loses_and_doubles_none(tmp_path: Path, point: str) -> None:
    bodies = [body_of(number) for number in range(20)]
    batch = {"requests": [{"endpoint": CHAT, "body": body} for body in bodies]}
    # What died before it was made is not under way for long, but for longer than a test should wait.
    key = {"Idempotency-Key": "k"} if point == "job.joined" else {}
    summary: dict[str, Any] = {}
    async with site(tmp_path, latency="1ms") as here:
        port = "0"
        for path, body, headers in (
            ("/v1/batches", batch, key),
            (CHAT, bodies[0] | {"async": True}, {"Idempotency-Key": "j"}),
        ):
            armed = await here.serve(*FLAGS, "--port", port, BATCHRUNNER_CRASH_AT=f"{point}:1")
            place = Place(armed)
            port = armed.base_url.rpartition(":")[2].removesuffix("/v1")
            asking = asyncio.create_task(ask(place, "POST", path, body, **headers))
            await armed.said("ended with code -9")
            await armed.kill_all()
            await place.move(await here.serve(*FLAGS, "--port", port))
            status, made = await asking
            assert status == 202, made
            if path == CHAT:
                assert_own_answer(await ended_job(place, made["id"]), bodies[0])
            else:
                await done_batch(place.server, made["id"])
                await check_batch(here, place.server, made["id"], bodies)
            _, summary = await ask(place, "GET", "/api/inference/queue/summary")
            assert (await place.server.stop()).code == 0

    assert summary["jobs"]["PROCESSED"] == sum(summary["jobs"].values()) == 21
    assert summary["runs"] == {"PENDING": 0, "PROCESSING": 0, "DONE": 1}


async def test_a_worker_of_the_server_is_heard_of(tmp_path: Path) -> None:
    async with site(tmp_path, latency="1ms") as here:
        server = await here.serve("--workers", "1", upstream=False)
        place = Place(server)
        status, _ = await ask(place, "POST", CHAT, body_of(1) | {"async": True})

        async def summary() -> dict[str, Any]:
            return dict((await ask(place, "GET", "/api/inference/queue/summary"))[1])

        found = await server.when(summary, lambda found: found["last_dispatch"] is not None)
        assert (await server.stop()).code == 0

    assert (status, found["active"], found["worker_stalled"]) == (202, 1, False)
