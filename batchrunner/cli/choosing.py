"""Which lines `run --retry-failed` runs again: those of the errors file of the run and its retries so far."""

from __future__ import annotations

import shlex

from batchrunner.app import Runner
from batchrunner.choosing import failed_ids, write_chosen
from batchrunner.cli.folding import fold
from batchrunner.cli.preparing import Prepared
from batchrunner.errors import UsageError
from batchrunner.models import BatchId
from batchrunner.pipeline import read_blob
from batchrunner.ports import TenantScope
from batchrunner.seal import refused_numbers


def not_finished() -> UsageError:
    """Give the refusal to run failed lines again while others have not run at all."""
    return UsageError("--retry-failed: this run has not finished yet", hint="Run it without --retry-failed first.")


def choose_failed(runner: Runner, scope: TenantScope, prepared: Prepared, wanted: str) -> str:
    """Write the line numbers of the failed lines into a blob and give its name. Blocks.

    Raises:
        UsageError: the run is not finished, or no line has failed with such a code.
    """
    record, blobs = prepared.record, runner.adapters.blobs
    if not record.batches or record.finished_exit_code is None:
        raise not_finished()
    codes = None if wanted == "all" else {code.strip() for code in wanted.split(",")}
    folded = fold(runner, scope, record.batches, prepared.folder.path)
    failed: set[str] = set()
    if folded.errors is not None:
        with folded.errors.open("rb") as stream:
            failed = failed_ids(stream, codes=codes)
    first = scope.batch(BatchId(record.batches[0]))
    name = f"chosen/{len(record.batches)}-{runner.adapters.rng.token_hex(8)}"
    runner.adapters.store.register_blob(name, owner="run")
    count = write_chosen(
        blobs,
        name,
        read_blob(blobs, first.source),
        failed,
        refused=refused_numbers(blobs, first.problems_blob),
        line_bytes_max=runner.settings.line_bytes_max,
    )
    if count == 0:
        raise UsageError(
            f"--retry-failed: no failed line{'' if codes is None else f' with code {wanted}'} to run again",
            hint=f"`batchrunner errors {shlex.quote(str(prepared.folder.path))}` shows what failed, and how.",
        )
    return name
