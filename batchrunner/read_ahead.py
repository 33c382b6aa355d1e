"""Ranges of blobs fetched before they are asked for, where each is a request and the way is long."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import NamedTuple, Self

from batchrunner.ports import Blobs

_THREADS = 3
_AHEAD_BYTES = 4 << 20


class Range(NamedTuple):
    """Bytes [start, end) of a blob."""

    name: str
    start: int
    end: int


class ReadAhead:
    """Reads of one thread that follow a plan, nearly: what is not next in it is read when it is asked for.

    Use it as a context. Where segments lie on this disk it fetches nothing ahead.
    """

    def __init__(self, blobs: Blobs, plan: Iterable[Range]) -> None:
        self._blobs = blobs
        self._plan: Iterator[Range] = iter(plan if blobs.has_frozen_segments else ())
        self._coming: deque[tuple[Range, Future[bytes]]] = deque()
        self._coming_bytes = 0
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="read-ahead")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def read(self, name: str, start: int, end: int) -> bytes:
        """Read a range, as Blobs does."""
        wanted = Range(name, start, end)
        self._fetch()
        if not self._coming or self._coming[0][0] != wanted:
            return self._blobs.read(name, start, end)
        _, future = self._coming.popleft()
        self._coming_bytes -= end - start
        self._fetch()
        return future.result()

    def _fetch(self) -> None:
        """Ask for what comes next, up to a bound; one range at least."""
        while not self._coming or self._coming_bytes < _AHEAD_BYTES:
            planned = next(self._plan, None)
            if planned is None:
                return
            self._coming.append((planned, self._threads.submit(self._blobs.read, *planned)))
            self._coming_bytes += planned.end - planned.start
