"""Every batch can end, whoever dies and whenever it is cancelled, and each rule of ending is needed for it."""

from __future__ import annotations

from dataclasses import dataclass, fields

import pytest

from tests.model.seal import (
    COUNTER_EXACT,
    END_CAUSE_KEPT,
    ENDING_HAS_SEAL,
    INSERTED_ONCE,
    MOVES_LEGAL,
    NOTHING_ROLLED_BACK,
    SETTLED_MEANS_ALL,
    TERMINAL,
    Bounds,
    Rules,
    SealModel,
    State,
    has_ended,
    invariants,
    step_invariants,
)
from tests.model.search import END_OUT_OF_REACH, Report, explore

EARLY = Bounds()
UNDISTURBED = Bounds(ends_early=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A model with one rule off, where to search, and what must break there."""

    off: str
    bounds: Bounds
    breaks: str


MUTANTS = (
    # Two last settles each see the other as open; with no deadline nobody ever comes back to the batch.
    Mutant(off="settle_counts_on_batch_row", bounds=UNDISTURBED, breaks=END_OUT_OF_REACH),
    Mutant(off="settle_allowed_in_any_status", bounds=EARLY, breaks=NOTHING_ROLLED_BACK),
    Mutant(off="mover_inserts_seal", bounds=EARLY, breaks=END_OUT_OF_REACH),
    Mutant(off="mover_inserts_seal", bounds=EARLY, breaks=ENDING_HAS_SEAL),
    Mutant(off="seal_task_is_unique", bounds=EARLY, breaks=INSERTED_ONCE),
    Mutant(off="seal_needs_no_settled_shards", bounds=EARLY, breaks=END_OUT_OF_REACH),
    Mutant(off="split_counts_the_new_shard", bounds=UNDISTURBED, breaks=SETTLED_MEANS_ALL),
    Mutant(off="split_counts_the_new_shard", bounds=UNDISTURBED, breaks=COUNTER_EXACT),
    Mutant(off="cause_is_set_once", bounds=EARLY, breaks=END_CAUSE_KEPT),
    Mutant(off="publish_checks_status", bounds=EARLY, breaks=MOVES_LEGAL),
)


def search(rules: Rules, bounds: Bounds) -> Report[State]:
    model = SealModel(bounds=bounds, rules=rules)
    return explore(model.initial(), model.steps, invariants(), step_invariants=step_invariants(), goal=has_ended)


@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param(EARLY, id="cancel-and-deadline"),
        pytest.param(UNDISTURBED, id="undisturbed"),
        pytest.param(Bounds(shards=3, shards_max=4), id="four-shards"),
    ],
)
def test_every_state_can_reach_the_end_under_the_rules(bounds: Bounds) -> None:
    report = search(Rules(), bounds)

    assert not report.violations, str(report)
    assert report.stuck_states == 0


def test_search_reaches_every_kind_of_end() -> None:
    reached: set[str] = set()

    def note_status(state: State) -> bool:
        reached.add(state.status)
        return True

    model = SealModel(bounds=EARLY, rules=Rules())
    explore(model.initial(), model.steps, {"every status is noted": note_status})

    assert set(TERMINAL) <= reached


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.off}-{mutant.breaks.replace(' ', '_')}")
def test_each_rule_off_breaks_what_it_protects(mutant: Mutant) -> None:
    report = search(Rules(**{mutant.off: False}), mutant.bounds)

    assert mutant.breaks in report.violations, str(report)


def test_last_settler_inserting_the_seal_strands_a_cancelled_batch() -> None:
    """The obvious first design, two rules off at once: only the last settle inserts the seal, and only in progress."""
    rules = Rules(mover_inserts_seal=False, settle_allowed_in_any_status=False)

    report = search(rules, EARLY)

    assert report.stuck_states > 0
    assert report.violations[END_OUT_OF_REACH].state.status in ("finalizing", "cancelling")


def test_every_rule_has_a_mutant() -> None:
    assert {mutant.off for mutant in MUTANTS} == {field.name for field in fields(Rules)}
