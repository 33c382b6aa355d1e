"""A worker process of a crew: one session that reports to its supervisor and keeps to the shares that come back."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from batchrunner.app import open_adapters, worker_session
from batchrunner.child import run_child
from batchrunner.fanout import Fanout
from batchrunner.ports import Clock
from batchrunner.supervisor import Activity, Report, Share, WorkerGreeting, encode_message
from batchrunner.tuning import freeze_start_up, take_long_turns
from batchrunner.worker import Worker

# Where workers keep every core busy, whoever asks the API must not wait for them.
_WORKER_NICENESS = 5


class _PipePacer:
    """Gives the supervisor a report at each call and applies the share that came last."""

    def __init__(self, worker: Callable[[], Worker], clock: Clock) -> None:
        self.share: Share | None = None
        self._worker = worker
        self._clock = clock

    def __call__(self, fanout: Fanout) -> None:
        worker = self._worker()
        activities = tuple(
            Activity(
                sample=pool.take_sample(),
                in_flight=len(pool.in_flight),
                waiting=fanout.waiting_for(pool),
                is_down=pool.is_down,
            )
            for pool in fanout.pools
        )
        report = Report(
            activities=activities,
            waiting=fanout.waiting_count + fanout.untouched_count,
            tally=fanout.tally.to_wire(),
            trouble=worker.trouble_text,
            lost=worker.lost_text,
        )
        try:
            os.write(sys.stdout.fileno(), encode_message(report))
        except BrokenPipeError:
            # The supervisor is gone; the end of stdin says so as well and ends this process.
            worker.stop(grace_s=0.0)
        if self.share is not None:
            for pool, part in zip(fanout.pools, self.share.parts, strict=True):
                pool.window, pool.bound_by = part.window, part.bound_by
                pool.gate.set_rates(self._clock.monotonic_s(), rpm=part.rpm, tpm=part.tpm)


async def _work(greeting: WorkerGreeting, stdin: asyncio.StreamReader) -> None:
    adapters = open_adapters(Path(greeting.folder), greeting.settings)
    workers: list[Worker] = []
    pacer = _PipePacer(lambda: workers[0], adapters.clock)
    session = worker_session(
        adapters,
        Path(greeting.folder),
        greeting.settings,
        api_keys=greeting.api_keys,
        pacer=pacer,
        is_server=greeting.is_server,
    )
    async with session as worker:
        workers.append(worker)
        for pool in worker.fanout.pools:
            pool.window = 0
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, worker.stop)
        async with asyncio.TaskGroup() as group:
            listening = group.create_task(_obey(worker, pacer, stdin))
            await worker.run()
            listening.cancel()
    adapters.store.close()


async def _obey(worker: Worker, pacer: _PipePacer, stdin: asyncio.StreamReader) -> None:
    """Follow the supervisor's shares; when its pipe closes, end at once: nobody would share out limits any more."""
    while line := await stdin.readline():
        pacer.share = msgspec.json.decode(line, type=Share)
        if pacer.share.stop_grace_s is not None:
            worker.stop(grace_s=pacer.share.stop_grace_s)
    worker.stop(grace_s=0.0)


async def _worker_process(stdin: asyncio.StreamReader) -> None:
    greeting = msgspec.json.decode(await stdin.readline(), type=WorkerGreeting)
    take_long_turns()
    if greeting.is_server:
        os.nice(_WORKER_NICENESS)
    freeze_start_up()
    await _work(greeting, stdin)


if __name__ == "__main__":
    run_child(_worker_process, words="worker %(process)d: %(message)s", level=logging.WARNING)
