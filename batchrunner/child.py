"""What a child process of ours does before and around its own work: it is greeted on stdin and talks on stderr."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable

from batchrunner import crash
from batchrunner.log_line import LogLine
from batchrunner.tuning import tune_process


def arm_crash_point() -> None:
    """Have this process kill itself at the point that BATCHRUNNER_CRASH_AT names, so that tests can prove what
    survives.

    Raises:
        UsageError: there is no such point.
    """
    crash.arm(os.environ.get("BATCHRUNNER_CRASH_AT", ""), lambda: os.kill(os.getpid(), signal.SIGKILL))


def run_child(work: Callable[[asyncio.StreamReader], Awaitable[None]], *, words: str, level: int) -> None:
    """Run this process as a child: `work` reads its parent's lines. Its log is written as `words` has it, from `level`
    on.
    """
    arm_crash_point()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LogLine(words))
    logging.basicConfig(level=level, handlers=[handler])

    async def listening() -> None:
        stdin = asyncio.StreamReader(limit=1 << 22)
        protocol = asyncio.StreamReaderProtocol(stdin)
        await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
        await work(stdin)

    with asyncio.Runner(loop_factory=tune_process()) as runner:
        runner.run(listening())
