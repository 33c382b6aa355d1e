"""The walk of the data, in the order in which it happens. Read this first.

accept      a byte stream becomes a File
create      a File becomes a Batch, with a task that validates it
validate    one pass over the input cuts it into shards, or finds what is wrong with it
run_shard   a worker loads a shard and hands its lines to the fan-out, which journals each result
seal        when the last shard is settled, its results become an output and an error file
notify      whoever asked for it is told

Each step has one durable effect, in one transaction at its end. A process may die anywhere: the task's lease ends, and
the step begins again from the last durable effect. Everything here blocks and runs in a worker's threads; what is
asynchronous, the sending, lives in `fanout`, and which step runs when is the worker's business.
"""

from __future__ import annotations

import hashlib
import heapq
import logging
import threading
from array import array
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self, assert_never

import msgspec

from batchrunner import crash
from batchrunner.assets import Assets
from batchrunner.errors import BatchrunnerError, BlobsUnavailable, DiskFull, OwnError, StoreUnavailable
from batchrunner.journal import Journal
from batchrunner.lines import LineRules, ProblemCode
from batchrunner.models import OPENAI_STRICT, Batch, Claim, LineProblem, OnInvalid, TaskKind
from batchrunner.outcomes import AcceptedInput, RejectedInput
from batchrunner.ports import Blobs, BlobWriter, Clock, Store
from batchrunner.room import Room
from batchrunner.seal import Sealing, read_problems
from batchrunner.settings import MIB, Settings
from batchrunner.shards import ShardRun, load
from batchrunner.upkeep import Upkeep
from batchrunner.validation import Validation, Validator

logger = logging.getLogger(__name__)

# Larger pieces leave holes in the heap that peak memory shows.
_READ_BYTES = 1 << 18
# Source: the limits of OpenAI's Batch API.
_STRICT_LINES_MAX = 50_000
_STRICT_BYTES_MAX = 200 * MIB
_NO_INPUT = hashlib.sha256().hexdigest()
_encode = msgspec.json.Encoder().encode


