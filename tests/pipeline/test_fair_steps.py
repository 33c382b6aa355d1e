"""Small batches beside huge ones that are read or written: whoever is soon over does not wait for them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from batchrunner.appetite import LIGHT_BYTES_MAX, LIGHT_LINES_MAX
from batchrunner.lifecycle import BatchStatus
from batchrunner.models import Claim, File, FileId, TaskKind
from batchrunner.worker import Worker
from tests.pipeline.crews import ANA, Crew, crew, good


def _hold(worker: Worker, kind: TaskKind, stem: str, begun: list[str]) -> asyncio.Event:
    """Keep steps of that kind, of the batches whose name begins so, from ending until the event is set."""
    go_on, call = asyncio.Event(), worker._call

    async def held(function: Callable[..., Any], *arguments: Any) -> Any:
        if function == worker._pipeline.run_step:
            claim: Claim = arguments[0]
            if claim.kind is kind:
                begun.append(claim.batch.id)
                if claim.batch.id.startswith(stem):
                    await go_on.wait()
        return await call(function, *arguments)

    worker._call = held  # type: ignore[method-assign]
    return go_on


def _submit_upload(team: Crew, name: str, lines: int, *, size_bytes: int) -> None:
    """Make a batch of a file that is said to be so large."""
    file = File(
        id=FileId(f"file-{name}"),
        tenant=ANA,
        purpose="batch",
        filename=name,
        size_bytes=size_bytes,
        sha256="0" * 64,
        blob=name,
        created_at=team.clock.now(),
        expires_at=None,
    )
    team.store.scope(ANA).add_file(file)
    team.submit(name, lines, input_file_id=file.id, input_name=file.id)


async def test_a_small_batch_is_validated_while_huge_ones_are(tmp_path: Path) -> None:
    async with crew(tmp_path, good(0.1)) as team:
        worker = team.hire()
        begun: list[str] = []
        go_on = _hold(worker, TaskKind.VALIDATE, "huge", begun)
        for number in range(2):
            _submit_upload(team, f"huge-{number}", 5, size_bytes=LIGHT_BYTES_MAX + 1)
        await team.until(lambda: bool(begun))
        for number in range(3):
            _submit_upload(team, f"small-{number}", 5, size_bytes=LIGHT_BYTES_MAX)
            await team.until(lambda name=f"small-{number}": team.is_over(name), within_s=3.0)  # type: ignore[misc]

        # A second huge one waits for the first: two of them would leave nothing for the small ones either.
        assert begun == ["huge-0", "small-0", "small-1", "small-2"]
        assert team.batch("huge-0").status is BatchStatus.VALIDATING

        go_on.set()
        await team.until(lambda: team.is_over("huge-0") and team.is_over("huge-1"))


async def test_a_small_batch_is_sealed_while_a_huge_one_is(tmp_path: Path) -> None:
    async with crew(tmp_path, good(0.01)) as team:
        worker = team.hire(window=64)
        begun: list[str] = []
        go_on = _hold(worker, TaskKind.SEAL, "huge", begun)
        team.submit("huge", LIGHT_LINES_MAX + 1)
        await team.until(lambda: bool(begun))
        for number in range(3):
            team.submit(f"small-{number}", 5)
            await team.until(lambda name=f"small-{number}": team.is_over(name), within_s=3.0)  # type: ignore[misc]

        assert begun == ["huge", "small-0", "small-1", "small-2"]
        assert team.batch("huge").status is BatchStatus.FINALIZING

        go_on.set()
        await team.until(lambda: team.is_over("huge"))


async def test_a_run_has_one_step_at_a_time(tmp_path: Path) -> None:
    async with crew(tmp_path, good(0.1), is_server=False) as team:
        worker = team.hire()
        begun: list[str] = []
        go_on = _hold(worker, TaskKind.VALIDATE, "first", begun)
        team.submit("first", 5)
        await team.until(lambda: bool(begun))
        team.submit("second", 5)
        await team.advance(2.0)

        assert begun == ["first"]

        go_on.set()
        await team.until(lambda: team.is_over("first") and team.is_over("second"))
