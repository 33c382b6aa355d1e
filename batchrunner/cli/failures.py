"""`batchrunner errors`: the failed lines of a run or batch by cause, with samples and what to do about them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import click
import orjson

from batchrunner.cli.console import counted, say
from batchrunner.cli.results import folder_of, open_run
from batchrunner.cli.run_folder import RunFolder, fingerprint
from batchrunner.cli.server_address import is_batch_id, server_of, server_option
from batchrunner.errors import NotFound
from batchrunner.grouping import COMMAND_LINE, FailureGroups, Group, printable
from batchrunner.models import RecordKind


@click.command("errors")
@click.argument("source", metavar="RUN_FOLDER|ERRORS|ID", type=click.Path(path_type=Path))
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object.")
@server_option
def failures(*, source: Path, is_json: bool, server_address: str | None) -> None:
    """Group the failed lines of a run, OUTPUT.run, of an errors file, or of a batch on a server, by code and message.

    Numbers, ids and quoted words in a message do not tell two failures apart. Run or batch may still be going on.
    """
    if is_batch_id(source):
        from batchrunner.cli.failing_batch import tell_failures

        tell_failures(server_of(server_address), str(source), is_json=is_json)
    summary = FailureGroups(COMMAND_LINE)
    for raw in _failed_lines(source):
        summary.add(raw)
    tell_groups(summary.total, summary.groups(), is_json=is_json)


def tell_groups(total: int, groups: Sequence[Group], *, is_json: bool) -> None:
    """Print the groups, as one JSON object or for people."""
    if is_json:
        click.echo(orjson.dumps({"total": total, "groups": [group.as_json() for group in groups]}))
        return
    for group in groups:
        for line in _as_text(group):
            click.echo(line)
    say(f"{counted(total, 'failed line')} in {counted(len(groups), 'group')}")


# -- where the lines are -----------------------------------------------------------------------------------------------


def _failed_lines(source: Path) -> Iterator[bytes]:
    """Give the failed lines of an errors file, of a finished run's own one, or of a run that has not ended.

    OUTPUT stands for its run.
    """
    source = folder_of(source)
    if source.is_file():
        yield from _of_file(source)
        return
    finished = _finished_errors(source)
    if finished is not None:
        yield from _of_file(finished)
        return
    with open_run(source) as opened:
        yield from opened.lines(RecordKind.FAILED)


def _finished_errors(source: Path) -> Path | None:
    """The errors file that a finished run wrote and nobody touched since: it has the lines that were never sent too."""
    record = RunFolder(source).load() if source.is_dir() else None
    if record is None or record.finished_exit_code is None:
        return None
    path = Path(record.errors)
    mark = record.exported.get(str(path.resolve()))
    return path if mark is not None and path.is_file() and fingerprint(path) == mark else None


def _of_file(path: Path) -> Iterator[bytes]:
    try:
        with path.open("rb") as stream:
            yield from (raw for raw in stream if not raw.isspace())
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from error


def _as_text(group: Group) -> Iterator[str]:
    """The lines for people."""
    yield f"{group.count:,} x {group.code}: {group.message or '(no message)'}"
    names = [_sample_text(each) for each in group.samples]
    yield f"    such as {', '.join(names)}"
    yield f"    {group.hint}"


def _sample_text(sample: Mapping[str, str | None]) -> str:
    """Name a line; one that was never run has no result line and so no id."""
    name = printable(sample["custom_id"]) or "(no custom_id)"
    return f"{name} ({sample['id']})" if sample["id"] else name
