"""Counts the problems of an input, hands each on, and keeps those that a batch object lists."""

from __future__ import annotations

from collections.abc import Callable

from batchrunner.lines import ProblemCode
from batchrunner.models import LineProblem


class Problems:
    """All problems of one input; the first `kept_max` are kept, and `on_problem` gets each."""

    def __init__(self, kept_max: int, on_problem: Callable[[LineProblem], None] | None) -> None:
        self.count = 0
        self._kept_max = kept_max
        self._on_problem = on_problem
        self._of_file: list[LineProblem] = []
        self._kept: list[LineProblem] = []
        self._late: list[LineProblem] = []

    @property
    def has_any_of_file(self) -> bool:
        """Tell whether the file as a whole was refused."""
        return bool(self._of_file)

    def add_of_file(self, code: ProblemCode, message: str) -> None:
        """Take a problem of the whole file; these are listed first, whatever the cap."""
        problem = LineProblem(code, message, None, None)
        self._hand_on(problem)
        self._of_file.append(problem)

    def add(self, problem: LineProblem) -> None:
        """Take the next problem in line order."""
        self._hand_on(problem)
        if len(self._kept) < self._kept_max:
            self._kept.append(problem)

    def add_late(self, problem: LineProblem) -> None:
        """Take a problem of any line."""
        self._hand_on(problem)
        self._late.append(problem)
        if len(self._late) > 2 * self._kept_max:
            self._late = sorted(self._late, key=_line_of)[: self._kept_max]

    def listed(self) -> tuple[LineProblem, ...]:
        """Give the first problems, and a last one that tells how many there are when these are not all."""
        kept = sorted(self._kept + self._late, key=_line_of)[: self._kept_max]
        problems = self._of_file + kept
        if len(problems) < self.count:
            message = f"There are {self.count} problems in all; this list holds the first {len(problems)}."
            problems.append(LineProblem(ProblemCode.TOO_MANY_ERRORS, message, None, None))
        return tuple(problems)

    def _hand_on(self, problem: LineProblem) -> None:
        self.count += 1
        if self._on_problem is not None:
            self._on_problem(problem)


def _line_of(problem: LineProblem) -> int:
    return problem.line_number or 0
