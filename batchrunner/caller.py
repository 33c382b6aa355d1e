"""Sends a line, and before a line that may be blamed for the upstream's death finds out whether anybody is there."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping

from batchrunner.limits import DEATHS_ALONE
from batchrunner.members import renamed
from batchrunner.models import Attempt
from batchrunner.outlets import Outlet
from batchrunner.verdict import (
    is_late,
    is_sign_of_life,
    is_silent,
    is_unreached,
    nobody_there,
    unreached_since_s,
)
from batchrunner.work import Work


class Caller:
    """Calls one upstream for the lines of one process, and tells its gate whether anybody is there.

    `contact_message` says what the last attempt met that found nobody.
    """

    __slots__ = (
        "_address", "_aliases", "_door", "_first_contact", "_knocked", "_outage", "_upstream", "contact_message",
    )  # fmt: skip

    def __init__(self, outlet: Outlet) -> None:
        self.contact_message = ""
        self._door = asyncio.Lock()
        self._knocked: Attempt | None = None
        self._address = outlet.address
        self._upstream = outlet.upstream
        self._aliases: Mapping[str, str] = outlet.aliases
        self._outage = outlet.gate.outage
        self._first_contact = outlet.gate.first_contact

    async def send(self, work: Work) -> Attempt:
        """Send a line. A suspect is sent only where a knock is answered, so that its failure is its own; else, and when
        it is excused, that it reached nobody uses up no try.
        """
        line, is_excused = work.line, work.is_excused
        work.is_excused = is_vouched = False
        if self._is_suspect(work) and not is_excused:
            answer = await self._upstream.knock()
            work.is_excused = self._outage.note_knock(is_answered=is_sign_of_life(answer))
            if not is_sign_of_life(answer):
                return nobody_there(answer)
            is_vouched = True
        key = f"{work.run.key_stem}-{line.line_number}-{work.generation}"
        body = renamed(line.body, self._aliases) if work.model in self._aliases else line.body
        attempt = await self._upstream.send(
            line.url, body, idempotency_key=key, is_at_most_once=work.run.is_at_most_once, owner=work
        )
        if is_sign_of_life(attempt) or (is_vouched and is_late(attempt)):
            self._outage.note_answer(attempt.started_at_s)
        elif is_late(attempt) and not work.deaths and not work.run.is_at_most_once:
            answer = await self._knock_since(attempt.started_at_s + attempt.elapsed_s)
            if not is_sign_of_life(answer):
                # This once: from now on a knock goes before it while the upstream is down.
                work.deaths = 1
                work.generation += attempt.error is None
                return nobody_there(answer)
        return nobody_there(attempt) if is_excused and (is_unreached(attempt) or is_late(attempt)) else attempt

    async def knock(self, in_flight: int) -> bool:
        """Ask an upstream that is down whether it is back; `in_flight` counts what is under way besides."""
        answer = await self._upstream.knock()
        if is_sign_of_life(answer):
            self._outage.note_answer(answer.started_at_s)
            self._first_contact.note_answer()
            return True
        self._note_nobody(answer, answer.started_at_s + answer.elapsed_s, in_flight + 1)
        return False

    def note_failure(self, work: Work, attempt: Attempt, now_s: float, *, in_flight: int, line_count: int) -> None:
        """Take in an attempt that may mean that nobody is there. `in_flight` counts it; for `line_count` see Outage."""
        if is_unreached(attempt):
            self._note_nobody(attempt, now_s, in_flight)
        elif is_silent(attempt):
            self._say(attempt)
            line = (work.run.batch.id, work.line.line_number)
            self._outage.note_silence(now_s, attempt.started_at_s, line, in_flight=in_flight, line_count=line_count)

    async def _knock_since(self, since_s: float) -> Attempt:
        """Knock, once for all lines that came to nothing at about the same time, and not before `since_s`."""
        async with self._door:
            if self._knocked is None or self._knocked.started_at_s < since_s:
                self._knocked = await self._upstream.knock()
                if is_sign_of_life(self._knocked):
                    self._outage.note_knock(is_answered=True)
                    self._outage.note_answer(self._knocked.started_at_s)
            return self._knocked

    def _note_nobody(self, attempt: Attempt, now_s: float, in_flight: int) -> None:
        self._say(attempt)
        self._outage.note_failure(now_s, in_flight)
        self._first_contact.note_failure(unreached_since_s(attempt))

    def _say(self, attempt: Attempt) -> None:
        self.contact_message = attempt.message or f"{self._address} answers {attempt.status} to everything"

    def _is_suspect(self, work: Work) -> bool:
        return bool(work.deaths) and (self._outage.is_down or work.deaths >= DEATHS_ALONE)
