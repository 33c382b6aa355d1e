"""What must stay true of the extents model: in every state, and over every step.

The outside reader is here: one that looks after every step sees whatever a slower one could see, so it needs no state.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from tests.model.extents import ExtentsModel, Kind, Record, State, Status, damaged_extents

View = tuple[tuple[int, int, Kind, int], ...]
"""(sequence, line, kind, sender) of every readable record, in sequence order."""

LEGAL_MOVES: Final[dict[Status, tuple[Status, ...]]] = {
    "in_progress": ("finalizing", "cancelling"),
    "finalizing": ("in_progress", "cancelling", "completed", "expired"),
    "cancelling": ("cancelled",),
    "completed": (),
    "expired": (),
    "cancelled": (),
}

REGISTERED_ONCE: Final = "a line is registered at most once"
REGISTERED_WHOLE: Final = "a registered record can be read whole"
SUCCESS_KEPT: Final = "a registered success is in the sealed file"
NO_WOKEN_TIMEOUT: Final = "the timeout of a frozen session is never a result"
NOT_PAID_TWICE: Final = "a line with a durable success is not sent again"
SEQUENCE_GAPLESS: Final = "the sequence has no gap but where damage was taken out"
SEALS_AGREE: Final = "every seal reads the same content"
PUBLISHED_AS_READ: Final = "what is published equals what was read"
SETTLED_IS_WHOLE: Final = "a batch ended by its last line has every line"
ONE_SHARD_EACH: Final = "each line belongs to exactly one shard"
READER_STABLE: Final = "a reader never sees a change"
MOVES_LEGAL: Final = "the status moves as the table says"


def readable(model: ExtentsModel, state: State) -> View:
    """Give what an outside reader gets: the registered records that are not damaged, from wherever their bytes are."""
    view = []
    damaged = damaged_extents(state)
    for extent in state.extents:
        kind = extent.kind
        if extent in damaged:
            continue
        if extent.writer >= 0 and _record_at(state, extent.writer, extent.position).bytes == "torn":
            kind = "garbage"
        view.append((extent.sequence, extent.line, kind, extent.sender))
    lines = sorted(view)
    if not model.rules.reader_stays_within_extents:
        done = {line for _, line, _, _ in lines}
        for session in state.sessions:
            unregistered = [r for r in session.records if r.line not in done and r.bytes != "torn"]
            lines += [(len(lines) + place, r.line, r.kind, r.sender) for place, r in enumerate(unregistered, start=1)]
    return tuple(lines)


def invariants(model: ExtentsModel) -> Mapping[str, Callable[[State], bool]]:
    """Give the predicates that hold in every state."""
    return {
        REGISTERED_ONCE: _is_registered_once,
        REGISTERED_WHOLE: lambda state: all(kind != "garbage" for _, _, kind, _ in readable(model, state)),
        SUCCESS_KEPT: _is_success_kept,
        NO_WOKEN_TIMEOUT: lambda state: all(extent.kind != "woken" for extent in state.extents),
        NOT_PAID_TWICE: lambda state: not state.was_resent,
        SEQUENCE_GAPLESS: _is_sequence_gapless,
        SEALS_AGREE: lambda state: bool(model.bounds.damages) or _do_seals_agree(state),
        PUBLISHED_AS_READ: _is_published_as_read,
        SETTLED_IS_WHOLE: _is_settled_whole,
        ONE_SHARD_EACH: lambda state: _is_each_line_in_one_shard(model, state),
    }


def step_invariants(model: ExtentsModel) -> Mapping[str, Callable[[State, State], bool]]:
    """Give the predicates that hold over every step."""

    def reader_sees_no_change(before: State, after: State) -> bool:
        if before.extents is after.extents and before.sessions is after.sessions:
            return True
        old, new = readable(model, before), readable(model, after)
        if not model.bounds.damages:
            return new[: len(old)] == old
        # Records may go missing and come back, but a number never comes to mean another one.
        by_number = {sequence: rest for sequence, *rest in new}
        return all(by_number.get(sequence, rest) == rest for sequence, *rest in old)

    def move_is_legal(before: State, after: State) -> bool:
        return before.status == after.status or after.status in LEGAL_MOVES[before.status]

    return {READER_STABLE: reader_sees_no_change, MOVES_LEGAL: move_is_legal}


def _record_at(state: State, writer: int, position: int) -> Record:
    return state.sessions[writer].records[position]


def _is_registered_once(state: State) -> bool:
    lines = [extent.line for extent in state.extents]
    return len(lines) == len(set(lines))


def _is_sequence_gapless(state: State) -> bool:
    numbers = [extent.sequence for extent in state.extents]
    if not state.taken_out:
        return numbers == list(range(1, len(numbers) + 1))
    return len(set(numbers)) == len(numbers) and len(numbers) + len(state.taken_out) == state.next_sequence - 1


def _is_success_kept(state: State) -> bool:
    if state.published is None:
        return True
    return all(state.published[e.line - 1].kind == "ok" for e in state.extents if e.kind == "ok")


def _do_seals_agree(state: State) -> bool:
    return len({sealer.content for sealer in state.sealers if sealer.content is not None}) <= 1


def _is_published_as_read(state: State) -> bool:
    if state.published is None:
        return True
    registered = {extent.line: (extent.kind, extent.sender) for extent in state.extents}
    published = {line: tuple(result) for line, result in enumerate(state.published, start=1) if result.sender >= 0}
    return published == registered


def _is_settled_whole(state: State) -> bool:
    if state.published is None or state.ended_by != "settled":
        return True
    return all(result.kind in ("ok", "error") for result in state.published)


def _is_each_line_in_one_shard(model: ExtentsModel, state: State) -> bool:
    lines = [line for shard in state.shards for line in range(shard.first, shard.end)]
    return sorted(lines) == list(range(1, model.bounds.lines + 1))
