"""batchwork, one client of many batch APIs, runs whole batches as xAI's client and as OpenAI's. It refuses unknown
statuses, ids that come twice, and pages that repeat.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from batchwork import BatchRequest, Batchwork

from tests.api.batching import working
from tests.api.serving import Served

pytestmark = pytest.mark.slow

NAMES = [f"request-{number}" for number in range(230)]


@pytest.mark.parametrize(
    ("model", "root"), [("xai/m", "/v1"), ("xai/m", "/xai/v1"), ("openai/m", "/v1"), ("openai/m", "/openai/v1")]
)
async def test_batchwork_runs_a_batch_to_its_end(keyed: Served, tmp_path: Path, model: str, root: str) -> None:
    requests = [BatchRequest(custom_id=name, prompt=f"Say {name}.") for name in NAMES]
    async with Batchwork() as client, working(tmp_path):
        job = await client.batch(model=model, requests=requests, api_key=keyed.secret, base_url=keyed.base + root)
        done = await job.wait(poll_interval=0.05, timeout=60)
        found = await job.collect()

    assert done.status == "completed"
    assert (done.request_counts.total, done.request_counts.completed) == (230, 230)
    assert {each.custom_id: (each.status, (each.text or "").partition(" ")[2]) for each in found} == {
        name: ("succeeded", f"Say {name}.") for name in NAMES
    }


async def test_batchwork_cancels_an_xai_batch(keyed: Served, tmp_path: Path) -> None:
    requests = [BatchRequest(custom_id=name, prompt=f"Say {name}.") for name in NAMES]
    async with Batchwork() as client:
        job = await client.batch(model="xai/m", requests=requests, api_key=keyed.secret, base_url=f"{keyed.base}/v1")
        async with working(tmp_path, is_down=True):
            cancelled = await job.cancel()
            done = await job.wait(poll_interval=0.05, timeout=60)

    assert cancelled.status in ("cancelling", "cancelled")
    assert done.status == "cancelled"
