"""`batchrunner listen`: events of a server, forwarded to a receiver on this machine, signed as the server signs."""

from __future__ import annotations

import click

from batchrunner.cli.console import say
from batchrunner.cli.event_option import EVENT_TYPE
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.remote import with_client
from batchrunner.cli.server_address import server_of, server_option
from batchrunner.errors import UsageError
from batchrunner.ports import Clock
from batchrunner.webhook_client import Heard, WebhookClient


@click.command("listen", short_help="Forward the events of a server to a receiver on this machine.")
@click.option(
    "--forward-to",
    "target",
    metavar="URL",
    help="Where events go, such as http://localhost:3000/hook; none only shows.",
)
@click.option(
    "--event", "wanted", metavar="TYPE", type=EVENT_TYPE, multiple=True, help="Only this type; may be repeated."
)
@server_option
def listen(*, target: str | None, wanted: tuple[str, ...], server_address: str | None) -> None:
    """Forward the events of a server, from now on, to a receiver that the server itself could not reach.

    They are signed with the secret that is printed first, the one of `batchrunner webhooks secret`. Nothing that fails
    here is tried again.
    """
    from batchrunner.addresses import AddressRules, parse_networks, url_problem

    # Whoever types the URL may reach what it names.
    rules = AddressRules(is_loopback_allowed=True, networks=parse_networks(["0.0.0.0/0", "::/0"]))
    if target is not None and (why := url_problem(target, rules)):
        raise UsageError(f"--forward-to {target}: {why}")
    server = server_of(server_address)

    async def work(client: WebhookClient, clock: Clock) -> ExitCode:
        from batchrunner.poster import AiohttpPoster

        secret = await client.secret()
        say(f"signing secret: {secret}")
        poster = AiohttpPoster(rules, clock)

        def begin() -> None:
            say(f"listening to {client.base_url}{f', forwarding to {target}' if target else ''}; Ctrl-C ends it")

        async def forward(heard: Heard) -> None:
            if wanted and heard.event.type not in wanted:
                return
            click.echo(f"{clock.now().astimezone():%H:%M:%S} {heard.event.type} {heard.event.id}", nl=target is None)
            if target is not None:
                click.echo(f" {await _posted(poster, target, heard, secret, clock)}")

        try:
            await client.listen(forward, begin=begin)
        finally:
            await poster.close()
        return ExitCode.OK

    with_client(WebhookClient, server, work, on_interrupt=lambda: say("stopped"))


async def _posted(poster: object, target: str, heard: Heard, secret: str, clock: Clock) -> str:
    """Send one event and say what came of it."""
    from batchrunner.deliveries import EventId
    from batchrunner.poster import AiohttpPoster
    from batchrunner.webhooks import delivery_id, signed_headers

    assert isinstance(poster, AiohttpPoster)
    name = delivery_id(EventId(heard.event.id), target)
    headers = signed_headers(name, heard.event.type, heard.body, [secret], clock.now())
    posted = await poster.post(target, heard.body, headers)
    took = f"in {posted.elapsed_s * 1000:.0f} ms"
    return f"-> {posted.status} {took}" if posted.status is not None else f"-> {posted.error}: {posted.message}"
