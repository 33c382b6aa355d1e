"""The model of who ends a batch: who moves it, who inserts its seal task, and that every state can reach an end.

Lines, segments and epochs are left out (the extents model has them): a shard is queued, leased or settled, and a
worker that dies gives its shard back. Death is a step here, for the question is whether the others can finish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, TypeAlias

Status: TypeAlias = Literal[
    "validating", "in_progress", "finalizing", "cancelling", "completed", "expired", "cancelled", "failed"
]
SealTask: TypeAlias = Literal["absent", "waiting", "leased", "done"]
EndedBy: TypeAlias = Literal["settled", "deadline", "cancel"]
Step: TypeAlias = "tuple[str, State]"

LEGAL_MOVES: Final[dict[Status, tuple[Status, ...]]] = {
    "validating": ("in_progress", "failed", "finalizing", "cancelling"),
    "in_progress": ("finalizing", "cancelling"),
    "finalizing": ("cancelling", "completed", "expired"),
    "cancelling": ("cancelled",),
    "completed": (),
    "expired": (),
    "cancelled": (),
    "failed": (),
}
TERMINAL: Final[tuple[Status, ...]] = ("completed", "expired", "cancelled", "failed")

ENDING_HAS_SEAL: Final = "a batch that is ending has a seal task"
INSERTED_ONCE: Final = "the seal task is inserted at most once"
COUNTER_EXACT: Final = "open_shards is the number of unsettled shards"
SETTLED_MEANS_ALL: Final = "ended_by settled means that every shard is settled"
NOTHING_ROLLED_BACK: Final = "a holder's settle is never rolled back"
END_CAUSE_KEPT: Final = "ended_by is set once"
MOVES_LEGAL: Final = "the status moves as the table says"


class Shard(NamedTuple):
    """A shard's task row; `seen_open` is what an uncommitted settle has counted (only when it counts by reading)."""

    phase: Literal["queued", "leased", "settled"]
    seen_open: int | None


