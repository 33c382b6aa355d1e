"""`batchrunner errors`: the failed lines of a run, grouped by cause, with samples and what to do about them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import orjson

from batchrunner.cli.console import say
from batchrunner.cli.results import open_run
from batchrunner.cli.run_folder import RunFolder, fingerprint
from batchrunner.errors import NotFound, UsageError
from batchrunner.lines import ProblemCode
from batchrunner.models import LineCode, RecordKind

_SAMPLES = 3
_GROUPS_MAX = 1000
_MESSAGE_CHARS_MAX = 300
_READ_CHARS_MAX = 2000

_PLACEHOLDERS = (
    (re.compile(r"\b[0-9a-fA-F]{8}(?:-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}\b"), "<uuid>"),
    (re.compile(r"'[^'\n]*'|\"[^\"\n]*\"|`[^`\n]*`"), "<text>"),
    # A letter run, then hex or letters with a digit: req_01ab23, chatcmpl-8f3e..., 0x7ffe.
    (re.compile(r"\b(?:0x[0-9a-fA-F]+|(?=[0-9a-zA-Z_-]*\d)(?:[a-z]+[_-])[0-9a-zA-Z]{6,})\b"), "<id>"),
    (re.compile(r"\b(?=[0-9a-fA-F]*\d)(?=[0-9a-fA-F]*[a-fA-F])[0-9a-fA-F]{8,}\b"), "<id>"),
    (re.compile(r"\d+(?:[.,]\d+)*"), "<n>"),
)

_HINTS: dict[str, str] = {
    LineCode.REQUEST_TIMEOUT: "Too slow: raise --request-timeout, lower --concurrency, or ask for fewer tokens.",
    LineCode.BATCH_EXPIRED: "The deadline came first: run again with --retry-failed and a longer --window.",
    LineCode.BATCH_CANCELLED: "The batch was cancelled: --retry-failed runs these lines.",
    LineCode.CONNECTION_ERROR: "The upstream broke the connection each time: see its log, then --retry-failed.",
    LineCode.INVALID_RESPONSE: "The answer was no usable JSON: see whether a proxy stands in front of the upstream.",
    LineCode.OUTCOME_UNKNOWN: "Perhaps processed, so not sent twice; --retry-failed=outcome_unknown sends it again.",
    LineCode.POISON_REQUEST: "Something died each time this line was under way: try it alone first.",
    LineCode.INPUT_LOST: "The input was gone or changed at the end: put it back and run what is missing.",
    "context_length_exceeded": "Prompt and max_tokens exceed the model's context: shorten one of them.",
    "model_not_found": "See which models the server has with `batchrunner doctor -u URL`; mend `model` in the input.",
    "400": "The request itself is refused: the message says why; mend these lines in the input.",
    "401": "The key was refused: set OPENAI_API_KEY, or name another variable with --api-key-env; then --retry-failed.",
    "402": "The account has no credit left: top it up, then --retry-failed.",
    "403": "The key may not do this: check its project, model access and region; then --retry-failed.",
    "404": "Model or route does not exist: check `model`, `url` and -u with `batchrunner doctor -u URL`.",
    "413": "The request body is larger than the upstream takes: shorten these lines.",
    "422": "The upstream cannot use these fields: the message names them; mend the input.",
    "429": "The upstream limits the rate or quota: set --rpm or --tpm, or lower --concurrency; then --retry-failed.",
    "4xx": "The upstream refuses these requests: the message says why; mend the input, then --retry-failed.",
    "3xx": "A redirect is never followed: give the upstream's final address with -u.",
    "5xx": "The upstream failed on these lines each time: see its log, then --retry-failed.",
    "refused": "Refused before sending: mend these lines; `batchrunner validate INPUT` lists every one.",
}
_TOO_LONG = re.compile(r"context.{0,20}(?:length|window|size)|max_model_len|too many tokens", re.IGNORECASE)
_NO_MODEL = re.compile(r"model.{0,80}(?:not exist|not found|unknown)", re.IGNORECASE)


@click.command("errors")
@click.argument("source", metavar="RUN_FOLDER|ERRORS", type=click.Path(path_type=Path))
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object.")
def failures(*, source: Path, is_json: bool) -> None:
    """Group the failed lines of a run, OUTPUT.run, or of an errors file, by code and message.

    Numbers, ids and quoted words in a message do not tell two failures apart. The run may still be going on.
    """
    summary = _Summary()
    for raw in _failed_lines(source):
        summary.add(raw)
    groups = summary.groups()
    if is_json:
        click.echo(orjson.dumps({"total": summary.total, "groups": [group.as_json() for group in groups]}))
        return
    for group in groups:
        for line in group.as_text():
            click.echo(line)
    say(f"{summary.total:,} failed lines in {len(groups):,} groups")


# -- where the lines are -----------------------------------------------------------------------------------------------


def _failed_lines(source: Path) -> Iterator[bytes]:
    """Give the failed lines of an errors file, of a finished run's own one, or of a run that has not ended."""
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


