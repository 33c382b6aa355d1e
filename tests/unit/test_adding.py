"""Ids of open batches: what a process knows of them, and that a hash alone refuses nobody."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrunner import adding
from batchrunner.adding import KnownIds, Lines, OpenBatches, join, judge
from batchrunner.additions import Addition, NewAddition
from batchrunner.blobs.local import LocalBlobs
from batchrunner.errors import InputInvalid
from batchrunner.models import BatchId, ShardCut
from batchrunner.settings import Settings

NOW = datetime(2026, 1, 1, tzinfo=UTC)
B1 = BatchId("b1")


def lines(*names: str, source: str = "add") -> Lines:
    return Lines(custom_ids=names, source=source, shards=(ShardCut(0, 9, 1, 0, len(names), 0),), model="m")


def addition(first_line: int, *names: str, source: str = "add") -> Addition:
    return Addition(
        first_line=first_line,
        line_count=len(names),
        source=source,
        id_hashes=lines(*names).id_hashes,
        created_at=NOW,
    )


@dataclass(slots=True)
class PaperScope:
    """What joined, as a store would keep it; `rivals` join between a look and the next attempt."""

    blobs: LocalBlobs
    joined: list[Addition] = field(default_factory=list)
    rivals: list[tuple[str, ...]] = field(default_factory=list)
    looks: list[int] = field(default_factory=list)

    def additions(self, _batch_id: BatchId, *, from_line: int = 1, limit: int) -> list[Addition]:
        self.looks.append(from_line)
        return [each for each in self.joined if each.first_line >= from_line][:limit]

    def next_line(self) -> int:
        return 1 + sum(each.line_count for each in self.joined)

    def write(self, source: str, *names: str) -> None:
        writer = self.blobs.writer(source)
        writer.write(b"".join(b'{"custom_id":"%b"}\n' % name.encode() for name in names))
        writer.commit()

    def keep(self, *names: str) -> None:
        source = f"add-{len(self.joined)}"
        self.write(source, *names)
        self.joined.append(addition(self.next_line(), *names, source=source))

    def add(self, new: NewAddition) -> bool:
        if self.rivals:
            self.keep(*self.rivals.pop())
        if new.first_line != self.next_line():
            return False
        self.joined.append(
            Addition(
                first_line=new.first_line,
                line_count=new.line_count,
                source=new.source,
                id_hashes=new.id_hashes,
                created_at=NOW,
            )
        )
        return True


@pytest.fixture
def scope(tmp_path: Path) -> PaperScope:
    return PaperScope(LocalBlobs(tmp_path))


def joining(scope: PaperScope, known: KnownIds, new: Lines, *, lines_max: int = 100) -> None:
    paper: Any = scope
    join(paper, scope.blobs, known, B1, new, lines_max=lines_max, closes_at=NOW, add=scope.add)


@given(st.lists(st.lists(st.integers(0, 50), min_size=1, max_size=20), max_size=12))
def test_every_id_learned_is_known_and_no_other(groups: list[list[int]]) -> None:
    known, first_line = KnownIds(), 1
    for group in groups:
        known.learn([addition(first_line, *map(str, group))])
        first_line += len(group)

    found = known.known(lines(*map(str, range(60))).id_hashes)

    assert found == sorted({each for group in groups for each in group})
    assert known.next_line == first_line
    assert len(known._runs) <= 8


def test_lines_join_behind_those_of_rivals(scope: PaperScope) -> None:
    scope.rivals = [("x", "y"), ("z",)]
    known = KnownIds()

    joining(scope, known, lines("a", "b"))

    assert [each.first_line for each in scope.joined] == [1, 2, 4]
    assert scope.looks == [1, 1, 2]


def test_an_id_that_a_rival_took_meanwhile_is_refused(scope: PaperScope) -> None:
    scope.rivals = [("a",)]

    with pytest.raises(InputInvalid, match="'a'"):
        joining(scope, KnownIds(), lines("b", "a"))

    assert len(scope.joined) == 1


def test_what_is_known_is_not_read_again(scope: PaperScope) -> None:
    known = KnownIds()
    for name in "abc":
        joining(scope, known, lines(name, source=f"add-{name}"))

    assert scope.looks == [1, 1, 2]


@pytest.mark.parametrize(("name", "looks"), [("x", [1, 3, 5, 7]), ("e", [1, 3, 5, 7, 1, 3, 5])])
def test_of_many_additions_few_are_read_at_once(
    scope: PaperScope, monkeypatch: pytest.MonkeyPatch, name: str, looks: list[int]
) -> None:
    monkeypatch.setattr(adding, "_ADDITIONS_AT_ONCE", 2)
    for each in "abcdef":
        scope.keep(each)

    with contextlib.nullcontext() if name == "x" else pytest.raises(InputInvalid, match="'e'"):
        joining(scope, KnownIds(), lines(name))

    assert scope.looks == looks


def test_ids_of_one_hash_are_compared_themselves(scope: PaperScope, monkeypatch: pytest.MonkeyPatch) -> None:
    class Blunt:
        """A hash that is the same for all."""

        def __init__(self, _raw: bytes, *, digest_size: int) -> None:
            self._size = digest_size

        def digest(self) -> bytes:
            return bytes(self._size)

    monkeypatch.setattr(adding, "blake2b", Blunt)
    known = KnownIds()
    scope.keep("a", "b")
    scope.write("add", "c", "d")

    joining(scope, known, lines("c", "d"))
    with pytest.raises(InputInvalid, match="'b'"):
        joining(scope, known, lines("e", "b"))


def test_no_more_lines_join_than_may(scope: PaperScope) -> None:
    scope.keep("a", "b")

    with pytest.raises(InputInvalid, match="has 2 requests, at most 3"):
        joining(scope, KnownIds(), lines("c", "d"), lines_max=3)


def test_shards_are_numbered_from_where_they_join() -> None:
    content = b"".join(
        b'{"custom_id":"%d","method":"POST","url":"/v1/responses","body":{"model":"m","input":"x"}}\n' % number
        for number in range(5)
    )
    found = judge(content, Settings(shard_lines_max=2))
    new = Lines(custom_ids=list("01234"), source="add", shards=found.shards, model=found.model)

    joined = new.joining(NOW).joining_at(11)

    assert [(cut.first_line, cut.first_index, cut.line_count) for cut in joined.shards] == [
        (11, 10, 2),
        (13, 12, 2),
        (15, 14, 1),
    ]
    assert (joined.line_count, joined.model, len(joined.id_hashes)) == (5, "m", 40)


def test_of_many_batches_those_used_last_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adding, "_BATCHES_MAX", 2)
    known = OpenBatches()

    def named(names: Iterable[str]) -> list[KnownIds]:
        return [known.known_ids(BatchId(name)) for name in names]

    one, two = named("ab")
    again, three = named("ac")

    assert again is one
    assert named("ac") == [one, three]
    assert named("b") != [two]
