"""`batchrunner trigger`: have a server send a sample event."""

from __future__ import annotations

import click

from batchrunner.cli.event_option import EVENT_TYPE
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.remote import with_client
from batchrunner.cli.server_address import server_of, server_option
from batchrunner.ports import Clock
from batchrunner.webhook_client import WebhookClient


@click.command("trigger", short_help="Have a server send a sample event.")
@click.argument("event_type", metavar="TYPE", type=EVENT_TYPE)
@click.option("--url", metavar="URL", help="Send it to this URL as well, as to a batch's webhook_url.")
@server_option
def trigger(*, event_type: str, url: str | None, server_address: str | None) -> None:
    """Have a server tell an event, such as batch.completed, of a batch that never was.

    All registered receivers that want the type get it, and everybody who runs `batchrunner listen`.
    """

    async def work(client: WebhookClient, _clock: Clock) -> ExitCode:
        made = await client.trigger(event_type, url)
        click.echo(f"{made.type} {made.id}")
        return ExitCode.OK

    with_client(WebhookClient, server_of(server_address), work, on_interrupt=lambda: None)
