"""Every process of a server killed in every status of a batch, while a cancel or the deadline comes: one end, and never
a step back.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.e2e.following import Place, Watcher
from tests.e2e.served import Server, Site, site

LINES = 400
WINDOW = 16
REPEATS_PER_DEATH = WINDOW + 256
# A busy machine takes its time to start a process; `bench.server` measures how long.
RECOVERY_S = 30.0
FLAGS = ("--workers", "1", "--concurrency", str(WINDOW))

pytestmark = pytest.mark.slow


@dataclass(frozen=True, slots=True)
class Hold:
    """A status that a batch is kept in: its worker dies at the point again and again, or else it just runs."""

    status: str
    point: str | None = None


HOLDS = {
    "validating": Hold("validating", "validate.before_accept"),
    "running": Hold("in_progress"),
    "finalizing": Hold("finalizing", "seal.fenced"),
    "sealed": Hold("finalizing", "seal.files_committed"),
    "cancelling": Hold("cancelling", "seal.fenced"),
    "completed": Hold("completed"),
}
VICTIMS = ("api", "worker", "all")
EVENTS = ("nothing", "cancel", "cancel at the same instant")
CELLS = list(itertools.product(HOLDS, VICTIMS, EVENTS))
# One of each row and column in every run of the tests, the rest in the long lane.
QUICK = {
    ("validating", "all", "cancel at the same instant"),
    ("running", "api", "cancel at the same instant"),
    ("finalizing", "worker", "nothing"),
    ("sealed", "all", "cancel"),
}


async def cancel(server: Server, batch_id: str) -> int | None:
    """Cancel a batch; gives the status of the answer, if one comes."""
    with contextlib.suppress(aiohttp.ClientError):
        async with server.session.post(f"{server.base_url}/batches/{batch_id}/cancel") as answer:
            await answer.read()
            return answer.status
    return None


async def kill(server: Server, victim: str) -> None:
    """Kill one process, or all; a worker may be dead just now."""
    if victim == "all":
        await server.kill_all()
        return
    with contextlib.suppress(psutil.NoSuchProcess, StopIteration):
        (server.api() if victim == "api" else server.worker()).kill()


async def begin(here: Site, hold: Hold) -> tuple[Server, str]:
    """Bring a batch into the status and keep it there."""
    server = await here.serve(*FLAGS, BATCHRUNNER_REGISTER_S="50ms", BATCHRUNNER_CRASH_AT=hold.point or "")
    batch_id = await server.submit(here.write_input(LINES))
    if hold.status in ("in_progress", "cancelling"):
        await here.simulator.wait_until(lambda stats: stats.ok >= LINES // 4)
    if hold.status == "cancelling":
        assert await cancel(server, batch_id) == 200

    def is_there(batch: dict[str, Any]) -> bool:
        is_moving = batch["request_counts"]["completed"] > 0
        return batch["status"] == hold.status and (is_moving or hold.point is not None)

    await server.batch_when(batch_id, is_there)
    if hold.point:
        await server.said("worker 0 ended with code -9")
    return server, batch_id


async def strike(server: Server, batch_id: str, victim: str, event: str) -> int | None:
    """Let the event come and the process die; gives the answer to the cancel."""
    if event == "cancel at the same instant":
        cancelling = asyncio.create_task(cancel(server, batch_id))
        await asyncio.sleep(0)
        await kill(server, victim)
        return await cancelling
    answered = await cancel(server, batch_id) if event == "cancel" else None
    await kill(server, victim)
    return answered


async def recover(here: Site, place: Place, hold: Hold, victim: str, batch_id: str) -> None:
    """Have a server that works and answers: the same one, or a new one where all are dead or die again and again."""
    if victim == "api":
        async with asyncio.timeout(RECOVERY_S):
            await answered(place.server, batch_id)
    if victim == "all" or hold.point:
        await place.server.kill_all()
        port = place.server.base_url.rpartition(":")[2].removesuffix("/v1")
        await place.move(await here.serve(*FLAGS, "--port", port))
    async with asyncio.timeout(RECOVERY_S):
        await answered(place.server, batch_id)


async def answered(server: Server, batch_id: str) -> None:
    """Ask until there is an answer."""
    await server.batch_when(batch_id, lambda _: True)


def ends_of(hold: Hold, event: str, answer: int | None) -> set[str]:
    """How the batch may end: a cancel that was answered decides, one whose answer was lost may have come or not."""
    if hold.status == "cancelling":
        return {"cancelled"}
    if event == "nothing" or hold.status == "completed":
        return {"completed"}
    return {200: {"cancelled"}, 409: {"completed"}, None: {"completed", "cancelled"}}[answer]


@pytest.mark.parametrize(
    ("name", "victim", "event"),
    [pytest.param(*cell, marks=() if cell in QUICK else pytest.mark.long) for cell in CELLS],
)
async def test_process_killed_in_a_status_leaves_one_end(tmp_path: Path, name: str, victim: str, event: str) -> None:
    hold = HOLDS[name]
    async with site(tmp_path, latency="50ms") as here:
        server, batch_id = await begin(here, hold)
        place, watcher = Place(server), Watcher()
        watching = asyncio.create_task(watcher.watch(place))

        answer = await strike(server, batch_id, victim, event)
        await recover(here, place, hold, victim, batch_id)
        batch = await place.server.ended_batch(batch_id)
        await last_look(watching, watcher, place.server, batch)

        watcher.check()
        assert batch["status"] in ends_of(hold, event, answer)
        if hold.status == "completed":
            assert answer == (409 if event == "cancel" else answer)
        await check_files(here, place.server, batch)
        assert (await place.server.stop()).code == 0


async def last_look(watching: asyncio.Task[None], watcher: Watcher, server: Server, batch: dict[str, Any]) -> None:
    """Have the watcher see the end too."""
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    await watcher.look(server)
    assert watcher.seen[batch["id"]][-1]["status"] == batch["status"]


async def check_files(here: Site, server: Server, batch: dict[str, Any]) -> None:
    """Prove the ledger; a batch that was cancelled before its lines were known has none."""
    if batch["request_counts"]["total"] == 0:
        assert batch["status"] == "cancelled"
        assert batch["output_file_id"] is batch["error_file_id"] is None
        assert here.simulator.stats().total == 0
        return
    # A point may have killed the worker several times before all were killed; only once with lines in flight.
    await here.check(server, batch, repeats_max=REPEATS_PER_DEATH)


@pytest.mark.long
@pytest.mark.parametrize("victim", VICTIMS)
async def test_process_killed_as_the_deadline_comes_leaves_an_expired_batch(tmp_path: Path, victim: str) -> None:
    """The shortest window there is, a minute; the server dies in its last second and after it."""
    async with site(tmp_path, latency="1s") as here:
        server = await here.serve(*FLAGS, BATCHRUNNER_CANCEL_GRACE_S="1s")
        path = here.write_input(5 * LINES)
        batch_id = await server.submit(path, completion_window="1m")
        place, watcher = Place(server), Watcher()
        watching = asyncio.create_task(watcher.watch(place))
        await here.simulator.wait_until(lambda stats: stats.total >= 56 * WINDOW)

        await kill(server, victim)
        await recover(here, place, Hold("in_progress"), victim, batch_id)
        batch = await place.server.ended_batch(batch_id)
        await last_look(watching, watcher, place.server, batch)

        watcher.check()
        assert batch["status"] == "expired"
        checked = await here.check(place.server, batch, repeats_max=REPEATS_PER_DEATH)
        assert set(checked.codes) == {"batch_expired"}
        assert len(checked.succeeded) > 40 * WINDOW
        assert (await place.server.stop()).code == 0
