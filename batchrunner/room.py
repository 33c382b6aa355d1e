"""Waiting for room: what found the disk full is done again when there may be room for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from batchrunner.errors import DiskFull

_T = TypeVar("_T")

_LOOK_S = 1.0
# Who looks may be wrong about what is needed: after this it is tried all the same.
_LOOKS_MAX = 60


def _always() -> bool:
    return True


class Room:
    """Does what needs room, and waits for it. Blocks.

    `pause` waits so many seconds and tells whether nobody waits any more; `tell` hears what the disk said each time
    that it was full, and None when it is over.
    """

    def __init__(self, *, pause: Callable[[float], bool], tell: Callable[[DiskFull | None], None]) -> None:
        self._pause = pause
        self._tell = tell

    def until_done(self, act: Callable[[], _T], *, is_there: Callable[[], bool] = _always) -> _T:
        """Do it, again whenever `is_there` tells that there may be room; it must leave nothing behind when it fails.

        Raises:
            DiskFull: there was no room, and nobody waits any more.
        """
        try:
            while True:
                try:
                    return act()
                except DiskFull as error:
                    self._tell(error)
                    if self._is_given_up(is_there):
                        raise
        finally:
            self._tell(None)

    def _is_given_up(self, is_there: Callable[[], bool]) -> bool:
        for _ in range(_LOOKS_MAX):
            if self._pause(_LOOK_S):
                return True
            if is_there():
                break
        return False
