"""`batchrunner webhooks`: the log of notifications, sending one again, tests, and the secret that signs them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import NoReturn

import click

from batchrunner.cli.event_option import EVENT_TYPE
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.remote import with_client
from batchrunner.cli.server_address import server_of, server_option
from batchrunner.errors import UsageError
from batchrunner.grouping import printable
from batchrunner.ports import Clock
from batchrunner.webhook_client import RemoteDelivery, RemoteEndpoint, WebhookClient


@click.group("webhooks")
def webhooks() -> None:
    """Show the log of notifications, send one again, try a receiver, and show the secret that signs."""


def _on(server_address: str | None, work: Callable[[WebhookClient], Awaitable[ExitCode]]) -> NoReturn:
    async def with_clock(client: WebhookClient, _clock: Clock) -> ExitCode:
        return await work(client)

    with_client(WebhookClient, server_of(server_address), with_clock, on_interrupt=lambda: None)


@webhooks.command("secret")
@click.option("--rotate", is_flag=True, help="Make a new one; the old one signs as well for 24 hours.")
@click.option("--at-once", is_flag=True, help="With --rotate: the old one signs no more.")
@click.option("--local", "is_local", is_flag=True, help="That of `batchrunner run --webhook-url` on this machine.")
@server_option
def secret(*, rotate: bool, at_once: bool, is_local: bool, server_address: str | None) -> None:
    """Print the secret that signs for the webhook_url of batches; registered receivers have their own."""
    if at_once and not rotate:
        raise UsageError("--at-once needs --rotate")
    if is_local:
        if rotate or server_address:
            raise UsageError("--local stands alone", hint="The secret of runs is the file that it names; delete it.")
        from batchrunner.cli.local_secret import local_secret

        click.echo(local_secret())
        return

    async def work(client: WebhookClient) -> ExitCode:
        click.echo(await client.rotate_secret(keeps_old=not at_once) if rotate else await client.secret())
        return ExitCode.OK

    _on(server_address, work)


@webhooks.command("test")
@click.argument("endpoint_id", metavar="ID")
@click.option(
    "--event", "event_type", type=EVENT_TYPE, default="batch.completed", show_default=True, help="What to send."
)
@server_option
def test(*, endpoint_id: str, event_type: str, server_address: str | None) -> None:
    """Send a sample to the receiver ID (we_...) at once and print the status that it answers.

    Exit codes: 0 it took it (2xx), 3 it did not.
    """

    async def work(client: WebhookClient) -> ExitCode:
        status = await client.test_endpoint(endpoint_id, event_type)
        click.echo(str(status))
        return ExitCode.OK if 200 <= status < 300 else ExitCode.SOME_FAILED

    _on(server_address, work)


@webhooks.command("list")
@click.option("--status", type=click.Choice(["pending", "delivered", "undelivered"]), help="Only these.")
@click.option("--event", "event_type", type=EVENT_TYPE, help="Only those of one type.")
@click.option("--batch", "batch_id", metavar="ID", help="Only those of one batch.")
@click.option("--endpoint", "webhook_endpoint_id", metavar="ID", help="Only those to one registered receiver.")
@click.option("--limit", type=click.IntRange(1, 100), default=20, show_default=True, help="How many.")
@click.option("--endpoints", "is_endpoints", is_flag=True, help="List the registered receivers instead.")
@click.option("--json", "is_json", is_flag=True, help="Print the page as the server shows it, one JSON object.")
@server_option
def list_deliveries(
    *, limit: int, is_endpoints: bool, is_json: bool, server_address: str | None, **narrowed: str | None
) -> None:
    """List notifications, newest first: what, to whom, and what came of it."""
    wanted = {"limit": str(limit)} | {name: value for name, value in narrowed.items() if value is not None}
    if is_endpoints and len(wanted) > 1:
        raise UsageError("--endpoints lists receivers, which nothing narrows down but --limit")

    async def work(client: WebhookClient) -> ExitCode:
        lines: list[str]
        if is_endpoints:
            endpoints, raw = await client.endpoints(wanted)
            lines = [_endpoint_text(each) for each in endpoints]
        else:
            deliveries, raw = await client.deliveries(wanted)
            lines = [_delivery_text(each) for each in deliveries]
        for line in [raw.decode()] if is_json else lines:
            click.echo(line)
        return ExitCode.OK

    _on(server_address, work)


def _endpoint_text(each: RemoteEndpoint) -> str:
    state = f"disabled: {each.disabled_reason}" if each.disabled_reason else ",".join(each.event_types)
    return f"{each.id}  {each.url}  {printable(each.name)}  {state}"


def _delivery_text(each: RemoteDelivery) -> str:
    at = datetime.fromtimestamp(each.created_at, UTC).astimezone()
    words = [f"{at:%Y-%m-%d %H:%M:%S}", each.id, each.status, each.event_type, each.batch_id, each.url]
    if each.attempts:
        last = each.attempts[-1]
        words.append(f"{last.status_code or last.error or 'under way'} ({len(each.attempts)})")
    if each.reason:
        words.append(each.reason)
    if each.next_attempt_at is not None and each.attempts:
        words.append(f"next {datetime.fromtimestamp(each.next_attempt_at, UTC).astimezone():%Y-%m-%d %H:%M:%S}")
    return "  ".join(words)


@webhooks.command("resend")
@click.argument("delivery_id", metavar="ID")
@server_option
def resend(*, delivery_id: str, server_address: str | None) -> None:
    """Send the notification ID (wh_...) again at once, under the same webhook-id."""

    async def work(client: WebhookClient) -> ExitCode:
        click.echo(_delivery_text(await client.resend(delivery_id)))
        return ExitCode.OK

    _on(server_address, work)
