"""What found the disk full is done again when there may be room, and told, and given up when nobody waits."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest

from batchrunner.errors import BlobsUnavailable, DiskFull
from batchrunner.room import Room


class Waiting:
    """A disk that is full so many times, and who waits for it."""

    def __init__(self, *, full: int, patience: int = 1000) -> None:
        self.tries = 0
        self.pauses: list[float] = []
        self.told: list[str | None] = []
        self._full = full
        self._patience = patience
        self.room = Room(pause=self.pause, tell=lambda error: self.told.append(str(error) if error else None))

    def pause(self, duration_s: float) -> bool:
        self.pauses.append(duration_s)
        return len(self.pauses) >= self._patience

    def act(self) -> str:
        self.tries += 1
        if self.tries <= self._full:
            raise DiskFull(f"full {self.tries}")
        return "done"


def answers(*given: bool) -> Iterator[bool]:
    yield from given


def test_what_has_room_is_done_at_once() -> None:
    waiting = Waiting(full=0)

    assert waiting.room.until_done(waiting.act) == "done"
    assert (waiting.pauses, waiting.told) == ([], [None])


def test_full_disk_is_told_each_time_and_its_end_too() -> None:
    waiting = Waiting(full=2)

    assert waiting.room.until_done(waiting.act) == "done"
    assert waiting.told == ["full 1", "full 2", None]
    assert waiting.pauses == [1.0, 1.0]


def test_nothing_is_tried_before_there_is_room() -> None:
    waiting = Waiting(full=1)
    looks = answers(False, False, True)

    assert waiting.room.until_done(waiting.act, is_there=lambda: next(looks)) == "done"
    assert (waiting.tries, len(waiting.pauses)) == (2, 3)


def test_after_a_minute_it_is_tried_whatever_the_look_says() -> None:
    waiting = Waiting(full=1)

    assert waiting.room.until_done(waiting.act, is_there=lambda: False) == "done"
    assert sum(waiting.pauses) == 60.0


@pytest.mark.parametrize("looks", [(), (False, False)])
def test_who_waits_no_more_hears_what_the_disk_said(looks: Iterable[bool]) -> None:
    waiting = Waiting(full=5, patience=len(tuple(looks)) + 1)
    there = answers(*looks)

    with pytest.raises(DiskFull, match="full 1"):
        waiting.room.until_done(waiting.act, is_there=lambda: next(there))

    assert waiting.told == ["full 1", None]


def test_other_errors_are_not_waited_out() -> None:
    waiting = Waiting(full=0)

    def act() -> None:
        raise BlobsUnavailable("gone")

    with pytest.raises(BlobsUnavailable):
        waiting.room.until_done(act)

    assert (waiting.pauses, waiting.told) == ([], [None])
