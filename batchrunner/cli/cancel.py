"""`batchrunner cancel`: end a batch on a server early."""

from __future__ import annotations

import click

from batchrunner.cli.console import say
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.remote import status_text, with_server
from batchrunner.cli.server_address import server_of, server_option
from batchrunner.client import BatchClient
from batchrunner.ports import Clock


@click.command("cancel", short_help="Cancel a batch on a server; finished results are kept.")
@click.argument("batch_id", metavar="ID")
@click.option("--json", "is_json", is_flag=True, help="Print the batch as the server shows it, one JSON object.")
@server_option
def cancel(*, batch_id: str, is_json: bool, server_address: str | None) -> None:
    """Cancel batch ID: no new request is sent, and what is finished can be read. Again is no error.

    Exit codes: 0 cancelled or on the way, 1 it had ended in another way.
    """
    server = server_of(server_address)

    async def work(client: BatchClient, clock: Clock) -> ExitCode:
        shown = await client.cancel(batch_id)
        click.echo(shown.raw if is_json else status_text(shown.batch, now=clock.now()))
        if not shown.batch.has_ended:
            say(f"follow its end: {server.command('status', batch_id, '--wait')}")
        return ExitCode.OK

    with_server(server, work, on_interrupt=lambda: say(f"interrupted: {server.command('status', batch_id)}"))
