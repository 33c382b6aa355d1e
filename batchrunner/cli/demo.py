"""`batchrunner demo`: the sample file through a simulated upstream, by the very command that a user would type."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import click
import orjson

import batchrunner
from batchrunner.cli.console import say
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.run_folder import RunFolder
from batchrunner.durable import write_whole
from batchrunner.errors import OwnError

_FOLDER = Path("demo")
_SAMPLE = Path(batchrunner.__file__).parents[1] / "sample_inputs" / "chat_1000.jsonl"
_LINES = 1000
_ANNOUNCEMENT = "simulator listening on "
_SUBJECTS = ("rivers", "bridges", "bread", "glaciers", "lighthouses", "violins", "bees", "printing", "maps", "tides")
# A run that is over asks nobody, so its address may lead nowhere.
_NOWHERE = "http://127.0.0.1:9/v1"


@click.command("demo")
@click.option(
    "--lines", type=click.IntRange(min=1), metavar="N", default=_LINES, show_default=True, help="How many lines."
)
def demo(*, lines: int) -> None:
    """Run N sample requests against a simulated upstream that fails now and then; files go to ./demo/.

    The second time it answers that all is done.
    """
    source, target = _FOLDER / "in.jsonl", _FOLDER / "out.jsonl"
    _FOLDER.mkdir(exist_ok=True)
    content = b"".join(itertools.islice(_requests(), lines))
    is_new = not source.is_file() or source.read_bytes() != content
    if is_new:
        write_whole(source, content)
    arguments = ["run", str(source), "-o", str(target)]
    if is_new and target.with_name(f"{target.name}.run").exists():
        arguments.append("--fresh")
    if not is_new and _is_over(target):
        code = _run(arguments, base_url=_NOWHERE)
    else:
        with _simulator() as url:
            code = _run([*arguments, "-u", url])
    if code in (ExitCode.OK, ExitCode.SOME_FAILED):
        _tell_what_next(source, target)
    sys.exit(code)


def _requests() -> Iterator[bytes]:
    """Give the lines of the sample file where it lies beside the package, and more of the same kind."""
    count = 0
    if _SAMPLE.is_file():
        with _SAMPLE.open("rb") as stream:
            for count, line in enumerate(stream, 1):  # noqa: B007 - tells how many there were
                yield line
    for number in itertools.count(count + 1):
        prompt = f"Name three facts about {_SUBJECTS[number % len(_SUBJECTS)]}. (question {number})"
        body = {"model": "small-chat", "messages": [{"role": "user", "content": prompt}], "max_tokens": 64}
        request = {"custom_id": f"chat-{number:04}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        yield orjson.dumps(request, option=orjson.OPT_APPEND_NEWLINE)


def _is_over(target: Path) -> bool:
    folder = target.with_name(f"{target.name}.run")
    record = RunFolder(folder).load() if folder.is_dir() else None
    return record is not None and record.finished_exit_code is not None


def _run(arguments: list[str], *, base_url: str | None = None) -> int:
    """Run a command of ours with this terminal; its exit code is ours, however it is interrupted."""
    env = os.environ if base_url is None else os.environ | {"BATCHRUNNER_BASE_URL": base_url}
    say(f"$ batchrunner {' '.join(arguments)}")
    process = subprocess.Popen([sys.executable, "-m", "batchrunner", *arguments], env=env)  # noqa: S603 - our own program

    def forward(number: int, _: FrameType | None) -> None:
        process.send_signal(number)

    before = signal.signal(signal.SIGTERM, forward)
    try:
        while True:
            # Ctrl-C reaches both processes; the other one drains and says so, this one waits for it.
            with contextlib.suppress(KeyboardInterrupt):
                code = process.wait()
                return code if code >= 0 else ExitCode.TROUBLE
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _simulator() -> Iterator[str]:
    """Run a simulator on a free port, out of reach of Ctrl-C, so that requests in flight can end; gives its URL.

    Raises:
        OwnError: it did not start.
    """
    command = [
        sys.executable,
        "-m",
        "batchrunner",
        "simulate",
        "--port",
        "0",
        "--latency",
        "150ms",
        "--faults",
        "500:0.006,reset:0.004",
    ]
    with subprocess.Popen(  # noqa: S603 - our own program
        command, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stderr is not None
        try:
            said = process.stderr.readline().strip()
            if not said.startswith(_ANNOUNCEMENT):
                raise OwnError(f"the simulator did not start: {said or 'it said nothing'}")
            yield said.removeprefix(_ANNOUNCEMENT)
        finally:
            process.terminate()


def _tell_what_next(source: Path, target: Path) -> None:
    folder = target.with_name(f"{target.name}.run")
    rows = (
        (f"verify {source} {target}", "is every line there exactly once?"),
        (f"results {folder} | head -1", "finished lines, also while a run goes on"),
        ("demo", "again: it is done already"),
        ("run in.jsonl -o out.jsonl -u URL", "your own file on your own server"),
    )
    say(f"input {source}, output {target}, state and manifest {folder}")
    for command, meaning in rows:
        say(f"  batchrunner {command:<45} {meaning}")
