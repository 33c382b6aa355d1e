"""Sends a line, and before a line that may be blamed for the upstream's death finds out whether anybody is there."""

from __future__ import annotations

from collections.abc import Mapping

from batchrunner.limits import DEATHS_ALONE, Outage
from batchrunner.members import renamed
from batchrunner.models import Attempt
from batchrunner.ports import Upstream
from batchrunner.verdict import is_sign_of_life, is_unreached, nobody_there
from batchrunner.work import Work


class Caller:
    """Calls one upstream for the lines of one process, and tells `outage` of every sign of life."""

    __slots__ = ("_aliases", "_outage", "_upstream")

    def __init__(self, upstream: Upstream, outage: Outage, aliases: Mapping[str, str]) -> None:
        self._upstream = upstream
        self._aliases = aliases
        self._outage = outage

    async def send(self, work: Work) -> Attempt:
        """Send a line. A suspect is sent only where a knock is answered, so that its failure is its own; else, and when
        it is excused, that it reached nobody uses up no try.
        """
        line, is_excused = work.line, work.is_excused
        work.is_excused = False
        if self._is_suspect(work) and not is_excused:
            answer = await self._upstream.knock()
            work.is_excused = self._outage.note_knock(is_answered=is_sign_of_life(answer))
            if not is_sign_of_life(answer):
                return nobody_there(answer)
        key = f"{work.run.key_stem}-{line.line_number}-{work.generation}"
        body = renamed(line.body, self._aliases) if work.model in self._aliases else line.body
        attempt = await self._upstream.send(
            line.url, body, idempotency_key=key, is_at_most_once=work.run.is_at_most_once, owner=work
        )
        if is_sign_of_life(attempt):
            self._outage.note_answer(attempt.started_at_s)
        return nobody_there(attempt) if is_excused and is_unreached(attempt) else attempt

    def _is_suspect(self, work: Work) -> bool:
        return bool(work.deaths) and (self._outage.is_down or work.deaths >= DEATHS_ALONE)
