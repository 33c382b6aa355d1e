"""Runs on SeaweedFS: objects in and out, a service that fails, and many deaths."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from batchrunner.simulate import SimulatorStats
from tests.e2e.harness import COMMAND_S, Bench, bench, start
from tests.e2e.small_disk import fill_up, needs_root, small_disk
from tests.s3.conftest import environment_of
from tests.s3.proxy import Fault, Proxy, Request, proxied
from tests.s3.services import BUCKET, Service, client_of, distinct_ports, seaweedfs

pytestmark = [pytest.mark.real, pytest.mark.slow]
WINDOW = 16


@pytest.fixture
def proxy(s3_service: Callable[[str], Service]) -> Iterator[Proxy]:
    with proxied(s3_service("seaweedfs").url) as made:
        yield made


def uploads_left(url: str, blobs: str) -> list[str]:
    prefix = blobs.removeprefix(f"s3://{BUCKET}/")
    found = client_of(url).list_multipart_uploads(Bucket=BUCKET, Prefix=prefix).get("Uploads", [])
    return [each["Key"] for each in found if each["Key"].startswith(prefix)]


def names_of(url: str, prefix: str) -> set[str]:
    pages = client_of(url).get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
    return {each["Key"].removeprefix(prefix) for page in pages for each in page.get("Contents", [])}


async def test_run_from_an_object_to_an_object_and_again(tmp_path: Path, s3_service: Callable[[str], Service]) -> None:
    url = s3_service("seaweedfs").url
    client = client_of(url)
    environment = environment_of(url)
    environment.pop("BATCHRUNNER_BLOBS")
    async with bench(tmp_path) as run:
        run.write_input(200)
        client.upload_file(str(run.input), BUCKET, "own/in.jsonl")
        command = ["run", f"s3://{BUCKET}/own/in.jsonl", "-o", f"s3://{BUCKET}/own/out.jsonl", "-u", run.simulator.url]

        first = await (await start([*command, "--json"], tmp_path, environment)).ended()
        sent = run.simulator.stats().total
        second = await (await start(command, tmp_path, environment)).ended()
        client.delete_object(Bucket=BUCKET, Key="own/out.jsonl")
        third = await (await start(command, tmp_path, environment)).ended()
        other = await (await start([*command, "--state", "other"], tmp_path, environment)).ended()

        assert first.code == 0, first.stderr
        assert first.summary["output"] == f"s3://{BUCKET}/own/out.jsonl"
        assert "already done" in second.stderr
        assert third.code == 0, third.stderr
        assert run.simulator.stats().total == sent
        assert other.code == 2
        assert "exists and was not written by this run" in other.stderr
        client.download_file(BUCKET, "own/out.jsonl", str(run.output))
        run.check()
        manifest = json.loads((run.state / "manifest.json").read_bytes())
        assert manifest["output"]["sha256"] == hashlib.sha256(run.output.read_bytes()).hexdigest()


async def test_failed_lines_become_an_object_beside_the_output(
    tmp_path: Path, s3_service: Callable[[str], Service]
) -> None:
    url = s3_service("seaweedfs").url
    environment = environment_of(url)
    async with bench(tmp_path) as run:
        run.write_input(3, simulate=["400"])
        output = f"s3://{BUCKET}/failed/out.jsonl"
        command = ["run", "in.jsonl", "-o", output, "-u", run.simulator.url, "--json"]

        ended = await (await start(command, tmp_path, environment)).ended()

    assert ended.code == 3, ended.stderr
    assert ended.summary["errors"] == f"s3://{BUCKET}/failed/out.errors.jsonl"
    assert names_of(url, "failed/") == {"out.jsonl", "out.errors.jsonl"}


class Failures:
    """A rule that spoils whatever is to be written, and tells of each such request."""

    def __init__(self, fault: Fault) -> None:
        self._fault = fault
        self._told: asyncio.Queue[int] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def __call__(self, request: Request) -> Fault | None:
        if request.method not in ("PUT", "POST"):
            return None
        self._loop.call_soon_threadsafe(self._told.put_nowait, request.number)
        return self._fault

    async def wait(self, count: int) -> None:
        """Wait for so many more."""
        async with asyncio.timeout(COMMAND_S):
            for _ in range(self._told.qsize() + count):
                await self._told.get()


@pytest.mark.parametrize("fault", [pytest.param(Fault.BUSY, marks=pytest.mark.long), Fault.CUT, Fault.HELD])
async def test_service_that_fails_for_a_while_stops_the_sending_and_the_run_goes_on(
    tmp_path: Path, proxy: Proxy, fault: Fault
) -> None:
    """What may wait for the service is what comes within a segment's time and a second, and what is in flight."""
    environment = environment_of(proxy.url, BATCHRUNNER_SEGMENT_S="500ms", BATCHRUNNER_S3_TIMEOUT_S="1s")
    failures = Failures(fault)
    async with bench(tmp_path, latency="20ms") as run:
        run.environment = environment
        run.write_input(6_000)
        command = await run.start("--workers", "1", "--json")
        await run.reach(lambda stats: stats.total >= 1_500, command)

        proxy.rule = failures
        await command.said("waiting:")
        # Nothing is in flight for a moment between two turns too; what has stopped stays so from try to try.
        await failures.wait(2)
        await run.reach(lambda stats: stats.in_flight == 0, command)
        stopped_at = run.simulator.stats().total
        await failures.wait(3)
        still_at = run.simulator.stats().total
        proxy.rule = lambda _request: None
        proxy.release()
        ended = await command.ended()

        assert ended.code == 0, ended.stderr
        # 16 requests of 20 ms are 800 a second at most.
        assert still_at == stopped_at < 1_500 + 800 * 4
        run.check(repeats_max=0)
        assert uploads_left(proxy.url, environment["BATCHRUNNER_BLOBS"]) == []


