"""Judges a whole input as it streams by: every problem, every duplicate custom_id, and the shards.

It is fed bytes and never reads; how they are chunked makes no difference to what comes out. Ranges whose ids have to be
compared it asks for again.
"""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import msgspec
from zlib_ng.zlib_ng import crc32

from batchrunner.cutting import Block, Cutter, LongLine, split_lines
from batchrunner.errors import InputChanged
from batchrunner.lines import (
    LineRules,
    ProblemCode,
    is_blank,
    model_of,
    parse_line,
    quoted,
    too_long_message,
)
from batchrunner.models import LineProblem, OnInvalid, RequestLine, ShardCut
from batchrunner.problems import Problems
from batchrunner.repeats import Order, repeated_hashes
from batchrunner.settings import Settings
from batchrunner.soundness import custom_ids_of, sound_lines

# Real ids are held for this many hashes at a time while hits are confirmed, so that memory stays bounded in a file that
# was appended to itself.
_CONFIRMED_AT_ONCE = 1 << 18
# Below this, handing a chunk to a thread costs more than hashing it.
_CHUNK_BYTES_BESIDE = 64 * 1024


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """What one pass over the input found.

    `shards` are in file order, without those that hold no request to run; none when the batch is rejected.
    `total_count` counts requests, refused ones included. `problems` is in line order and capped, `problem_count` is
    not. `model` is the one that every accepted line names, None if they differ.
    """

    is_rejected: bool
    shards: tuple[ShardCut, ...]
    total_count: int
    refused_count: int
    problems: tuple[LineProblem, ...]
    problem_count: int
    sha256: str
    model: str | None


class Look(msgspec.Struct, frozen=True):
    """A byte range of the input that may hold a duplicate, or ids that it must be compared with: to be read again and
    handed to `confirm`. It is as long as a shard at most.
    """

    byte_start: int
    byte_end: int
    places: range


class _Cut(msgspec.Struct, gc=False):
    """What is remembered of a range of lines: its place, and 8 bytes for each custom_id once they are needed.

    It is a shard if any line is to run. `is_sound`: all its lines were taken together.
    """

    byte_start: int
    byte_end: int
    first_line: int
    checksum: int
    line_count: int
    hashes: array[int] | None
    skipped: list[int]
    is_sound: bool = True


