"""`batchrunner validate`: every problem of an input, found by the very rules that a run applies."""

from __future__ import annotations

import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

import click
import msgspec
import orjson

from batchrunner.cli.configuring import check_endpoint, load_settings
from batchrunner.cli.console import say
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.inputs import pieces_of, plain
from batchrunner.clock import SystemClock
from batchrunner.cutting import Cutter, LongLine
from batchrunner.errors import NotFound
from batchrunner.models import LineProblem
from batchrunner.settings import Settings
from batchrunner.tuning import raise_mmap_threshold
from batchrunner.validation import Validation, validator_of

_SPOOLED_BYTES = 16 << 20
_SHOWN = 10
_NAMES_MAX = 1000
_NAME_CHARS_MAX = 200


@click.command("validate")
@click.argument("input_path", metavar="INPUT", type=click.Path(allow_dash=True, path_type=Path))
@click.option("--endpoint", metavar="PATH", help="Where lines without a url go; lines with one must name it.")
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object instead of a line for each problem.")
def validate(*, input_path: Path, endpoint: str | None, is_json: bool) -> None:
    """Check INPUT (.gz and .zst too, - for stdin) and print every problem. Nothing is sent.

    Problems of single lines come in line order, repeated custom_ids after them.

    Exit codes: 0 sound, 5 there are problems.
    """
    settings, _ = load_settings({})
    check_endpoint(settings, endpoint)
    raise_mmap_threshold()
    clock = SystemClock()
    began_s = clock.monotonic_s()
    with ExitStack() as stack:
        kept = stack.enter_context(tempfile.SpooledTemporaryFile(max_size=_SPOOLED_BYTES))
        report: _Report = _JsonReport(kept) if is_json else _TextReport()
        source = _open(input_path, stack)
        census = Census(settings)
        found = _judge(source, census, settings, endpoint=endpoint, on_problem=report.add)
        report.finish(found, census)
    _summarise(found, census, elapsed_s=clock.monotonic_s() - began_s)
    sys.exit(int(ExitCode.INPUT_INVALID if found.problem_count else ExitCode.OK))


def _judge(
    source: _Source,
    census: Census,
    settings: Settings,
    *,
    endpoint: str | None,
    on_problem: Callable[[LineProblem], None],
) -> Validation:
    validator = validator_of(settings, endpoint=endpoint, problems_max=1, on_problem=on_problem)
    for chunk in source.chunks():
        validator.feed(chunk)
        census.feed(chunk)
    while looks := validator.candidates():
        ranges = source.ranges([(look.byte_start, look.byte_end) for look in looks])
        for look, content in zip(looks, ranges, strict=True):
            validator.confirm(look, content)
    census.finish()
    return validator.finish()


# -- the input -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Source:
    """An input that can be streamed from its start as often as it takes."""

    again: Callable[[], Iterator[bytes]]

    def chunks(self) -> Iterator[bytes]:
        """Give all bytes, unpacked."""
        return self.again()

    def ranges(self, wanted: list[tuple[int, int]]) -> Iterator[bytes]:
        """Give byte ranges, in ascending order, in one more pass; short where the input has become shorter."""
        chunks, buffer, base = self.again(), b"", 0
        for start, end in wanted:
            parts: list[bytes] = []
            while True:
                low, high = max(start, base) - base, end - base
                parts.append(buffer[low:high] if high > low else b"")
                if base + len(buffer) >= end:
                    break
                base += len(buffer)
                buffer = next(chunks, b"")
                if not buffer:
                    break
            yield b"".join(parts)


def _open(path: Path, stack: ExitStack) -> _Source:
    """Find the input; stdin, which cannot be read twice, is kept in a file while it is read.

    Raises:
        NotFound: no such file.
    """
    if str(path) == "-":
        return _Source(_Spool(sys.stdin.buffer, stack.enter_context(tempfile.TemporaryFile())))
    if not path.is_file():
        raise NotFound(f"INPUT {path} is not there" if not path.exists() else f"INPUT {path} is not a file")
    return _Source(lambda: plain(path))


class _Spool:
    """The first call reads a stream and keeps it, the next ones read what was kept."""

    def __init__(self, stream: IO[bytes], kept: IO[bytes]) -> None:
        self._stream = stream
        self._kept = kept
        self._is_kept = False

    def __call__(self) -> Iterator[bytes]:
        if not self._is_kept:
            self._is_kept = True
            for chunk in pieces_of(self._stream):
                self._kept.write(chunk)
                yield chunk
            return
        self._kept.seek(0)
        yield from pieces_of(self._kept)


# -- what the lines ask for ------------------------------------------------------------------------------------------


class _SeenBody(msgspec.Struct, gc=False):
    model: str | None = None


class _Seen(msgspec.Struct, gc=False):
    body: _SeenBody | None = None
    url: str | None = None


_decode_seen = msgspec.json.Decoder(_Seen).decode
_decode_all_seen = msgspec.json.Decoder(_Seen).decode_lines