async def test_service_killed_in_mid_run_is_waited_for_and_the_run_goes_on(tmp_path: Path) -> None:
    folder, ports = tmp_path / "weed", distinct_ports(4)
    folder.mkdir()
    async with bench(tmp_path, latency="20ms") as run:
        run.write_input(6_000)
        with seaweedfs(folder, ports=ports) as service:
            run.environment = environment_of(service.url, BATCHRUNNER_SEGMENT_S="500ms")
            command = await run.start("--workers", "1", "--json")
            await run.reach(lambda stats: stats.total >= 1_500, command)
            assert service.process is not None
            service.process.kill()
            await command.said("waiting:")
        with contextlib.ExitStack() as stack:
            # Its start takes seconds, in which nothing is sent.
            service = await asyncio.to_thread(stack.enter_context, seaweedfs(folder, ports=ports))
            stopped_at = run.simulator.stats().total
            ended = await command.ended(within_s=120)

            assert ended.code == 0, ended.stderr
            assert stopped_at < 1_500 + 800 * 4
            run.check(repeats_max=0)
            assert uploads_left(service.url, run.environment["BATCHRUNNER_BLOBS"]) == []


@needs_root
@pytest.mark.long
async def test_service_whose_disk_is_full_is_waited_for_and_the_run_goes_on(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", "96m") as disk:
        folder, ballast = disk / "weed", disk / "ballast"
        folder.mkdir()
        async with bench(tmp_path, latency="20ms") as run:
            run.write_input(6_000)
            with seaweedfs(folder) as service:
                run.environment = environment_of(service.url, BATCHRUNNER_SEGMENT_S="500ms")
                command = await run.start("--workers", "1", "--json")
                await run.reach(lambda stats: stats.total >= 1_500, command)

                fill_up(ballast)
                said = await command.said("waiting:")
                stopped_at = run.simulator.stats().total
                ballast.unlink()
                ended = await command.ended(within_s=120)

                assert "blobs_unavailable" in said
                assert ended.code == 0, ended.stderr
                assert stopped_at < 1_500 + 800 * 4
                run.check(repeats_max=0)
                assert uploads_left(service.url, run.environment["BATCHRUNNER_BLOBS"]) == []


async def test_run_that_waits_for_the_service_ends_when_it_is_told_to(tmp_path: Path, proxy: Proxy) -> None:
    """All of its lines are answered, and none of the answers can be kept."""
    proxy.rule = lambda request: Fault.BUSY if request.method == "PUT" else None
    async with bench(tmp_path) as run:
        run.environment = environment_of(proxy.url)
        run.write_input(WINDOW)
        command = await run.start()
        await command.said("waiting: blobs_unavailable")
        command.send(signal.SIGTERM)
        stopped = await command.ended()

        proxy.rule = lambda _request: None
        ended = await run.run("--json")

        assert stopped.code == 130, stopped.stderr
        assert ended.code == 0, ended.stderr
        run.check(repeats_max=WINDOW)


@dataclass(frozen=True, slots=True)
class Scale:
    lines: int
    kills: int
    latency: str
    window: int


QUICK = Scale(lines=1_500, kills=3, latency="20ms", window=16)
FULL = Scale(lines=50_000, kills=20, latency="20ms", window=32)


@pytest.mark.parametrize("scale", [QUICK, pytest.param(FULL, marks=pytest.mark.long)])
async def test_run_killed_at_random_repeats_what_a_segment_holds_and_ends_as_in_a_folder(
    tmp_path: Path, s3_service: Callable[[str], Service], scale: Scale
) -> None:
    url = s3_service("seaweedfs").url
    rng = random.Random(7)
    per_s = scale.window / 0.02
    # What is in flight, and what was answered within one interval.
    per_kill_max = scale.window + int(per_s * 2.0)
    async with bench(tmp_path, latency=scale.latency) as run:
        run.flags = ["--concurrency", str(scale.window), "--workers", "2"]
        run.environment = environment_of(url)
        run.write_input(scale.lines)
        repeats = 0
        for _ in range(scale.kills):
            command = await run.start()
            target = run.simulator.stats().total + rng.randint(1, scale.lines // scale.kills)
            await run.reach(partial(is_sent, target), command)
            command.kill_group()
            assert (await command.ended()).code == -signal.SIGKILL
            assert run.simulator.stats().repeats - repeats <= per_kill_max
            repeats = run.simulator.stats().repeats
        ended = await (await run.start("--json")).ended(within_s=600)

        assert ended.code == 0, ended.stderr
        run.check(repeats_max=ended.summary["re_executed"])
        assert uploads_left(url, run.environment["BATCHRUNNER_BLOBS"]) == []
        manifest = json.loads((run.state / "manifest.json").read_bytes())
        (name,) = [each for each in names_of(url, key_of(run)) if each.endswith("-output.jsonl")]
        sealed = client_of(url).get_object(Bucket=BUCKET, Key=key_of(run) + name)["Body"].read()
        assert hashlib.sha256(sealed).hexdigest() == manifest["output"]["sha256"]
        print(f"{scale.kills} kills, {run.simulator.stats().repeats} repeats, at most {per_kill_max} a kill")
        assert sums(sealed) == await sums_in_a_folder(tmp_path, run)


def is_sent(count: int, stats: SimulatorStats) -> bool:
    return stats.total >= count


def key_of(run: Bench) -> str:
    return (run.state / "blobs.address").read_text().strip().removeprefix(f"s3://{BUCKET}/") + "/"


def sums(output: bytes) -> str:
    """Sum up an output without what each run draws anew: the ids of batch and exchange."""
    digest = hashlib.sha256()
    for raw in output.splitlines():
        line = json.loads(raw)
        del line["id"], line["response"]["request_id"]
        digest.update(json.dumps(line).encode())
    return digest.hexdigest()


async def sums_in_a_folder(tmp_path: Path, run: Bench) -> str:
    command = ["run", str(run.input), "-o", "folder.jsonl", "-u", run.simulator.url, *run.flags]
    ended = await (await start(command, tmp_path, {})).ended(within_s=600)
    assert ended.code == 0, ended.stderr
    return sums((tmp_path / "folder.jsonl").read_bytes())
