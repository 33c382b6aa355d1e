"""`batchrunner status`: where a batch on a server is, or its newest ones."""

from __future__ import annotations

import click

from batchrunner.cli.exits import ExitCode
from batchrunner.cli.remote import exit_code_of_batch, follow, status_text, tell_end, with_server
from batchrunner.cli.server_address import server_of, server_option
from batchrunner.client import BatchClient
from batchrunner.errors import UsageError
from batchrunner.ports import Clock


@click.command("status", short_help="Tell where a batch on a server is, or wait for its end.")
@click.argument("batch_id", metavar="[ID]", required=False)
@click.option("--wait", "is_waiting", is_flag=True, help="Stay until the batch has ended; Ctrl-C leaves it running.")
@click.option("--json", "is_json", is_flag=True, help="Print the batch as the server shows it, one JSON object.")
@server_option
def status(*, batch_id: str | None, is_waiting: bool, is_json: bool, server_address: str | None) -> None:
    """Tell where batch ID is; without an ID, the newest batches, a line each.

    Exit codes: 0 asked and told; with --wait those of `submit --wait`.
    """
    server = server_of(server_address)
    if batch_id is None and (is_waiting or is_json):
        raise UsageError("--wait and --json need the id of a batch", hint="`batchrunner status` lists the newest ones.")

    async def work(client: BatchClient, clock: Clock) -> ExitCode:
        if batch_id is None:
            for each in await client.newest():
                click.echo(status_text(each, now=clock.now()))
            return ExitCode.OK
        if not is_waiting:
            shown = await client.batch(batch_id)
            click.echo(shown.raw if is_json else status_text(shown.batch, now=clock.now()))
            return ExitCode.OK
        shown = await follow(client, clock, batch_id, is_quiet=is_json)
        click.echo(shown.raw if is_json else status_text(shown.batch, now=clock.now()))
        tell_end(server, shown.batch)
        return exit_code_of_batch(shown.batch)

    with_server(
        server,
        work,
        on_interrupt=lambda: click.echo("interrupted; the batch is not touched by that, it goes on", err=True),
    )
