"""A cancel as its caller sees it: sends stop, what is done can be read, and asking again is harmless."""

from __future__ import annotations

from pathlib import Path

import httpx2
import openai
import pytest

from tests.e2e.following import Place, Reader
from tests.e2e.served import WAIT_S, Site, site

LINES = 2_000
WINDOW = 32
STOP_S = 1.0
LATENCIES_S = {"100ms": 0.1, "3s": 3.0}
FLAGS = ("--workers", "1", "--concurrency", str(WINDOW))

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("latency", LATENCIES_S)
async def test_cancelled_batch_sends_for_less_than_a_second_and_keeps_what_is_done(
    tmp_path: Path, latency: str
) -> None:
    """What is in flight may end, and is kept: it is paid for. Undisturbed it would take six seconds, or minutes."""
    sent_in_a_second = WINDOW * int(STOP_S / LATENCIES_S[latency])
    async with site(tmp_path, latency=latency) as here:
        server = await here.serve(*FLAGS)
        batch_id = await server.submit(here.write_input(LINES))
        # Each place of the window has been taken again just now.
        await here.simulator.wait_until(lambda stats: stats.total >= 2 * WINDOW)

        cancelled = await server.post(f"/batches/{batch_id}/cancel")
        sent = here.simulator.stats().total
        again = await server.post(f"/batches/{batch_id}/cancel")
        batch = await server.ended_batch(batch_id)

        assert cancelled["status"] == "cancelling"
        assert again["status"] in ("cancelling", "cancelled")
        assert again["cancelling_at"] == cancelled["cancelling_at"]
        assert sent <= here.simulator.stats().total <= sent + sent_in_a_second < LINES
        assert batch["status"] == "cancelled"
        checked = await here.check(server, batch, repeats_max=0)
        assert set(checked.codes) == {"batch_cancelled"}
        assert len(checked.succeeded) == here.simulator.stats().ok == here.simulator.stats().total
        assert (await server.post(f"/batches/{batch_id}/cancel")) == batch
        assert (await server.stop()).code == 0


async def test_results_of_a_batch_are_read_before_while_and_after_it_is_cancelled(tmp_path: Path) -> None:
    async with site(tmp_path, latency="500ms") as here:
        server = await here.serve(*FLAGS, BATCHRUNNER_REGISTER_S="50ms")
        batch_id = await server.submit(here.write_input(LINES))
        place, reader = Place(server), Reader(batch_id)
        await reader.read_until(place, WINDOW, within_s=WAIT_S)

        await server.post(f"/batches/{batch_id}/cancel")
        await reader.read(server)
        while_cancelling = list(reader.lines)
        batch = await server.ended_batch(batch_id)
        await reader.read_until(place, LINES + 1, within_s=WAIT_S)

        output = (await server.content(batch["output_file_id"])).splitlines()
        assert WINDOW <= len(while_cancelling) <= len(output) < LINES
        assert sorted(reader.lines) == sorted(output)
        await here.check(server, batch, repeats_max=0)


async def test_cancel_of_a_completed_batch_is_refused_in_one_request(tmp_path: Path) -> None:
    """The official client sends a 409 again, unless it is told not to."""
    async with site(tmp_path) as here:
        server = await here.serve(*FLAGS)
        batch_id = await server.submit(here.write_input(20))
        ended = await server.ended_batch(batch_id)
        sent: list[str] = []

        refused = await refusal(server.base_url, batch_id, sent)

        assert sent == [f"/v1/batches/{batch_id}/cancel"]
        assert "Cannot cancel a batch with status 'completed'." in refused.message
        assert await server.get(f"/batches/{batch_id}") == ended


async def refusal(base_url: str, batch_id: str, sent: list[str]) -> openai.ConflictError:
    """Cancel with the official client, which must be refused; note the path of each of its requests."""

    async def note(request: httpx2.Request) -> None:
        sent.append(request.url.path)

    async with (
        httpx2.AsyncClient(event_hooks={"request": [note]}) as http,
        openai.AsyncOpenAI(base_url=base_url, api_key="any", http_client=http, max_retries=3) as client,
    ):
        with pytest.raises(openai.ConflictError) as caught:
            await client.batches.cancel(batch_id)
        return caught.value


async def test_cancel_that_races_the_last_line_ends_the_batch_one_way(tmp_path: Path) -> None:
    """Whoever comes first decides: the answer to the cancel, the status and the files tell the same."""
    async with site(tmp_path) as here:
        server = await here.serve(*FLAGS, BATCHRUNNER_REGISTER_S="50ms")
        path = here.write_input(WINDOW)
        seen = set()
        for number in range(6):
            seen.add(await race(here, path, after=1 + number * WINDOW // 4))
        assert seen <= {"completed", "cancelled"}
        assert (await server.stop()).code == 0


async def race(here: Site, path: Path, *, after: int) -> str:
    """Cancel when so many lines were sent; gives how the batch ended."""
    server = here.servers[-1]
    before = here.simulator.stats().total
    batch_id = await server.submit(path)
    await here.simulator.wait_until(lambda stats: stats.total >= before + min(after, WINDOW))
    async with server.session.post(f"{server.base_url}/batches/{batch_id}/cancel") as answer:
        status, told = answer.status, await answer.json()
    batch = await server.ended_batch(batch_id)
    await here.check(server, batch)
    if status == 409:
        assert "completed" in told["error"]["message"]
        assert batch["status"] == "completed"
        assert batch["cancelling_at"] is None
    else:
        assert status == 200
        assert batch["status"] == "cancelled"
        assert batch["cancelling_at"] is not None
    return str(batch["status"])