# -- one failure -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Failure:
    """What a failed line says of its cause. `code` is our code, or the HTTP status with the upstream's own word."""

    code: str
    status: int | None
    message: str


def read_failure(line: dict[str, object]) -> Failure:
    """Read the cause out of an error line."""
    error, response = line.get("error"), line.get("response")
    status = response.get("status_code") if isinstance(response, dict) else None
    status = status if isinstance(status, int) else None
    if isinstance(error, dict):
        return Failure(str(error.get("code") or "unknown"), status, str(error.get("message") or ""))
    if not isinstance(response, dict):
        return Failure("unknown", None, "neither error nor response")
    word, message = _read_body(response.get("body"))
    return Failure(f"{status} {word}".strip() if status is not None else word or "unknown", status, message)


def _read_body(body: object) -> tuple[str, str]:
    """Give the upstream's own word and message. Source: OpenAI's error object, vLLM's flat one, FastAPI's `detail`."""
    if isinstance(body, str):
        return "", body
    if not isinstance(body, dict):
        return "", ""
    inner = body.get("error", body)
    if isinstance(inner, str):
        return "", inner
    if not isinstance(inner, dict):
        return "", ""
    code, kind = inner.get("code"), inner.get("type")
    word = code if isinstance(code, str) and not code.isdigit() else kind if isinstance(kind, str) else ""
    message = inner.get("message") or inner.get("detail") or body.get("detail") or ""
    return word, message if isinstance(message, str) else orjson.dumps(message).decode()


def normalise(message: str) -> str:
    """Replace what differs between two failures of the same kind."""
    text = message[:_READ_CHARS_MAX]
    for pattern, placeholder in _PLACEHOLDERS:
        text = pattern.sub(placeholder, text)
    text = "".join(each if each.isprintable() else " " for each in text)
    text = " ".join(text.split())
    return text if len(text) <= _MESSAGE_CHARS_MAX else f"{text[:_MESSAGE_CHARS_MAX]}..."


def hint_for(failure: Failure) -> str:
    """Say what the reader can do about it."""
    word = failure.code.rpartition(" ")[2]
    if word in _HINTS and not word.isdigit():
        return _HINTS[word]
    if word in set(ProblemCode) and failure.status is None:
        return _HINTS["refused"]
    if failure.status is None:
        return "The message says why; --retry-failed runs these lines again."
    if 400 <= failure.status < 500 and _TOO_LONG.search(failure.message):
        return _HINTS["context_length_exceeded"]
    if failure.status in (400, 404) and _NO_MODEL.search(failure.message):
        return _HINTS["model_not_found"]
    status = str(failure.status)
    return _HINTS.get(status) or _HINTS.get(f"{status[0]}xx") or _HINTS["5xx"]


# -- groups ------------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Group:
    """Failed lines of the same cause."""

    code: str
    message: str
    hint: str
    count: int = 0
    samples: list[dict[str, str | None]] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """The entry that --json prints."""
        return {
            "code": self.code,
            "message": self.message,
            "count": self.count,
            "samples": self.samples,
            "hint": self.hint,
        }

    def as_text(self) -> Iterator[str]:
        """The lines for people."""
        yield f"{self.count:,} x {self.code}: {self.message or '(no message)'}"
        names = [f"{_printable(each['custom_id']) or '(no custom_id)'} ({each['id']})" for each in self.samples]
        yield f"    such as {', '.join(names)}"
        yield f"    {self.hint}"


class _Summary:
    """Failures by cause. Beyond a thousand different messages, a code has one group for the rest."""

    def __init__(self) -> None:
        self.total = 0
        self._groups: dict[tuple[str, str], Group] = {}

    def add(self, raw: bytes) -> None:
        """Take one line.

        Raises:
            UsageError: it is not a line of an errors file.
        """
        self.total += 1
        try:
            line = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise UsageError(f"line {self.total:,} of the errors is not JSON: {error.msg}") from error
        if not isinstance(line, dict) or "custom_id" not in line:
            raise UsageError(
                f"line {self.total:,} is not a result line", hint="Name OUTPUT.run or OUTPUT.errors.jsonl."
            )
        failure = read_failure(line)
        group = self._group(failure)
        group.count += 1
        if len(group.samples) < _SAMPLES:
            group.samples.append({"custom_id": _text(line.get("custom_id")), "id": _text(line.get("id"))})

    def groups(self) -> list[Group]:
        """The groups, largest first."""
        return sorted(self._groups.values(), key=lambda group: -group.count)

    def _group(self, failure: Failure) -> Group:
        code = _printable(failure.code) or "unknown"
        key = (code, normalise(failure.message))
        if key not in self._groups and len(self._groups) >= _GROUPS_MAX:
            key = (code, "(other messages)")
        if key not in self._groups:
            self._groups[key] = Group(code, key[1], hint_for(failure))
        return self._groups[key]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _printable(text: str | None) -> str:
    return "".join(each if each.isprintable() else "?" for each in (text or "")[:200])