class Pipeline:
    """The steps of one worker session over its store, blobs and journal."""

    def __init__(self, *, store: Store, blobs: Blobs, journal: Journal, clock: Clock, settings: Settings) -> None:
        self.journal = journal
        self.assets = Assets(blobs, clock, settings)
        self._store = store
        self._blobs = blobs
        self._clock = clock
        self._settings = settings
        # What each loaded shard and each seal found; they end in threads of their own.
        self._damages: list[int] = []
        # What steps wait for, by their tasks, and whether they still may.
        self._waits: dict[int, DiskFull] = {}
        self._is_over = threading.Event()

    def run_step(self, claim: Claim, beat: Callable[[], None]) -> None:
        """Run a task that is one blocking step. `beat` is called while it moves on.

        Raises:
            Fenced: a newer holder has the task.
            OwnError: the task is no such step.
        """
        match claim.kind:
            case TaskKind.VALIDATE:
                self.validate(claim, beat)
            case TaskKind.SEAL:
                self.seal(claim, beat)
            case TaskKind.SHARD | TaskKind.NOTIFY:
                raise OwnError(f"task {claim.ref.task_id} is a {claim.kind}, not a blocking step")
            case _:
                assert_never(claim.kind)

    def validate(self, claim: Claim, beat: Callable[[], None]) -> None:
        """Judge the whole input in one pass; then shards and `input_accepted`, or problems and `input_rejected`, at
        once.
        """
        batch = claim.batch
        if batch.input_name is not None and batch.input_file_id is None:
            self._store.reject_input(claim.ref, _missing_input(batch))
            return
        stem = f"reports/{batch.id}/{claim.ref.epoch}-{claim.session}"
        with ProblemReport(self._blobs, self._store, stem, owner=claim.session) as report:
            found, problems_blob = self._examine(batch, report, beat)
        if found.is_rejected:
            rejected = RejectedInput(
                problems=found.problems,
                problem_count=found.problem_count,
                problems_blob=problems_blob,
                input_sha256=found.sha256,
            )
            self._store.reject_input(claim.ref, rejected)
            return
        accepted = AcceptedInput(
            shards=found.shards,
            total_count=found.total_count,
            refused_count=found.refused_count,
            problems_blob=problems_blob,
            problem_count=found.problem_count,
            problems=found.problems if batch.on_invalid is OnInvalid.SKIP else (),
            input_sha256=found.sha256,
            model=found.model,
        )
        crash.point("validate.before_accept")
        self._store.accept_input(claim.ref, accepted)
        crash.point("validate.accepted")

    def _examine(self, batch: Batch, report: ProblemReport, beat: Callable[[], None]) -> tuple[Validation, str | None]:
        """Read the whole input; gives what was found and the blob that lists all problems."""
        settings = self._settings
        is_strict = batch.dialect == OPENAI_STRICT
        validator = Validator(
            self.rules(batch),
            batch.on_invalid,
            lines_max=min(settings.lines_max, _STRICT_LINES_MAX) if is_strict else settings.lines_max,
            bytes_max=min(settings.input_bytes_max, _STRICT_BYTES_MAX) if is_strict else settings.input_bytes_max,
            problems_max=settings.problems_max,
            shard_lines_max=settings.shard_lines_max,
            shard_bytes_max=settings.shard_bytes_max,
            chosen=self._chosen(batch),
            on_problem=report.add,
            sha256=batch.input_sha256,
        )
        for chunk in read_blob(self._blobs, batch.source):
            validator.feed(chunk)
            beat()
        while looks := validator.candidates():
            for look in looks:
                validator.confirm(look, self._blobs.read(batch.source, look.byte_start, look.byte_end))
                beat()
        return validator.finish(), report.finish()

    def load_shard(self, claim: Claim) -> ShardRun:
        """Make a claimed shard ready for the fan-out. Raises as `shards.load` does."""
        run = load(self._blobs, self.journal, claim, self.rules(claim.batch))
        run.assets = self.assets
        self._note_damages(len(run.repairs))
        return run

    def seal(self, claim: Claim, beat: Callable[[], None]) -> Batch:
        """Write and publish the files of a batch that has ended. Raises as `Sealing.run` does."""
        sealing = Sealing(
            claim,
            store=self._store,
            blobs=self._blobs,
            journal=self.journal,
            clock=self._clock,
            rules=self.rules(claim.batch),
            beat=beat,
            room=self._room(claim, beat),
        )
        try:
            return sealing.run()
        finally:
            self._note_damages(sealing.damage_count)

    @property
    def damage_count(self) -> int:
        """Registered byte ranges of the journal that were found damaged so far."""
        return sum(self._damages)

    def _note_damages(self, count: int) -> None:
        if count:
            self._damages.append(count)

    @property
    def trouble(self) -> BatchrunnerError | None:
        """Why a step stands still, or the results of lines do not become durable; None while all goes on."""
        return self.journal.trouble or next(iter(tuple(self._waits.values())), None)

    def stop(self) -> None:
        """Have no step wait for room any more."""
        self._is_over.set()

    def _room(self, claim: Claim, beat: Callable[[], None]) -> Room:
        """Let a step wait for room, alive all the while. What is told stays as it was when it began to."""

        def pause(duration_s: float) -> bool:
            beat()
            return self._is_over.wait(duration_s)

        def tell(error: DiskFull | None) -> None:
            task_id = claim.ref.task_id
            if error is None:
                self._waits.pop(task_id, None)
            elif self._waits.setdefault(task_id, error) is error:
                logger.warning("waiting: %s", error, extra={"action": "worker_waits", "code": error.code})

        return Room(pause=pause, tell=tell)

    def keep_reserve(self) -> None:
        """Hold back the space with which statuses can be written on a full disk; without it there is none to hold."""
        try:
            self._blobs.keep_reserve(self._settings.reserve_bytes)
        except (DiskFull, BlobsUnavailable) as error:
            logger.warning("no reserve of disk space: %s", error, extra={"action": "reserve_missing"})

    def release_reserve(self) -> None:
        """Give the reserve to the store."""
        self._blobs.release_reserve()

    def rules(self, batch: Batch) -> LineRules:
        """What the lines of a batch must keep to."""
        settings = self._settings
        return LineRules(
            endpoint=batch.endpoint,
            endpoints=settings.endpoints,
            is_strict=batch.dialect == OPENAI_STRICT,
            custom_id_chars_max=settings.custom_id_chars_max,
            line_bytes_max=settings.line_bytes_max,
        )

    def _chosen(self, batch: Batch) -> array[int] | None:
        """The only lines that a linked batch runs."""
        return read_numbers(self._blobs, batch.chosen_blob) if batch.chosen_blob is not None else None


