"""Real processes of the command line over a folder of their own, and a simulator here that counts what they send."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil

from batchrunner.simulate import Simulator, SimulatorSettings, SimulatorStats
from tests.invariants import Checked, check_run, check_summary

# A command that takes longer hangs.
COMMAND_S = 60.0
# What every command finds in its environment; tests that put the blobs elsewhere fill it for their time.
AMBIENT: dict[str, str] = {}


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended; a killed one has the negative number of its signal."""

    code: int
    stdout: bytes
    stderr: str

    @property
    def summary(self) -> dict[str, Any]:
        """What --json printed."""
        found = json.loads(self.stdout)
        check_summary(found)
        assert isinstance(found, dict)
        return found


@dataclass(slots=True)
class Command:
    """A started command, leader of a process group of its own."""

    process: asyncio.subprocess.Process
    talk: list[bytes] = field(default_factory=list)

    @property
    def pid(self) -> int:
        """Its process id, and that of its group."""
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        """Signal the command alone."""
        self.process.send_signal(number)

    def kill_group(self) -> None:
        """Kill it and its workers at one instant."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def workers(self) -> list[psutil.Process]:
        """Its worker processes that live now."""
        return [each for each in psutil.Process(self.pid).children() if each.status() != psutil.STATUS_ZOMBIE]

    async def said(self, words: str) -> str:
        """Wait for a line on stderr with these words and give it."""
        assert self.process.stderr is not None
        async with asyncio.timeout(COMMAND_S):
            while line := await self.process.stderr.readline():
                self.talk.append(line)
                if words in line.decode(errors="replace"):
                    return line.decode(errors="replace")
        raise AssertionError(f"it ended without saying {words!r}: {b''.join(self.talk)!r}")

    async def ended(self, *, within_s: float = COMMAND_S) -> Ended:
        """Wait for its end."""
        ending = asyncio.ensure_future(self.process.communicate())
        await asyncio.wait({ending}, timeout=within_s)
        hangs = not ending.done()
        if hangs:
            self.kill_group()
        out, err = await ending
        talk = b"".join([*self.talk, err]).decode(errors="replace")
        assert not hangs, f"the command hangs:\n{talk}"
        assert self.process.returncode is not None
        return Ended(self.process.returncode, out, talk)


@dataclass(slots=True)
class Bench:
    """A folder with an input, and the simulator that its runs talk to."""

    folder: Path
    simulator: Simulator
    flags: list[str] = field(default_factory=lambda: ["--concurrency", "16"])
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def input(self) -> Path:
        """The plain input."""
        return self.folder / "in.jsonl"

    @property
    def output(self) -> Path:
        """OUTPUT."""
        return self.folder / "out.jsonl"

    @property
    def errors(self) -> Path:
        """The errors file."""
        return self.folder / "out.errors.jsonl"

    @property
    def state(self) -> Path:
        """The run folder."""
        return self.folder / "out.jsonl.run"

    def write_input(self, count: int, **body: object) -> None:
        """Make an input of `count` chat lines, each with a prompt of its own and more in its body."""
        self.input.write_bytes(b"".join(chat_line(number, **body) for number in range(count)))

    async def start(self, *flags: str, **environment: str) -> Command:
        """Start `run` over the folder's input."""
        url = self.simulator.url
        command = ["run", str(self.input), "-o", str(self.output), "-u", url, *self.flags, *flags]
        return await start(command, self.folder, {**self.environment, **environment})

    async def run(self, *flags: str, **environment: str) -> Ended:
        """Run to its end."""
        return await (await self.start(*flags, **environment)).ended()

    def check(self, *, repeats_max: int | None = None) -> Checked:
        """Prove the run's ledger."""
        stats = None if repeats_max is None else self.simulator.stats()
        return check_run(self.input, self.output, self.errors, sim_stats=stats, repeats_max=repeats_max or 0)

    def sender(self, command: Command) -> psutil.Process:
        """A worker process of a run that talks to the simulator; another one may not have begun."""
        port = urlsplit(self.simulator.url).port
        return next(
            each
            for each in command.workers()
            if any(talk.raddr and talk.raddr.port == port for talk in each.net_connections("tcp"))
        )

    async def reach(self, is_reached: Callable[[SimulatorStats], bool], command: Command) -> None:
        """Wait until the simulator's counters fulfil a condition; the command must not end before."""
        await reach(self.simulator, is_reached, command)


async def reach(simulator: Simulator, is_reached: Callable[[SimulatorStats], bool], command: Command) -> None:
    """Wait until a simulator's counters fulfil a condition; the command must not end before."""
    reached = asyncio.ensure_future(simulator.wait_until(is_reached))
    ended = asyncio.ensure_future(command.process.wait())
    done, _ = await asyncio.wait({reached, ended}, timeout=COMMAND_S, return_when=asyncio.FIRST_COMPLETED)
    for waiting in (reached, ended):
        waiting.cancel()
    if reached not in done:
        command.kill_group()
        raise AssertionError(f"not reached: {(await command.ended()).stderr}; {simulator.stats()}")


async def died(process: psutil.Process) -> None:
    """Wait for the death of a process whose parent is frozen and cannot bury it."""
    loop, dead = asyncio.get_running_loop(), asyncio.Event()
    pidfd = os.pidfd_open(process.pid)
    loop.add_reader(pidfd, dead.set)
    try:
        async with asyncio.timeout(COMMAND_S):
            await dead.wait()
    finally:
        loop.remove_reader(pidfd)
        os.close(pidfd)


def freeze(database: Path, *processes: psutil.Process) -> None:
    """Stop processes while none of them writes: one that did would keep all others from the database."""
    with contextlib.closing(sqlite3.connect(database, timeout=COMMAND_S, isolation_level=None)) as holding:
        holding.execute("BEGIN IMMEDIATE")
        for each in processes:
            each.suspend()
            while each.status() not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE):
                os.sched_yield()
        holding.execute("ROLLBACK")


def chat_line(number: int, **body: object) -> bytes:
    """Make one request line."""
    content = {"model": "simulated", "messages": [{"role": "user", "content": f"prompt {number}"}]} | body
    line = {"custom_id": f"request-{number:05}", "method": "POST", "url": "/v1/chat/completions", "body": content}
    return json.dumps(line).encode() + b"\n"


async def start(
    arguments: list[str], folder: Path, environment: dict[str, str], *, stdin: Path | None = None
) -> Command:
    """Start the command line in a process group of its own, with no setting from outside."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("BATCHRUNNER_", "OPENAI_"))}
    with (stdin or Path(os.devnull)).open("rb") as reading:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "batchrunner",
            *arguments,
            cwd=folder,
            env=inherited | AMBIENT | {"XDG_CONFIG_HOME": str(folder)} | environment,
            stdin=reading,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    return Command(process)


@contextlib.asynccontextmanager
async def bench(folder: Path, **settings: Any) -> AsyncIterator[Bench]:
    """Have a simulator beside a folder."""
    async with Simulator(SimulatorSettings(**settings)) as simulator:
        yield Bench(folder, simulator)