class Validator:
    """One validation: `feed` everything; confirm what `candidates` asks for until it asks for nothing; `finish`.

        while looks := validator.candidates():
            for look in looks:
                validator.confirm(look, read(look.byte_start, look.byte_end))

    A file whose ids ascend has no candidates. In any other, the ids before the first that does not are looked at again
    first, and then those that may be duplicates. Memory: 8 bytes a line where ids do not ascend, 8 more up to 2,000,000
    lines when they are compared, one block with its parsed lines; the numbers of refused lines when these are skipped.
    """

    def __init__(
        self,
        rules: LineRules,
        on_invalid: OnInvalid,
        *,
        lines_max: int,
        bytes_max: int,
        problems_max: int = 1000,
        shard_lines_max: int = 1000,
        shard_bytes_max: int = 8 * 1024 * 1024,
        chosen: Sequence[int] | None = None,
        on_problem: Callable[[LineProblem], None] | None = None,
        sha256: str | None = None,
    ) -> None:
        """Begin. `chosen` are the only physical lines that count, ascending; None means all.

        `sha256` is the input's digest where it is known already: reckoning it again would be a fifth of the work.
        `on_problem` gets every problem: those of single lines in line order, then the duplicates, which are known last.
        """
        self._rules = rules
        self._on_invalid = on_invalid
        self._lines_max = lines_max
        self._bytes_max = bytes_max
        self._chosen = chosen
        self._shard_bytes_max = shard_bytes_max
        self._cutter = Cutter(lines_max=shard_lines_max, bytes_max=shard_bytes_max, line_bytes_max=rules.line_bytes_max)
        self._problems = Problems(problems_max, on_problem)
        self._sha256 = sha256
        self._digest = _Digest()
        self._fed_bytes = 0
        self._has_ended = False
        self._total_count = 0
        self._refused_count = 0
        self._cuts: list[_Cut] = []
        self._models: set[str | None] = set()
        # None until all ids have hashes.
        self._repeated: array[int] | None = None
        self._confirmed_count = 0
        self._confirming: set[int] = set()
        self._seen: set[str] = set()
        self._order = Order()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the input."""
        if self._sha256 is None:
            self._digest.update(chunk)
        if self._has_ended:
            return
        room = self._bytes_max - self._fed_bytes
        self._fed_bytes += len(chunk)
        for cut in self._cutter.feed(chunk if len(chunk) <= room else chunk[:room]):
            self._take(cut)
        if len(chunk) > room:
            self._end_early(
                ProblemCode.FILE_TOO_LARGE,
                f"The batch input file is larger than the {self._bytes_max} maximum. "
                "Please try again with a smaller batch.",
            )

    def candidates(self) -> tuple[Look, ...]:
        """Give the ranges to read again and confirm, in this order; empty when nothing is left. Ends the feeding."""
        self._end()
        if self._repeated is None:
            if unhashed := self._looks(lambda cut: cut.hashes is None):
                return unhashed
            self._repeated = repeated_hashes([cut.hashes for cut in self._cuts if cut.hashes is not None])
        hashes = self._repeated[self._confirmed_count : self._confirmed_count + _CONFIRMED_AT_ONCE]
        self._confirmed_count += len(hashes)
        self._confirming = set(hashes)
        self._seen = set()
        if not hashes:
            return ()
        return self._looks(lambda cut: not self._confirming.isdisjoint(cut.hashes or ()))

    def _looks(self, is_wanted: Callable[[_Cut], bool]) -> tuple[Look, ...]:
        """Give where the wanted cuts lie, small ones that follow each other in one range."""
        looks: list[Look] = []
        for place, cut in enumerate(self._cuts):
            if not is_wanted(cut):
                continue
            start, first = cut.byte_start, place
            if looks and looks[-1].byte_end == start and cut.byte_end - looks[-1].byte_start <= self._shard_bytes_max:
                before = looks.pop()
                start, first = before.byte_start, before.places.start
            looks.append(Look(start, cut.byte_end, range(first, place + 1)))
        return tuple(looks)

    def confirm(self, look: Look, content: bytes) -> None:
        """Compare the ids of a range of the input, or take them in to be compared.

        Raises:
            InputChanged: these are not the bytes that were fed.
        """
        for cut in self._cuts[look.places.start : look.places.stop]:
            start, end = cut.byte_start - look.byte_start, cut.byte_end - look.byte_start
            self._confirm(cut, content[start:end])

    def _confirm(self, cut: _Cut, content: bytes) -> None:
        if crc32(content) != cut.checksum:
            raise InputChanged(f"the input changed between its bytes {cut.byte_start} and {cut.byte_end}")
        if cut.hashes is None:
            cut.hashes = _hashes(self._ids_of(cut, content))
            return
        for line_number, raw in self._requests(content, cut.first_line):
            found = parse_line(raw, line_number, self._rules)
            custom_id = found.custom_id
            if custom_id is None or hash(custom_id) not in self._confirming:
                continue
            if custom_id not in self._seen:
                self._seen.add(custom_id)
            elif isinstance(found, RequestLine):
                # A line refused for another reason keeps that: one problem a line.
                self._refuse_duplicate(cut, line_number, custom_id)

    def finish(self) -> Validation:
        """Give what was found.

        Raises:
            ValueError: there are candidates left to confirm.
        """
        self._end()
        if self._repeated is None or self._confirmed_count < len(self._repeated):
            raise ValueError("candidates() has to be called, and its ranges confirmed, until it gives none")
        is_fatal = self._refused_count > 0 and self._on_invalid is OnInvalid.FAIL
        is_rejected = is_fatal or self._problems.has_any_of_file
        return Validation(
            is_rejected=is_rejected,
            shards=() if is_rejected else tuple(self._shards()),
            total_count=self._total_count,
            refused_count=self._refused_count,
            problems=self._problems.listed(),
            problem_count=self._problems.count,
            sha256=self._sha256 or self._digest.hexdigest(),
            model=next(iter(self._models)) if len(self._models) == 1 else None,
        )

    def _end(self) -> None:
        if self._has_ended:
            return
        for cut in self._cutter.finish():
            self._take(cut)
        self._end_if_too_many()
        if not self._total_count:
            message = "The input file is empty. Please ensure that the batch contains at least one request."
            self._problems.add_of_file(ProblemCode.EMPTY_FILE, message)
        self._close()

    def _end_early(self, code: ProblemCode, message: str) -> None:
        """Refuse the whole file at its first limit; what was found so far is still told."""
        if not self._has_ended:
            self._problems.add_of_file(code, message)
            self._close()

    def _close(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            if self._order.is_ascending:
                self._repeated = array("q")

    def _take(self, cut: Block | LongLine) -> None:
        if isinstance(cut, LongLine) or cut.is_first:
            self._end_if_too_many()
        if self._has_ended:
            return
        if isinstance(cut, LongLine):
            if self._is_chosen(cut.line_number):
                message = too_long_message(self._rules, cut.size_bytes)
                self._total_count += 1
                self._refuse(LineProblem(ProblemCode.LINE_TOO_LONG, message, None, cut.line_number))
        else:
            if cut.is_first:
                # Ids that ascend cannot repeat, and may never have to be hashed.
                hashes = None if self._order.is_ascending else array("q")
                self._cuts.append(_Cut(cut.byte_start, cut.byte_start, cut.first_line, 0, 0, hashes, []))
            if not (cut.is_plain and self._take_sound(cut)):
                self._take_one_by_one(cut)

    def _end_if_too_many(self) -> None:
        """Refuse an input with too many requests; looked at where shards end, which no chunking changes."""
        if self._total_count > self._lines_max:
            self._end_early(
                ProblemCode.TOO_MANY_TASKS,
                f"The batch input file holds more than the {self._lines_max} requests maximum. "
                "Please try again with a smaller batch.",
            )

    def _take_sound(self, block: Block) -> bool:
        """Take a block whose lines are all plain and sound; False if it has to be looked at line by line."""
        if self._chosen is not None:
            return False
        if not self._rules.is_settled:
            self._learn_from_first(block)
            if not self._rules.is_settled:
                return False
        sound = sound_lines(block.content, block.line_count, self._rules)
        if sound is None:
            return False
        self._total_count += block.line_count
        self._note_models(sound.models)
        self._remember(block, block.line_count, sound.custom_ids, [])
        return True

    def _learn_from_first(self, block: Block) -> None:
        """Learn what the first line teaches, as looking at each line would."""
        line_number, raw = next(split_lines(block.content, block.first_line))
        self._rules = self._rules.learn_url(raw)
        found = parse_line(raw, line_number, self._rules)
        if isinstance(found, RequestLine):
            self._rules = self._rules.learn_model(found)

    def _take_one_by_one(self, block: Block) -> None:
        self._cuts[-1].is_sound = False
        custom_ids = []
        skipped = []
        line_count = 0
        wanted = self._chosen_of(block.first_line, block.content)
        for line_number, raw in split_lines(block.content, block.first_line):
            if is_blank(raw):
                continue
            if wanted is not None and line_number not in wanted:
                skipped.append(line_number)
                continue
            self._total_count += 1
            self._rules = self._rules.learn_url(raw)
            found = parse_line(raw, line_number, self._rules)
            if found.custom_id is not None:
                custom_ids.append(found.custom_id)
            if isinstance(found, RequestLine):
                line_count += 1
                self._rules = self._rules.learn_model(found)
                if len(self._models) < 2:
                    self._note_models({model_of(found)})
            else:
                self._refuse(found)
                skipped.append(line_number)
        self._remember(block, line_count, custom_ids, skipped)

    def _ids_of(self, cut: _Cut, content: bytes) -> list[str]:
        """Give the ids that were noted of a range of the input."""
        if cut.is_sound:
            return custom_ids_of(content)
        lines = self._requests(content, cut.first_line)
        each = (parse_line(raw, line_number, self._rules).custom_id for line_number, raw in lines)
        return [custom_id for custom_id in each if custom_id is not None]

    def _requests(self, content: bytes, first_line: int) -> Iterator[tuple[int, bytes]]:
        """Give the lines that count: not blank, and chosen."""
        wanted = self._chosen_of(first_line, content)
        for line_number, raw in split_lines(content, first_line):
            if (wanted is None or line_number in wanted) and not is_blank(raw):
                yield line_number, raw

    def _chosen_of(self, first_line: int, content: bytes) -> frozenset[int] | None:
        chosen = self._chosen
        if chosen is None:
            return None
        last_line = first_line + content.count(b"\n")
        return frozenset(chosen[bisect_left(chosen, first_line) : bisect_left(chosen, last_line + 1)])

    def _is_chosen(self, line_number: int) -> bool:
        chosen = self._chosen
        if chosen is None:
            return True
        place = bisect_left(chosen, line_number)
        return place < len(chosen) and chosen[place] == line_number

    def _note_models(self, models: set[str | None]) -> None:
        # Two are enough to know that there is not one.
        if len(self._models) < 2:
            self._models |= models

    def _remember(self, block: Block, line_count: int, custom_ids: list[str], skipped: list[int]) -> None:
        self._order.note(custom_ids)
        cut = self._cuts[-1]
        cut.byte_end = block.byte_end
        cut.checksum = crc32(block.content, cut.checksum)
        cut.line_count += line_count
        if cut.hashes is not None:
            cut.hashes.extend(_hashes(custom_ids))
        # A shard leaves out lines not chosen and refused ones; without on_invalid=skip the latter leave no shard.
        if self._on_invalid is OnInvalid.SKIP or self._chosen is not None:
            cut.skipped.extend(skipped)

    def _refuse(self, problem: LineProblem) -> None:
        self._refused_count += 1
        self._problems.add(problem)

    def _refuse_duplicate(self, cut: _Cut, line_number: int, custom_id: str) -> None:
        message = (
            f"The custom_id {quoted(custom_id)} for this request is a duplicate of another request. "
            "The custom_id parameter must be unique for each request in a batch."
        )
        self._refused_count += 1
        self._problems.add_late(
            LineProblem(ProblemCode.DUPLICATE_CUSTOM_ID, message, "custom_id", line_number, custom_id)
        )
        cut.line_count -= 1
        if self._on_invalid is OnInvalid.SKIP or self._chosen is not None:
            cut.skipped.append(line_number)

    def _shards(self) -> Iterator[ShardCut]:
        first_index = 0
        for cut in self._cuts:
            if cut.line_count:
                yield ShardCut(
                    cut.byte_start,
                    cut.byte_end,
                    cut.first_line,
                    first_index,
                    cut.line_count,
                    cut.checksum,
                    tuple(sorted(cut.skipped)),
                )
                first_index += cut.line_count


# To make rules costs as much as to judge a short line by them; settings with tables cannot be hashed, their parts can.
_rules = lru_cache(maxsize=32)(LineRules)


def line_rules(settings: Settings, *, endpoint: str | None = None) -> LineRules:
    """What lines must keep to by the settings alone, those without a `url` of their own going to `endpoint`."""
    return _rules(
        endpoint=endpoint,
        endpoints=settings.endpoints,
        custom_id_chars_max=settings.custom_id_chars_max,
        line_bytes_max=settings.line_bytes_max,
    )


def validator_of(
    settings: Settings,
    *,
    endpoint: str | None = None,
    problems_max: int,
    on_problem: Callable[[LineProblem], None],
    sha256: str | None = None,
) -> Validator:
    """Begin the validation of a file of which no batch was made: by the settings alone, and bad with any bad line."""
    return Validator(
        line_rules(settings, endpoint=endpoint),
        OnInvalid.FAIL,
        lines_max=settings.lines_max,
        bytes_max=settings.input_bytes_max,
        problems_max=problems_max,
        shard_lines_max=settings.shard_lines_max,
        shard_bytes_max=settings.shard_bytes_max,
        on_problem=on_problem,
        sha256=sha256,
    )


def _hashes(custom_ids: list[str]) -> array[int]:
    return array("q", list(map(hash, custom_ids)))


class _Digest:
    """SHA-256 of all bytes, reckoned beside the judging: hashing a large chunk needs no interpreter lock."""

    def __init__(self) -> None:
        self._sha256 = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1, "input-digest")
        self._pending: Future[None] | None = None

    def update(self, chunk: bytes) -> None:
        """Add bytes, once those before are in."""
        self._settle()
        if len(chunk) < _CHUNK_BYTES_BESIDE:
            self._sha256.update(chunk)
        else:
            self._pending = self._pool.submit(self._sha256.update, chunk)

    def hexdigest(self) -> str:
        """Give the digest of everything so far."""
        self._settle()
        self._pool.shutdown()
        return self._sha256.hexdigest()

    def _settle(self) -> None:
        if self._pending is not None:
            self._pending.result()
            self._pending = None
