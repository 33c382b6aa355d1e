"""A breadth-first explicit-state explorer: every reachable state, the rules that break there, the shortest way to each.

Knows nothing of batches: a model is an initial state, a function that lists what may happen next, and named predicates.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

StateT = TypeVar("StateT", bound=Hashable)

Steps = Callable[[StateT], Iterable[tuple[str, StateT]]]
"""Gives every (name of the step, state after it) that may follow; a step that changes nothing may be left out."""

END_OUT_OF_REACH = "the end is out of reach"
"""The name under which a broken liveness check is reported."""

STATES_MAX = 3_000_000


class StateSpaceTooLargeError(Exception):
    """The model has more states than the caller allowed; a search cut short would prove nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Violation(Generic[StateT]):
    """One broken rule and a shortest sequence of steps that leads from the initial state to it."""

    name: str
    trace: tuple[str, ...]
    state: StateT

    def __str__(self) -> str:
        return f"{self.name}: {' > '.join(self.trace) or 'in the initial state'}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report(Generic[StateT]):
    """What a search found: `violations` by rule name; `stuck_states` counts those that cannot reach the goal.

    `steps_taken` holds the name of every step that occurred: what is not in it was not tested.
    """

    states: int
    transitions: int
    steps_taken: frozenset[str]
    violations: Mapping[str, Violation[StateT]]
    stuck_states: int

    def __str__(self) -> str:
        found = "\n".join(str(violation) for violation in self.violations.values())
        counted = f"{self.states} states, {self.transitions} transitions, {self.stuck_states} stuck"
        return f"{counted}\n{found or 'no violation'}"


@dataclass(slots=True, kw_only=True)
class _Graph(Generic[StateT]):
    """The states in the order found, each with the first (hence shortest) way into it."""

    states: list[StateT] = field(default_factory=list)
    number_of: dict[StateT, int] = field(default_factory=dict)
    found_from: list[int] = field(default_factory=list)
    found_by: list[str] = field(default_factory=list)
    predecessors: list[list[int]] = field(default_factory=list)
    violations: dict[str, Violation[StateT]] = field(default_factory=dict)

    def add(self, state: StateT, *, source: int, step: str) -> int:
        number = len(self.states)
        self.states.append(state)
        self.number_of[state] = number
        self.found_from.append(source)
        self.found_by.append(step)
        self.predecessors.append([])
        return number

    def trace_to(self, number: int) -> tuple[str, ...]:
        trace: list[str] = []
        while self.found_from[number] >= 0:
            trace.append(self.found_by[number])
            number = self.found_from[number]
        return tuple(reversed(trace))

    def report(self, name: str, number: int, *, last_step: tuple[str, ...] = (), state: StateT | None = None) -> None:
        if name not in self.violations:
            self.violations[name] = Violation(
                name=name,
                trace=self.trace_to(number) + last_step,
                state=self.states[number] if state is None else state,
            )


def explore(
    initial: StateT,
    steps: Steps[StateT],
    invariants: Mapping[str, Callable[[StateT], bool]],
    *,
    step_invariants: Mapping[str, Callable[[StateT, StateT], bool]] | None = None,
    goal: Callable[[StateT], bool] | None = None,
    until: str | None = None,
    states_max: int = STATES_MAX,
) -> Report[StateT]:
    """Visit every reachable state, nearest first, and report the shortest way to each broken rule.

    A predicate in `invariants` must hold in every state, one in `step_invariants` over every (before, after).
    With `goal`, every reachable state must be able to reach a goal state (AG EF goal); a breach is
    reported as `END_OUT_OF_REACH`. With `until`, the search stops once that rule has been seen broken.

    Raises:
        StateSpaceTooLargeError: more than `states_max` states are reachable.
    """
    graph: _Graph[StateT] = _Graph()
    rules_over = (step_invariants or {}).items()
    graph.add(initial, source=-1, step="")
    steps_taken: set[str] = set()
    transitions = 0
    stuck_states = 0
    number = 0
    while number < len(graph.states):
        state = graph.states[number]
        for broken in [name for name, holds in invariants.items() if not holds(state)]:
            graph.report(broken, number)
        for step, after in steps(state):
            transitions += 1
            steps_taken.add(step)
            for broken in [name for name, holds_over in rules_over if not holds_over(state, after)]:
                graph.report(broken, number, last_step=(step,), state=after)
            target = graph.number_of.get(after)
            if target is None:
                target = graph.add(after, source=number, step=step)
            if goal is not None:
                graph.predecessors[target].append(number)
        if until in graph.violations:
            break
        if len(graph.states) > states_max:
            raise StateSpaceTooLargeError(f"more than {states_max} states are reachable")
        number += 1
    else:
        stuck_states = _report_stuck(graph, goal) if goal is not None else 0
    return Report(
        states=len(graph.states),
        transitions=transitions,
        steps_taken=frozenset(steps_taken),
        violations=graph.violations,
        stuck_states=stuck_states,
    )


def _report_stuck(graph: _Graph[StateT], goal: Callable[[StateT], bool]) -> int:
    """Walk back from the goal states; what is not met on the way cannot reach them."""
    frontier = [number for number, state in enumerate(graph.states) if goal(state)]
    can_end = set(frontier)
    while frontier:
        for source in graph.predecessors[frontier.pop()]:
            if source not in can_end:
                can_end.add(source)
                frontier.append(source)
    stuck = [number for number in range(len(graph.states)) if number not in can_end]
    if stuck:
        graph.report(END_OUT_OF_REACH, stuck[0])
    return len(stuck)
