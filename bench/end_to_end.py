"""What a request costs in `run`, from validation to sealed files, against clients that only send and read.

python -m bench.end_to_end [--lines 20000] [--pairs 5] [--loop uvloop|asyncio] [--openai-lines 1000]

Ours is user + system time of every process of the command, from start to exit, less that of a run of one line. The
others are measured around their loops only, in processes of their own. Same upstream on the other core; event loop,
allocator and gc settings are the same for ours and bare, naive and openai are left as people run them.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path

from bench.inputs import is_in_order, write_requests
from bench.measuring import ROOT, Command, Ran, batchrunner, cores, in_pairs, median, scratch
from bench.results import Figure, print_table
from bench.upstream import simulator

IN_FLIGHT = 64
WHAT = {
    "run": "run, all its processes, start to exit less a run of one line",
    "bare": "tuned aiohttp loop that only posts and reads",
    "transport": "our own transport alone, in the same loop",
    "naive": "aiohttp as most scripts use it",
    "openai": "AsyncOpenAI with a semaphore",
}


def loop_environment(folder: Path, loop: str) -> dict[str, str]:
    """Make uvloop impossible to import where plain asyncio is to be measured."""
    if loop == "uvloop":
        return {}
    shim = folder / "without-uvloop"
    shim.mkdir(exist_ok=True)
    (shim / "uvloop.py").write_text("raise ImportError('left out on purpose')\n")
    return {"PYTHONPATH": f"{shim}:{ROOT}"}


class Sides:
    """The commands that are compared, over one upstream."""

    def __init__(self, folder: Path, base_url: str, core: int | None, environment: dict[str, str]) -> None:
        self._folder = folder
        self._base_url = base_url
        self._core = core
        self._environment = environment
        self._serial = 0

    def ours(self, path: Path, count: int, workers: int = 1) -> Ran:
        """One run of our command into a folder of its own."""
        self._serial += 1
        output = self._folder / f"out-{self._serial}" / "out.jsonl"
        output.parent.mkdir()
        command = batchrunner(
            "run", str(path), "-o", str(output), "-u", self._base_url, "--workers", str(workers),
            "--concurrency", str(IN_FLIGHT), "--json",
        )  # fmt: skip
        ran = self._run(command)
        if ran.code == 0 and not is_in_order(output, count):
            raise RuntimeError("the output is not the input's lines in order")
        return ran

    def peer(self, kind: str, path: Path) -> Ran:
        """One run of another client."""
        command = [sys.executable, "-m", "bench.peers", kind, str(path), self._base_url, "--in-flight", str(IN_FLIGHT)]
        return self._run(command)

    def _run(self, command: list[str]) -> Ran:
        return Command(command, core=self._core, environment=self._environment).wait()


def measure(*, lines: int, pairs: int, loop: str = "uvloop", openai_lines: int = 1000) -> list[Figure]:
    client_core, upstream_core = cores()
    with scratch() as folder, simulator(core=upstream_core) as upstream:
        many = write_requests(folder / "many.jsonl", lines)
        one = write_requests(folder / "one.jsonl", 1)
        few = write_requests(folder / "few.jsonl", openai_lines)
        sides = Sides(folder, upstream.base_url, client_core, loop_environment(folder, loop))
        commands: dict[str, Callable[[], Ran]] = {
            "one": lambda: sides.ours(one, 1),
            "ours": lambda: sides.ours(many, lines),
            "bare": lambda: sides.peer("bare", many),
            "transport": lambda: sides.peer("transport", many),
        }
        sides.ours(one, 1)  # Compiles and fills the page cache.
        rows = in_pairs(commands, pairs)
        rows |= in_pairs({"naive": lambda: sides.peer("naive", many)}, max(1, pairs // 2))
        rows |= in_pairs({"openai": lambda: sides.peer("openai", few)}, max(1, pairs // 2))
    return _figures(rows, lines, loop)


def _figures(rows: dict[str, list[Ran]], lines: int, loop: str) -> list[Figure]:
    pairs = list(zip(rows["ours"], rows["one"], strict=True))
    cost = {"run": [(many.cpu_s - one.cpu_s) / (lines - 1) * 1e6 for many, one in pairs]}
    rate = {"run": [(lines - 1) / (many.wall_s - one.wall_s) for many, one in pairs]}
    for kind in ("bare", "transport", "naive", "openai"):
        cost[kind], rate[kind] = _peer(rows[kind])
    ratios = [bare / ours for bare, ours in zip(cost["bare"], cost["run"], strict=True)]
    over_transport = [run / own for run, own in zip(cost["run"], cost["transport"], strict=True)]
    begun = [one.cpu_s for one in rows["one"]]
    over_openai = median(rate["run"]) / median(rate["openai"])
    figures = [
        Figure(f"end_to_end.{kind}_us", median(cost[kind]), "us CPU/request", WHAT[kind], None, cost[kind])
        for kind in WHAT
    ]
    figures += [
        Figure(f"end_to_end.{kind}_rate", median(rate[kind]), "requests/s", WHAT[kind], None, rate[kind])
        for kind in WHAT
    ]
    what = f"CPU, bare / run, {lines} lines, {IN_FLIGHT} in flight, {loop}"
    return [
        *figures,
        Figure("end_to_end.start_s", median(begun), "s CPU", "run of one line", None, begun),
        Figure("end_to_end.bare_over_run", median(ratios), "x", what, ">= 0.80", ratios),
        # Whoever does more must cost more: at 1 or below, something is measured wrongly.
        Figure(
            "end_to_end.run_over_transport", median(over_transport), "x", "CPU, run / transport", "> 1", over_transport
        ),
        Figure("end_to_end.run_over_openai", over_openai, "x", "requests/s, run / AsyncOpenAI", ">= 10"),
    ]


def _peer(rows: list[Ran]) -> tuple[list[float], list[float]]:
    told = [json.loads(ran.stdout) for ran in rows]
    return [each["cpu_s"] / each["count"] * 1e6 for each in told], [each["count"] / each["wall_s"] for each in told]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lines", type=int, default=20_000)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--loop", choices=["uvloop", "asyncio"], default="uvloop")
    parser.add_argument("--openai-lines", type=int, default=1000)
    options = parser.parse_args()
    print_table(measure(lines=options.lines, pairs=options.pairs, loop=options.loop, openai_lines=options.openai_lines))


if __name__ == "__main__":
    main()
