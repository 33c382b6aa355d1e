"""A whole run of named lines in this process: the real transport, fan-out, journal and seal over a folder."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from batchrunner.app import Adapters, open_adapters, worker_session
from batchrunner.clock import SystemRng
from batchrunner.fanout import Fanout
from batchrunner.lifecycle import TERMINAL
from batchrunner.models import LOCAL_TENANT, Batch, BatchId, FileId, NewBatch, OnUnknown
from batchrunner.ports import TenantScope
from batchrunner.settings import Settings
from tests.hostile.cases import Words
from tests.hostile.peer import Peer, Talk, answer
from tests.hostile.run_cases import LineCase

BATCH = BatchId("batch_hostile")
WINDOW = 48
LIMIT_S = 90.0


class HastyRng(SystemRng):
    """Draws the shortest wait each time, so that retries follow at once."""

    def uniform(self) -> float:
        """See Rng."""
        return 0.0


class CasePeer(Peer):
    """Says to each line what its case wants, and counts how often it was asked."""

    def __init__(self, cases: Sequence[LineCase]) -> None:
        super().__init__(self._talk)
        self.sends: Counter[str] = Counter()
        self._cases = {case.name: case for case in cases}

    async def _talk(self, talk: Talk) -> None:
        while not talk.is_left:
            await self._reply(talk, await talk.request())

    async def _reply(self, talk: Talk, request: bytes) -> None:
        if request.startswith(b"GET "):
            talk.say(answer(b'{"data":[]}'))
            return
        case = self._cases[json.loads(request.partition(b"\r\n\r\n")[2])["case"]]
        words = case.words[min(self.sends[case.name], len(case.words) - 1)]
        self.sends[case.name] += 1
        await words.answer(talk)


class OutagePeer(CasePeer):
    """A gateway whose server goes away after some answers: it says `words` until it has said them often enough."""

    def __init__(self, cases: Sequence[LineCase], *, answers: int, refusals: int, words: Words) -> None:
        super().__init__(cases)
        self._answers = answers
        self._refusals = refusals
        self._refusal = words

    async def _reply(self, talk: Talk, request: bytes) -> None:
        if self._answers == 0 and self._refusals > 0:
            self._refusals -= 1
            await self._refusal.answer(talk)
            return
        self._answers = max(0, self._answers - 1)
        await super()._reply(talk, request)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What a run left: its files line by line, and what the peer saw."""

    batch: Batch
    output: list[bytes]
    errors: list[bytes]
    assets: dict[str, bytes]
    sends: Counter[str]
    peer: str


def run_cases(
    folder: Path,
    cases: Sequence[LineCase],
    settings: Settings,
    *,
    on_unknown: OnUnknown = OnUnknown.RETRY,
    peer: CasePeer | None = None,
) -> Ended:
    """Run one file with a line for each case to its end."""
    return asyncio.run(_run_cases(folder, cases, settings, on_unknown, peer or CasePeer(cases)))


async def _run_cases(
    folder: Path, cases: Sequence[LineCase], settings: Settings, on_unknown: OnUnknown, peer: CasePeer
) -> Ended:
    source = folder / "in.jsonl"
    source.write_bytes(b"".join(_input_line(case) for case in cases))
    await peer.listen()
    adapters = replace(open_adapters(folder / "run"), rng=HastyRng())
    try:
        adapters.blobs.adopt("input", source)
        scope = adapters.store.scope(LOCAL_TENANT)
        scope.create_batch(_batch(on_unknown))
        batch = await _work(adapters, folder / "run", replace(settings, base_url=peer.url), scope)
        return Ended(
            batch=batch,
            output=_lines(adapters, scope, batch.output_file_id),
            errors=_lines(adapters, scope, batch.error_file_id),
            assets=_assets(adapters),
            sends=peer.sends,
            peer=peer.url.split("/")[2],
        )
    finally:
        adapters.store.close()
        await peer.die()


def _input_line(case: LineCase) -> bytes:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "input": "hi", "case": case.name}
    request = {"custom_id": case.custom_id, "method": "POST", "url": case.url, "body": body}
    return json.dumps(request).encode() + b"\n"


def _batch(on_unknown: OnUnknown) -> NewBatch:
    return NewBatch(
        id=BATCH,
        tenant=LOCAL_TENANT,
        dialect="run",
        endpoint=None,
        input_file_id=None,
        source="input",
        completion_window=None,
        deadline_at=None,
        on_unknown=on_unknown,
    )


async def _work(adapters: Adapters, folder: Path, settings: Settings, scope: TenantScope) -> Batch:
    """Have one worker session take the batch to its end."""

    def pace(fanout: Fanout) -> None:
        fanout.pools[0].take_sample()
        fanout.pools[0].window = WINDOW

    async with worker_session(adapters, folder, settings, api_keys={"default": "sk-secret"}, pacer=pace) as worker:
        working = asyncio.create_task(worker.run())
        try:
            async with asyncio.timeout(LIMIT_S):
                while (batch := scope.batch(BATCH)).status not in TERMINAL:
                    worker.step_done.clear()
                    await worker.step_done.wait()
        finally:
            worker.stop(grace_s=0.0)
            await working
        return batch


def _lines(adapters: Adapters, scope: TenantScope, file_id: FileId | None) -> list[bytes]:
    if file_id is None:
        return []
    file = scope.file(file_id)
    content = adapters.blobs.read(file.blob, 0, file.size_bytes)
    assert content.endswith(b"\n")
    return content.split(b"\n")[:-1]


def _assets(adapters: Adapters) -> dict[str, bytes]:
    """What was kept beside the output, by name."""
    blobs = adapters.blobs
    names = list(blobs.list(f"assets/{BATCH}/"))
    return {Path(name).name: blobs.read(name, 0, blobs.size_bytes(name)) for name in names}
