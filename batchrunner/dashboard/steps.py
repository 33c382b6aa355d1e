"""The four steps of a batch and how each stands, told from its row, its tasks and its notifications. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from types import MappingProxyType

from batchrunner.deliveries import DeliveryState
from batchrunner.lifecycle import SEALING, TERMINAL, BatchStatus
from batchrunner.models import Batch, Shard, TaskKind, TaskState
from batchrunner.progress import is_paused

# A batch may have thousands of shards; above so many they are shown together, by their state.
SHARDS_SHOWN_MAX = 6


class StepState(StrEnum):
    """How a step stands, in the words that people read."""

    WAITING = "waiting"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    NOT_NEEDED = "not needed"


TASK_STEPS: Mapping[TaskState, StepState] = MappingProxyType(
    {
        TaskState.QUEUED: StepState.WAITING,
        TaskState.LEASED: StepState.RUNNING,
        TaskState.SETTLED: StepState.DONE,
        TaskState.SEALED: StepState.DONE,
        TaskState.FINAL: StepState.DONE,
        TaskState.PARKED: StepState.FAILED,
    }
)
_OPEN = (StepState.WAITING, StepState.RUNNING)


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One shard of a step, or all of those that stand alike."""

    label: str
    state: StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of a batch, with what else is to be said of it, in short."""

    name: str
    state: StepState
    notes: tuple[str, ...] = ()
    parts: tuple[Part, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the steps are told from. `shards` are the first ones, none where there are too many; `told` counts the
    batch's deliveries, and with `has_receivers` somebody would be told of its end.
    """

    batch: Batch
    tasks: Mapping[TaskKind, Mapping[TaskState, int]]
    shards: Sequence[Shard] = ()
    told: Mapping[DeliveryState, int]
    has_receivers: bool


def steps_of(facts: Facts) -> tuple[Step, ...]:
    """Give the steps in the order in which they are taken."""
    return (_validate(facts), _shards(facts), _seal(facts), _notify(facts))


def _validate(facts: Facts) -> Step:
    batch = facts.batch
    if batch.has_jobs:
        return Step(name="validate", state=StepState.NOT_NEEDED, notes=("its jobs were checked when it was made",))
    if TaskKind.VALIDATE not in facts.tasks:
        return Step(name="validate", state=StepState.NOT_NEEDED, notes=("requests join one by one",))
    if batch.in_progress_at is not None:
        refused = (f"{batch.refused_count:,} refused",) if batch.refused_count else ()
        return Step(name="validate", state=StepState.DONE, notes=(_counted(batch.total_count, "line"), *refused))
    if batch.status is BatchStatus.VALIDATING:
        return Step(name="validate", state=_of_task(facts, TaskKind.VALIDATE), notes=_pause(batch))
    if batch.status is BatchStatus.FAILED:
        notes = (_counted(batch.problem_count, "problem"),) if batch.problem_count else ()
        return Step(name="validate", state=StepState.FAILED, notes=notes)
    return Step(name="validate", state=StepState.NOT_NEEDED, notes=("the batch was ended before",))


def _shards(facts: Facts) -> Step:
    batch = facts.batch
    if batch.status is BatchStatus.VALIDATING:
        return Step(name="shards", state=StepState.WAITING)
    if batch.in_progress_at is None:
        return Step(name="shards", state=StepState.NOT_NEEDED)
    answered = batch.succeeded_count + batch.failed_count - batch.refused_count
    notes = [f"{answered:,} of {_counted(batch.total_count - batch.refused_count, 'line')} answered"]
    ends = {"expired": batch.expired_count, "cancelled": batch.cancelled_count}
    notes += [f"{count:,} {word}" for word, count in ends.items() if count]
    notes += _pause(batch)
    return Step(name="shards", state=_shard_state(facts), notes=tuple(notes), parts=_parts(facts))


def _shard_state(facts: Facts) -> StepState:
    counts = facts.tasks.get(TaskKind.SHARD, {})
    match facts.batch.status:
        case BatchStatus.IN_PROGRESS if TaskState.PARKED in counts:
            return StepState.FAILED
        case BatchStatus.IN_PROGRESS | BatchStatus.CANCELLING if TaskState.LEASED in counts:
            return StepState.RUNNING
        case BatchStatus.IN_PROGRESS:
            return StepState.WAITING
        case BatchStatus.FAILED:
            return StepState.FAILED
        case _:
            return StepState.DONE


def _parts(facts: Facts) -> tuple[Part, ...]:
    if facts.shards:
        return tuple(
            Part(label=f"from line {each.first_line:,}", state=_state_of(facts.batch, each.state))
            for each in facts.shards
        )
    grouped: Counter[StepState] = Counter()
    for state, count in facts.tasks.get(TaskKind.SHARD, {}).items():
        grouped[_state_of(facts.batch, state)] += count
    return tuple(Part(label=_counted(grouped[state], "shard"), state=state) for state in StepState if grouped[state])


def _state_of(batch: Batch, state: TaskState) -> StepState:
    """Of a batch that is over nothing waits any more."""
    told = TASK_STEPS[state]
    return StepState.NOT_NEEDED if batch.status in TERMINAL and told in _OPEN else told


def _seal(facts: Facts) -> Step:
    batch = facts.batch
    if batch.has_jobs:
        return Step(name="seal", state=StepState.NOT_NEEDED, notes=("each job has its own result",))
    if batch.status in SEALING:
        return Step(name="seal", state=_of_task(facts, TaskKind.SEAL))
    if batch.status not in TERMINAL:
        return Step(name="seal", state=StepState.WAITING)
    if batch.status is not BatchStatus.FAILED:
        files = sum(each is not None for each in (batch.output_file_id, batch.error_file_id))
        return Step(name="seal", state=StepState.DONE, notes=(_counted(files, "file"),))
    is_begun = batch.finalizing_at is not None or batch.cancelling_at is not None
    return Step(name="seal", state=StepState.FAILED if is_begun else StepState.NOT_NEEDED)


def _notify(facts: Facts) -> Step:
    told = facts.told
    notes = tuple(f"{told[state]:,} {state}" for state in DeliveryState if told.get(state))
    if facts.batch.status not in TERMINAL:
        is_told = facts.has_receivers and not facts.batch.has_jobs
        state = StepState.WAITING if is_told else StepState.NOT_NEEDED
    elif told.get(DeliveryState.PENDING):
        state = StepState.RUNNING
    elif told.get(DeliveryState.UNDELIVERED):
        state = StepState.FAILED
    else:
        state = StepState.DONE if told.get(DeliveryState.DELIVERED) else StepState.NOT_NEEDED
    return Step(name="notify", state=state, notes=notes)


def _of_task(facts: Facts, kind: TaskKind) -> StepState:
    """How the one task of a kind stands; it waits where there is none yet."""
    states = [TASK_STEPS[state] for state in facts.tasks.get(kind, {})]
    return states[0] if states else StepState.WAITING


def _pause(batch: Batch) -> tuple[str, ...]:
    return (f"paused: {batch.paused_reason}",) if is_paused(batch) else ()


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
