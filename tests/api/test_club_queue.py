"""inference.club's queue summary: the counts of a tenant, and whether anybody works on them."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

from batchrunner.orders import Pulse
from batchrunner.settings import Settings
from tests.api.batching import working
from tests.api.club import chat, created, submitted, until_done, until_over
from tests.api.serving import Served, serving

NO_JOBS = {"QUEUED": 0, "PROCESSING": 0, "PROCESSED": 0, "FAILED": 0, "CANCELED": 0}
PATH = "/api/inference/queue/summary"


async def summary(served: Served) -> dict[str, Any]:
    reply = await served.call("GET", PATH)
    assert reply.status == 200, reply.body
    return dict(reply.json)


def pulse(served: Served, *, ticking: int, ago_s: float) -> None:
    """Have the parent have said so some time ago."""
    served.parts.vitals.feel(Pulse(worker_count=1, ticking_count=ticking), served.clock.monotonic_s() - ago_s)


async def test_an_idle_queue_is_not_stalled(api: Served) -> None:
    assert await summary(api) == {
        "jobs": NO_JOBS,
        "active": 0,
        "runs": {"PENDING": 0, "PROCESSING": 0, "DONE": 0},
        "async_enabled": True,
        "last_dispatch": None,
        "worker_stalled": False,
    }


async def test_jobs_and_batches_are_counted(api: Served, tmp_path: Path) -> None:
    batch_id = await created(api, chat("a"), chat("b", simulate="always:400"))
    single = await submitted(api)
    async with working(tmp_path):
        await until_done(api, batch_id)
        await until_over(api, single)
    await created(api, chat("a"))
    begun = await created(api, chat("a"), chat("b"))
    first = (await api.call("GET", f"/v1/batches/{begun}")).json["jobs"][0]["id"]
    await api.call("POST", f"/v1/jobs/{first}/cancel")

    found = await summary(api)

    assert found["jobs"] == NO_JOBS | {"QUEUED": 2, "PROCESSED": 2, "FAILED": 1, "CANCELED": 1}
    assert found["active"] == 2
    assert found["runs"] == {"PENDING": 1, "PROCESSING": 1, "DONE": 1}


async def test_work_that_no_worker_was_ever_there_for_is_stalled(api: Served) -> None:
    await submitted(api)
    pulse(api, ticking=0, ago_s=1)

    found = await summary(api)

    assert (found["worker_stalled"], found["last_dispatch"]) == (True, None)


async def test_work_whose_workers_were_heard_of_within_a_minute_is_not_stalled(api: Served) -> None:
    await submitted(api)
    pulse(api, ticking=1, ago_s=50)
    pulse(api, ticking=0, ago_s=1)

    found = await summary(api)

    assert found["worker_stalled"] is False
    ago_s = api.clock.now().timestamp() - datetime.fromisoformat(found["last_dispatch"]).timestamp()
    assert 49 < ago_s < 55


async def test_work_whose_workers_have_long_been_silent_is_stalled(api: Served) -> None:
    job_id = await submitted(api)
    pulse(api, ticking=1, ago_s=61)

    stalled = (await summary(api))["worker_stalled"]
    await api.call("POST", f"/v1/jobs/{job_id}/cancel")

    assert stalled is True
    assert (await summary(api))["worker_stalled"] is False


async def test_a_tenant_sees_its_own_queue(keyed: Served) -> None:
    await submitted(keyed)
    keyed.secret = keyed.add_key("other")

    found = await summary(keyed)

    assert (found["jobs"], found["active"]) == (NO_JOBS, 0)


async def test_who_has_no_key_sees_nothing(keyed: Served) -> None:
    keyed.secret = None

    reply = await keyed.call("GET", PATH)

    assert (reply.status, tuple(reply.json)) == (401, ("detail",))


async def test_the_summary_says_that_jobs_are_not_taken(tmp_path: Path) -> None:
    async with serving(tmp_path, settings=Settings(async_enabled=False)) as served:
        assert (await summary(served))["async_enabled"] is False
        assert (await served.call("GET", f"{PATH}/")).status == 200
