"""A child process that is kept running: started, greeted, listened to, started again when it dies, ended with its
parent.

Parent and child talk in lines over the child's stdin and stdout; what the child says on stderr is the parent's to show.
A child never hears Ctrl-C, and ends when its stdin closes, so that none outlives its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

from batchrunner.errors import WorkerLost
from batchrunner.ports import Clock

logger = logging.getLogger(__name__)

# Ctrl-C reaches a whole process group, and Python could ignore it only once it has started; what is ignored stays so
# over exec. A function between fork and exec is not safe beside threads, and uvloop undoes what it sets.
_DEAF = ("/bin/sh", "-c", 'trap "" INT; exec "$@"', "sh")
_LINE_BYTES_MAX = 1 << 20
# What a child says on stderr without ending its line is passed on in pieces of at most twice this.
_WORDS_BYTES_MAX = 64 * 1024
# What waits for a child that is stopped, or too busy to read.
_UNREAD_BYTES_MAX = 256 * 1024
# A dead child's stderr may be held open by a process that it started: nobody waits longer for the end of it.
_LAST_WORDS_S = 2.0
# A child that dies this often within the time below, without any progress in between, dies by itself.
_DEATHS_MAX = 5
_DEATHS_WITHIN_S = 60.0
_EXTRA_GRACE_S = 10.0


class Grace:
    """How long processes may take to end once they were asked to; asked again they can only get less."""

    def __init__(self, clock: Clock) -> None:
        self.given_s: float | None = None
        self._clock = clock
        self._until_s = math.inf

    def give(self, grace_s: float) -> None:
        """Ask them to end within this time."""
        until_s = self._clock.monotonic_s() + grace_s
        if until_s < self._until_s:
            self.given_s, self._until_s = grace_s, until_s

    @property
    def is_long_over(self) -> bool:
        """Whether nothing but a kill can help."""
        return self._clock.monotonic_s() >= self._until_s + _EXTRA_GRACE_S


class ChildProcess(ABC):
    """One child process and its successors. `keep` returns when one has ended after `leave`.

    `greeting` is the first line that each of them reads. With `waits_s` one that dies again and again as soon as it
    starts is started again after that time.

    Raises (from keep):
        WorkerLost: it does so, and there is no `waits_s`.
    """

    def __init__(
        self,
        name: str,
        *,
        command: Sequence[str],
        greeting: bytes,
        clock: Clock,
        pass_fds: Sequence[int] = (),
        waits_s: float | None = None,
    ) -> None:
        self.name = name
        self.process: asyncio.subprocess.Process | None = None
        self._command = command
        self._greeting = greeting
        self.clock = clock
        self._pass_fds = tuple(pass_fds)
        self._waits_s = waits_s
        self._deaths_s: list[float] = []
        self._leaving = asyncio.Event()

    @abstractmethod
    def hear(self, line: bytes) -> None:
        """Take in a line that the child wrote."""

    @abstractmethod
    async def mourn(self) -> None:
        """Do what has to be done after each end."""

    def overhear(self, words: str) -> None:
        """Take in whole lines that the child wrote on stderr, control characters escaped; they go to the log."""
        logger.warning("%s", words, extra={"action": "child_said"})

    @property
    def pid(self) -> int | None:
        """The process id of the one that runs now."""
        return self.process.pid if self.process is not None else None

    def progressed(self) -> None:
        """Say that the child did something of use: what came before speaks no more against it."""
        self._deaths_s.clear()

    def leave(self) -> None:
        """Start no other when the present one ends."""
        self._leaving.set()

    async def keep(self) -> None:
        """Keep one running until `leave`."""
        while not self._leaving.is_set():
            await self._start()
            code = await self._listen()
            self.process = None
            await self.mourn()
            if not self._leaving.is_set():
                await self._note_death(code)

    def send(self, line: bytes) -> None:
        """Write a line to the child, if there is one that reads. What is said to one that does not is dropped: all of
        it is said again and again.
        """
        process = self.process
        if process is None or process.stdin is None or process.stdin.is_closing():
            return
        if process.stdin.transport.get_write_buffer_size() < _UNREAD_BYTES_MAX:
            process.stdin.write(line)

    def kill(self) -> None:
        """End the child at once."""
        if self.process is not None:
            logger.error("%s did not end, killed", self.name, extra={"action": "child_killed", "pid": self.process.pid})
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    async def dismiss(self) -> None:
        """End a child that nobody listens to any more: it drains at once when its stdin closes."""
        process = self.process
        if process is None:
            return
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.close()
        async with asyncio.TaskGroup() as group:
            ends = [group.create_task(process.stdout.read()), group.create_task(self._relay(process.stderr))]
            try:
                async with asyncio.timeout(_EXTRA_GRACE_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()
            await asyncio.wait(ends, timeout=_LAST_WORDS_S)
            for end in ends:
                end.cancel()

    async def _start(self) -> None:
        self.process = await asyncio.create_subprocess_exec(
            *_DEAF,
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_LINE_BYTES_MAX,
            pass_fds=self._pass_fds,
        )
        self.send(self._greeting)

    async def _listen(self) -> int:
        """Follow the child to its end, its last words included; gives its exit code."""
        process = self.process
        assert process is not None
        assert process.stdout is not None
        assert process.stderr is not None
        async with asyncio.TaskGroup() as group:
            relaying = group.create_task(self._relay(process.stderr))
            while line := await process.stdout.readline():
                self.hear(line)
            code = await process.wait()
            await asyncio.wait({relaying}, timeout=_LAST_WORDS_S)
            relaying.cancel()
        return code

    async def _relay(self, stderr: asyncio.StreamReader) -> None:
        """Pass on what the child says, in whole lines as they come; a long one without an end goes in parts."""
        held = b""
        try:
            while words := await stderr.read(_WORDS_BYTES_MAX):
                whole, end, held = (held + words).rpartition(b"\n")
                self._pass_on(whole + end)
                if len(held) >= _WORDS_BYTES_MAX:
                    self._pass_on(held)
                    held = b""
        finally:
            self._pass_on(held)

    def _pass_on(self, words: bytes) -> None:
        text = words.decode("utf-8", "backslashreplace").rstrip()
        if text:
            self.overhear("".join(each if each.isprintable() or each in "\n\t" else _escaped(each) for each in text))

    async def _note_death(self, code: int) -> None:
        now_s = self.clock.monotonic_s()
        self._deaths_s = [at_s for at_s in self._deaths_s if now_s - at_s < _DEATHS_WITHIN_S] + [now_s]
        logger.warning("%s ended with code %d; starting it again", self.name, code, extra={"action": "child_died"})
        if len(self._deaths_s) < _DEATHS_MAX:
            return
        told = f"{self.name} died {len(self._deaths_s)} times in a minute, the last time with code {code}"
        if self._waits_s is None:
            raise WorkerLost(told)
        logger.error("%s; waiting %.0f s", told, self._waits_s, extra={"action": "child_waits"})
        waiting = asyncio.ensure_future(self.clock.sleep(self._waits_s))
        leaving = asyncio.ensure_future(self._leaving.wait())
        await asyncio.wait([waiting, leaving], return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        leaving.cancel()


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
