"""No interleaving loses, doubles or changes a line under the rules, and each rule off breaks something by name."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

import pytest

from tests.model.extents import Bounds, ExtentsModel, Rules, State
from tests.model.extents_invariants import (
    MOVES_LEGAL,
    NO_WOKEN_TIMEOUT,
    NOT_PAID_TWICE,
    ONE_SHARD_EACH,
    PUBLISHED_AS_READ,
    READER_STABLE,
    REGISTERED_ONCE,
    REGISTERED_WHOLE,
    SEALS_AGREE,
    SEQUENCE_GAPLESS,
    SETTLED_IS_WHOLE,
    SUCCESS_KEPT,
    invariants,
    step_invariants,
)
from tests.model.search import Report, explore

ONE_LINE = Bounds(lines=1)
# No deadline, so that the shortest way to a violation leads through the power loss.
POWER_LOSS = Bounds(lines=1, power_losses=1, seals=1, ends_early=False)
SPLIT = Bounds(claims=(2, 1), errors=False, seals=1)
TWO_SPLITS = Bounds(lines=3, claims=(2, 1, 1), errors=False, seals=1, ends_early=False)
TORN = Bounds(lines=1, tears=True, seals=1)
TORN_SPLIT = Bounds(claims=(2, 1), tears=True, errors=False, seals=1)
DAMAGE = Bounds(lines=1, damages=1)
# The second shard is there so that one settled and final stays as it is while the other goes back.
DAMAGED_SHARD = Bounds(claims=(1, 1), damages=1, errors=False, seals=1)
EVERYTHING = Bounds(claims=(2, 1), tears=True, power_losses=1, errors=False, seals=1, ends_early=False)
"""Two lines, two shards, three sessions, torn writes and a power loss; sealed once, when the last line is in."""

SEARCHES = [
    pytest.param(ONE_LINE, id="one-line-two-seals"),
    pytest.param(Bounds(lines=1, claims=(3,)), id="three-sessions", marks=pytest.mark.slow),
    pytest.param(Bounds(seals=1), id="two-lines", marks=pytest.mark.slow),
    pytest.param(SPLIT, id="split"),
    pytest.param(TWO_SPLITS, id="two-splits", marks=pytest.mark.slow),
    pytest.param(Bounds(lines=1, claims=(3,), tears=True, seals=1), id="torn", marks=pytest.mark.slow),
    pytest.param(TORN_SPLIT, id="torn-and-split", marks=pytest.mark.slow),
    pytest.param(DAMAGE, id="damage"),
    pytest.param(DAMAGED_SHARD, id="damage-in-one-of-two-shards", marks=pytest.mark.slow),
    pytest.param(Bounds(lines=1, damages=2, seals=1), id="damaged-twice", marks=pytest.mark.slow),
    pytest.param(Bounds(damages=1, errors=False, seals=1), id="damage-in-two-lines", marks=pytest.mark.long),
    pytest.param(Bounds(), id="two-lines-two-seals", marks=pytest.mark.long),
    pytest.param(Bounds(claims=(3,), seals=1), id="two-lines-three-sessions", marks=pytest.mark.long),
    pytest.param(Bounds(claims=(2, 2), seals=1), id="split-with-takeover", marks=pytest.mark.long),
    pytest.param(Bounds(claims=(2, 1), seals=2), id="split-with-errors-two-seals", marks=pytest.mark.long),
]
"""Searches whose every state must also reach a published batch."""

POWER_LOSS_SEARCHES = [
    pytest.param(Bounds(lines=1, power_losses=1), id="two-seals", marks=pytest.mark.slow),
    pytest.param(Bounds(power_losses=1, seals=1, errors=False), id="two-lines", marks=pytest.mark.slow),
    pytest.param(Bounds(lines=1, tears=True, power_losses=1, seals=1), id="torn", marks=pytest.mark.slow),
    pytest.param(EVERYTHING, id="everything", marks=pytest.mark.slow),
    pytest.param(Bounds(lines=1, claims=(3,), tears=True, power_losses=1, seals=1), id="deep", marks=pytest.mark.long),
]
"""Safety only: claims are bounded, and after a power loss nobody may be left who could still claim."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """A model with one rule off, where to search, and what must break there."""

    off: str
    bounds: Bounds
    breaks: str


MUTANTS = (
    Mutant(off="seal_fences", bounds=ONE_LINE, breaks=REGISTERED_ONCE),
    Mutant(off="seal_fences", bounds=ONE_LINE, breaks=SEALS_AGREE),
    Mutant(off="seal_fences", bounds=ONE_LINE, breaks=PUBLISHED_AS_READ),
    Mutant(off="seal_fences", bounds=ONE_LINE, breaks=SUCCESS_KEPT),
    Mutant(off="registration_guarded", bounds=ONE_LINE, breaks=REGISTERED_ONCE),
    Mutant(off="registration_guarded", bounds=ONE_LINE, breaks=NO_WOKEN_TIMEOUT),
    Mutant(off="claim_bumps_epoch", bounds=ONE_LINE, breaks=REGISTERED_ONCE),
    Mutant(off="claim_salvages", bounds=ONE_LINE, breaks=NOT_PAID_TWICE),
    Mutant(off="salvage_copies", bounds=POWER_LOSS, breaks=REGISTERED_WHOLE),
    Mutant(off="salvage_copies", bounds=POWER_LOSS, breaks=READER_STABLE),
    Mutant(off="salvage_takes_only_successes", bounds=ONE_LINE, breaks=NO_WOKEN_TIMEOUT),
    Mutant(off="salvage_stays_in_the_shard", bounds=SPLIT, breaks=REGISTERED_ONCE),
    Mutant(off="salvage_ends_with_final", bounds=ONE_LINE, breaks=SEALS_AGREE),
    Mutant(off="reader_stays_within_extents", bounds=ONE_LINE, breaks=READER_STABLE),
    Mutant(off="publish_checks_status", bounds=ONE_LINE, breaks=MOVES_LEGAL),
    Mutant(off="codes_follow_first_move", bounds=ONE_LINE, breaks=SEALS_AGREE),
    Mutant(off="split_guarded", bounds=SPLIT, breaks=REGISTERED_ONCE),
    Mutant(off="split_guarded", bounds=TWO_SPLITS, breaks=ONE_SHARD_EACH),
    Mutant(off="split_takes_only_untouched", bounds=SPLIT, breaks=REGISTERED_ONCE),
    Mutant(off="register_after_sync", bounds=POWER_LOSS, breaks=REGISTERED_WHOLE),
    Mutant(off="torn_is_no_record", bounds=TORN, breaks=REGISTERED_WHOLE),
    Mutant(off="torn_is_no_record", bounds=TORN, breaks=SETTLED_IS_WHOLE),
    Mutant(off="sequence_drawn_in_transaction", bounds=ONE_LINE, breaks=SEQUENCE_GAPLESS),
    Mutant(off="repair_takes_damage_out", bounds=DAMAGE, breaks=REGISTERED_ONCE),
    Mutant(off="repair_guarded", bounds=DAMAGE, breaks=SETTLED_IS_WHOLE),
    Mutant(off="seal_repairs", bounds=DAMAGE, breaks=SETTLED_IS_WHOLE),
    Mutant(off="sending_back_undoes_the_end", bounds=DAMAGE, breaks=SETTLED_IS_WHOLE),
)


def search(rules: Rules, bounds: Bounds, *, checks_liveness: bool = False, until: str | None = None) -> Report[State]:
    model = ExtentsModel(bounds=bounds, rules=rules)
    return explore(
        model.initial(),
        model.steps,
        invariants(model),
        step_invariants=step_invariants(model),
        goal=(lambda state: state.published is not None) if checks_liveness else None,
        until=until,
    )


@pytest.mark.parametrize("bounds", SEARCHES)
def test_no_line_is_lost_doubled_or_changed_and_every_state_can_end(bounds: Bounds) -> None:
    report = search(Rules(), bounds, checks_liveness=True)

    assert not report.violations, str(report)
    assert report.stuck_states == 0


@pytest.mark.parametrize("bounds", POWER_LOSS_SEARCHES)
def test_no_line_is_lost_doubled_or_changed_when_the_power_fails(bounds: Bounds) -> None:
    report = search(Rules(), bounds)

    assert not report.violations, str(report)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant.off}-{mutant.breaks.replace(' ', '_')}")
def test_each_rule_off_breaks_what_it_protects(mutant: Mutant) -> None:
    report = search(Rules(**{mutant.off: False}), mutant.bounds, until=mutant.breaks)

    assert mutant.breaks in report.violations, str(report)


def test_every_rule_and_every_invariant_has_a_mutant() -> None:
    model = ExtentsModel(bounds=ONE_LINE, rules=Rules())

    assert {mutant.off for mutant in MUTANTS} == {field.name for field in fields(Rules)}
    assert {mutant.breaks for mutant in MUTANTS} == {*invariants(model), *step_invariants(model)}


def test_searches_take_every_kind_of_step() -> None:
    """A rule that is never exercised holds of itself, so each kind of step has to occur."""
    two_shards = Bounds(claims=(1, 1), tears=True, power_losses=1, errors=False, seals=1, ends_early=False)

    found = [search(Rules(), bounds).steps_taken for bounds in (ONE_LINE, two_shards, DAMAGE)]
    taken = frozenset().union(*found)

    kinds = {re.sub(r"\[.*\]|\d+", "_", step) for step in taken}

    assert kinds == {
        "cancel",
        "cancel while finalizing",
        "deadline passes",
        "power loss leaves _",
        "session _ claims shard _",
        "session _ recovers, salvages _",
        "session _ appends ok of line _",
        "session _ appends error of line _",
        "session _ appends woken of line _",
        "session _ finishes writing line _",
        "session _ writes line _ to its next segment",
        "session _ syncs",
        "session _ registers lines _",
        "session _ settles shard _",
        "session _ cuts off the lines from _",
        "seal _ claims and fences",
        "seal _ sees _ to salvage",
        "seal _ registers its salvage",
        "seal _ finds all final",
        "line _ is damaged",
        "line _ heals",
        "session _ takes out _",
        "seal _ takes out damage",
        "seal _ takes out damage after a cancel",
        "seal _ sends the batch back",
        "seal _ reads",
        "seal _ publishes as completed",
        "seal _ publishes as expired",
        "seal _ publishes as cancelled",
    }
