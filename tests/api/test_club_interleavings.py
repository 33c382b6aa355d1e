"""Whatever comes between answers, failures, cancels, retries and the end of jobs: counters sum up at every instant,
nothing goes backwards but by a retry, and every view has the same results.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from batchrunner.models import NO_USAGE, LineCode, RecordKind, RequestLine
from batchrunner.shards import ShardRun
from tests.api.serving import Served
from tests.api.walking import Walker, walking
from tests.api.xai import metadata, results

ACTIVE = ("QUEUED", "PROCESSING")
RANK = {"QUEUED": 0, "PROCESSING": 1, "PROCESSED": 2, "FAILED": 2, "CANCELED": 2}
# A job by its place, or how many lines at a time.
STEPS = st.one_of(
    st.tuples(st.sampled_from(["answer", "fail"]), st.integers(1, 4)),
    st.tuples(st.sampled_from(["cancel", "retry"]), st.integers(0, 5)),
    st.sampled_from([("leave", 0), ("cancel_all", 0), ("retry_all", 0)]),
)
WALKS = st.tuples(st.integers(1, 6), st.lists(STEPS, max_size=14), st.booleans())


@dataclass(slots=True)
class Jobs(Walker):
    """A batch of jobs, and what was seen of it so far."""

    seen: list[str] = field(default_factory=list)
    retried: set[int] = field(default_factory=set)
    is_over: bool = False
    is_cancelled: bool = False

    async def step(self, verb: str, count: int) -> None:
        self.retried.clear()
        match verb:
            case "answer" | "fail":
                self.answer(count, is_well=verb == "answer")
            case "leave":
                self.leave()
            case "cancel_all":
                await self.cancel_all()
            case "cancel":
                await self.cancel(count)
            case "retry":
                await self.retry(count)
            case "retry_all":
                for place in range(len(self.seen)):
                    await self.retry(place)
            case "expire":
                self.expire()

    async def cancel_all(self) -> None:
        reply = await self.served.call("POST", f"/v1/batches/{self.batch_id}/cancel")
        assert reply.status == 200
        self.is_cancelled = self.is_cancelled or bool(set(self.seen) & set(ACTIVE))

    async def cancel(self, place: int) -> None:
        number = (await self.jobs())[place % len(self.seen)]["id"]
        was = self.seen[place % len(self.seen)]
        reply = await self.served.call("POST", f"/v1/jobs/{number}/cancel")
        assert reply.status == 200
        expected = "CANCELED" if was in ACTIVE else was
        assert reply.json == {"id": number, "status": expected, "canceled": was in ACTIVE}

    async def retry(self, place: int) -> None:
        place %= len(self.seen)
        number = (await self.jobs())[place]["id"]
        reply = await self.served.call("POST", f"/v1/jobs/{number}/retry")
        if self.seen[place] in ("FAILED", "CANCELED") and not self.is_over:
            assert (reply.status, reply.json["id"], reply.json["status"]) == (202, number, "QUEUED")
            self.retried.add(place)
            self.is_cancelled = False
        else:
            assert (reply.status, reply.json["error"]["type"]) == (409, "conflict")

    async def jobs(self) -> list[dict[str, Any]]:
        shown = await self.served.call("GET", f"/v1/batches/{self.batch_id}")
        return list(shown.json["jobs"])

    def answer(self, count: int, *, is_well: bool) -> None:
        """Take lines as a worker does, which hears what was canceled before it sends any."""

        def answer(run: ShardRun) -> None:
            self.listen(run)
            for _ in range(count):
                line = self.hand.next_line(run)
                if line is None:
                    break
                if not run.drops(line):
                    self.end(run, line, is_well=is_well)
            run.journal.flush()

        self.work(answer)

    def listen(self, run: ShardRun) -> None:
        for held in self.hand.store.watch(self.hand.session).held:
            if held.task_id == run.shard.task_id:
                run.follow(held)

    def end(self, run: ShardRun, line: RequestLine, *, is_well: bool) -> None:
        if is_well:
            self.hand.record(run, line)
            return
        payload = run.results.failed(
            line.line_number, line.custom_id, code=LineCode.CONNECTION_ERROR, message="Nobody was there."
        )
        run.record(line.line_number, RecordKind.FAILED, payload, NO_USAGE)

    def expire(self) -> None:
        """Let the time of the batch run out, and end it."""
        self.ground.pass_time(15 * 86_400)
        self.leave()
        self.hand.seal()
        self.is_over = True

    async def look(self) -> None:
        """Compare all that is shown now with itself and with what was shown before."""
        shown = (await self.served.call("GET", f"/v1/batches/{self.batch_id}")).json
        statuses = [each["status"] for each in shown["jobs"]]
        for word in ("queued", "processing", "processed", "failed", "canceled"):
            assert shown[word] == statuses.count(word.upper())
        assert shown["total"] == len(statuses)
        assert (shown["status"] == "DONE") == (not set(statuses) & set(ACTIVE))
        assert (shown["status"] == "PENDING") == (set(statuses) == {"QUEUED"})
        for place, (before, now) in enumerate(zip(self.seen, statuses, strict=False)):
            assert RANK[now] > RANK[before] or now == before or place in self.retried, (place, before, now)
        self.seen = statuses
        await self.compare(shown)

    async def compare(self, shown: dict[str, Any]) -> None:
        """All views have the same results."""
        superset = (await self.served.call("GET", f"/openai/v1/batches/{self.batch_id}")).json
        counts = superset["request_counts"]
        assert (counts["total"], counts["completed"]) == (shown["total"], shown["processed"])
        xai = (await self.served.call("GET", f"/xai/v1/batches/{self.batch_id}")).json
        if set(self.seen) & set(ACTIVE):
            assert superset["status"] == "in_progress"
        else:
            assert superset["status"] == ("cancelled" if self.is_cancelled else "completed")
        assert xai["status"] == superset["status"]
        assert (xai["cancel_time"] is not None) == self.is_cancelled == (superset["cancelled_at"] is not None)
        assert xai["state"] == {
            "num_requests": shown["total"],
            "num_pending": shown["queued"] + shown["processing"],
            "num_success": shown["processed"],
            "num_error": shown["failed"],
            "num_cancelled": shown["canceled"],
        }
        pages = {_place(each["batch_request_id"]): each for each in await results(self.served, self.batch_id, limit=3)}
        requests = await metadata(self.served, self.batch_id, limit=4)
        states = {_place(each["batch_request_id"]): each["state"] for each in requests}
        words = {"PROCESSED": "succeeded", "FAILED": "failed", "CANCELED": "cancelled"}
        assert states == {place: words.get(each, "pending") for place, each in enumerate(self.seen)}
        answered = {place for place, each in enumerate(self.seen) if each == "PROCESSED"}
        assert {place for place, each in pages.items() if "response" in each["batch_result"]} == answered
        lines = await self.served.call("GET", f"/openai/v1/batches/{self.batch_id}/results?after=0")
        given = [orjson.loads(line) for line in lines.body.splitlines()]
        places = [_place(each["custom_id"]) for each in given]
        assert len(places) == len(set(places))
        assert {place for place, each in zip(places, given, strict=True) if each["response"]} == answered
        for place in answered:
            job = (await self.served.call("GET", f"/v1/jobs/{shown['jobs'][place]['id']}")).json
            body = next(each for each in given if _place(each["custom_id"]) == place)["response"]["body"]
            assert job["result"] == body
            assert f"item {place}" in orjson.dumps(body).decode()


def _place(custom_id: str) -> int:
    found = re.fullmatch(r"requests\[(\d+)\]", custom_id)
    assert found is not None
    return int(found[1])


async def walk(folder: Path, count: int, steps: list[tuple[str, int]], *, expires: bool) -> None:
    async with walking(folder) as ground:
        walker = Jobs(ground, await _batch_of(ground.served, count))
        await walker.go(steps)
        if expires:
            await walker.step("expire", 0)
            await walker.look()
            await walker.step("retry_all", 0)
            return
        while walker.is_unfinished:
            walker.answer(100, is_well=True)
        await walker.look()
        assert not set(walker.seen) & set(ACTIVE)


async def _batch_of(served: Served, count: int) -> str:
    requests = [
        {
            "endpoint": "/v1/chat/completions",
            "body": {"model": "m", "messages": [{"role": "user", "content": f"item {number}"}]},
        }
        for number in range(count)
    ]
    reply = await served.call("POST", "/v1/batches", json={"label": "walk", "requests": requests})
    assert reply.status == 202, reply.body
    return str(reply.json["id"])


@pytest.mark.slow
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(WALKS)
@example((5, [("cancel_all", 0), ("retry_all", 0)], False))
@example((2, [("answer", 1), ("cancel_all", 0)], True))
def test_every_view_of_jobs_agrees_at_every_instant(drawn: tuple[int, list[tuple[str, int]], bool]) -> None:
    count, steps, expires = drawn
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(walk(Path(folder), count, steps, expires=expires))