class State(NamedTuple):
    """The rows of one batch, and the status that a sealer noted when it began."""

    status: Status
    ended_by: EndedBy | None
    open_shards: int
    shards: tuple[Shard, ...]
    seal: SealTask
    seals_inserted: int
    status_noted: Status | None
    was_rolled_back: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How far the search goes. Without `ends_early` there is no deadline and no cancel, as in a plain local run."""

    shards: int = 2
    shards_max: int = 3
    ends_early: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The rules under test; a mutant is a model with one of them switched off."""

    settle_counts_on_batch_row: bool = True
    settle_allowed_in_any_status: bool = True
    mover_inserts_seal: bool = True
    seal_task_is_unique: bool = True
    seal_needs_no_settled_shards: bool = True
    split_counts_the_new_shard: bool = True
    cause_is_set_once: bool = True
    publish_checks_status: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class SealModel:
    """What may happen next, under given rules and bounds."""

    bounds: Bounds
    rules: Rules

    def initial(self) -> State:
        """Give a batch just created: validating, no shard known."""
        return State("validating", None, 0, (), "absent", 0, None, False)

    def steps(self, state: State) -> Iterator[Step]:
        """Yield everything that may happen. A validator that dies is claimed again, which changes nothing here."""
        if state.status == "validating":
            shards = (Shard("queued", None),) * self.bounds.shards
            accepted = state._replace(status="in_progress", open_shards=len(shards), shards=shards)
            yield "input accepted", accepted
            yield "input rejected", state._replace(status="failed")
        yield from self._early_ends(state)
        if state.status not in TERMINAL:
            for number, shard in enumerate(state.shards):
                yield from self._shard_steps(state, number, shard)
            yield from self._seal_steps(state)

    def _early_ends(self, state: State) -> Iterator[Step]:
        if not self.bounds.ends_early:
            return
        if state.status in ("validating", "in_progress"):
            yield "deadline passes", self._moved(state, "finalizing", "deadline")
        if state.status in ("validating", "in_progress", "finalizing"):
            yield "cancel", self._moved(state, "cancelling", "cancel")

    def _moved(self, state: State, status: Status, cause: EndedBy, *, by_settle: bool = False) -> State:
        """Move the batch towards its end; the same transaction inserts the seal task."""
        ended_by = state.ended_by if self.rules.cause_is_set_once and state.ended_by else cause
        after = state._replace(status=status, ended_by=ended_by)
        if not self.rules.mover_inserts_seal and not by_settle:
            return after
        return self._with_seal_task(after)

    def _with_seal_task(self, state: State) -> State:
        if state.seal != "absent" and self.rules.seal_task_is_unique:
            return state
        return state._replace(seal="waiting", seals_inserted=state.seals_inserted + 1)

    # Shards. Only a batch in progress gives shards out; whoever holds one may settle it whatever the status.

    def _shard_steps(self, state: State, number: int, shard: Shard) -> Iterator[Step]:
        if shard.phase == "queued" and state.status == "in_progress":
            yield f"shard {number} is claimed", _with_shard(state, number, Shard("leased", None))
        if shard.phase == "leased":
            yield f"the holder of shard {number} dies", _with_shard(state, number, Shard("queued", None))
            if self.rules.settle_counts_on_batch_row:
                yield from self._settles(state, number)
            else:
                yield from self._settles_by_reading(state, number, shard)
            if len(state.shards) < self.bounds.shards_max and shard.seen_open is None:
                open_shards = state.open_shards + (1 if self.rules.split_counts_the_new_shard else 0)
                cut = state._replace(shards=(*state.shards, Shard("queued", None)), open_shards=open_shards)
                yield f"the holder of shard {number} splits it", cut

    def _settles(self, state: State, number: int) -> Iterator[Step]:
        """One step: the decrement holds the batch row's lock until commit."""
        after = _with_shard(state, number, Shard("settled", None))._replace(open_shards=state.open_shards - 1)
        yield f"shard {number} settles", self._after_settle(state, after, is_last=after.open_shards == 0)

    def _settles_by_reading(self, state: State, number: int, shard: Shard) -> Iterator[Step]:
        """Two steps: under READ COMMITTED the count misses whatever has not committed yet."""
        if shard.seen_open is None:
            others = sum(row.phase != "settled" for other, row in enumerate(state.shards) if other != number)
            yield f"shard {number} counts the others", _with_shard(state, number, shard._replace(seen_open=others))
            return
        after = _with_shard(state, number, Shard("settled", None))._replace(open_shards=state.open_shards - 1)
        yield f"shard {number} commits", self._after_settle(state, after, is_last=shard.seen_open == 0)

    def _after_settle(self, before: State, settled: State, *, is_last: bool) -> State:
        if is_last and before.status == "in_progress":
            return self._moved(settled, "finalizing", "settled", by_settle=True)
        if is_last and not self.rules.settle_allowed_in_any_status:
            return before._replace(was_rolled_back=True)
        if is_last and not self.rules.mover_inserts_seal:
            return self._with_seal_task(settled)
        return settled

    # The seal task: claimable once nobody holds a shard or the grace is over, which may be at any moment.

    def _seal_steps(self, state: State) -> Iterator[Step]:
        all_settled = all(shard.phase == "settled" for shard in state.shards)
        if state.seal == "waiting" and (all_settled or self.rules.seal_needs_no_settled_shards):
            yield "the seal is claimed", state._replace(seal="leased", status_noted=state.status)
        if state.seal == "leased":
            yield "the sealer dies", state._replace(seal="waiting", status_noted=None)
            status = state.status if self.rules.publish_checks_status else state.status_noted
            word: Status = "cancelled"
            if status == "finalizing":
                word = "completed" if state.ended_by == "settled" else "expired"
            yield f"the seal publishes as {word}", state._replace(status=word, seal="done", status_noted=None)


def invariants() -> Mapping[str, Callable[[State], bool]]:
    """Give the predicates that hold in every state."""
    return {
        ENDING_HAS_SEAL: lambda s: s.status not in ("finalizing", "cancelling") or s.seal in ("waiting", "leased"),
        INSERTED_ONCE: lambda s: s.seals_inserted <= 1,
        COUNTER_EXACT: lambda s: s.open_shards == sum(shard.phase != "settled" for shard in s.shards),
        SETTLED_MEANS_ALL: lambda s: s.ended_by != "settled" or all(shard.phase == "settled" for shard in s.shards),
        NOTHING_ROLLED_BACK: lambda s: not s.was_rolled_back,
    }


def step_invariants() -> Mapping[str, Callable[[State, State], bool]]:
    """Give the predicates that hold over every step."""
    return {
        END_CAUSE_KEPT: lambda before, after: before.ended_by in (None, after.ended_by),
        MOVES_LEGAL: lambda before, after: before.status == after.status or after.status in LEGAL_MOVES[before.status],
    }


def has_ended(state: State) -> bool:
    """Tell whether the batch is in a terminal status: the goal of the liveness check."""
    return state.status in TERMINAL


def _with_shard(state: State, number: int, shard: Shard) -> State:
    return state._replace(shards=(*state.shards[:number], shard, *state.shards[number + 1 :]))