class Census:
    """Counts lines, bytes, models and urls of an input, whether its lines are sound or not."""

    def __init__(self, settings: Settings) -> None:
        self.size_bytes = 0
        self.line_count = 0
        self.models: Counter[str] = Counter()
        self.urls: Counter[str] = Counter()
        self._cutter = Cutter(
            lines_max=settings.shard_lines_max,
            bytes_max=settings.shard_bytes_max,
            line_bytes_max=settings.line_bytes_max,
        )

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes."""
        self.size_bytes += len(chunk)
        for run in self._cutter.feed(chunk):
            self._take(run)

    def finish(self) -> None:
        """Take what is left."""
        for run in self._cutter.finish():
            self._take(run)

    def _take(self, run: bytes | LongLine) -> None:
        if isinstance(run, LongLine):
            self.line_count += 1
            return
        self.line_count += run.count(b"\n") + (not run.endswith(b"\n"))
        try:
            lines = _decode_all_seen(run)
        except (msgspec.DecodeError, RecursionError):
            lines = list(_seen_one_by_one(run))
        _count(self.models, (line.body.model if line.body is not None else None for line in lines))
        _count(self.urls, (line.url for line in lines))


def _count(counts: Counter[str], names: Iterable[str | None]) -> None:
    """Count names; an input with a new one in each line does not fill the memory."""
    for name, count in Counter(names).items():
        shown = "(none named)" if name is None else printable(name)
        counts[shown if shown in counts or len(counts) < _NAMES_MAX else "(others)"] += count


def printable(text: str) -> str:
    """Bring what a file holds into a form that is safe on a terminal: short, without control characters."""
    cut = text if len(text) <= _NAME_CHARS_MAX else f"{text[:_NAME_CHARS_MAX]}..."
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in cut)


def _seen_one_by_one(content: bytes) -> Iterator[_Seen]:
    for raw in content.split(b"\n"):
        try:
            yield _decode_seen(raw)
        except (msgspec.DecodeError, RecursionError):
            continue


# -- reports ---------------------------------------------------------------------------------------------------------


class _Report(Protocol):
    """Where problems go as they are found."""

    def add(self, problem: LineProblem) -> None:
        """Take one problem."""

    def finish(self, found: Validation, census: Census) -> None:
        """End the report."""


class _TextReport:
    """A line for each problem, at once."""

    def add(self, problem: LineProblem) -> None:
        """See _Report."""
        where = f"line {problem.line_number}: " if problem.line_number is not None else ""
        sys.stdout.buffer.write(f"{where}{problem.code}: {problem.message}\n".encode(errors="backslashreplace"))

    def finish(self, found: Validation, census: Census) -> None:  # noqa: ARG002 - said on stderr by the caller
        """See _Report."""
        sys.stdout.buffer.flush()


class _JsonReport:
    """One object, whatever the number of problems: they wait in a file once they are many."""

    def __init__(self, kept: IO[bytes]) -> None:
        self._kept = kept
        self._is_first = True

    def add(self, problem: LineProblem) -> None:
        """See _Report."""
        entry = {
            "line": problem.line_number,
            "code": str(problem.code),
            "param": problem.param,
            "message": problem.message,
            "custom_id": problem.custom_id,
        }
        self._kept.write(b"" if self._is_first else b",")
        self._kept.write(orjson.dumps(entry))
        self._is_first = False

    def finish(self, found: Validation, census: Census) -> None:
        """See _Report."""
        whole = {
            "is_valid": found.problem_count == 0,
            "lines": census.line_count,
            "requests": found.total_count,
            "bytes": census.size_bytes,
            "sha256": found.sha256,
            "model": found.model,
            "models": dict(census.models),
            "endpoints": dict(census.urls),
            "problem_count": found.problem_count,
        }
        out = sys.stdout.buffer
        out.write(orjson.dumps(whole)[:-1] + b',"problems":[')
        self._kept.seek(0)
        out.writelines(pieces_of(self._kept))
        out.write(b"]}\n")
        out.flush()


def _summarise(found: Validation, census: Census, *, elapsed_s: float) -> None:
    rate = census.line_count / elapsed_s if elapsed_s > 0 else 0.0
    say(
        f"{census.line_count:,} lines, {found.total_count:,} requests, {census.size_bytes:,} bytes, "
        f"{elapsed_s:.1f} s, {rate:,.0f} lines/s"
    )
    say(f"models: {_listed(census.models)}")
    say(f"endpoints: {_listed(census.urls)}")
    say("no problems" if not found.problem_count else f"{found.problem_count:,} problems")


def _listed(counts: Counter[str]) -> str:
    most = [f"{name} ({count:,})" for name, count in counts.most_common(_SHOWN)]
    rest = len(counts) - len(most)
    return ", ".join(most) + (f" and {rest:,} more" if rest > 0 else "") if most else "none"
