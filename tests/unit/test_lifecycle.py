"""The table of the batch's life: every pair of status and event, and whatever may come of any sequence of them."""

from __future__ import annotations

from copy import deepcopy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrunner.errors import TransitionRefused
from batchrunner.lifecycle import (
    ENDED_BY,
    SEALING,
    TERMINAL,
    TRANSITIONS,
    BatchEvent,
    BatchStatus,
    EndedBy,
    allows,
    mermaid,
    next_status,
)

_S, _E = BatchStatus, BatchEvent

# The table once more, as the design draws it: a change of one of the two has to be meant.
LEGAL = {
    (_S.VALIDATING, _E.INPUT_ACCEPTED): _S.IN_PROGRESS,
    (_S.VALIDATING, _E.INPUT_REJECTED): _S.FAILED,
    (_S.VALIDATING, _E.DEADLINE_PASSED): _S.FINALIZING,
    (_S.VALIDATING, _E.CANCEL_REQUESTED): _S.CANCELLING,
    (_S.VALIDATING, _E.GAVE_UP): _S.FAILED,
    (_S.IN_PROGRESS, _E.LINES_SETTLED): _S.FINALIZING,
    (_S.IN_PROGRESS, _E.DEADLINE_PASSED): _S.FINALIZING,
    (_S.IN_PROGRESS, _E.CANCEL_REQUESTED): _S.CANCELLING,
    (_S.IN_PROGRESS, _E.GAVE_UP): _S.FAILED,
    (_S.FINALIZING, _E.CANCEL_REQUESTED): _S.CANCELLING,
    (_S.FINALIZING, _E.SEALED_WHOLE): _S.COMPLETED,
    (_S.FINALIZING, _E.SEALED_PARTIAL): _S.EXPIRED,
    (_S.FINALIZING, _E.RESULTS_DAMAGED): _S.IN_PROGRESS,
    (_S.FINALIZING, _E.GAVE_UP): _S.FAILED,
    (_S.CANCELLING, _E.SEALED_WHOLE): _S.CANCELLED,
    (_S.CANCELLING, _E.SEALED_PARTIAL): _S.CANCELLED,
    (_S.CANCELLING, _E.GAVE_UP): _S.FAILED,
}
PAIRS = [(status, event) for status in BatchStatus for event in BatchEvent]


@pytest.mark.parametrize(("status", "event"), PAIRS, ids=lambda each: each.value)
def test_pair_leads_where_the_design_says_or_is_refused_by_name(status: BatchStatus, event: BatchEvent) -> None:
    before = deepcopy(TRANSITIONS)

    if (status, event) in LEGAL:
        assert next_status(status, event) is LEGAL[status, event]
        assert allows(status, event)
    else:
        with pytest.raises(TransitionRefused) as refused:
            next_status(status, event)
        assert status.value in refused.value.message
        assert event.value in refused.value.message
        assert refused.value.__cause__ is None
        assert not allows(status, event)

    assert before == TRANSITIONS


def test_there_are_72_pairs_and_every_status_has_a_row() -> None:
    assert len(PAIRS) == 72
    assert set(TRANSITIONS) == set(BatchStatus)


def test_a_row_is_empty_exactly_for_terminal_statuses() -> None:
    assert {_S.COMPLETED, _S.FAILED, _S.EXPIRED, _S.CANCELLED} == TERMINAL


@given(events=st.lists(st.sampled_from(BatchEvent), max_size=30))
def test_any_sequence_of_events_enters_at_most_one_terminal_status_and_stays(events: list[BatchEvent]) -> None:
    status = _S.VALIDATING
    entered = []
    for event in events:
        if not allows(status, event):
            continue
        following = next_status(status, event)
        assert status not in TERMINAL
        if following in TERMINAL:
            entered.append(following)
        status = following

    assert len(entered) <= 1
    assert status not in TERMINAL or entered == [status]


@given(events=st.lists(st.sampled_from(BatchEvent), max_size=30))
def test_no_status_comes_back_but_for_damaged_results_so_every_life_is_short(events: list[BatchEvent]) -> None:
    lived = [_S.VALIDATING]
    for event in events:
        if event is not _E.RESULTS_DAMAGED and allows(lived[-1], event):
            lived.append(next_status(lived[-1], event))

    assert len(lived) == len(set(lived))
    assert len(lived) <= 5


@pytest.mark.parametrize("status", [each for each in BatchStatus if each not in TERMINAL])
def test_every_status_that_is_not_terminal_has_a_way_to_an_end(status: BatchStatus) -> None:
    reached, rest = {status}, [status]
    while rest:
        for target in TRANSITIONS[rest.pop()].values():
            if target not in reached:
                reached.add(target)
                rest.append(target)

    assert reached & TERMINAL


def test_files_are_sealed_before_any_end_but_failure_shows() -> None:
    """Only a sealing status leads to a terminal one that has files."""
    sources = {
        (status, target)
        for status, row in TRANSITIONS.items()
        for target in row.values()
        if target in TERMINAL - {_S.FAILED}
    }

    assert {status for status, _ in sources} == SEALING


def test_what_stops_the_answers_is_what_leads_to_sealing() -> None:
    causes = {event for row in TRANSITIONS.values() for event, target in row.items() if target in SEALING}

    assert set(ENDED_BY) == causes
    assert set(ENDED_BY.values()) == set(EndedBy)


def test_cancel_is_taken_until_the_end() -> None:
    taking = {status for status in BatchStatus if allows(status, _E.CANCEL_REQUESTED)}

    assert taking == set(BatchStatus) - TERMINAL - {_S.CANCELLING}


def test_diagram_shows_every_row_of_the_table() -> None:
    drawn = mermaid().splitlines()

    assert len(drawn) == 2 + len(LEGAL) + len(TERMINAL)
    for (status, event), target in LEGAL.items():
        assert f"    {status.value} --> {target.value}: {event.value}" in drawn
