"""The way of lines into an open batch: judged while the caller waits, their ids compared with all that came before,
then let in by one transaction.
"""

from __future__ import annotations

import threading
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from hashlib import blake2b

from batchrunner import crash
from batchrunner.additions import Addition, NewAddition
from batchrunner.choosing import custom_id_of, lines_of
from batchrunner.errors import InputInvalid
from batchrunner.models import BatchId, ShardCut
from batchrunner.pipeline import read_blob
from batchrunner.ports import Blobs, TenantScope
from batchrunner.settings import Settings
from batchrunner.validation import Validation, validator_of

# Open batches whose ids one process remembers; of others it reads them again.
_BATCHES_MAX = 256
_HASH_BYTES = 8
_ADDITIONS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Lines:
    """Sound lines on their way: their ids in line order, the blob that holds them, and its shards as from line 1."""

    custom_ids: Sequence[str]
    source: str
    shards: tuple[ShardCut, ...]
    model: str | None

    @property
    def id_hashes(self) -> bytes:
        """8 bytes for each id, the same in every process."""
        return b"".join(blake2b(each.encode(), digest_size=_HASH_BYTES).digest() for each in self.custom_ids)

    def joining(self, closes_at: datetime) -> NewAddition:
        """Give what asks to join, as from line 1."""
        return NewAddition(
            first_line=1,
            source=self.source,
            id_hashes=self.id_hashes,
            shards=self.shards,
            model=self.model,
            closes_at=closes_at,
        )


def judge(content: bytes, settings: Settings) -> Validation:
    """Look at lines that stand in memory as validation would at a whole file. Blocks."""
    validator = validator_of(settings, problems_max=1, on_problem=lambda _problem: None, sha256="")
    validator.feed(content)
    while looks := validator.candidates():
        for look in looks:
            validator.confirm(look, content[look.byte_start : look.byte_end])
    return validator.finish()


class KnownIds:
    """The hashes of the ids of one open batch, as far as this process has read them. `turn` is held while they are
    compared and lines join.

    Runs of sorted hashes, each at least twice as long as the next one: 8 bytes an id, and few places to look at.
    """

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.next_line = 1
        self._runs: list[array[int]] = []

    def learn(self, additions: Iterable[Addition]) -> None:
        """Take what has joined from `next_line` on."""
        for each in additions:
            self._merge(_numbers(each.id_hashes))
            self.next_line = each.first_line + each.line_count

    def known(self, id_hashes: bytes) -> list[int]:
        """Give the places of the hashes that are known."""
        return [place for place, value in enumerate(_numbers(id_hashes, is_sorted=False)) if self._holds(value)]

    def _merge(self, run: array[int]) -> None:
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = array("Q", sorted(run + self._runs.pop()))
        self._runs.append(run)

    def _holds(self, value: int) -> bool:
        for run in self._runs:
            place = bisect_left(run, value)
            if place < len(run) and run[place] == value:
                return True
        return False


def _numbers(id_hashes: bytes, *, is_sorted: bool = True) -> array[int]:
    numbers = array("Q", id_hashes)
    return array("Q", sorted(numbers)) if is_sorted else numbers


class OpenBatches:
    """What one process knows of the ids of open batches; those used last are kept. Used by many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: OrderedDict[BatchId, KnownIds] = OrderedDict()

    def known_ids(self, batch_id: BatchId) -> KnownIds:
        """Give those of a batch."""
        with self._lock:
            known = self._known.pop(batch_id, None) or KnownIds()
            self._known[batch_id] = known
            while len(self._known) > _BATCHES_MAX:
                self._known.popitem(last=False)
            return known


def join(
    scope: TenantScope,
    blobs: Blobs,
    known: KnownIds,
    batch_id: BatchId,
    lines: Lines,
    *,
    lines_max: int,
    closes_at: datetime,
    add: Callable[[NewAddition], bool],
) -> None:
    """Have lines join a batch behind what joined before, under ids that are new to it, by the store's `add`. Blocks.

    Raises:
        InputInvalid: one of the ids is taken, or the batch would have more than `lines_max`.
    """
    joining = lines.joining(closes_at)
    id_hashes = joining.id_hashes
    with known.turn:
        while True:
            known.learn(joined(scope, batch_id, from_line=known.next_line))
            if known.next_line - 1 + len(lines.custom_ids) > lines_max:
                raise InputInvalid(f"the batch has {known.next_line - 1} requests, at most {lines_max} are allowed")
            for place in known.known(id_hashes):
                _require_new(scope, blobs, batch_id, id_hashes[8 * place : 8 * place + 8], lines.custom_ids[place])
            if add(joining.joining_at(known.next_line)):
                crash.point("add.joined")
                return


def joined(scope: TenantScope, batch_id: BatchId, *, from_line: int = 1) -> Iterator[Addition]:
    """Give what joined from a line on, never much of it at once."""
    while some := scope.additions(batch_id, from_line=from_line, limit=_ADDITIONS_AT_ONCE):
        yield from some
        if len(some) < _ADDITIONS_AT_ONCE:
            return
        from_line = some[-1].first_line + some[-1].line_count


def _require_new(scope: TenantScope, blobs: Blobs, batch_id: BatchId, id_hash: bytes, custom_id: str) -> None:
    """Compare an id with those of the same hash."""
    for each in joined(scope, batch_id):
        hashes = each.id_hashes
        places = {start // 8 for start in range(0, len(hashes), 8) if hashes[start : start + 8] == id_hash}
        if not places:
            continue
        for place, raw in enumerate(lines_of(read_blob(blobs, each.source))):
            if place in places and custom_id_of(raw) == custom_id:
                raise InputInvalid(f"the batch has a request {custom_id!r} already")
