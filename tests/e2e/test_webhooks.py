"""Notifications of a served batch, with every process killed around each durable step: delivered, under one id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import psutil
import pytest

from tests.api.receiving import receiving
from tests.e2e.harness import died, freeze
from tests.e2e.served import site

FLAGS = ("--workers", "1")

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "point",
    [
        pytest.param("webhook.claimed", marks=pytest.mark.long),
        "webhook.posted",
        pytest.param("webhook.recorded", marks=pytest.mark.long),
        "seal.published",
    ],
)
async def test_whoever_dies_the_end_is_told_under_one_id(tmp_path: Path, point: str) -> None:
    async with receiving() as receiver, site(tmp_path, latency="1ms") as here:
        armed = await here.serve(*FLAGS, BATCHRUNNER_CRASH_AT=point)
        await armed.until_ready()
        parent, api, worker = psutil.Process(armed.command.pid), armed.api(), armed.worker()
        freeze(here.data / "state.db", worker)
        batch_id = await armed.submit(here.write_input(5), webhook_url=f"{receiver.base}/hook")
        # After the death at the point nobody takes another step: no parent to start the dead again, no API to deliver.
        dying, others = (worker, (parent, api)) if point == "seal.published" else (api, (parent,))
        freeze(here.data / "state.db", *others)
        worker.resume()
        await died(dying)
        await armed.kill_all()

        again = await here.serve(*FLAGS)
        await again.ended_batch(batch_id)
        await receiver.wait(2 if point == "webhook.posted" else 1)

        async def its_delivery() -> Any:
            (found,) = (await again.get("/webhook_deliveries"))["data"]
            return found

        delivery = await again.when(its_delivery, lambda found: found["status"] == "delivered")

    assert {each.id for each in receiver.got} == {delivery["id"]}
    assert {orjson.loads(each.body)["data"]["id"] for each in receiver.got} == {batch_id}
    assert len(receiver.got) == (2 if point == "webhook.posted" else 1)
    assert delivery["attempt_count"] == 1
    errors = [each["error"] for each in delivery["attempts"]]
    assert errors == ([None] if point in {"webhook.recorded", "seal.published"} else ["unknown", None])


async def test_an_api_process_that_dies_alone_is_followed_by_one_that_sends_again_at_once(tmp_path: Path) -> None:
    async with (
        receiving(lambda number: None if number == 1 else 200) as receiver,
        site(tmp_path, latency="1ms") as here,
    ):
        server = await here.serve(*FLAGS)
        await server.submit(here.write_input(5), webhook_url=f"{receiver.base}/hook")
        await receiver.wait(1)

        server.api().kill()
        # Sooner than its lease would end.
        await receiver.wait(2)

    assert len({each.id for each in receiver.got}) == 1
