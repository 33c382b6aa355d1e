"""Sessions without a worker: tests lead them by the hand, one durable effect at a time, over one store and folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

from batchrunner.blobs.local import LocalBlobs
from batchrunner.journal import Journal
from batchrunner.models import (
    LOCAL_TENANT,
    Batch,
    BatchId,
    Claim,
    FileId,
    NewBatch,
    NewExtent,
    OnUnknown,
    Progress,
    RecordKind,
    RequestLine,
    SessionId,
    TaskKind,
    Usage,
)
from batchrunner.pipeline import Pipeline
from batchrunner.ports import TenantScope
from batchrunner.settings import Settings
from batchrunner.shards import ShardRun
from batchrunner.simulate.replies import model_answer
from batchrunner.store.sqlite import SqliteStore
from tests.contract.conftest import ManualClock
from tests.e2e.harness import chat_line
from tests.invariants import Checked, check_run

LEASE_S = 15.0
BATCH = BatchId("batch_one")


@dataclass(slots=True)
class Hand:
    """One session: its own store connections, journal and steps."""

    session: SessionId
    store: SqliteStore
    journal: Journal
    pipeline: Pipeline

    def claim(self, *kinds: TaskKind, quarantined: bool = False) -> Claim:
        """Claim the next task of these kinds; there must be one."""
        claim = self.find(*kinds, quarantined=quarantined)
        assert claim is not None, f"nothing to claim of {kinds}"
        return claim

    def find(self, *kinds: TaskKind, quarantined: bool = False) -> Claim | None:
        """Claim the next task of these kinds, if there is one."""
        return self.store.claim(self.session, lease_s=LEASE_S, kinds=kinds, quarantined=quarantined)

    def validate(self) -> None:
        """Claim and run the validate task."""
        self.pipeline.run_step(self.claim(TaskKind.VALIDATE), _beat)

    def seal(self) -> Batch:
        """Claim and run the seal task."""
        return self.pipeline.seal(self.claim(TaskKind.SEAL), _beat)

    def take(self, *, quarantined: bool = False) -> ShardRun:
        """Claim and load a shard."""
        return self.pipeline.load_shard(self.claim(TaskKind.SHARD, quarantined=quarantined))

    def next_line(self, run: ShardRun) -> RequestLine | None:
        """Give the next line that may be sent, once its mark, and its intent where wanted, are durable."""
        line = run.next_line()
        if line is None:
            run.journal.flush()
            line = run.next_line()
        if line is None and run.intent_mark is not None and run.intent_wanted > run.intent_mark:
            self.store.register(run.claim.ref, Progress(intent_mark=run.intent_wanted))
            run.intent_mark = run.intent_wanted
            line = self.next_line(run)
        return line

    def answer(self, run: ShardRun, count: int | None = None) -> list[int]:
        """Take lines, all or so many, and journal the model's answers durably; nothing is registered."""
        numbers: list[int] = []
        while (count is None or len(numbers) < count) and (line := self.next_line(run)) is not None:
            self.record(run, line)
            numbers.append(line.line_number)
        run.journal.flush()
        return numbers

    def record(self, run: ShardRun, line: RequestLine) -> None:
        """Journal the model's answer to a line."""
        answer = model_answer(line.url.encode(), line.body, hashlib.sha256(line.body).digest())
        payload = run.results.answered(line.line_number, line.custom_id, answer.status, "req", answer.body)
        run.record(line.line_number, RecordKind.SUCCEEDED, payload, Usage(1, 0, 2, 0))

    def extents(self, run: ShardRun) -> tuple[NewExtent, ...]:
        """What a run has durable and did not register."""
        return run.journal.take_registrable()

    def register(self, run: ShardRun) -> None:
        """Register what is durable."""
        self.store.register(run.claim.ref, Progress(extents=self.extents(run), re_executed_count=run.re_executed_count))
        run.re_executed_count = 0

    def settle(self, run: ShardRun) -> bool:
        """Settle a finished shard."""
        progress = Progress(extents=self.extents(run), re_executed_count=run.re_executed_count)
        return self.store.settle(run.claim.ref, progress)

    def run_all(self) -> None:
        """Answer and settle whatever shard there is."""
        while (claim := self.find(TaskKind.SHARD)) is not None:
            run = self.pipeline.load_shard(claim)
            self.answer(run)
            self.settle(run)


@dataclass(slots=True)
class Place:
    """A folder with an input, a batch over it, and the hands that work there."""

    folder: Path
    clock: ManualClock = field(default_factory=ManualClock)
    settings: Settings = field(default_factory=lambda: replace(Settings(), shard_lines_max=10))
    hands: list[Hand] = field(default_factory=list)

    @property
    def input(self) -> Path:
        """The input."""
        return self.folder / "in.jsonl"

    def hand(self, name: str) -> Hand:
        """Open a session."""
        store = SqliteStore.open(self.folder / "state.db", self.clock)
        blobs = LocalBlobs(self.folder / "blobs")
        session = SessionId(name)
        journal = Journal(blobs, session, on_durable=_beat, tick_s=0.001)
        pipeline = Pipeline(store=store, blobs=blobs, journal=journal, clock=self.clock, settings=self.settings)
        store.open_session(session, host="here", pid=1)
        made = Hand(session, store, journal, pipeline)
        self.hands.append(made)
        return made

    def begin(
        self, hand: Hand, *, lines: int, on_unknown: OnUnknown = OnUnknown.RETRY, deadline_at: datetime | None = None
    ) -> None:
        """Make an input and a batch over it."""
        self.input.write_bytes(b"".join(chat_line(number) for number in range(1, lines + 1)))
        LocalBlobs(self.folder / "blobs").adopt("input", self.input.absolute())
        new = NewBatch(
            id=BATCH,
            tenant=LOCAL_TENANT,
            dialect="run",
            endpoint=None,
            input_file_id=None,
            source="input",
            completion_window=None,
            deadline_at=deadline_at,
            on_unknown=on_unknown,
        )
        self.scope(hand).create_batch(new)

    def begin_once(self, hand: Hand) -> ShardRun:
        """Make a batch of ten lines, each of which may be sent once, and have the hand take them."""
        self.begin(hand, lines=10, on_unknown=OnUnknown.FAIL)
        hand.validate()
        return hand.take()

    def scope(self, hand: Hand) -> TenantScope:
        """The tenant's view."""
        return hand.store.scope(LOCAL_TENANT)

    def batch(self) -> Batch:
        """The batch as it stands."""
        return self.scope(self.hands[-1]).batch(BATCH)

    def files(self) -> tuple[bytes, bytes]:
        """Output and errors as published, empty where there is none."""
        batch = self.batch()
        return self._content(batch.output_file_id), self._content(batch.error_file_id)

    def _content(self, file_id: FileId | None) -> bytes:
        if file_id is None:
            return b""
        blob = self.scope(self.hands[-1]).file(file_id).blob
        return LocalBlobs(self.folder / "blobs").path(blob).read_bytes()

    def check(self) -> Checked:
        """Prove the ledger of the published files."""
        output, errors = self.files()
        (self.folder / "out.jsonl").write_bytes(output)
        (self.folder / "out.errors.jsonl").write_bytes(errors)
        return check_run(self.input, self.folder / "out.jsonl", self.folder / "out.errors.jsonl")

    def close(self) -> None:
        """Let go of everything."""
        for hand in self.hands:
            hand.journal.close()
            hand.store.close()


def _beat() -> None:
    """Nobody watches."""
