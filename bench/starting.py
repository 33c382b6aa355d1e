"""Seconds from the command to its first request: on a fresh file, after a kill, and when there is nothing left to do.

python -m bench.starting [--lines 1000000]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from bench.inputs import write_requests
from bench.measuring import Command, batchrunner, measured, scratch
from bench.results import Figure, print_table
from bench.upstream import Upstream, simulator

_LOOK_S = 0.005
_PATIENCE_S = 600.0


def await_requests(upstream: Upstream, command: Command, wanted: int) -> float:
    """Wait until the upstream has had that many requests, and give the seconds since the command began."""
    while upstream.stats()["total"] < wanted:
        if not command.is_running():
            raise RuntimeError(f"run ended too early: {command.wait()}")
        if time.perf_counter() - command.began_s > _PATIENCE_S:
            raise RuntimeError(f"no {wanted} requests within {_PATIENCE_S:.0f} s")
        time.sleep(_LOOK_S)
    return time.perf_counter() - command.began_s


def kill_and_resume(path: Path, folder: Path, upstream: Upstream, lines: int) -> tuple[float, float, int]:
    """Give seconds to the first request, the same after a kill in mid run, and the repeats that the kill caused."""
    line = batchrunner("run", str(path), "-o", str(folder / "out.jsonl"), "-u", upstream.base_url, "--json")
    command = Command(line)
    try:
        first_s = await_requests(upstream, command, 1)
        await_requests(upstream, command, lines // 2)
        command.kill()
        command.wait()
        # A request that was on its way may still be counted now.
        time.sleep(0.5)
        before = upstream.stats()
        command = Command(line)
        resume_s = await_requests(upstream, command, before["total"] + 1)
        await_requests(upstream, command, before["total"] + min(lines // 10, 5000))
        repeats = upstream.stats()["repeats"] - before["repeats"]
    finally:
        command.kill()
        command.wait()
    return first_s, resume_s, repeats


def done_again_s(folder: Path, upstream: Upstream) -> float:
    """Give the seconds that a finished run takes to say so."""
    path = write_requests(folder / "done.jsonl", 1000)
    line = batchrunner("run", str(path), "-o", str(folder / "done-out.jsonl"), "-u", upstream.base_url, "--json")
    first, again = measured(line), measured(line)
    if (first.code, again.code) != (0, 0):
        raise RuntimeError(
            f"run ended with {first.code}, then {again.code}: {first.stderr[-2000:]} {again.stderr[-2000:]}"
        )
    return again.wall_s


def measure(*, lines: int) -> list[Figure]:
    with scratch() as folder, simulator() as upstream:
        path = write_requests(folder / "in.jsonl", lines, line_bytes=1024)
        first_s, resume_s, repeats = kill_and_resume(path, folder, upstream, lines)
        done_s = done_again_s(folder, upstream)
    return [
        Figure("starting.first_request_s", first_s, "s", f"from the command to its first request, {lines} lines"),
        Figure("starting.resume_s", resume_s, "s", f"the same after kill -9 at half of {lines} lines"),
        Figure("starting.resume_repeats", repeats, "requests", "sent again after that kill"),
        Figure("starting.already_done_s", done_s, "s", "the command on a finished run", "< 3"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lines", type=int, default=1_000_000)
    print_table(measure(lines=parser.parse_args().lines))


if __name__ == "__main__":
    main()
