"""Async jobs on a server as users have it: what was accepted runs to its end, whatever dies meanwhile."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from batchrunner.members import without_member
from batchrunner.simulate import expected_reply
from tests.e2e.following import Place
from tests.e2e.served import Server, Site, site

CHAT = "/v1/chat/completions"
FLAGS = ("--workers", "1", "--concurrency", "64")
REPEATS_PER_KILL = 64 + 256

pytestmark = pytest.mark.slow


def chat(number: int) -> bytes:
    body = {"model": "m", "async": True, "messages": [{"role": "user", "content": f"prompt {number}"}]}
    return json.dumps(body).encode()


@dataclass(slots=True)
class Sender:
    """Sends jobs, each until it is answered, and remembers what was accepted under which number."""

    place: Place
    has_keys: bool
    accepted: dict[str, bytes] = field(default_factory=dict)
    sent_count: int = 0

    async def send(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            await self._send(number)

    async def _send(self, number: int) -> None:
        headers = {"Content-Type": "application/json"}
        if self.has_keys:
            headers["Idempotency-Key"] = f"key-{number}"
        while True:
            async with self.place.visit() as server:
                self.sent_count += 1
                async with server.session.post(
                    server.base_url + "/chat/completions", data=chat(number), headers=headers
                ) as answer:
                    found = await answer.json()
                    assert answer.status == 202, found
                    self.accepted[found["id"]] = chat(number)
                    return


async def send_all(sender: Sender, jobs: int, *, clients: int) -> None:
    numbers = iter(range(jobs))
    await asyncio.gather(*(sender.send(numbers) for _ in range(clients)))


async def all_ended(server: Server) -> None:
    await server.when(lambda: server.get("/jobs?active=1&limit=1"), lambda found: not found["data"])


async def check_all(here: Site, server: Server, sender: Sender, *, jobs: int, kills: int) -> None:
    """Each job that was accepted has the answer to its own prompt; there are no others, but for unanswered sends."""
    await all_ended(server)
    for number, body in sender.accepted.items():
        job = await server.get(f"/jobs/{number}")
        assert job["status"] == "PROCESSED", job
        assert expected_reply(without_member(body, "async"), CHAT) in json.dumps(job["result"])
    # They are numbered from 1 without gaps: what is rolled back takes no number.
    made = int((await server.get("/jobs?limit=1"))["data"][0]["id"])
    assert len(sender.accepted) == jobs
    assert made == jobs if sender.has_keys else jobs <= made <= sender.sent_count
    stats = here.simulator.stats()
    assert stats.unique == jobs
    assert stats.repeats <= REPEATS_PER_KILL * kills + made - jobs


@pytest.mark.parametrize(
    ("point", "has_keys"),
    [
        ("job.stored", False),
        ("job.joined", True),
        pytest.param("job.stored", True, marks=pytest.mark.long),
        pytest.param("job.joined", False, marks=pytest.mark.long),
    ],
)
async def test_an_api_that_dies_while_jobs_come_loses_none_and_doubles_none(
    tmp_path: Path, point: str, has_keys: bool
) -> None:
    jobs = 60
    async with site(tmp_path, latency="1ms") as here:
        armed = await here.serve(*FLAGS, BATCHRUNNER_CRASH_AT=f"{point}:3")
        place = Place(armed)
        port = armed.base_url.rpartition(":")[2].removesuffix("/v1")
        sender = Sender(place, has_keys)
        sending = asyncio.create_task(send_all(sender, jobs, clients=4))
        await armed.said("the API process ended with code -9")
        await armed.kill_all()
        await place.move(await here.serve(*FLAGS, "--port", port))
        await sending

        await check_all(here, place.server, sender, jobs=jobs, kills=1)
        assert (await place.server.stop()).code == 0


async def test_jobs_accepted_between_kills_of_everything_run_to_their_ends(tmp_path: Path) -> None:
    jobs, kills = 400, 2
    async with site(tmp_path, latency="20ms") as here:
        place = Place(await here.serve(*FLAGS))
        port = place.server.base_url.rpartition(":")[2].removesuffix("/v1")
        sender = Sender(place, has_keys=True)
        sending = asyncio.create_task(send_all(sender, jobs, clients=8))
        for number in range(1, kills + 1):
            wanted = number * jobs // (kills + 2)
            await here.simulator.wait_until(lambda stats, wanted=wanted: stats.total >= wanted)  # type: ignore[misc]
            await place.server.kill_all()
            await place.move(await here.serve(*FLAGS, "--port", port))
        await sending

        await check_all(here, place.server, sender, jobs=jobs, kills=kills)
        assert (await place.server.stop()).code == 0


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("images/generations", {"prompt": "a lamp", "response_format": "b64_json", "n": 2}),
        ("audio/speech", {"model": "m", "input": "hello"}),
        ("music/generations", {"model": "m", "prompt": "a waltz", "response_format": "b64_json"}),
    ],
)
async def test_media_of_a_job_are_those_of_its_own_prompt(tmp_path: Path, path: str, body: dict[str, Any]) -> None:
    raw = json.dumps(body | {"async": True}).encode()
    async with site(tmp_path) as here:
        server = await here.serve(*FLAGS)
        async with server.session.post(f"{server.base_url}/{path}", data=raw) as answer:
            number = (await answer.json())["id"]
        job = await server.when(
            lambda: server.get(f"/jobs/{number}"), lambda found: found["status"] not in ("QUEUED", "PROCESSING")
        )
        async with server.session.get(job["result_url"]) as answer:
            content, content_type = await answer.read(), answer.content_type

        assert job["status"] == "PROCESSED", job
        assert content_type == ("image/png" if "images" in path else "audio/wav" if "music" in path else "audio/mpeg")
        assert expected_reply(without_member(raw, "async"), f"/v1/{path}").encode() in content
        assert (await server.stop()).code == 0
