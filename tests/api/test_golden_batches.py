"""Every refusal about batches, byte for byte as the golden files have it; they are written like the other ones."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from batchrunner.holdings import KeyLimits
from batchrunner.store.sqlite import SqliteStore
from tests.api.batching import chat_lines, make_batch
from tests.api.serving import Served, serving
from tests.api.test_golden import Stage, check_refusal

GOLDEN = Path(__file__).parent / "golden_batches"
CASES = sorted(path.stem for path in GOLDEN.glob("*.json"))
STATUSES = ("in_progress", "completed", "failed", "expired", "cancelled")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def stage(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Stage]:
    """A server without workers, with a batch in each status that a refusal speaks of. Refusals change nothing."""
    async with serving(tmp_path_factory.mktemp("golden"), is_open=False) as served:
        served.secret = served.add_key("acme")
        served.add_key("acme", limits=KeyLimits(open_batches_max=1), secret="brk_one_open_batch")
        served.add_key("acme", limits=KeyLimits(queued_lines_max=1), secret="brk_one_queued_line")
        served.add_key("acme", limits=KeyLimits(priority_max=0), secret="brk_no_priority")
        names = {
            "batch_file": (await served.upload()).json["id"],
            "user_data_file": (await served.upload(b"x", purpose="user_data")).json["id"],
            "long": "x" * 65,
            "longer": "x" * 513,
            "validating": (await make_batch(served, chat_lines(["a"])))["id"],
        }
        for status in STATUSES:
            names[status] = await put(served, status)
        yield Stage(served, names)


async def put(served: Served, status: str) -> str:
    """Make a batch and say in the store that it is in a status."""
    batch_id: str = (await make_batch(served, chat_lines(["a"])))["id"]
    store = served.parts.store
    assert isinstance(store, SqliteStore)
    with store.writing() as conn:
        conn.exec_driver_sql("update batches set status = ? where id = ?", (status, batch_id))
    return batch_id


@pytest.mark.asyncio(loop_scope="module")
@pytest.mark.parametrize("case", CASES)
async def test_refusal_is_as_the_golden_file_has_it(stage: Stage, case: str) -> None:
    await check_refusal(stage, (GOLDEN / f"{case}.json").read_text(encoding="utf-8"))
