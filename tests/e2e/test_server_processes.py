"""The processes of a server: what a death of each costs, how all end, and what a second one is told."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from tests.e2e.harness import Command, freeze, start
from tests.e2e.served import Server, Site, site

LINES = 400
WINDOW = 16
FLAGS = ("--workers", "1", "--concurrency", str(WINDOW))
# What may be sent again after a death: what was in flight, and one commit group of the worker.
REPEATS_PER_KILL = WINDOW + 256
# A busy machine takes its time to start a process; `bench.server` measures how long.
RECOVERY_S = 30.0
# Well below the grace of 30 s, and the 20 s of a request, that would be waited for otherwise.
AT_ONCE_S = 10.0

pytestmark = pytest.mark.slow


@asynccontextmanager
async def in_mid_batch(folder: Path) -> AsyncIterator[tuple[Site, Server, str]]:
    """Give a server that has done a part of the batch of this id."""
    async with site(folder, latency="100ms") as here:
        server = await here.serve(*FLAGS)
        batch_id = await server.submit(here.write_input(LINES))
        await here.simulator.wait_until(lambda stats: stats.ok >= LINES // 10)
        yield here, server, batch_id


async def end_and_check(here: Site, server: Server, batch_id: str, *, kills: int) -> None:
    batch = await server.ended_batch(batch_id)

    assert batch["status"] == "completed", batch
    await here.check(server, batch, repeats_max=REPEATS_PER_KILL * kills)


async def test_first_lines_are_the_base_url_and_a_curl_line_that_works(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        server = await here.serve("--workers", "1")

        base_url, curl, *rest = [line.strip() for line in server.opening]
        assert curl == f"curl {base_url}/batches"
        assert rest[0] == f"data: {here.data}"
        curling = await asyncio.create_subprocess_exec(
            *curl.split(), "-sf", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
        )
        out, _ = await curling.communicate()
        assert curling.returncode == 0
        assert b'"object":"list"' in out
        assert (await server.stop()).code == 0


async def test_workers_let_the_api_go_first(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        server = await here.serve("--workers", "1")
        await server.until_ready()

        assert server.worker().nice() == server.api().nice() + 5
        assert server.api().nice() == psutil.Process().nice()
        if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_OTHER:
            assert policies(server.worker()) == {os.SCHED_BATCH}
            assert policies(server.api()) == {os.SCHED_OTHER}
        assert (await server.stop()).code == 0


def policies(process: psutil.Process) -> set[int]:
    """How the system shares its cores out to the threads of a process."""
    return {os.sched_getscheduler(thread.id) for thread in process.threads()}


async def test_workers_take_turns_at_an_upstream_that_takes_one_request_at_a_time(tmp_path: Path) -> None:
    async with site(tmp_path, latency="10ms") as here:
        server = await here.serve("--workers", "2", "--concurrency", "1")
        batch_id = await server.submit(here.write_input(100))

        batch = await server.ended_batch(batch_id)

        assert batch["status"] == "completed", batch
        assert here.simulator.stats().peak_in_flight == 1
        await here.check(server, batch, repeats_max=0)
        assert (await server.stop()).code == 0


async def test_killed_api_comes_back_on_its_port_and_the_batch_goes_on(tmp_path: Path) -> None:
    async with in_mid_batch(tmp_path) as (here, server, batch_id):
        old, worker = server.api(), server.worker()

        old.kill()
        # The parent holds the port: a request that comes meanwhile waits, it is not refused.
        async with (
            asyncio.timeout(RECOVERY_S),
            aiohttp.ClientSession() as fresh,
            fresh.get(f"{server.base_url}/batches/{batch_id}") as answer,
        ):
            assert answer.status == 200

        assert server.api().pid != old.pid
        assert server.worker() == worker
        await end_and_check(here, server, batch_id, kills=0)
        assert (await server.stop()).code == 0


async def test_half_an_upload_of_a_killed_api_leaves_the_disk(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        server = await here.serve("--workers", "0")
        head = b'--x\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n{}\n'
        _, writing = await asyncio.open_connection("127.0.0.1", int(server.root.rpartition(":")[2]))
        writing.write(b"POST /v1/files HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9000000\r\n")
        writing.write(b"content-type: multipart/form-data; boundary=x\r\n\r\n" + head + b"{}\n" * 500_000)
        await writing.drain()

        async def half_written() -> list[Path]:
            assert await status_of(server, "/healthz") == 200
            return [path for path in (here.data / "blobs").rglob("files/*") if "~" in path.name]

        await server.when(half_written, bool)
        server.api().kill()
        await server.said("1 half written blobs")

        assert await half_written() == []
        writing.close()
        assert (await server.stop()).code == 0


async def test_killed_worker_comes_back_and_its_lines_at_once(tmp_path: Path) -> None:
    async with in_mid_batch(tmp_path) as (here, server, batch_id):
        worker = server.worker()

        worker.kill()
        async with asyncio.timeout(RECOVERY_S):
            await server.said("worker 0 ended with code -9")
            # Whatever was counted by then; a worker that registers more than that is a new one.
            done = (await server.get(f"/batches/{batch_id}"))["request_counts"]["completed"]
            await server.batch_when(batch_id, lambda batch: batch["request_counts"]["completed"] > done + WINDOW)

        assert server.worker().pid != worker.pid
        await end_and_check(here, server, batch_id, kills=1)
        assert (await server.stop()).code == 0


async def test_killed_server_is_started_again_and_the_batch_completes(tmp_path: Path) -> None:
    async with in_mid_batch(tmp_path) as (here, server, batch_id):
        await server.kill_all()
        again = await here.serve(*FLAGS)

        await end_and_check(here, again, batch_id, kills=1)
        assert (await again.stop()).code == 0


async def test_server_may_be_started_while_the_children_of_a_killed_one_still_end(tmp_path: Path) -> None:
    async with in_mid_batch(tmp_path) as (here, server, batch_id):
        port = server.base_url.rpartition(":")[2].removesuffix("/v1")
        children = server.command.workers()

        server.command.send(signal.SIGKILL)
        again = await here.serve(*FLAGS, "--port", port)

        gone, alive = await asyncio.to_thread(psutil.wait_procs, children, timeout=AT_ONCE_S)
        assert len(gone) == 2
        assert alive == []
        await end_and_check(here, again, batch_id, kills=1)
        assert (await again.stop()).code == 0


async def test_sigterm_lets_what_is_in_flight_end_and_nothing_is_sent_again(tmp_path: Path) -> None:
    async with site(tmp_path, latency="500ms") as here:
        server = await here.serve(*FLAGS)
        batch_id = await server.submit(here.write_input(LINES // 4))
        await here.simulator.wait_until(lambda stats: stats.total >= 2 * WINDOW)

        ended = await server.stop()

        assert ended.code == 0, ended.stderr
        assert "SIGTERM: waiting up to 30 s" in ended.stderr
        assert "Traceback" not in ended.stderr
        again = await here.serve(*FLAGS)
        await end_and_check(here, again, batch_id, kills=0)
        assert (await again.stop()).code == 0


async def test_second_signal_ends_at_once(tmp_path: Path) -> None:
    async with site(tmp_path, latency="20s") as here:
        server = await here.serve(*FLAGS)
        await server.submit(here.write_input(LINES))
        await here.simulator.wait_until(lambda stats: stats.total >= 1)

        server.command.send(signal.SIGTERM)
        await server.said("again to stop at once")
        async with asyncio.timeout(AT_ONCE_S):
            ended = await server.stop(signal.SIGINT)

        assert ended.code == 130, ended.stderr


async def test_request_under_way_is_answered_before_the_end(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        server = await here.serve("--workers", "0")
        path = here.write_input(3)
        content = path.read_bytes()
        closed = asyncio.Event()

        async def slowly() -> Any:
            yield content[:100]
            server.command.send(signal.SIGTERM)
            await server.said("SIGTERM")
            closed.set()
            yield content[100:]

        form = aiohttp.FormData()
        form.add_field("purpose", "batch")
        form.add_field("file", slowly(), filename="in.jsonl", content_type="application/jsonl")
        async with here.session.post(f"{server.base_url}/files", data=form) as answer:
            file = await answer.json()

        assert closed.is_set()
        assert file["bytes"] == len(content)
        assert (await server.ended()).code == 0


async def test_followed_batch_does_not_hold_up_the_end(tmp_path: Path) -> None:
    async with site(tmp_path, latency="50ms") as here:
        server = await here.serve("--workers", "1", "--concurrency", "2")
        batch_id = await server.submit(here.write_input(LINES))
        async with here.session.get(f"{server.base_url}/batches/{batch_id}/events") as answer:
            assert (await answer.content.readuntil(b"\n\n")).startswith(b"event: status")

            async with asyncio.timeout(AT_ONCE_S):
                ended = await server.stop()
            assert answer.content_type == "text/event-stream"
            await answer.read()

        assert ended.code == 0, ended.stderr
        assert "cut off" not in ended.stderr


async def test_signal_to_all_processes_is_a_clean_end(tmp_path: Path) -> None:
    """As a terminal or a service manager may send it."""
    async with site(tmp_path, latency="50ms") as here:
        server = await here.serve("--workers", "1", "--concurrency", "2")
        batch_id = await server.submit(here.write_input(LINES // 4))
        await here.simulator.wait_until(lambda stats: stats.total >= 2)

        os.killpg(server.command.pid, signal.SIGTERM)
        ended = await server.ended()

        assert ended.code == 0, ended.stderr
        assert "Traceback" not in ended.stderr
        again = await here.serve("--workers", "1")
        await end_and_check(here, again, batch_id, kills=0)
        os.killpg(again.command.pid, signal.SIGINT)
        ended = await again.ended()
        assert ended.code == 0, ended.stderr
        assert "Traceback" not in ended.stderr


async def test_second_server_on_the_folder_is_refused_with_the_pid_of_the_first(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        server = await here.serve("--workers", "1")
        await server.until_ready()

        second = await (await here.launch("--workers", "1")).ended()

        assert second.code == 1
        assert f"process {server.command.pid} is running this already" in second.stderr
        assert (await server.ready())[0] == 200
        await server.stop()


async def test_taken_port_is_said_and_exits_1(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]

            ended = await (await here.launch("--port", str(port))).ended()

        assert ended.code == 1
        assert f"cannot listen on 127.0.0.1 port {port}" in ended.stderr
        assert "--port" in ended.stderr


async def test_server_without_workers_takes_batches_and_one_with_workers_does_them(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        server = await here.serve("--workers", "0")
        batch_id = await server.submit(here.write_input(20))
        assert (await server.get(f"/batches/{batch_id}"))["status"] == "validating"
        assert (await server.ready())[0] == 200
        assert (await server.stop()).code == 0

        again = await here.serve("--workers", "2")
        await end_and_check(here, again, batch_id, kills=0)
        assert (await again.stop()).code == 0


async def test_server_without_upstream_says_so_validates_and_waits(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        server = await here.serve("--workers", "1", upstream=False)
        batch_id = await server.submit(here.write_input(20))

        assert any("none is named" in line for line in server.opening)
        batch = await server.batch_when(batch_id, lambda found: found["status"] == "in_progress")
        assert batch["request_counts"] == {"total": 20, "completed": 0, "failed": 0}
        assert (await server.stop()).code == 0

        again = await here.serve("--workers", "1")
        await end_and_check(here, again, batch_id, kills=0)
        assert (await again.stop()).code == 0


async def test_readiness_tells_that_no_worker_reports(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        server = await here.serve("--workers", "1")
        await server.until_ready()
        worker = server.worker()

        freeze(here.data / "state.db", worker)
        status, found = await server.when(server.ready, lambda found: found[0] != 200)
        worker.resume()

        assert status == 503
        assert found["failed"] == ["workers"]
        await server.stop()


async def test_first_key_closes_an_open_server(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        server = await here.serve("--workers", "0")
        assert (await server.get("/batches"))["data"] == []

        created = await (await start_keys(here, "create", "--scopes", "read")).ended()
        await server.said("there are API keys now")
        await server.said("the API process ended with code 0")

        secret = created.stdout.decode().strip()
        assert await status_of(server, "/v1/batches") == 401
        assert await status_of(server, "/v1/batches", secret) == 200
        assert await status_of(server, "/healthz") == await status_of(server, "/readyz") == 200
        assert await status_of(server, "/metrics") == 200
        assert (await server.stop()).code == 0


async def test_others_are_served_only_with_keys(tmp_path: Path) -> None:
    async with site(tmp_path) as here:
        refused = await (await here.launch("--host", "0.0.0.0", "--workers", "0")).ended()
        assert refused.code == 2
        assert "batchrunner keys create" in refused.stderr

        created = await (await start_keys(here, "create", "--scopes", "admin,read")).ended()
        secret = created.stdout.decode().strip()
        server = await here.serve("--host", "0.0.0.0", "--workers", "0")

        assert server.base_url.startswith("http://127.0.0.1:")
        assert "$BATCHRUNNER_API_KEY" in server.opening[1]
        assert await status_of(server, "/v1/batches") == await status_of(server, "/metrics") == 401
        assert await status_of(server, "/healthz") == 200
        assert await status_of(server, "/metrics", secret) == await status_of(server, "/v1/batches", secret) == 200
        _, ready = await server.ready()
        assert all("detail" not in check for check in ready["checks"].values())
        assert (await server.stop()).code == 0


async def start_keys(here: Site, *words: str) -> Command:
    return await start(["keys", *words, "--data", str(here.data)], here.folder, {})


async def status_of(server: Server, path: str, secret: str | None = None) -> int:
    headers = {"Authorization": f"Bearer {secret}"} if secret else {}
    async with server.session.get(server.root + path, headers=headers) as answer:
        return answer.status
