"""Run the benchmarks, print one table, and write the figures to bench/results/.

python -m bench [--quick] [NAME ...]
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from bench.results import print_table, save
from bench.suite import BENCHES


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure speed as ratios.")
    parser.add_argument("--quick", action="store_true", help="small sizes: minutes become seconds, figures rough")
    parser.add_argument("names", nargs="*", choices=[*BENCHES, []], help="which ones; all by default")
    options = parser.parse_args()
    figures = []
    for name in options.names or BENCHES:
        print(f"measuring {name} ...", file=sys.stderr)
        # Some benches print a table of their own; one table is enough.
        with contextlib.redirect_stdout(sys.stderr):
            figures += BENCHES[name](options.quick)
    print_table(figures)
    print(f"written to {save(figures, 'quick' if options.quick else 'bench')}", file=sys.stderr)


if __name__ == "__main__":
    main()
