"""Judges a whole input in one streaming pass: every problem, every duplicate custom_id, and the shards.

It is fed bytes and never reads; how they are chunked makes no difference to what comes out.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import islice

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
from batchrunner.repeats import Repeats
from batchrunner.settings import Settings
from batchrunner.soundness import SoundLines, sound_lines

# Lines are judged together in so many bytes as stay in the nearest caches.
_RUN_BYTES = 1 << 18
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
    """A byte range of the input that may hold a duplicate: to be read again and handed to `confirm`. It is as long as a
    shard at most.
    """

    byte_start: int
    byte_end: int
    places: range


class _Cut(msgspec.Struct, gc=False):
    """What is remembered of a range of lines. It is a shard if any of them is to run."""

    byte_start: int
    byte_end: int
    first_line: int
    checksum: int
    line_count: int
    skipped: list[int]


class Validator:
    """One validation: `feed` everything; confirm what `candidates` asks for until it asks for nothing; `finish`.

        while looks := validator.candidates():
            for look in looks:
                validator.confirm(look, read(look.byte_start, look.byte_end))

    A file without duplicates has no candidates. Memory: 9 bytes a line, a little more while the ids are compared; one
    chunk with its parsed lines; the numbers of refused lines when these are skipped.
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
        self._repeats = Repeats()

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the input."""
        if self._sha256 is None:
            self._digest.update(chunk)
        if self._has_ended:
            return
        room = self._bytes_max - self._fed_bytes
        self._fed_bytes += len(chunk)
        for start in range(0, min(len(chunk), room), _RUN_BYTES):
            for run in self._cutter.feed(chunk[start : min(start + _RUN_BYTES, room)]):
                self._take(run)
        if len(chunk) > room:
            self._end_early(
                ProblemCode.FILE_TOO_LARGE,
                f"The batch input file is larger than the {self._bytes_max} maximum. "
                "Please try again with a smaller batch.",
            )

    def candidates(self) -> tuple[Look, ...]:
        """Give the ranges to read again and confirm, in this order; empty when nothing is left. Ends the feeding."""
        self._end()
        return self._looks(self._repeats.next_places())

    def _looks(self, places: Iterable[int]) -> tuple[Look, ...]:
        """Give where cuts lie, small ones that follow each other in one range."""
        looks: list[Look] = []
        for place in places:
            cut = self._cuts[place]
            start, first = cut.byte_start, place
            if looks and looks[-1].byte_end == start and cut.byte_end - looks[-1].byte_start <= self._shard_bytes_max:
                before = looks.pop()
                start, first = before.byte_start, before.places.start
            looks.append(Look(start, cut.byte_end, range(first, place + 1)))
        return tuple(looks)

    def confirm(self, look: Look, content: bytes) -> None:
        """Compare the real ids of a range of the input.

        Raises:
            InputChanged: these are not the bytes that were fed.
        """
        for cut in self._cuts[look.places.start : look.places.stop]:
            start, end = cut.byte_start - look.byte_start, cut.byte_end - look.byte_start
            self._confirm(cut, content[start:end])

    def _confirm(self, cut: _Cut, content: bytes) -> None:
        if crc32(content) != cut.checksum:
            raise InputChanged(f"the input changed between its bytes {cut.byte_start} and {cut.byte_end}")
        for line_number, raw in self._requests(content, cut.first_line):
            found = parse_line(raw, line_number, self._rules)
            # A line refused for another reason keeps that: one problem a line.
            if found.custom_id and self._repeats.is_again(found.custom_id) and isinstance(found, RequestLine):
                self._refuse_duplicate(cut, line_number, found.custom_id)

    def finish(self) -> Validation:
        """Give what was found.

        Raises:
            ValueError: there are candidates left to confirm.
        """
        self._end()
        if not self._repeats.is_told:
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
        for run in self._cutter.finish():
            self._take(run)
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
            self._repeats.close()

    def _take(self, run: bytes | LongLine) -> None:
        if self._has_ended:
            return
        if isinstance(run, LongLine):
            self._take_long(run)
            return
        together = self._judge_together(run)
        custom_ids = iter(() if together is None else together.custom_ids)
        for block in self._cutter.blocks(run, None if together is None else len(together.custom_ids)):
            if block.is_first:
                if self._end_if_too_many():
                    return
                self._repeats.begin_range(block.byte_start)
                self._cuts.append(_Cut(block.byte_start, block.byte_start, block.first_line, 0, 0, []))
            if together is not None:
                self._take_sound(block, together.models, list(islice(custom_ids, block.line_count)))
            # An odd line does not slow down those of another shard.
            elif len(block.content) < len(run) and (sound := self._judge_together(block.content)):
                self._take_sound(block, sound.models, sound.custom_ids)
            else:
                self._take_one_by_one(block)

    def _take_sound(self, block: Block, models: set[str | None], custom_ids: list[str]) -> None:
        self._total_count += block.line_count
        self._note_models(models)
        self._remember(block, block.line_count, custom_ids, [])

    def _take_long(self, line: LongLine) -> None:
        if not self._end_if_too_many() and self._is_chosen(line.line_number):
            self._total_count += 1
            message = too_long_message(self._rules, line.size_bytes)
            self._refuse(LineProblem(ProblemCode.LINE_TOO_LONG, message, None, line.line_number))

    def _end_if_too_many(self) -> bool:
        """Refuse an input with too many requests; looked at where shards end, which no chunking changes."""
        has_too_many = self._total_count > self._lines_max
        if has_too_many:
            self._end_early(
                ProblemCode.TOO_MANY_TASKS,
                f"The batch input file holds more than the {self._lines_max} requests maximum. "
                "Please try again with a smaller batch.",
            )
        return has_too_many

    def _judge_together(self, lines: bytes) -> SoundLines | None:
        """Judge whole lines at once; None if they have to be looked at one by one."""
        if self._chosen is not None:
            return None
        if not self._rules.is_settled:
            self._learn_from_first(lines)
            if not self._rules.is_settled:
                return None
        sound = sound_lines(lines, self._rules)
        if sound is not None and len(sound.models) > 1 and self._total_count + len(sound.custom_ids) > self._lines_max:
            # The input may end within them, and then not all of their models count.
            return None
        return sound

    def _learn_from_first(self, lines: bytes) -> None:
        """Learn what the first line teaches, as looking at each line would."""
        _, raw = next(split_lines(lines, 1))
        self._rules = self._rules.learn_url(raw)
        found = parse_line(raw, 1, self._rules)
        if isinstance(found, RequestLine):
            self._rules = self._rules.learn_model(found)

    def _take_one_by_one(self, block: Block) -> None:
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
        self._repeats.note(custom_ids)
        cut = self._cuts[-1]
        cut.byte_end = block.byte_end
        cut.checksum = crc32(block.content, cut.checksum)
        cut.line_count += line_count
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