def _missing_input(batch: Batch) -> RejectedInput:
    """What becomes of a batch whose input file is not there. Source: a recorded batch of the OpenAI API."""
    message = f"Cannot find file {batch.input_name}, or organization {batch.tenant} does not have access to it."
    problem = LineProblem(ProblemCode.INVALID_REQUEST, message, "file_id", None)
    return RejectedInput(problems=(problem,), problem_count=1, problems_blob=None, input_sha256=_NO_INPUT)


def read_blob(blobs: Blobs, name: str, start: int = 0) -> Iterator[bytes]:
    """Give a blob's bytes from `start` on, a piece at a time."""
    while chunk := blobs.read(name, start, start + _READ_BYTES):
        yield chunk
        start += len(chunk)


def read_numbers(blobs: Blobs, name: str) -> array[int]:
    """Read the line numbers that a linked batch is limited to."""
    numbers = array("Q")
    for chunk in read_blob(blobs, name):
        numbers.frombytes(chunk)
    return numbers


class ProblemReport:
    """All problems of a validation as a blob of JSON lines in line order.

    Duplicates are known last, so they go to a part of their own and the two are merged at the end. What a block that
    failed has written is given up.
    """

    def __init__(self, blobs: Blobs, store: Upkeep, stem: str, *, owner: str) -> None:
        self._blobs = blobs
        self._store = store
        self._stem = stem
        self._owner = owner
        self._parts: dict[str, BlobWriter] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for writer in self._parts.values():
                writer.abort()
            for part in self._parts:
                give_up(self._store, self._name(part))

    def add(self, problem: LineProblem) -> None:
        """Take one problem."""
        part = "duplicates" if problem.code == ProblemCode.DUPLICATE_CUSTOM_ID else "lines"
        self._writer(part).write(_encode(problem) + b"\n")

    def finish(self) -> str | None:
        """Give the blob's name, None if there was no problem."""
        for writer in self._parts.values():
            writer.commit()
        names = [self._name(part) for part in self._parts]
        if len(names) < 2:
            return names[0] if names else None
        merged = self._writer("all")
        for problem in heapq.merge(*(read_problems(self._blobs, name) for name in names), key=_line_of):
            merged.write(_encode(problem) + b"\n")
        merged.commit()
        for name in names:
            self._store.abandon_blob(name)
            self._blobs.delete(name)
        return self._name("all")

    def _name(self, part: str) -> str:
        return f"{self._stem}-{part}.jsonl"

    def _writer(self, part: str) -> BlobWriter:
        if part not in self._parts:
            name = self._name(part)
            self._store.register_blob(name, owner=self._owner)
            self._parts[part] = self._blobs.writer(name)
        return self._parts[part]


def give_up(store: Upkeep, name: str) -> None:
    """Say that a registered blob will not be needed, on the way out of what went wrong before and tells more."""
    try:
        store.abandon_blob(name)
    except (StoreUnavailable, DiskFull):
        # It is given up after a day anyhow.
        logger.warning("a blob's name was not given up", exc_info=True, extra={"action": "blob_not_abandoned"})


def _line_of(problem: LineProblem) -> int:
    return problem.line_number or 0
