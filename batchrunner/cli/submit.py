"""`batchrunner submit`: a file of requests becomes a batch on a server; with --wait the command stays until its end."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import click
import orjson

from batchrunner.cli.console import say
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.inputs import PACKED, pieces_of, plain
from batchrunner.cli.remote import exit_code_of_batch, follow, tell_end, with_server
from batchrunner.cli.server_address import Server, server_of, server_option
from batchrunner.client import BatchClient, Shown
from batchrunner.durable import write_pieces
from batchrunner.errors import InputInvalid, ServerRefused, UsageError
from batchrunner.lines import is_blank
from batchrunner.ports import Clock

_LINE_BYTES_MAX = 16 << 20
_MIB = 1 << 20
_VALIDATE = "`batchrunner validate FILE` lists every problem."
# Where a body without a url goes, by the field that only it has.
_ENDPOINTS = (("messages", "/v1/chat/completions"), ("input", "/v1/embeddings"), ("prompt", "/v1/completions"))


@click.command("submit", short_help="Send a file of requests to a server as a batch.")
@click.argument("input_path", metavar="FILE", type=click.Path(allow_dash=True, path_type=Path))
@click.option("--endpoint", metavar="PATH", help="Where the lines go. [the url of the first line]")
@click.option(
    "--window", "completion_window", metavar="DURATION", default="24h", show_default=True, help="Deadline, 1m to 14d."
)
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", help="A note that the batch keeps; may be repeated.")
@click.option("--on-invalid", type=click.Choice(["fail", "skip"]), help="What a bad line does. [fail]")
@click.option("--on-unknown", type=click.Choice(["retry", "fail"]), help="What a lost answer does. [retry]")
@click.option("--order", type=click.Choice(["input", "completion"]), help="Order of the lines in the output. [input]")
@click.option("--priority", type=click.IntRange(-100, 100), metavar="N", help="Higher goes first. [0]")
@click.option("--webhook-url", metavar="URL", help="Whom the server tells how the batch ended, see docs/webhooks.md.")
@click.option("--wait", "is_waiting", is_flag=True, help="Stay until the batch has ended; Ctrl-C leaves it running.")
@click.option("--json", "is_json", is_flag=True, help="Print the batch as one JSON object instead of its id.")
@server_option
def submit(
    *,
    input_path: Path,
    metadata: Sequence[str],
    is_waiting: bool,
    is_json: bool,
    server_address: str | None,
    **fields: object,
) -> None:
    """Send FILE (OpenAI Batch JSONL, .gz and .zst too, - for stdin) to a batch server and print the id of its batch.

    What is sent again because the server did not answer is still one batch. The options say what they say for `run`.

    Exit codes: 0 submitted, with --wait every line ok, 1 trouble, 2 usage, 3 some lines failed, 4 key refused,
    5 input invalid, 7 deadline passed, 130 interrupted, the batch goes on.
    """
    server = server_of(server_address)
    wanted = {name: value for name, value in fields.items() if value is not None} | _metadata(metadata)
    made: list[str] = []

    async def work(client: BatchClient, clock: Clock) -> ExitCode:
        shown = await _submit(client, input_path, wanted)
        made.append(shown.batch.id)
        if not is_json:
            click.echo(shown.batch.id)
        if is_waiting:
            shown = await follow(client, clock, shown.batch.id, is_quiet=is_json)
        if is_json:
            click.echo(shown.raw)
        if not is_waiting:
            say(f"follow it: {server.command('status', shown.batch.id, '--wait')}")
            return ExitCode.OK
        tell_end(server, shown.batch)
        return exit_code_of_batch(shown.batch)

    with_server(server, work, on_interrupt=lambda: _tell_interrupted(server, made))


def _tell_interrupted(server: Server, made: Sequence[str]) -> None:
    if made:
        say(f"interrupted; the batch goes on: {server.command('status', made[0], '--wait')}")
    else:
        say(f"interrupted; most likely nothing was submitted; the newest batches: {server.command('status')}")


async def _submit(client: BatchClient, path: Path, fields: Mapping[str, object]) -> Shown:
    """Upload the file and make the batch."""
    await client.greet()
    with _spooled(path) as source:
        endpoint = fields.get("endpoint") or _endpoint_of(source)
        size_bytes = source.stat().st_size
        if size_bytes >= _MIB:
            say(f"uploading {size_bytes / _MIB:,.0f} MiB to {client.base_url}")
        try:
            file_id = await client.upload(source, filename=_filename(path))
        except ServerRefused as error:
            raise InputInvalid(error.message, hint=_VALIDATE) from error
    return await client.create({**fields, "endpoint": endpoint, "input_file_id": file_id})


@contextmanager
def _spooled(path: Path) -> Iterator[Path]:
    """Give the input as a plain file that can be read as often as it takes."""
    if str(path) != "-" and not path.is_file():
        raise UsageError(f"FILE {path} {'is not a file' if path.exists() else 'is not there'}", hint="Check the path.")
    if str(path) != "-" and path.suffix not in PACKED:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        spooled = Path(folder) / "input.jsonl"
        write_pieces(spooled, pieces_of(sys.stdin.buffer) if str(path) == "-" else plain(path))
        yield spooled


def _filename(path: Path) -> str:
    if str(path) == "-":
        return "stdin.jsonl"
    return path.name.removesuffix(path.suffix) if path.suffix in PACKED else path.name


def _endpoint_of(path: Path) -> str:
    """Read from the first line where it goes.

    Raises:
        InputInvalid: there is no line, or it is not JSON.
        UsageError: it does not say.
    """
    first: object = None
    with path.open("rb") as stream:
        while raw := stream.readline(_LINE_BYTES_MAX):
            if not is_blank(raw):
                try:
                    first = orjson.loads(raw.removeprefix(b"\xef\xbb\xbf"))
                except orjson.JSONDecodeError as error:
                    raise InputInvalid(f"the first line of FILE is not JSON: {error.msg}", hint=_VALIDATE) from error
                break
    if not isinstance(first, dict):
        raise InputInvalid("FILE has no line with a JSON object", hint=_VALIDATE)
    if isinstance(first.get("url"), str):
        return str(first["url"])
    body = first.get("body")
    for name, endpoint in _ENDPOINTS:
        if isinstance(body, dict) and name in body:
            return endpoint
    raise UsageError("the first line does not say where it goes", hint="Name it: --endpoint /v1/chat/completions.")


def _metadata(pairs: Sequence[str]) -> dict[str, object]:
    """Read the notes; none, no field.

    Raises:
        UsageError: one has no `=`.
    """
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(f"--metadata {pair!r} is not KEY=VALUE", hint="Write --metadata team=search.")
    notes = {key: value for key, _, value in (pair.partition("=") for pair in pairs)}
    return {"metadata": notes} if notes else {}
