"""Measure every promise that has a number, and print one line for each.

python -m bench.proof [--quick] [NAME ...]
"""

from __future__ import annotations

import argparse
import contextlib
import sys

from bench.results import Figure, save, show
from bench.suite import PROOFS


def tell(figure: Figure) -> str:
    verdict = "met   " if figure.is_met else "MISSED"
    return f"{verdict} {figure.name}: {show(figure.value)} {figure.unit}, promised {figure.goal} ({figure.what})"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.proof", description="Measure every promise.")
    parser.add_argument("--quick", action="store_true", help="small sizes: the figures say little")
    parser.add_argument("names", nargs="*", choices=[*PROOFS, []], help="which ones; all by default")
    options = parser.parse_args()
    figures = []
    for name in options.names or PROOFS:
        with contextlib.redirect_stdout(sys.stderr):
            found = PROOFS[name](options.quick)
        figures += found
        for figure in found:
            if figure.goal is not None:
                print(tell(figure), flush=True)
    save(figures, "quick-proof" if options.quick else "proof")


if __name__ == "__main__":
    main()
