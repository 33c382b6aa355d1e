"""The explorer itself, on models small enough to check by hand: a search that overlooks something proves nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.model.search import END_OUT_OF_REACH, StateSpaceTooLargeError, explore


def counter_steps(count: int) -> Iterator[tuple[str, int]]:
    """Count to six by ones and twos; four is a trap."""
    if count < 6 and count != 4:
        yield "add one", count + 1
        if count + 2 <= 6:
            yield "add two", count + 2


def test_explore_visits_every_reachable_state_once() -> None:
    report = explore(0, counter_steps, {})

    assert (report.states, report.transitions) == (7, 9)
    assert report.steps_taken == {"add one", "add two"}
    assert not report.violations


def test_explore_reports_the_shortest_way_to_each_broken_rule() -> None:
    report = explore(0, counter_steps, {"below three": lambda count: count < 3, "below six": lambda count: count < 6})

    assert report.violations["below three"].state == 3
    assert len(report.violations["below three"].trace) == 2
    assert report.violations["below six"].state == 6
    assert report.violations["below six"].trace.count("add two") == 2
    assert str(report.violations["below three"]) == "below three: add one > add two"


def test_explore_reports_a_rule_broken_in_the_initial_state() -> None:
    report = explore(0, counter_steps, {"above zero": lambda count: count > 0})

    assert report.violations["above zero"].trace == ()


def test_explore_checks_steps_that_lead_to_a_known_state() -> None:
    def cycle(position: int) -> Iterator[tuple[str, int]]:
        yield "turn", (position + 1) % 3

    report = explore(0, cycle, {}, step_invariants={"never back": lambda before, after: after > before})

    assert report.violations["never back"].trace == ("turn", "turn", "turn")
    assert report.violations["never back"].state == 0


def test_explore_finds_states_that_cannot_reach_the_goal() -> None:
    report = explore(0, counter_steps, {}, goal=lambda count: count == 6)

    assert report.stuck_states == 1
    assert report.violations[END_OUT_OF_REACH].state == 4
    assert len(report.violations[END_OUT_OF_REACH].trace) == 2


def test_explore_takes_a_cycle_without_a_way_out_for_stuck() -> None:
    ways = {"start": [("in", "left"), ("out", "end")], "left": [("on", "right")], "right": [("on", "left")], "end": []}

    report = explore("start", lambda place: ways[place], {}, goal=lambda place: place == "end")

    assert report.stuck_states == 2
    assert report.violations[END_OUT_OF_REACH].trace == ("in",)


def test_explore_stops_early_when_the_awaited_rule_is_broken() -> None:
    report = explore(0, counter_steps, {"below two": lambda count: count < 2}, until="below two")

    assert report.states < 7
    assert set(report.violations) == {"below two"}


def test_explore_refuses_a_search_that_it_would_have_to_cut_short() -> None:
    with pytest.raises(StateSpaceTooLargeError, match="more than 100 states"):
        explore(0, lambda count: [("add one", count + 1)], {}, states_max=100)
