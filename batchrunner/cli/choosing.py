"""Which lines `run --retry-failed` runs again: those of the errors file, all or by code, found again in the input."""

from __future__ import annotations

import msgspec

from batchrunner.app import Runner
from batchrunner.cli.export import read_error_line
from batchrunner.cli.folding import fold
from batchrunner.cli.preparing import Prepared
from batchrunner.errors import UsageError
from batchrunner.lines import ProblemCode
from batchrunner.models import BatchId
from batchrunner.ports import TenantScope
from batchrunner.seal import read_problems


class _Named(msgspec.Struct):
    custom_id: str | None = None


_REFUSALS = frozenset(ProblemCode)
_read_id = msgspec.json.Decoder(_Named).decode


def choose_failed(runner: Runner, scope: TenantScope, prepared: Prepared, wanted: str) -> str:
    """Write the line numbers of the failed lines into a blob and give its name. Blocks.

    Refused lines are not among them: they would be refused again.

    Raises:
        UsageError: the run is not finished, or no line has failed with such a code.
    """
    record = prepared.record
    if not record.batches or record.finished_exit_code is None:
        raise UsageError("--retry-failed: this run has not finished yet", hint="Run it without --retry-failed first.")
    codes = None if wanted == "all" else {code.strip() for code in wanted.split(",")}
    folded = fold(runner, scope, record.batches, prepared.folder.path)
    failed: set[str] = set()
    if folded.errors is not None:
        with folded.errors.open("rb") as stream:
            for raw in stream:
                line = read_error_line(raw)
                if line.custom_id is not None and line.code not in _REFUSALS and (codes is None or line.code in codes):
                    failed.add(line.custom_id)
    first = scope.batch(BatchId(record.batches[0]))
    refused = {problem.line_number for problem in read_problems(runner.adapters.blobs, first.problems_blob)}
    name = f"chosen/{len(record.batches)}-{runner.adapters.rng.token_hex(8)}"
    count = 0
    writer = runner.adapters.blobs.writer(name)
    with prepared.source.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            if number not in refused and _custom_id(raw) in failed:
                writer.write(number.to_bytes(8, "little"))
                count += 1
    if count == 0:
        writer.abort()
        raise UsageError(
            f"--retry-failed: no failed line{'' if codes is None else f' with code {wanted}'} to run again"
        )
    writer.commit()
    return name


def _custom_id(raw: bytes) -> str | None:
    """The custom_id of a line, None for a blank or refused one that has none to read."""
    try:
        return _read_id(raw.removeprefix(b"\xef\xbb\xbf")).custom_id
    except (msgspec.DecodeError, RecursionError):
        return None
