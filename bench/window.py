"""Try the adaptive window on simulated upstreams, many seeds each: how close does it come to the best fixed one?"""

from __future__ import annotations

import sys

from batchrunner.pace import Window
from tests.unit.queueing import Loop, Server, batching, constant, lognormal, uniform

KINDS = {"constant": constant, "lognormal": lognormal, "uniform": uniform}


def slots_case(slots: int, kind: str, seed: int) -> list[tuple[str, float, float, int, int]]:
    """Find, halve, double: for each stage (name, share of the best rate, p50 / alone, smallest and largest size)."""
    loop = Loop(Server(slots, KINDS[kind](0.2)), Window(), seed=seed)
    rows = []
    for name, now, start, end in (
        ("find", slots, 30, 50),
        ("halve", slots // 2, 60, 80),
        ("double", slots, 110, 130),
    ):
        loop.resize(now)
        loop.run_until(end)
        sizes = loop.sizes(start, end)
        rows.append((name, loop.rate(start, end) / (now / 0.2), loop.p50_s(start, end) / 0.2, min(sizes), max(sizes)))
    return rows


def main(seeds: int) -> None:
    for slots in (8, 64, 512):
        for kind in KINDS:
            runs = [slots_case(slots, kind, seed) for seed in range(seeds if slots < 512 else max(1, seeds // 5))]
            for stage in range(3):
                rows = [run[stage] for run in runs]
                worst = min(row[1] for row in rows)
                mean = sum(row[1] for row in rows) / len(rows)
                bad = sum(row[1] < 0.95 or row[2] > 2.0 for row in rows)
                print(
                    f"{slots:4d} {kind:9s} {rows[0][0]:6s} rate mean {mean:.3f} worst {worst:.3f}  "
                    f"p50 worst {max(row[2] for row in rows):.2f}  size {min(row[3] for row in rows)}"
                    f"..{max(row[4] for row in rows)}  bad {bad}/{len(rows)}"
                )
    for seed in range(max(1, seeds // 5)):
        loop = Loop(Server(64, constant(0.2), queue=0), Window(), seed=seed)
        loop.run_until(120)
        print(
            f"queue 0: rate {loop.rate(30, 120) / 320:.3f} refused {loop.refused_share(30, 120):.4f}"
            f" sizes {min(loop.sizes(30, 120))}..{max(loop.sizes(30, 120))}"
        )
        loop = Loop(Server(4096, batching(0.5)), Window(), seed=seed)
        loop.run_until(90)
        print(f"batching: size {loop.window.size} rate {loop.rate(60, 90) / 96:.3f} of the asymptote")
        loop = Loop(Server(200, batching(0.5)), Window(), seed=seed)
        loop.run_until(90)
        best = 200 / (0.5 * (1 + 200 / 48))
        print(f"batching, 200 slots: size {loop.window.size} rate {loop.rate(60, 90) / best:.3f} of the best")
        loop = Loop(Server(1, constant(0.0003), delay_s=0.003), Window(), seed=seed)
        loop.run_until(40)
        sizes = loop.sizes(20, 40)
        print(f"instant: sizes {min(sizes)}..{max(sizes)} rate {loop.rate(20, 40) * 0.0003:.3f}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
