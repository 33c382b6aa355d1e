"""The model of journal, lease and seal: sessions that stall at any point, torn writes, power loss, splits, two seals.

Holds the states and what may happen next; `extents_invariants` says what must stay true. A crash is a session that
takes no further step, a pause one that takes its next step late: both are among the interleavings, neither is a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal, NamedTuple, TypeAlias, TypeVar

Bytes: TypeAlias = Literal["torn", "whole", "durable", "damaged"]
"""How much of a record is in its segment: a part, all of it but only in memory, all of it and synced; or it was synced
and reads wrong now, for good or for a while.
"""

Kind: TypeAlias = Literal["ok", "error", "woken", "garbage", "expired", "cancelled", "missing"]
"""What a line came to. `woken` is the timeout of a session that had lost its shard; the last three are seal codes."""

Status: TypeAlias = Literal["in_progress", "finalizing", "cancelling", "completed", "expired", "cancelled"]

EndedBy: TypeAlias = Literal["settled", "deadline", "cancel"]

CODE_BY_END: Final[dict[EndedBy | None, Kind]] = {"deadline": "expired", "cancel": "cancelled"}
"""What an unfinished line is called; a settled batch has none, so there it is `missing`."""

Step: TypeAlias = "tuple[str, State]"
RowT = TypeVar("RowT")


class Record(NamedTuple):
    """A reply in a segment; `sender` is the session that got it, also in a salvaged copy."""

    line: int
    kind: Kind
    sender: int
    bytes: Bytes


class Extent(NamedTuple):
    """A registered record: the Store row, and where its bytes are (`writer` -1: the seal's own, always synced)."""

    sequence: int
    line: int
    kind: Kind
    sender: int
    writer: int
    position: int


class Session(NamedTuple):
    """What one claim knows in memory, and the segment that it alone appends to."""

    shard: int
    epoch: int
    phase: Literal["claimed", "running", "gone"]
    # Not known to the worker: lines that had a registered or durable successful record when it claimed.
    owed: tuple[int, ...]
    salvage: tuple[Record, ...]
    todo: tuple[int, ...]
    records: tuple[Record, ...]
    # Sequence numbers of the extents that it found damaged; taken out before anything is sent.
    repairs: tuple[int, ...]
    # Only used when the sequence is, against the rule, drawn ahead of the registering transaction.
    drawn: int


class Shard(NamedTuple):
    """A Store row: lines `first` to `end` - 1, open until settled, sealed by a fence, final once salvaged for good."""

    first: int
    end: int
    epoch: int
    phase: Literal["open", "settled", "sealed", "final"]


class Result(NamedTuple):
    """What one line has in a sealed file."""

    kind: Kind
    sender: int


class Sealer(NamedTuple):
    """One claim of the seal task; the newest is the one whose epoch the Store accepts."""

    phase: Literal["fenced", "saw", "ready", "read", "gone"]
    salvage: tuple[Record, ...]
    repairs: tuple[int, ...]
    content: tuple[Result, ...] | None
    status_seen: Status | None


class State(NamedTuple):
    """The Store, the segments, every session and every sealer."""

    status: Status
    ended_by: EndedBy | None
    next_sequence: int
    shards: tuple[Shard, ...]
    extents: tuple[Extent, ...]
    sessions: tuple[Session, ...]
    sealers: tuple[Sealer, ...]
    published: tuple[Result, ...] | None
    power_losses_left: int
    damages_left: int
    # The lines whose damaged results were taken out of the extents.
    taken_out: tuple[int, ...]
    sent_back: int
    was_resent: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How far the search goes. `claims` has one entry per shard that may exist: how often it may be claimed."""

    lines: int = 2
    claims: tuple[int, ...] = (2,)
    seals: int = 2
    errors: bool = True
    tears: bool = False
    power_losses: int = 0
    damages: int = 0
    ends_early: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Rules:
    """The rules under test; a mutant is a model with one of them switched off."""

    seal_fences: bool = True
    registration_guarded: bool = True
    claim_bumps_epoch: bool = True
    claim_salvages: bool = True
    salvage_copies: bool = True
    salvage_takes_only_successes: bool = True
    salvage_stays_in_the_shard: bool = True
    salvage_ends_with_final: bool = True
    reader_stays_within_extents: bool = True
    publish_checks_status: bool = True
    codes_follow_first_move: bool = True
    split_guarded: bool = True
    split_takes_only_untouched: bool = True
    register_after_sync: bool = True
    torn_is_no_record: bool = True
    sequence_drawn_in_transaction: bool = True
    repair_takes_damage_out: bool = True
    repair_guarded: bool = True
    seal_repairs: bool = True
    sending_back_undoes_the_end: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtentsModel:
    """What may happen next, under given rules and bounds."""

    bounds: Bounds
    rules: Rules

    def initial(self) -> State:
        """Give a fresh batch: one open shard of all lines, nothing claimed."""
        return State(
            status="in_progress",
            ended_by=None,
            next_sequence=1,
            shards=(Shard(first=1, end=self.bounds.lines + 1, epoch=0, phase="open"),),
            extents=(),
            sessions=(),
            sealers=(),
            published=None,
            power_losses_left=self.bounds.power_losses,
            damages_left=self.bounds.damages,
            taken_out=(),
            sent_back=0,
            was_resent=False,
        )

    def steps(self, state: State) -> Iterator[Step]:
        """Yield everything that anybody may do in this state. A refused write changes nothing, so it is no step."""
        yield from self._batch_steps(state)
        yield from self._claims(state)
        for number, session in enumerate(state.sessions):
            if session.phase == "claimed":
                yield self._recover(state, number, session)
            elif session.repairs:
                yield from self._repairs(state, number, session)
            elif session.phase == "running":
                # Nobody looks at a segment any more once the batch is published; what a late session may
                # still try is to write to the Store.
                if state.published is None:
                    yield from self._appends(state, number, session)
                yield from self._registers(state, number, session)
                yield from self._settles(state, number, session)
                yield from self._splits(state, number, session)
        yield from self._seal_claims(state)
        for number, sealer in enumerate(state.sealers):
            yield from self._seal_steps(state, number, sealer)
        if state.power_losses_left and state.published is None:
            yield from self._power_losses(state)
        if self.bounds.damages and state.published is None:
            yield from self._damages(state)

    def _batch_steps(self, state: State) -> Iterator[Step]:
        if not self.bounds.ends_early:
            return
        if state.status == "in_progress":
            yield "deadline passes", state._replace(status="finalizing", ended_by=state.ended_by or "deadline")
            yield "cancel", state._replace(status="cancelling", ended_by=state.ended_by or "cancel")
        elif state.status == "finalizing":
            yield "cancel while finalizing", state._replace(status="cancelling")

    # Claim and recovery. A lease may run out at any moment, so an open shard may always be claimed.

    def _claims(self, state: State) -> Iterator[Step]:
        if state.status != "in_progress":
            return
        for number, shard in enumerate(state.shards):
            claimed = sum(session.shard == number for session in state.sessions)
            if shard.phase != "open" or claimed >= self.bounds.claims[number] + state.sent_back:
                continue
            epoch = shard.epoch + 1 if self.rules.claim_bumps_epoch else shard.epoch
            session = Session(number, epoch, "claimed", self._owed(state, number), (), (), (), (), 0)
            yield (
                f"session {len(state.sessions)} claims shard {number}",
                state._replace(
                    shards=put(state.shards, number, shard._replace(epoch=epoch)),
                    sessions=(*state.sessions, session),
                ),
            )

    def _owed(self, state: State, shard: int) -> tuple[int, ...]:
        row = state.shards[shard]
        done = registered_lines(state)
        for session in state.sessions:
            if session.shard == shard:
                done |= {record.line for record in session.records if record.kind == "ok" and record.bytes == "durable"}
        return tuple(line for line in range(row.first, row.end) if line in done)

    def _recover(self, state: State, number: int, session: Session) -> Step:
        """Reading the extents and then the old segments is one step: the claim has already frozen the extents."""
        shard = state.shards[session.shard]
        salvage = self._unregistered(state, session.shard, before=number) if self.rules.claim_salvages else ()
        damaged = [e for e in damaged_extents(state) if shard.first <= e.line < shard.end]
        lost = {extent.line for extent in damaged}
        kept = (registered_lines(state) - lost) | {record.line for record in salvage}
        todo = tuple(line for line in range(shard.first, shard.end) if line not in kept)
        was_resent = state.was_resent or any(
            line in session.owed for line in todo if line not in lost and line not in state.taken_out
        )
        if not self.rules.salvage_copies and shard.epoch == session.epoch:
            places = [(record, *_place_of(state, session.shard, record)) for record in salvage]
            state = _with_extents(state, places)
            salvage = ()
        repairs = tuple(extent.sequence for extent in damaged)
        running = session._replace(phase="running", owed=(), salvage=salvage, todo=todo, repairs=repairs)
        return (
            f"session {number} recovers, salvages {[record.line for record in salvage]}",
            state._replace(sessions=put(state.sessions, number, running), was_resent=was_resent),
        )

    def _repairs(self, state: State, number: int, session: Session) -> Iterator[Step]:
        """What was damaged before this claim leaves the extents for good, before anything is sent again."""
        if not self._holds(state, session) and self.rules.repair_guarded:
            return
        after = _with_session(state, number, session._replace(repairs=()))
        if self.rules.repair_takes_damage_out:
            after = _without_extents(after, session.repairs)
        yield f"session {number} takes out {list(session.repairs)}", after

    def _damages(self, state: State) -> Iterator[Step]:
        """Registered bytes of a session go bad, or read well again; salvage of the seal is left alone."""
        for extent in state.extents:
            if extent.writer < 0:
                continue
            record = state.sessions[extent.writer].records[extent.position]
            if record.bytes == "durable" and state.damages_left:
                hit = _with_bytes(state, extent, "damaged")
                yield f"line {extent.line} is damaged", hit._replace(damages_left=state.damages_left - 1)
            elif record.bytes == "damaged":
                yield f"line {extent.line} heals", _with_bytes(state, extent, "durable")

    def _unregistered(self, state: State, shard: int, *, before: int) -> tuple[Record, ...]:
        """Give the first usable record of each unregistered line in the shard's segments, as it would be copied."""
        row = state.shards[shard]
        done = registered_lines(state) - {extent.line for extent in damaged_extents(state)}
        found: dict[int, Record] = {}
        for session in state.sessions[:before]:
            for record in session.records if session.shard == shard else ():
                is_ours = row.first <= record.line < row.end or not self.rules.salvage_stays_in_the_shard
                is_success = record.kind == "ok" or not self.rules.salvage_takes_only_successes
                is_whole = record.bytes != "damaged" and (record.bytes != "torn" or not self.rules.torn_is_no_record)
                if is_ours and is_success and is_whole and record.line not in done:
                    copy = record._replace(kind="garbage") if record.bytes == "torn" else record
                    found.setdefault(record.line, copy)
        return tuple(found[line] for line in sorted(found))

    # Run. Sending, waiting and appending are one step: the request touches nothing that another process can see
    # before its reply is written, and a crash in between looks like a crash before the send.

    def _appends(self, state: State, number: int, session: Session) -> Iterator[Step]:
        written: Bytes = "whole" if self.bounds.power_losses else "durable"
        last = session.records[-1] if session.records else None
        if last is not None and last.bytes == "torn":
            finished = session._replace(records=(*session.records[:-1], last._replace(bytes=written)))
            yield f"session {number} finishes writing line {last.line}", _with_session(state, number, finished)
            again = session._replace(records=(*session.records, last._replace(bytes=written)))
            yield f"session {number} writes line {last.line} to its next segment", _with_session(state, number, again)
            return
        for record, rest in self._next_records(state, number, session):
            first = record._replace(bytes="torn" if self.bounds.tears else written)
            yield (
                f"session {number} appends {record.kind} of line {record.line}",
                _with_session(state, number, rest._replace(records=(*rest.records, first))),
            )
        if any(record.bytes == "whole" for record in session.records):
            synced = tuple(r._replace(bytes="durable") if r.bytes == "whole" else r for r in session.records)
            yield f"session {number} syncs", _with_session(state, number, session._replace(records=synced))

    def _next_records(self, state: State, number: int, session: Session) -> Iterator[tuple[Record, Session]]:
        """Give what the session may append next, with the session that has taken it off its lists."""
        if session.salvage:
            yield session.salvage[0], session._replace(salvage=session.salvage[1:])
            return
        # Lines are sent in order, but their replies come in any.
        for line in session.todo:
            rest = session._replace(todo=tuple(other for other in session.todo if other != line))
            yield Record(line, "ok", number, "whole"), rest
            if self.bounds.errors:
                has_lost_its_shard = state.shards[session.shard].epoch != session.epoch
                yield Record(line, "woken" if has_lost_its_shard else "error", number, "whole"), rest

    def _registers(self, state: State, number: int, session: Session) -> Iterator[Step]:
        ready = self._registrable(state, number, session)
        if not ready:
            return
        if not self.rules.sequence_drawn_in_transaction and not session.drawn:
            drawn = _with_session(state, number, session._replace(drawn=state.next_sequence))
            yield f"session {number} draws numbers", drawn._replace(next_sequence=state.next_sequence + len(ready))
        elif self._holds(state, session) or not self.rules.registration_guarded:
            places = [(session.records[position], number, position) for position in ready]
            after = _with_extents(state, places, drawn=session.drawn)
            if session.drawn:
                after = _with_session(after, number, session._replace(drawn=0))
            yield f"session {number} registers lines {[record.line for record, _, _ in places]}", after

    def _registrable(self, state: State, number: int, session: Session) -> list[int]:
        """Give the positions of the session's own records that may be registered now."""
        accepted = {"durable"}
        if not self.rules.register_after_sync:
            accepted.add("whole")
        if not self.rules.torn_is_no_record:
            accepted.add("torn")
        done = {extent.position for extent in state.extents if extent.writer == number}
        return [p for p, record in enumerate(session.records) if record.bytes in accepted and p not in done]

    def _settles(self, state: State, number: int, session: Session) -> Iterator[Step]:
        shard = state.shards[session.shard]
        if session.todo or session.salvage or shard.phase != "open" or not self._holds(state, session):
            return
        done = {extent.position for extent in state.extents if extent.writer == number}
        if any(record.bytes != "torn" and p not in done for p, record in enumerate(session.records)):
            return
        if session.records and session.records[-1].bytes == "torn":
            return
        shards = put(state.shards, session.shard, shard._replace(phase="settled"))
        after = state._replace(shards=shards)
        if state.status == "in_progress" and all(row.phase in ("settled", "final") for row in shards):
            after = after._replace(status="finalizing", ended_by="settled")
        yield f"session {number} settles shard {session.shard}", after

    def _splits(self, state: State, number: int, session: Session) -> Iterator[Step]:
        if len(state.shards) >= len(self.bounds.claims):
            return
        if not self._holds(state, session) and self.rules.split_guarded:
            return
        row = state.shards[session.shard]
        in_flight = {record.line for record in session.records} if not self.rules.split_takes_only_untouched else set()
        own = sorted({*session.todo, *in_flight})
        for cut in own:
            suffix = tuple(line for line in own if line >= cut)
            # A suffix without holes, up to the end that the session knows of, and not the whole shard.
            if cut == row.first or suffix != tuple(range(cut, own[-1] + 1)) or own[-1] + 1 < row.end:
                continue
            cut_off = Shard(first=cut, end=own[-1] + 1, epoch=0, phase="open")
            kept = session._replace(todo=tuple(line for line in session.todo if line < cut))
            shards = (*put(state.shards, session.shard, row._replace(end=cut)), cut_off)
            after = _with_session(state, number, kept)
            yield f"session {number} cuts off the lines from {cut}", after._replace(shards=shards)

    def _holds(self, state: State, session: Session) -> bool:
        return state.shards[session.shard].epoch == session.epoch

    # Seal. Claiming the task and fencing are one step: between the two, only refused writes could come.

    def _seal_claims(self, state: State) -> Iterator[Step]:
        if (
            state.status not in ("finalizing", "cancelling")
            or len(state.sealers) >= self.bounds.seals + state.sent_back
        ):
            return
        shards = state.shards
        if self.rules.seal_fences:
            shards = tuple(_fenced(shard) for shard in shards)
        sealer = Sealer(phase="fenced", salvage=(), repairs=(), content=None, status_seen=None)
        yield (
            f"seal {len(state.sealers)} claims and fences",
            state._replace(shards=shards, sealers=(*state.sealers, sealer)),
        )

    def _seal_steps(self, state: State, number: int, sealer: Sealer) -> Iterator[Step]:
        is_newest = number == len(state.sealers) - 1
        is_final = all(shard.phase == "final" for shard in state.shards)
        if sealer.phase == "fenced" and is_final and self.rules.salvage_ends_with_final:
            yield f"seal {number} finds all final", _with_sealer(state, number, sealer._replace(phase="ready"))
        elif sealer.phase == "fenced" and is_newest:
            # A shard with a result for each line has nothing to salvage, so nobody looks at it before the copying.
            done = registered_lines(state)
            short = [n for n, row in enumerate(state.shards) if not done >= set(range(row.first, row.end))]
            tails = [self._unregistered(state, shard, before=len(state.sessions)) for shard in short]
            rows = [state.shards[shard] for shard in short]
            damaged = [e for e in damaged_extents(state) if any(row.first <= e.line < row.end for row in rows)]
            repairs = tuple(extent.sequence for extent in damaged)
            salvage = tuple(record for tail in tails for record in tail)
            saw = sealer._replace(phase="saw", salvage=salvage, repairs=repairs)
            yield f"seal {number} sees {[r.line for r in saw.salvage]} to salvage", _with_sealer(state, number, saw)
        elif sealer.phase == "saw" and is_newest:
            after = _without_extents(state, sealer.repairs)
            after = _with_extents(after, [(record, -1, 0) for record in sealer.salvage])
            after = after._replace(shards=tuple(shard._replace(phase="final") for shard in state.shards))
            ready = sealer._replace(phase="ready", salvage=(), repairs=())
            yield f"seal {number} registers its salvage", _with_sealer(after, number, ready)
        elif sealer.phase == "ready" and damaged_extents(state) and self.rules.seal_repairs:
            if is_newest:
                yield self._seal_repairs(state, number, sealer)
        elif sealer.phase == "ready":
            read = sealer._replace(phase="read", content=self._content(state), status_seen=state.status)
            yield f"seal {number} reads", _with_sealer(state, number, read)
        elif sealer.phase == "read" and is_newest:
            yield from self._publishes(state, number, sealer)

    def _seal_repairs(self, state: State, number: int, sealer: Sealer) -> Step:
        """A seal that meets damage takes it out; if every line had been settled, it sends the batch back for them."""
        damaged = damaged_extents(state)
        after = _without_extents(state, tuple(extent.sequence for extent in damaged))
        if state.ended_by != "settled":
            return f"seal {number} takes out damage", after
        if state.status == "cancelling":
            return f"seal {number} takes out damage after a cancel", after._replace(ended_by="cancel")
        lost = {extent.line for extent in damaged}
        shards = tuple(
            row._replace(phase="open") if lost & set(range(row.first, row.end)) else row for row in state.shards
        )
        after = _with_sealer(after, number, sealer._replace(phase="gone"))
        ended_by = None if self.rules.sending_back_undoes_the_end else state.ended_by
        after = after._replace(status="in_progress", ended_by=ended_by, shards=shards, sent_back=state.sent_back + 1)
        return f"seal {number} sends the batch back", after

    def _content(self, state: State) -> tuple[Result, ...]:
        unfinished = CODE_BY_END.get(state.ended_by, "missing")
        if not self.rules.codes_follow_first_move:
            unfinished = "cancelled" if state.status in ("cancelling", "cancelled") else "expired"
        damaged = damaged_extents(state)
        by_line = {e.line: Result(e.kind, e.sender) for e in state.extents if e not in damaged}
        return tuple(by_line.get(line, Result(unfinished, -1)) for line in range(1, self.bounds.lines + 1))

    def _publishes(self, state: State, number: int, sealer: Sealer) -> Iterator[Step]:
        assert sealer.content is not None
        status = state.status if self.rules.publish_checks_status else sealer.status_seen
        if status not in ("finalizing", "cancelling"):
            return
        is_whole = all(result.kind in ("ok", "error") for result in sealer.content)
        word: Status = "cancelled" if status == "cancelling" else "completed" if is_whole else "expired"
        after = state._replace(status=word, published=sealer.content)
        yield f"seal {number} publishes as {word}", _with_sealer(after, number, sealer._replace(phase="gone"))

    # Power loss: every process ends, and of what was not synced each record is either there or torn.

    def _power_losses(self, state: State) -> Iterator[Step]:
        unsynced = [
            (number, position)
            for number, session in enumerate(state.sessions)
            for position, record in enumerate(session.records)
            if record.bytes == "whole"
        ]
        ends: tuple[Bytes, Bytes] = ("torn", "durable")
        for choice in product(ends, repeat=len(unsynced)):
            kept = dict(zip(unsynced, choice, strict=True))
            sessions = tuple(
                session._replace(
                    phase="gone",
                    owed=(),
                    salvage=(),
                    todo=(),
                    repairs=(),
                    records=tuple(
                        record._replace(bytes=kept.get((number, position), record.bytes))
                        for position, record in enumerate(session.records)
                    ),
                )
                for number, session in enumerate(state.sessions)
            )
            yield (
                f"power loss leaves {list(choice)}",
                state._replace(
                    sessions=sessions,
                    sealers=tuple(sealer._replace(phase="gone", salvage=(), repairs=()) for sealer in state.sealers),
                    power_losses_left=state.power_losses_left - 1,
                ),
            )


def registered_lines(state: State) -> set[int]:
    """Give the lines that have an extent."""
    return {extent.line for extent in state.extents}


def damaged_extents(state: State) -> list[Extent]:
    """Give the extents whose bytes read wrong now."""
    return [
        extent
        for extent in state.extents
        if extent.writer >= 0 and state.sessions[extent.writer].records[extent.position].bytes == "damaged"
    ]


def put(rows: tuple[RowT, ...], number: int, row: RowT) -> tuple[RowT, ...]:
    """Give the rows with one of them replaced."""
    return (*rows[:number], row, *rows[number + 1 :])


def _with_session(state: State, number: int, session: Session) -> State:
    return state._replace(sessions=put(state.sessions, number, session))


def _with_sealer(state: State, number: int, sealer: Sealer) -> State:
    return state._replace(sealers=put(state.sealers, number, sealer))


def _with_extents(state: State, places: list[tuple[Record, int, int]], *, drawn: int = 0) -> State:
    first = drawn or state.next_sequence
    added = tuple(
        Extent(first + offset, record.line, record.kind, record.sender, writer, position)
        for offset, (record, writer, position) in enumerate(places)
    )
    next_sequence = state.next_sequence if drawn else first + len(added)
    return state._replace(extents=state.extents + added, next_sequence=next_sequence)


def _without_extents(state: State, sequences: tuple[int, ...]) -> State:
    lines = tuple(extent.line for extent in state.extents if extent.sequence in sequences)
    kept = tuple(extent for extent in state.extents if extent.sequence not in sequences)
    return state._replace(extents=kept, taken_out=state.taken_out + lines)


def _with_bytes(state: State, extent: Extent, changed: Bytes) -> State:
    session = state.sessions[extent.writer]
    record = session.records[extent.position]._replace(bytes=changed)
    return _with_session(state, extent.writer, session._replace(records=put(session.records, extent.position, record)))


def _place_of(state: State, shard: int, record: Record) -> tuple[int, int]:
    for number, session in enumerate(state.sessions):
        if session.shard == shard and record in session.records:
            return number, session.records.index(record)
    raise LookupError(f"no segment of shard {shard} holds {record}")


def _fenced(shard: Shard) -> Shard:
    if shard.phase in ("sealed", "final"):
        return shard
    return shard._replace(epoch=shard.epoch + 1, phase="sealed")
