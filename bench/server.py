"""What a server costs: uploads against a raw handler, its memory, its answers while a long batch runs, CPU per line
against `run`, and how soon it goes on after a kill.

python -m bench.server [--lines 1000000] [--seconds 60] [--upload-mib 200] [--pairs 3] [--cost-lines 50000]

What many small batches wait behind a huge one: python -m bench.fairness.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from types import MappingProxyType

import aiohttp

from bench.end_to_end import IN_FLIGHT, Sides
from bench.inputs import write_requests
from bench.measuring import ENVIRONMENT, cores, median, scratch
from bench.results import Figure, print_table
from bench.served import API, WORKER, Client, Served, body_of, client_of, serving
from bench.upstream import Upstream, simulator

_MB = 1_000_000
_MIB = 1024 * 1024
ASKS_PER_S = 20
_LOOK_S = 0.005
_PATIENCE_S = 120.0


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """How much is measured: as the promises have it, unless told otherwise."""

    lines: int = 1_000_000
    seconds: float = 60.0
    upload_mib: int = 200
    pairs: int = 3
    cost_lines: int = 50_000


@contextlib.contextmanager
def raw_server(folder: Path) -> Iterator[str]:
    """Start the handlers that ours are compared with, and give their address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.raw_server", str(folder)], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


# -- uploads ---------------------------------------------------------------------------------------------------------


async def upload_rates(client: Client, raw: Client, path: Path, pairs: int) -> dict[str, list[float]]:
    """Upload a file to the server and to the raw handler, that many times; give bytes a second."""
    rates: dict[str, list[float]] = {"ours": [], "raw": [], "raw_unsynced": []}
    size_bytes = path.stat().st_size
    sides = {
        "ours": lambda: client.upload(path),
        "raw": lambda: raw.ask("POST", "/raw?sync=1", **body_of(path, b"", b"", {})),
        "raw_unsynced": lambda: raw.ask("POST", "/raw", **body_of(path, b"", b"", {})),
    }
    for send in sides.values():
        await send()  # Fills the page cache.
    for number in range(pairs):
        for name in sides if number % 2 == 0 else reversed(sides):
            began_s = time.perf_counter()
            await sides[name]()
            rates[name].append(size_bytes / (time.perf_counter() - began_s))
    return rates


def _upload_figures(rates: dict[str, list[float]], size_mib: int) -> list[Figure]:
    ratios = [ours / raw for ours, raw in zip(rates["ours"], rates["raw"], strict=True)]
    harder = [ours / raw for ours, raw in zip(rates["ours"], rates["raw_unsynced"], strict=True)]
    what = f"upload of {size_mib} MiB, ours / raw body to disk, both hashed"
    return [
        Figure("server.upload_rate", median(rates["ours"]) / _MB, "MB/s", f"upload of {size_mib} MiB"),
        Figure("server.upload_over_raw", median(ratios), "x", f"{what} and synced", ">= 0.7", ratios),
        Figure("server.upload_over_unsynced", median(harder), "x", f"{what}, the raw one not synced", None, harder),
    ]


# -- answers while a batch runs --------------------------------------------------------------------------------------


async def answer_times_s(client: Client, path: str, seconds: float) -> list[float]:
    """Ask at a fixed rate, whether or not the answer before has come; give the seconds from when each was due."""
    began_s = time.perf_counter()

    async def ask(due_s: float) -> float:
        await client.ask("GET", path)
        return time.perf_counter() - due_s

    async def asked() -> AsyncIterator[asyncio.Task[float]]:
        for number in range(int(seconds * ASKS_PER_S)):
            due_s = began_s + number / ASKS_PER_S
            await asyncio.sleep(due_s - time.perf_counter())
            yield asyncio.create_task(ask(due_s))

    tasks = [task async for task in asked()]
    return list(await asyncio.gather(*tasks))


