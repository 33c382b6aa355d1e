"""Kill one run again and again, all its processes at once, and count what was sent twice and what came out in the end.

python -m bench.kills [--lines 10000] [--kills 50] [--workers 1] [--seed N]
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from pathlib import Path

from bench.inputs import is_in_order, write_requests
from bench.measuring import Command, batchrunner, measured, scratch
from bench.results import Figure, print_table
from bench.upstream import Upstream, simulator

IN_FLIGHT = 16
LATENCY_S = 0.25
_GROUP_RECORDS = 256


def kill_again_and_again(line: list[str], upstream: Upstream, moments_s: list[float]) -> list[int]:
    """Kill the command so many seconds after it began, each time; give the repeats that each kill led to."""
    repeats = [0]
    for moment_s in moments_s:
        command = Command(line)
        time.sleep(moment_s)
        if not command.is_running():
            break
        command.kill()
        command.wait()
        repeats.append(upstream.stats()["repeats"])
    return repeats


def measure(*, lines: int = 10_000, kills: int = 50, workers: int = 1, seed: int | None = None) -> list[Figure]:
    seed = random.randrange(10**6) if seed is None else seed
    rng = random.Random(seed)
    undisturbed_s = lines / IN_FLIGHT * LATENCY_S
    moments_s = [rng.uniform(0.3, 1.5 * undisturbed_s / kills + 1.0) for _ in range(kills)]
    with scratch() as folder, simulator("--faults", "2%", latency=f"{LATENCY_S * 1000:.0f}ms") as upstream:
        path = write_requests(folder / "in.jsonl", lines)
        output = folder / "out.jsonl"
        options = ("--concurrency", str(IN_FLIGHT), "--workers", str(workers), "--json")
        line = batchrunner("run", str(path), "-o", str(output), "-u", upstream.base_url, *options)
        totals = kill_again_and_again(line, upstream, moments_s)
        last = measured(line)
        totals.append(upstream.stats()["repeats"])
        if last.code != 0:
            raise RuntimeError(f"seed {seed}: the last run ended with {last.code}: {last.stderr[-2000:]}")
        is_right = is_in_order(output, lines)
        verified = _verify(path, output)
        summary = json.loads(last.stdout)
    # What a kill cost shows while the next try runs.
    each = [after - before for before, after in itertools.pairwise(totals)][1:]
    stem = f"kills.workers_{workers}"
    told = f"{len(each)} kills of {lines} lines, seed {seed}"
    bound = IN_FLIGHT + _GROUP_RECORDS * workers
    return [
        Figure(f"{stem}.worst_repeats", max(each), "requests", f"sent twice by one kill, {told}", f"<= {bound}", each),
        Figure(f"{stem}.repeats", totals[-1], "requests", "sent twice altogether", f"<= {summary['re_executed']}"),
        Figure(f"{stem}.re_executed", summary["re_executed"], "requests", "what the run itself reports"),
        Figure(f"{stem}.is_whole", float(is_right), "", "each line once, in input order", "= 1"),
        Figure(f"{stem}.verify_code", verified, "", "exit code of `verify`", "= 0"),
    ]


def _verify(path: Path, output: Path) -> int:
    return measured(batchrunner("verify", str(path), str(output))).code


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lines", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    print_table(measure(lines=options.lines, kills=options.kills, workers=options.workers, seed=options.seed))


if __name__ == "__main__":
    main()
