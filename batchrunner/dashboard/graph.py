"""Where the steps of a batch stand in a drawing: boxes from top to bottom, and the arrows between them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from batchrunner.dashboard.steps import Part, Step, StepState

# One column, as wide as a phone: what does not fit beside stands below.
WIDTH = 360
_MARGIN = 8
_HEAD = 36
_NOTE_HEIGHT = 18
_PART_HEIGHT = 44
_GAP = 8
_ARROW = 30
_COLUMNS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    """A rectangle with a label and the word of its state in it; lengths are units of the drawing."""

    x: int
    y: int
    width: int
    height: int
    label: str
    state: StepState


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """A line of text; `y` is what it stands on."""

    y: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBox(Box):
    """A step, with lines of text and the boxes of its parts inside."""

    notes: tuple[Note, ...]
    parts: tuple[Box, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrow:
    """From one step down to the next."""

    x: int
    y_start: int
    y_end: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Graph:
    """A drawing `WIDTH` wide and so high."""

    height: int
    boxes: tuple[StepBox, ...]
    arrows: tuple[Arrow, ...]


def graph_of(steps: Sequence[Step]) -> Graph:
    """Lay out the steps, the first on top."""
    boxes: list[StepBox] = []
    y = _MARGIN
    for step in steps:
        boxes.append(_step_box(step, y))
        y += boxes[-1].height + _ARROW
    arrows = tuple(
        Arrow(x=WIDTH // 2, y_start=above.y + above.height, y_end=below.y) for above, below in pairwise(boxes)
    )
    return Graph(height=y - _ARROW + _MARGIN, boxes=tuple(boxes), arrows=arrows)


def _step_box(step: Step, y: int) -> StepBox:
    rows = -(-len(step.parts) // _COLUMNS)
    head = _HEAD + len(step.notes) * _NOTE_HEIGHT
    notes = (Note(y=y + _HEAD + place * _NOTE_HEIGHT + 8, text=each) for place, each in enumerate(step.notes))
    return StepBox(
        x=_MARGIN,
        y=y,
        width=WIDTH - 2 * _MARGIN,
        height=head + rows * (_PART_HEIGHT + _GAP),
        label=step.name,
        state=step.state,
        notes=tuple(notes),
        parts=tuple(_part_box(part, place, y + head) for place, part in enumerate(step.parts)),
    )


def _part_box(part: Part, place: int, y: int) -> Box:
    row, column = divmod(place, _COLUMNS)
    width = (WIDTH - 2 * _MARGIN - (_COLUMNS + 1) * _GAP) // _COLUMNS
    return Box(
        x=_MARGIN + _GAP + column * (width + _GAP),
        y=y + row * (_PART_HEIGHT + _GAP),
        width=width,
        height=_PART_HEIGHT,
        label=part.label,
        state=part.state,
    )
