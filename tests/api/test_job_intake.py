"""Single jobs on their way into a real store: many at once, bad neighbours, limits, and a store that fails once."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import orjson
import pytest

from batchrunner.api.http import Answer, Call, Route, json_answer
from batchrunner.api.job_intake import submit
from batchrunner.api.routes import ROUTES
from batchrunner.blobs.local import LocalBlobs
from batchrunner.clock import SystemClock
from batchrunner.errors import DiskFull, StoreUnavailable
from batchrunner.holdings import KeyLimits, KeyScope, Replay
from batchrunner.housekeeping import clear
from batchrunner.jobs import InferenceType
from batchrunner.lifecycle import JobStatus
from batchrunner.models import BatchId, TenantId
from batchrunner.ports import TenantScope
from batchrunner.settings import Settings
from batchrunner.store.tenant_jobs import SqlTenantJobs
from tests.api.serving import Reply, Served, serving

CLIENTS = 64
URL = "/v1/chat/completions"


class Made(msgspec.Struct):
    number: int
    batch_id: BatchId
    line_number: int


async def take_job(call: Call) -> Answer:
    """Make a job of a chat body, as the route of a dialect does."""
    key = call.request.headers.get("Idempotency-Key")
    if key is not None:
        call.replay = Replay(route="jobs", key=key, fingerprint=None)
    job = await submit(call, URL, await call.body(), "m", InferenceType.LLM)
    return json_answer(Made(job.number, job.batch_id, job.line_number), status=202)


TABLE = (
    *ROUTES,
    Route(method="POST", path="/v1/test_jobs", handler=take_job, summary="Take a job", scope=KeyScope.WRITE),
)


def chat(prompt: str, **extra: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": prompt}], **extra}


async def post(api: Served, body: Any, **more: Any) -> Reply:
    return await api.call("POST", "/v1/test_jobs", json=body, **more)


def body_of(scope: TenantScope, api: Served, made: dict[str, Any]) -> Any:
    """Read the body that is to run for a job, as a worker finds it."""
    (shard,) = scope.shards_from(made["batch_id"], made["line_number"], limit=1)
    assert shard.source is not None
    content = api.parts.blobs.read(shard.source, shard.byte_start, shard.byte_end)
    lines = content.split(b"\n")
    assert len(lines) == shard.line_count + 1
    return orjson.loads(lines[made["line_number"] - shard.first_line])["body"]


async def test_each_of_many_at_once_gets_the_number_of_its_own_line(tmp_path: Path):
    async with serving(tmp_path, routes=TABLE) as api:

        async def client(number: int) -> list[tuple[str, dict[str, Any]]]:
            prompts = [f"client {number} turn {turn}" for turn in range(5)]
            return [(prompt, (await post(api, chat(prompt))).json) for prompt in prompts]

        found = [pair for each in await asyncio.gather(*map(client, range(CLIENTS))) for pair in each]

        assert len({made["number"] for _, made in found}) == CLIENTS * 5
        for prompt, made in found:
            assert body_of(api.scope, api, made) == chat(prompt)
            assert api.scope.job(made["number"]).line_number == made["line_number"]
        assert len({made["batch_id"] for _, made in found}) == 1
        shards = api.scope.shards_from(found[0][1]["batch_id"], 1, limit=1000)
        assert sum(each.line_count for each in shards) == CLIENTS * 5
        assert len(shards) < CLIENTS


async def test_bad_bodies_are_refused_alone(tmp_path: Path):
    bodies = [chat("good"), {"model": "m"}, chat("good"), {"messages": []}, chat("good", stream=True), chat("good")]
    async with serving(tmp_path, routes=TABLE) as api:
        replies = await asyncio.gather(*(post(api, each) for each in bodies))

        assert [each.status for each in replies] == [202, 400, 202, 400, 400, 202]
        assert replies[1].json["error"]["param"] == "body.messages"
        assert api.scope.job_counts()[JobStatus.QUEUED] == 3


async def test_a_long_body_is_taken_and_one_that_is_too_long_refused(tmp_path: Path):
    async with serving(tmp_path, routes=TABLE) as api:
        long = await post(api, chat("x" * 900_000))
        deep: Any = "x"
        for _ in range(200):
            deep = [deep]
        refused = await post(api, chat("y", extra=deep))

        assert (long.status, refused.status) == (202, 400)
        assert body_of(api.scope, api, long.json) == chat("x" * 900_000)


async def test_limits_of_a_key_let_in_what_fits_and_touch_nobody_else(tmp_path: Path):
    async with serving(tmp_path, is_open=False, routes=TABLE) as api:
        tight = api.add_key("ana", limits=KeyLimits(queued_lines_max=7))
        free = api.add_key("ben")

        replies = await asyncio.gather(
            *(post(api, chat(str(n)), secret=secret) for n in range(20) for secret in (tight, free))
        )

        statuses = [each.status for each in replies]
        assert sorted(statuses[::2]) == [202] * 7 + [429] * 13
        assert statuses[1::2] == [202] * 20
        assert api.parts.store.scope(TenantId("ana")).job_counts()[JobStatus.QUEUED] == 7


@pytest.mark.parametrize("trouble", [StoreUnavailable("the database is away"), DiskFull("no space")])
async def test_a_group_that_cannot_be_kept_is_refused_as_a_whole_and_the_next_is_not(tmp_path, monkeypatch, trouble):
    troubles = [trouble]
    store_jobs, open_writer = SqlTenantJobs.add_jobs, LocalBlobs.writer

    def stumbling_jobs(self, *args, **kwargs):
        if isinstance(trouble, StoreUnavailable) and troubles:
            raise troubles.pop()
        return store_jobs(self, *args, **kwargs)

    def stumbling_writer(self, name):
        writer = open_writer(self, name)
        if isinstance(trouble, DiskFull) and troubles:
            error = troubles.pop()

            def commit(_last_part=None):
                raise error

            monkeypatch.setattr(type(writer), "commit", lambda _self, _last=None: commit(), raising=True)
        return writer

    async with serving(tmp_path, routes=TABLE) as api:
        monkeypatch.setattr(SqlTenantJobs, "add_jobs", stumbling_jobs)
        monkeypatch.setattr(LocalBlobs, "writer", stumbling_writer)
        refused = await asyncio.gather(*(post(api, chat(str(n))) for n in range(5)))
        monkeypatch.undo()
        taken = await asyncio.gather(*(post(api, chat(str(n))) for n in range(5)))

        failed = [each for each in refused if each.status != 202]
        assert failed
        assert {(each.status, each.json["error"]["code"]) for each in failed} == {(503, trouble.code)}
        assert {"Retry-After" in each.headers for each in failed} == {True}
        assert [each.status for each in taken] == [202] * 5
        assert api.scope.job_counts()[JobStatus.QUEUED] == 10 - len(failed)
        # Whatever a refused group has written goes with the next sweep, and nothing else does.
        clear(api.parts.store, api.parts.blobs, in_use=frozenset)
        made = [each.json for each in (*refused, *taken) if each.status == 202]
        sources = {api.scope.shards_from(each["batch_id"], each["line_number"], limit=1)[0].source for each in made}
        assert {*api.parts.blobs.list("jobs/")} == sources


async def test_the_same_idempotency_key_makes_one_job_however_often_it_comes(tmp_path: Path):
    async with serving(tmp_path, routes=TABLE) as api:
        headers = {"Idempotency-Key": "abc"}
        replies = await asyncio.gather(*(post(api, chat(str(n)), headers=headers) for n in range(10)))

        assert {each.status for each in replies} == {202}
        assert len({each.json["number"] for each in replies}) == 1
        assert api.scope.job_counts()[JobStatus.QUEUED] == 1


async def test_keys_new_and_known_go_together_and_each_gets_its_own_job(tmp_path: Path) -> None:
    async with serving(tmp_path, routes=TABLE) as api:

        async def send(number: int) -> tuple[int, dict[str, Any]]:
            reply = await post(api, chat(str(number)), headers={"Idempotency-Key": f"key-{number}"})
            assert reply.status == 202
            return number, reply.json

        first = dict(await asyncio.gather(*(send(number) for number in range(0, 40, 2))))
        both = await asyncio.gather(*(send(number % 40) for number in range(80)))

        assert {number: made for number, made in both if number in first} == first
        assert len({made["number"] for _, made in both}) == 40
        assert api.scope.job_counts()[JobStatus.QUEUED] == 40
        for number, made in both:
            assert body_of(api.scope, api, made) == chat(str(number))
        assert len(api.scope.shards_from(both[0][1]["batch_id"], 1, limit=100)) < 20


async def test_callers_that_hang_up_leave_their_neighbours_alone(tmp_path: Path):
    async with serving(tmp_path, routes=TABLE) as api:
        calls = [asyncio.create_task(post(api, chat(str(n)))) for n in range(40)]
        await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        for each in calls[::2]:
            each.cancel()
        replies = await asyncio.gather(*calls, return_exceptions=True)

        stayed = [each for each in replies[1::2] if isinstance(each, Reply)]
        assert [each.status for each in stayed] == [202] * 20
        assert len({each.json["number"] for each in stayed}) == 20


@dataclass(slots=True)
class MovedClock(SystemClock):
    """The machine's clock, put forward by hand."""

    ahead_s: float = 0.0

    def now(self) -> datetime:
        return datetime.now(UTC) + timedelta(seconds=self.ahead_s)


async def test_every_job_has_the_whole_retention_to_be_done(tmp_path: Path):
    clock = MovedClock()
    async with serving(tmp_path, settings=Settings(job_retention_s=3600.0), clock=clock, routes=TABLE) as api:
        early = (await post(api, chat("early"))).json
        clock.ahead_s = 55 * 60.0
        late = (await post(api, chat("late"))).json
        clock.ahead_s += 59 * 60.0

        over = [batch_id for batch_id, _ in api.parts.store.sweep().moved]

        assert early["batch_id"] in over
        assert late["batch_id"] not in over
