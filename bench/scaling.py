"""What a second worker process costs: CPU per line of `run --workers 2` over that of `--workers 1`, pair by pair.

python -m bench.scaling [--lines 100000] [--pairs 9]

All processes of the command share one core and the upstream has the other, for both sides: where there are fewer cores
than busy processes, their fight for the cores would be measured otherwise. A shared machine has fast and slow seconds,
and two processes feel its caches more than one does: single pairs spread by a fifth, so that many short ones tell more
than a few long ones. A run of one line, which is taken off, is the median of all for the same reason.
"""

from __future__ import annotations

import argparse

from bench.end_to_end import IN_FLIGHT, Sides
from bench.inputs import write_requests
from bench.measuring import Ran, cores, in_pairs, median, scratch
from bench.results import Figure, print_table
from bench.upstream import simulator


def measure(*, lines: int, pairs: int) -> list[Figure]:
    client_core, upstream_core = cores()
    with scratch() as folder, simulator(core=upstream_core) as upstream:
        many = write_requests(folder / "many.jsonl", lines, line_bytes=1024)
        one = write_requests(folder / "one.jsonl", 1)
        sides = Sides(folder, upstream.base_url, client_core, {})
        rows = in_pairs(
            {
                "start_1": lambda: sides.ours(one, 1, workers=1),
                "many_1": lambda: sides.ours(many, lines, workers=1),
                "many_2": lambda: sides.ours(many, lines, workers=2),
                "start_2": lambda: sides.ours(one, 1, workers=2),
            },
            pairs,
        )
    costs = {count: _costs_us(rows[f"many_{count}"], rows[f"start_{count}"], lines) for count in (1, 2)}
    ratios = [two / one for one, two in zip(costs[1], costs[2], strict=True)]
    where = f"{lines} lines, {IN_FLIGHT} in flight"
    return [
        Figure("scaling.workers_1_us", median(costs[1]), "us CPU/line", f"run --workers 1, {where}", None, costs[1]),
        Figure("scaling.workers_2_us", median(costs[2]), "us CPU/line", f"run --workers 2, {where}", None, costs[2]),
        Figure("scaling.cpu_2_over_1", median(ratios), "x", "CPU per line, two workers / one", "<= 1.15", ratios),
    ]


def _costs_us(many: list[Ran], start: list[Ran], lines: int) -> list[float]:
    start_s = median([each.cpu_s for each in start])
    return [(each.cpu_s - start_s) / lines * 1e6 for each in many]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--lines", type=int, default=100_000)
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args()
    print_table(measure(lines=options.lines, pairs=options.pairs))


if __name__ == "__main__":
    main()
