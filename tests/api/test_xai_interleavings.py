"""Whatever comes between adds, answers, cancels and ends: counters sum up at every instant, nothing goes backwards, and
every view has the same results.
"""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batchrunner.models import BatchId, TaskKind
from tests.api.batching import content_of
from tests.api.walking import Walker, walking
from tests.api.xai import add, chat, metadata, open_batch, results

RANK = {"in_progress": 0, "finalizing": 1, "cancelling": 2, "completed": 3, "expired": 3, "cancelled": 3}
STEPS = st.one_of(
    st.tuples(st.just("add"), st.integers(1, 4)),
    st.tuples(st.just("answer"), st.integers(1, 5)),
    st.sampled_from([("leave", 0), ("seal", 0), ("cancel", 0), ("close", 0), ("expire", 0)]),
)
RUNNING = STEPS.filter(lambda step: step[0] in ("add", "answer", "leave"))
# Most walks go on for a while before anything ends them.
WALKS = st.tuples(st.lists(RUNNING, max_size=8), st.lists(STEPS, max_size=8))


@dataclass(slots=True)
class Requests(Walker):
    """A batch that requests join, and what was seen of it so far."""

    names: list[str] = field(default_factory=list)
    seen: dict[str, Any] = field(default_factory=dict)

    async def step(self, verb: str, count: int) -> None:
        match verb:
            case "add":
                fresh = [f"n{len(self.names) + number}" for number in range(count)]
                reply = await add(self.served, self.batch_id, *map(chat, fresh))
                assert reply.status == (200 if self.is_open else 400)
                self.names += fresh if reply.status == 200 else []
            case "answer":
                self.answer(count)
            case "leave":
                self.leave()
            case "seal":
                self.leave()
                if self.hand.store.has_work(self.hand.session, kinds=[TaskKind.SEAL]):
                    self.hand.seal()
            case "cancel" | "close":
                path = ":cancel" if verb == "cancel" else "/close"
                await self.served.call("POST", f"/v1/batches/{self.batch_id}{path}")
            case "expire":
                self.ground.pass_time(25 * 3600)

    @property
    def is_open(self) -> bool:
        return self.served.scope.batch(BatchId(self.batch_id)).is_open

    def answer(self, count: int) -> None:
        self.work(lambda run: self.hand.answer(run, count))

    async def look(self) -> None:
        """Compare all that is shown now with itself and with what was shown before."""
        shown = (await self.served.call("GET", f"/v1/batches/{self.batch_id}")).json
        state, progress = shown["state"], shown["progress"]
        parts = ("num_pending", "num_success", "num_error", "num_cancelled")
        assert sum(state[name] for name in parts) == state["num_requests"] == len(self.names)
        assert progress["remaining"] == state["num_pending"]
        if self.seen:
            before = self.seen["state"]
            assert RANK[shown["status"]] >= RANK[self.seen["status"]]
            assert all(state[name] >= before[name] for name in ("num_success", "num_error", "num_cancelled"))
        self.seen = shown
        await self.compare(shown)

    async def compare(self, shown: dict[str, Any]) -> None:
        """All views have the same results."""
        state = shown["state"]
        pages = {each["batch_request_id"]: each for each in await results(self.served, self.batch_id, limit=3)}
        requests = await metadata(self.served, self.batch_id, limit=4)
        states = {each["batch_request_id"]: each["state"] for each in requests}
        lines = await self.served.call("GET", f"/v1/batches/{self.batch_id}/results?after=0")
        answered = {orjson.loads(line)["custom_id"] for line in lines.body.splitlines()}

        assert list(states) == self.names
        assert answered == {name for name, each in states.items() if each == "succeeded"}
        assert answered == {name for name, each in pages.items() if "response" in each["batch_result"]}
        assert len(answered) == state["num_success"]
        ended = {name for name, each in states.items() if each != "pending"}
        assert set(pages) == ended
        assert len(ended) == state["num_requests"] - state["num_pending"]

    async def finish(self) -> None:
        """Bring the batch to its end and read its files."""
        await self.step("close", 0)
        while self.is_unfinished:
            self.answer(100)
        await self.look()
        await self.step("seal", 0)
        await self.look()
        assert RANK[self.seen["status"]] == 3
        output = await content_of(self.served, self.seen["output_file_id"])
        errors = await content_of(self.served, self.seen["error_file_id"])
        filed = [orjson.loads(line)["custom_id"] for line in output.splitlines() + errors.splitlines()]
        assert sorted(filed) == sorted(self.names)
        assert len(output.splitlines()) == self.seen["state"]["num_success"]
        await self.retry([orjson.loads(line)["custom_id"] for line in errors.splitlines()])

    async def retry(self, failed: list[str]) -> None:
        """Have all run again that did not end well, as one batch, and read both together."""
        reply = await self.served.call("POST", f"/v1/batches/{self.batch_id}/retry")
        if not failed:
            assert (reply.status, reply.json["error"]["code"]) == (400, "nothing_to_retry")
            return
        assert reply.status == 200, reply.body
        self.hand.validate()
        again = Requests(self.ground, reply.json["id"], names=failed)
        await again.look()
        self.hand.run_all()
        self.hand.seal()
        await again.look()
        assert again.seen["state"]["num_success"] == len(failed)
        merged = await self.served.call("GET", f"/v1/batches/{self.batch_id}/results?merged=true")
        answers = [orjson.loads(line) for line in merged.body.splitlines()]
        assert sorted(each["custom_id"] for each in answers) == sorted(self.names)
        assert all(each["response"]["status_code"] == 200 for each in answers)


async def walk(folder: Path, steps: list[tuple[str, int]]) -> None:
    async with walking(folder) as ground:
        walker = Requests(ground, await open_batch(ground.served))
        await walker.go(steps)
        await walker.finish()


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(WALKS)
def test_every_view_of_a_batch_agrees_at_every_instant(steps: tuple[list[tuple[str, int]], ...]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(walk(Path(folder), [each for part in steps for each in part]))
