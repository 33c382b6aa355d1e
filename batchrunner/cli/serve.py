"""`batchrunner serve`: the options, what is printed at the start, and how signals end it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import click

from batchrunner.cli.configuring import check_upstreams, check_webhook_url, load_settings, read_api_keys
from batchrunner.cli.console import counted, say
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.run_folder import RunFolder
from batchrunner.cli.server_folder import folder_of, folder_option
from batchrunner.hosting import Host, bind, is_loopback
from batchrunner.settings import Settings, targets_of


@click.command("serve", short_help="Serve an OpenAI Batch API over an upstream.")
@click.option("--host", metavar="ADDRESS", help="Address to listen on; any but loopback needs API keys. [127.0.0.1]")
@click.option(
    "--port", type=click.IntRange(0, 65535), metavar="N", help="Port to listen on; 0 takes a free one. [8080]"
)
@click.option(
    "-u",
    "--base-url",
    metavar="URL",
    help="The upstream: what the SDKs call base_url, such as http://localhost:8000/v1. [OPENAI_BASE_URL]",
)
@folder_option
@click.option(
    "--workers", type=click.IntRange(min=0), metavar="N", help="Worker processes; 0 serves the API only. [one per core]"
)
@click.option("--api-key-env", metavar="NAME", help="Environment variable with the upstream's key. [OPENAI_API_KEY]")
@click.option(
    "--concurrency", metavar="auto|N", help="Requests in flight, for all workers together; found by itself by default."
)
@click.option("--rpm", type=click.IntRange(min=1), metavar="N", help="At most N requests a minute to the upstream.")
@click.option("--tpm", type=click.IntRange(min=1), metavar="N", help="At most N tokens a minute.")
def serve(*, workers: int | None, **options: object) -> None:
    """Serve files, uploads and batches as the OpenAI Batch API does, and run the batches on an upstream.

    What was accepted survives: started again over the same data folder, the server goes on with every batch.
    Without API keys it answers this machine only. SIGTERM and Ctrl-C let requests in flight end first.

    Exit codes: 0 stopped as asked, 1 trouble on our side, 2 usage, 130 stopped at once by a second signal.
    """
    settings, _ = load_settings({**options, "workers": workers or None})
    check_upstreams(settings)
    if workers is None:
        workers = settings.workers or len(os.sched_getaffinity(0))
    from batchrunner.tuning import tune_process

    with asyncio.Runner(loop_factory=tune_process()) as loop:
        code = loop.run(_serve(settings, workers))
    sys.exit(int(code))


async def _serve(settings: Settings, worker_count: int) -> ExitCode:
    """Do everything that one invocation does; gives its exit code."""
    from batchrunner.clock import SystemClock

    clock = SystemClock()
    is_local = is_loopback(settings.host)
    check_webhook_url(settings, is_loopback_allowed=is_local, called="webhook_url")
    lock = RunFolder(folder_of(settings))
    lock.lock()
    try:
        sockets = await bind(settings.host, settings.port, clock)
        port = sockets[0].getsockname()[1]
        host = Host(
            folder=lock.path,
            settings=settings,
            api_keys=read_api_keys(settings),
            worker_count=worker_count,
            sockets=sockets,
            is_local=is_local,
            clock=clock,
        )
        return await _until_signalled(
            host, settings, lambda: _announce(host, settings, lock.path, worker_count, port=port)
        )
    finally:
        lock.unlock()


def _announce(host: Host, settings: Settings, folder: Path, worker_count: int, *, port: int) -> None:
    """Print where the server is and how to try it, then what it works with."""
    base_url = f"http://{_reachable(settings.host)}:{port}/v1"
    key = ' -H "Authorization: Bearer $BATCHRUNNER_API_KEY"' if host.has_keys else ""
    say(base_url)
    say(f"curl{key} {base_url}/batches")
    say(f"data: {folder}")
    for target in targets_of(settings):
        name = f" {target.name}" if settings.upstream else ""
        nowhere = "none is named; batches wait until the server is started with -u URL"
        say(f"upstream{name}: {target.base_url or nowhere}")
    say(f"workers: {worker_count}; API keys: {'needed' if host.has_keys else 'none, any or no key is taken'}")


def _reachable(host: str) -> str:
    """Write the address as it stands in a URL; one that stands for all is reached by loopback."""
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"[{name}]" if ":" in name else name


async def _until_signalled(host: Host, settings: Settings, announce: Callable[[], None]) -> ExitCode:
    loop = asyncio.get_running_loop()
    signals: list[int] = []

    def stop(number: int) -> None:
        signals.append(number)
        if len(signals) > 1:
            host.stop(grace_s=0.0)
            return
        grace_s = settings.drain_grace_s
        word, count = signal.Signals(number).name, counted(host.in_flight, "request")
        say(f"{word}: waiting up to {grace_s:.0f} s for {count} in flight; again to stop at once")
        host.stop(grace_s=grace_s)

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop, number)
    await host.run(announce)
    say("stopped; the same command goes on")
    return ExitCode.INTERRUPTED if len(signals) > 1 else ExitCode.OK
