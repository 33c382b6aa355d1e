"""Peak memory of every process over a long file, and order and ledger of what came out.

python -m bench.memory [--lines 1000000] [--few 10000] [--line-bytes 1024] [--workers 1 2]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.inputs import is_in_order, write_requests
from bench.measuring import Command, Ran, batchrunner, measured, scratch
from bench.results import Figure, print_table
from bench.upstream import simulator

_MB = 1_000_000


def run_file(path: Path, count: int, base_url: str, folder: Path, workers: int) -> Ran:
    """Run a file with that many workers, check what came out, and remove it."""
    folder.mkdir()
    output = folder / "out.jsonl"
    command = batchrunner(
        "run", str(path), "-o", str(output), "-u", base_url, "--workers", str(workers), "--concurrency", "64", "--json"
    )
    ran = Command(command, is_sampled=True).wait()
    if ran.code != 0:
        raise RuntimeError(f"run ended with {ran.code}: {ran.stderr[-2000:]} {ran.stdout[-2000:]}")
    if not is_in_order(output, count):
        raise RuntimeError("the output is not the input's lines in order")
    verified = measured(batchrunner("verify", str(path), str(output)))
    if verified.code != 0:
        raise RuntimeError(f"verify ended with {verified.code}: {verified.stderr[-2000:]}")
    return ran


def measure(*, lines: int, few: int, line_bytes: int = 1024, workers: tuple[int, ...] = (1, 2)) -> list[Figure]:
    figures = []
    with scratch() as folder:
        sizes = {"one": 1, "few": few, "many": lines}
        paths = {name: write_requests(folder / f"{name}.jsonl", sizes[name], line_bytes=line_bytes) for name in sizes}
        for count in workers:
            ran = {}
            for name, path in paths.items():
                with simulator() as upstream:
                    ran[name] = run_file(path, sizes[name], upstream.base_url, folder / f"{name}-{count}", count)
            cost_us = (ran["many"].cpu_s - ran["one"].cpu_s) / lines * 1e6
            figures += _figures(ran, lines, few, count, cost_us)
    return figures


def _figures(ran: dict[str, Ran], lines: int, few: int, workers: int, cost_us: float) -> list[Figure]:
    stem = f"memory.workers_{workers}"
    peaks = {name: sorted(each.peak_bytes.values()) for name, each in ran.items()}
    ratio = peaks["many"][-1] / peaks["few"][-1]
    each_mb = [peak / _MB for peak in peaks["many"]]
    return [
        Figure(
            f"{stem}.peak_mb", each_mb[-1], "MB", f"peak RSS of the largest process, {lines} lines", "< 120", each_mb
        ),
        Figure(f"{stem}.peak_few_mb", peaks["few"][-1] / _MB, "MB", f"the same, {few} lines"),
        Figure(f"{stem}.growth", ratio, "x", f"peak RSS, {lines} lines / {few} lines", "<= 1.3"),
        Figure(f"{stem}.cpu_us", cost_us, "us CPU/line", f"run, all its processes, {lines} lines"),
        Figure(f"{stem}.rate", lines / ran["many"].wall_s, "lines/s", "from start to exit"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--few", type=int, default=10_000)
    parser.add_argument("--line-bytes", type=int, default=1024)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    print_table(
        measure(lines=options.lines, few=options.few, line_bytes=options.line_bytes, workers=tuple(options.workers))
    )


if __name__ == "__main__":
    main()
