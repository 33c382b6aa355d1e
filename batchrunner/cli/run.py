"""`batchrunner run`: the options, and what they mean for one run."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from batchrunner.blobs.s3_address import S3Address
from batchrunner.cli.configuring import check_endpoint, check_upstreams, check_webhook_url, load_settings, read_api_keys
from batchrunner.cli.ending import Ending
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.inputs import PACKED
from batchrunner.cli.places import Place, Places
from batchrunner.cli.run_folder import errors_path_for
from batchrunner.errors import UsageError
from batchrunner.settings import Settings, has_upstream, parse_window


@click.command("run", short_help="Run a file of requests and write its output and error files.")
@click.argument("input_place", metavar="INPUT", type=Place())
@click.option(
    "-o",
    "--output",
    "output_place",
    required=True,
    metavar="OUTPUT",
    type=Place(),
    help="Where the finished lines go when the run ends; - streams them to stdout.",
)
@click.option(
    "-u",
    "--base-url",
    metavar="URL",
    help="What the SDKs call base_url, such as http://localhost:8000/v1. [OPENAI_BASE_URL]",
)
@click.option("--api-key-env", metavar="NAME", help="Environment variable that holds the key. [OPENAI_API_KEY]")
@click.option("--endpoint", metavar="PATH", help="Where lines without a url go; lines with one must name it.")
@click.option(
    "--window",
    "completion_window",
    metavar="DURATION",
    help="Deadline from the first start, 1m to 14d; none by default.",
)
@click.option(
    "--concurrency", metavar="auto|N", help="Requests in flight, for all workers together; found by itself by default."
)
@click.option(
    "--workers", metavar="auto|N", help="Worker processes; auto is one up to 10,000 lines, else one per core."
)
@click.option("--rpm", type=click.IntRange(min=1), metavar="N", help="At most N requests a minute.")
@click.option("--tpm", type=click.IntRange(min=1), metavar="N", help="At most N tokens a minute.")
@click.option("--max-tries", type=click.IntRange(min=1), metavar="N", help="Tries of a line that fails by itself. [5]")
@click.option("--request-timeout", metavar="S", help="Total time of one exchange. [600s]")
@click.option(
    "--order",
    type=click.Choice(["input", "completion"]),
    default="input",
    show_default=True,
    help="Order of the lines in OUTPUT.",
)
@click.option(
    "--on-invalid",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="What a bad line does: end the run before it begins, or go to the errors file.",
)
@click.option(
    "--on-unknown",
    type=click.Choice(["retry", "fail"]),
    default="retry",
    show_default=True,
    help="What a lost answer does: the line is sent again, or at most once and ends as outcome_unknown.",
)
@click.option(
    "--retry-failed",
    is_flag=False,
    flag_value="all",
    metavar="[=CODES]",
    help="Run the failed lines of a finished run again, all or those with these codes (a,b).",
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Run only the first N lines for now.")
@click.option(
    "--errors",
    "errors_place",
    metavar="PATH",
    type=Place(),
    help="Where failed lines go. [OUTPUT with .errors]",
)
@click.option(
    "--state",
    "state_path",
    metavar="DIR",
    type=click.Path(path_type=Path),
    help="Where the run's state lives. [OUTPUT.run, of an s3:// OUTPUT in this folder]",
)
@click.option(
    "--webhook-url", metavar="URL", help="Who is told how the run ended; signed, see `webhooks secret --local`."
)
@click.option("--fresh", is_flag=True, help="Start over; the old state folder is kept under another name.")
@click.option(
    "--json", "is_json", is_flag=True, help="Print one JSON object at the end instead of a panel and a summary."
)
@click.make_pass_decorator(Ending, ensure=True)
def run(ending: Ending, /, input_place: Path | S3Address, output_place: Path | S3Address, **options: object) -> None:
    """Run INPUT, a file of requests (OpenAI Batch JSONL, .gz and .zst too, - for stdin), and write OUTPUT. Either may
    be an object, s3://BUCKET/KEY.

    The same command again continues a run that was stopped, whatever stopped it, and pays for nothing twice.

    Exit codes: 0 every line ok, 1 trouble on our side, 2 usage, 3 some lines failed, 4 key refused, 5 input invalid,
    6 stopped on purpose, 7 deadline passed, 130 interrupted.
    """
    from batchrunner.cli.run_request import RunRequest
    from batchrunner.cli.running import run_to_end

    errors_place = options["errors_place"]
    assert errors_place is None or isinstance(errors_place, Path | S3Address)
    output_path = _stand_in(output_place)
    errors_path = None if errors_place is None else _stand_in(errors_place)
    _refuse_packed(output_path)
    settings, _ = load_settings(
        {
            "base_url": options["base_url"],
            "api_key_env": options["api_key_env"],
            "concurrency": options["concurrency"],
            "workers": options["workers"],
            "rpm": options["rpm"],
            "tpm": options["tpm"],
            "max_tries": options["max_tries"],
            "request_timeout_s": options["request_timeout"],
            "webhook_url": options["webhook_url"],
        }
    )
    request = RunRequest(
        places=_places(settings, input_place=input_place, output_place=output_place, errors_place=errors_place),
        input_path=_stand_in(input_place),
        output_path=output_path,
        errors_path=errors_path,
        state_path=_path(options["state_path"]),
        endpoint=_text(options["endpoint"]),
        completion_window=_window(_text(options["completion_window"])),
        order=str(options["order"]),
        on_invalid=str(options["on_invalid"]),
        on_unknown=str(options["on_unknown"]),
        retry_failed=_text(options["retry_failed"]),
        limit=options["limit"] if isinstance(options["limit"], int) else None,
        is_fresh=bool(options["fresh"]),
        is_json=bool(options["is_json"]),
        same_command=ending.same_command,
    )
    if not has_upstream(settings):
        raise UsageError(
            "no upstream is named",
            hint="Give -u URL or set OPENAI_BASE_URL; without a server, try `batchrunner simulate`.",
        )
    check_upstreams(settings)
    check_endpoint(settings, request.endpoint)
    _check_webhook(settings)
    code = run_to_end(request, settings, read_api_keys(settings), ending)
    sys.exit(int(code or ExitCode.OK))


def _check_webhook(settings: Settings) -> None:
    """Find out before the run what would keep its end from being told."""
    if settings.webhook_url is None:
        return
    from batchrunner.cli.local_secret import local_secret

    check_webhook_url(settings, is_loopback_allowed=True, called="--webhook-url")
    local_secret()


def _refuse_packed(output_path: Path) -> None:
    if output_path.suffix in PACKED:
        raise UsageError(
            f"OUTPUT {output_path}: packed output is not written", hint=f"Write {output_path.stem}, then pack it."
        )


def _stand_in(place: Path | S3Address) -> Path:
    """Give the path of a place; an object's bears its name."""
    return place if isinstance(place, Path) else Path(place.key.rpartition("/")[2])


def _places(
    settings: Settings,
    *,
    input_place: Path | S3Address,
    output_place: Path | S3Address,
    errors_place: Path | S3Address | None,
) -> Places:
    """Gather what the paths of the run stand for. Without --errors the failed lines go beside OUTPUT."""
    objects: dict[Path, S3Address] = {}
    if isinstance(output_place, S3Address):
        objects[_stand_in(output_place)] = output_place
        if errors_place is None:
            beside = errors_path_for(_stand_in(output_place))
            objects[beside] = output_place.beside(beside.name)
    if isinstance(errors_place, S3Address):
        objects[_stand_in(errors_place)] = errors_place
    source = input_place if isinstance(input_place, S3Address) else None
    return Places(settings=settings, source=source, objects=objects)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def _path(value: object) -> Path | None:
    return value if isinstance(value, Path) else None


def _window(text: str | None) -> str | None:
    """Check --window and give it back as written."""
    if text is not None:
        parse_window(text, what="--window")
    return text
