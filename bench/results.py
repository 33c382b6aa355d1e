"""Figures: how they are named, printed and kept."""

from __future__ import annotations

import json
import operator
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "results"
_COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt, ">": operator.gt, "=": operator.eq}


@dataclass(frozen=True)
class Figure:
    """One measured number, what it is of, its goal if there is one, and the measurements that it is the median of."""

    name: str
    value: float
    unit: str
    what: str
    goal: str | None = None
    each: Sequence[float] = field(default_factory=tuple)

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is reached; None without one."""
        if self.goal is None:
            return None
        sign, bound = self.goal.split()
        return bool(_COMPARE[sign](self.value, float(bound)))

    def row(self) -> str:
        verdict = {None: "", True: "met", False: "MISSED"}[self.is_met]
        spread = f"{show(min(self.each))} .. {show(max(self.each))}" if len(self.each) > 1 else ""
        number = f"{self.name:<44} {show(self.value):>12} {self.unit:<20} {spread:<24}"
        return f"{number} {self.goal or '':<10} {verdict:<7} {self.what}"


def show(value: float) -> str:
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def print_table(figures: Sequence[Figure]) -> None:
    print(f"{'figure':<44} {'median':>12} {'unit':<20} {'from .. to':<24} {'goal':<10} {'':<7} what")
    for figure in figures:
        print(figure.row())


def save(figures: Sequence[Figure], name: str) -> Path:
    """Write the figures, with the machine and the versions they hold for, and give the path."""
    FOLDER.mkdir(exist_ok=True)
    path = FOLDER / f"{name}.json"
    packages = ("batchrunner", "aiohttp", "uvloop", "orjson", "msgspec", "openai")
    found = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.platform()},
        "versions": {each: _version(each) for each in packages},
        "figures": [asdict(figure) | {"is_met": figure.is_met} for figure in figures],
    }
    path.write_text(json.dumps(found, indent=1) + "\n")
    return path


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError

    try:
        return version(package)
    except PackageNotFoundError:
        return None