def p99(values: list[float]) -> float:
    """The value that one in a hundred is above."""
    return sorted(values)[max(0, -(-len(values) * 99 // 100) - 1)]


async def _answers(client: Client, raw: Client, path: Path, seconds: float, lines: int) -> list[Figure]:
    file_id = await client.upload(path)
    batch_id = await client.create(file_id)
    await client.when(batch_id, "in_progress")
    # The word shows what the machine itself makes a client wait at that time.
    ours_s, words_s = await asyncio.gather(
        answer_times_s(client, f"/batches/{batch_id}", seconds), answer_times_s(raw, "/word", seconds)
    )
    batch = await client.ask("GET", f"/batches/{batch_id}")
    if batch["status"] != "in_progress":
        raise RuntimeError(f"the batch ended too early, give it more lines: {batch}")
    await client.ask("POST", f"/batches/{batch_id}/cancel")
    done = batch["request_counts"]["completed"]
    where = f"{ASKS_PER_S} a second for {seconds:.0f} s while {lines} lines run, {done} of them done"
    return [
        Figure("server.get_p99_ms", p99(ours_s) * 1000, "ms", f"GET of a batch, {where}", "<= 50"),
        Figure("server.get_median_ms", median(ours_s) * 1000, "ms", "the same, median"),
        Figure("server.word_p99_ms", p99(words_s) * 1000, "ms", "a bare handler, asked at the same time"),
    ]


async def _busy_server(served: Served, raw_url: str, paths: dict[str, Path], sizes: Sizes) -> list[Figure]:
    async with client_of(served.base_url) as client, client_of(raw_url) as raw:
        figures = _upload_figures(await upload_rates(client, raw, paths["upload"], sizes.pairs), sizes.upload_mib)
        figures += await _answers(client, raw, paths["many"], sizes.seconds, sizes.lines)
    peak_mb = served.peak_bytes(API) / _MB
    return [*figures, Figure("server.api_peak_mb", peak_mb, "MB", "peak RSS of the API process in all this", "< 150")]


def measure_answers(sizes: Sizes) -> list[Figure]:
    """Uploads, answers and memory of one server."""
    with scratch() as folder, simulator(latency="50ms") as upstream, raw_server(folder) as raw_url:
        paths = {
            "upload": write_requests(folder / "upload.jsonl", sizes.upload_mib * 1024, line_bytes=1024),
            "many": write_requests(folder / "many.jsonl", sizes.lines, line_bytes=210),
        }
        with serving(folder / "server", upstream, "--workers", "1") as served:
            return asyncio.run(_busy_server(served, raw_url, paths, sizes))


# -- CPU per line ----------------------------------------------------------------------------------------------------


async def _batch_cost_s(served: Served, path: Path, lines: int) -> tuple[float, float]:
    """Run one batch; give the CPU seconds of the workers, and those of parent, API and workers."""
    async with client_of(served.base_url) as client:
        file_id = await client.upload(path)
        before = [served.cpu_s(WORKER), served.cpu_s(API)]
        # One who waits as users do: asked twenty times a second, the API would cost more than it does.
        batch_id = await client.create(file_id)
        while (batch := await client.ask("GET", f"/batches/{batch_id}"))["status"] not in ("completed", "failed"):
            await asyncio.sleep(1.0)
        after = [served.cpu_s(WORKER), served.cpu_s(API)]
    if batch["request_counts"]["completed"] != lines:
        raise RuntimeError(f"the batch is not whole: {batch}")
    workers_s, api_s = (late - early for late, early in zip(after, before, strict=True))
    return workers_s, workers_s + api_s


def measure_cost(sizes: Sizes) -> list[Figure]:
    """CPU per line of the workers of a server over that of `run`, pair by pair."""
    lines = sizes.cost_lines
    client_core, upstream_core = cores()
    costs: dict[str, list[float]] = {"run": [], "workers": [], "server": []}
    with scratch() as folder, simulator(core=upstream_core) as upstream:
        many = write_requests(folder / "many.jsonl", lines)
        one = write_requests(folder / "one.jsonl", 1)
        sides = Sides(folder, upstream.base_url, client_core, {})
        flags = ("--workers", "1", "--concurrency", str(IN_FLIGHT))
        with serving(folder / "server", upstream, *flags, core=client_core) as served:
            asyncio.run(_batch_cost_s(served, one, 1))  # The first batch warms everything up.
            sides.ours(one, 1)

            def run() -> None:
                costs["run"].append((sides.ours(many, lines).cpu_s - sides.ours(one, 1).cpu_s) / lines * 1e6)

            def serve() -> None:
                workers_s, server_s = asyncio.run(_batch_cost_s(served, many, lines))
                costs["workers"].append(workers_s / lines * 1e6)
                costs["server"].append(server_s / lines * 1e6)

            for number in range(sizes.pairs):
                for side in (run, serve) if number % 2 == 0 else (serve, run):
                    side()
    return _cost_figures(costs, lines)


def _cost_figures(costs: dict[str, list[float]], lines: int) -> list[Figure]:
    ratios = [ours / run for ours, run in zip(costs["workers"], costs["run"], strict=True)]
    what = f"{lines} lines, {IN_FLIGHT} in flight"
    return [
        Figure("server.run_us", median(costs["run"]), "us CPU/line", f"run less its start, {what}", None, costs["run"]),
        Figure("server.worker_us", median(costs["workers"]), "us CPU/line", f"a batch, {what}", None, costs["workers"]),
        Figure("server.all_us", median(costs["server"]), "us CPU/line", "the API too", None, costs["server"]),
        Figure("server.worker_over_run", median(ratios), "x", f"CPU of the workers / run, {what}", "<= 1.1", ratios),
    ]


# -- recovery --------------------------------------------------------------------------------------------------------


async def _submit(served: Served, path: Path) -> None:
    async with client_of(served.base_url) as client:
        await client.when(await client.create(await client.upload(path)), "in_progress")


def _await_requests(upstream: Upstream, served: Served, wanted: int) -> float:
    """Wait until the upstream has had that many requests, and give the seconds since the server was started."""
    while upstream.stats()["total"] < wanted:
        if time.perf_counter() - served.began_s > _PATIENCE_S:
            raise RuntimeError(f"no {wanted} requests: {served.talk.read_text()[-2000:]}")
        time.sleep(_LOOK_S)
    return time.perf_counter() - served.began_s


async def _back_s(served: Served, module: str, is_back: Callable[[Client], Awaitable[bool]]) -> float:
    """Kill the process of a module; give the seconds until its successor works."""
    (pid,) = served.pids(module)
    async with client_of(served.base_url) as client:
        began_s = time.perf_counter()
        os.kill(pid, signal.SIGKILL)
        while not await is_back(client):
            if time.perf_counter() - began_s > _PATIENCE_S:
                raise RuntimeError(f"{module} does not come back: {served.talk.read_text()[-2000:]}")
            await asyncio.sleep(_LOOK_S)
        return time.perf_counter() - began_s


def _one_by_one_s(served: Served, upstream: Upstream) -> tuple[float, float]:
    """Kill the API and then the worker; give the seconds to the next answer and to the next request."""
    (worker,) = served.pids(WORKER)

    async def answers(client: Client) -> bool:
        # The parent holds the port, so that whoever asks waits for the successor.
        try:
            await client.ask("GET", "/batches")
        except (aiohttp.ClientError, ConnectionError):
            return False
        return True

    async def sends(_: Client) -> bool:
        if served.pids(WORKER) in ([], [worker]):
            return False
        return upstream.stats()["in_flight"] > 0

    return asyncio.run(_back_s(served, API, answers)), asyncio.run(_back_s(served, WORKER, sends))


def measure_recovery(sizes: Sizes) -> list[Figure]:
    """Seconds from a kill, or the command that follows a kill of everything, until the work goes on."""
    kills = sizes.pairs
    all_s: list[float] = []
    api_s: list[float] = []
    worker_s: list[float] = []
    with scratch() as folder, simulator(latency="50ms") as upstream:
        path = write_requests(folder / "many.jsonl", sizes.cost_lines)
        flags = ("--workers", "1", "--concurrency", str(IN_FLIGHT))
        with serving(folder, upstream, *flags) as served:
            asyncio.run(_submit(served, path))
            _await_requests(upstream, served, 20 * IN_FLIGHT)
        for _ in range(kills):
            # A request that was on its way may still be counted now.
            time.sleep(0.5)
            before = upstream.stats()["total"]
            with serving(folder, upstream, *flags) as served:
                all_s.append(_await_requests(upstream, served, before + 1))
                _await_requests(upstream, served, before + 20 * IN_FLIGHT)
                for each_s, back_s in zip((api_s, worker_s), _one_by_one_s(served, upstream), strict=True):
                    each_s.append(back_s)
    what = f"the longest of {kills}"
    return [
        Figure("server.recovery_s", max(all_s), "s", f"kill -9 of all: command to first request, {what}", "< 5", all_s),
        Figure("server.api_back_s", max(api_s), "s", f"kill -9 of the API: to the next answer, {what}", "< 5", api_s),
        Figure(
            "server.worker_back_s",
            max(worker_s),
            "s",
            f"kill -9 of the worker: to the next request, {what}",
            "< 5",
            worker_s,
        ),
    ]


PARTS: Mapping[str, Callable[[Sizes], list[Figure]]] = MappingProxyType(
    {"answers": measure_answers, "cost": measure_cost, "recovery": measure_recovery}
)


def measure(sizes: Sizes) -> list[Figure]:
    """Everything."""
    return [figure for part in PARTS.values() for figure in part(sizes)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    for each in fields(Sizes):
        parser.add_argument(f"--{each.name.replace('_', '-')}", type=type(each.default), default=each.default)
    parser.add_argument("--only", choices=[*PARTS], help="one part alone")
    options = vars(parser.parse_args())
    only = options.pop("only")
    sizes = Sizes(**options)
    print_table(PARTS[only](sizes) if only else measure(sizes))


if __name__ == "__main__":
    main()
