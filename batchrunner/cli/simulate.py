"""The command `simulate`: an upstream that calls no model, for trying things out."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from batchrunner.errors import UsageError

if TYPE_CHECKING:
    from batchrunner.simulate import Simulator


@click.command(name="simulate")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port",
    default=9000,
    show_default=True,
    type=click.IntRange(0, 65535),
    help="Port to listen on; 0 takes a free one.",
)
@click.option(
    "--latency",
    default="200ms",
    show_default=True,
    metavar="TIME",
    help="How long a request takes: 200ms, 200ms..800ms, lognormal:200ms,0.4 (median, sigma), or 0.",
)
@click.option("--slots", type=click.IntRange(0), help="Requests worked on at once; more wait. Default: no limit.")
@click.option("--queue", type=click.IntRange(0), help="Requests that may wait; more get 429. Default: no limit.")
@click.option(
    "--faults",
    default="",
    metavar="SPEC",
    help="What fails how often: 2%, or 429:0.01,500:0.005,reset:0.002,stall:0.001. Default: nothing.",
)
@click.option("--seed", default=0, show_default=True, help="Start of the random choices.")
@click.option("--api-key", metavar="KEY", help="Answer 401 to requests without this key.")
def simulate(
    *,
    host: str,
    port: int,
    latency: str,
    slots: int | None,
    queue: int | None,
    faults: str,
    seed: int,
    api_key: str | None,
) -> None:
    """Serve an OpenAI-compatible API that calls no model.

    Answers depend on the prompt alone. A request whose body has the key "simulate" asks for its own faults, such as
    {"simulate": ["429(2s)", "reset"]}: one for each time it comes. GET /__stats tells what has been counted.
    Stop it with Ctrl-C.
    """
    # Heavy imports wait until the command runs: --help stays quick.
    from batchrunner.simulate import SimulatorSettings, serve_until_signalled

    settings = SimulatorSettings(
        host=host, port=port, latency=latency, slots=slots, queue=queue, faults=faults, seed=seed, api_key=api_key
    )
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            stats = runner.run(serve_until_signalled(settings, _announce))
    except UsageError as error:
        raise click.UsageError(error.message) from error
    except OSError as error:
        raise click.ClickException(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
    click.echo(
        f"simulator stopped: {stats.total} requests, {stats.ok} answered, {stats.faulted} faulted, "
        f"{stats.repeats} repeated without need",
        err=True,
    )


def _announce(simulator: Simulator) -> None:
    click.echo(f"simulator listening on {simulator.url}", err=True)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
