"""`batchrunner errors ID`: why lines of a batch failed, grouped by its server, or here from its error file."""

from __future__ import annotations

import tempfile
from typing import NoReturn

from batchrunner.cli.console import say
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.failures import tell_groups
from batchrunner.cli.remote import with_server
from batchrunner.cli.server_address import Server
from batchrunner.client import BatchClient, FailedSample, RemoteBatch
from batchrunner.errors import NotFound
from batchrunner.grouping import COMMAND_LINE, FailureGroups, Group
from batchrunner.ports import Clock


def tell_failures(server: Server, batch_id: str, *, is_json: bool) -> NoReturn:
    """Print the groups and end the process."""

    async def work(client: BatchClient, _clock: Clock) -> ExitCode:
        batch = (await client.batch(batch_id)).batch
        found = await client.failures(batch_id)
        if found is None:
            summary = await _grouped_here(client, server, batch)
            tell_groups(summary.total, summary.groups(), is_json=is_json)
            return ExitCode.OK
        groups = [
            Group(each.code, each.message, each.hint, each.count, [_sample(one) for one in each.samples])
            for each in found.groups
        ]
        tell_groups(found.total, groups, is_json=is_json)
        if not batch.has_ended:
            say("the batch goes on; more may fail")
        return ExitCode.OK

    with_server(server, work, on_interrupt=lambda: say("interrupted"))


def _sample(sample: FailedSample) -> dict[str, str | None]:
    return {"custom_id": sample.custom_id, "id": sample.id}


async def _grouped_here(client: BatchClient, server: Server, batch: RemoteBatch) -> FailureGroups:
    """Group what stands in the error file.

    Raises:
        NotFound: the batch has none yet.
    """
    summary = FailureGroups(COMMAND_LINE)
    if batch.error_file_id:
        with tempfile.TemporaryFile() as kept:
            await client.download(batch.error_file_id, kept.write)
            kept.seek(0)
            for raw in kept:
                summary.add(raw)
    elif not batch.has_ended:
        raise NotFound(
            f"this server tells why lines of {batch.id} failed when it has ended, not before",
            hint=f"Wait for its end: {server.command('status', batch.id, '--wait')}",
        )
    return summary
