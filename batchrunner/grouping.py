"""Failed lines grouped by cause: the code with the message's fixed part, how many, samples, and what to do about it.

What to do is said in the words of the door that asks: flags of the command line, or fields and calls of the server.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from functools import lru_cache

import orjson

from batchrunner.errors import UsageError
from batchrunner.lines import ProblemCode
from batchrunner.models import LineCode

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Door:
    """What the things that a hint names are called where it is read."""

    retry: str
    window: str
    timeout: str
    concurrency: str
    rates: str
    url: str
    key: str
    problems: str


COMMAND_LINE = Door(
    retry="--retry-failed",
    window="--window",
    timeout="--request-timeout",
    concurrency="--concurrency",
    rates="--rpm or --tpm",
    url="-u",
    key="OPENAI_API_KEY, or name another variable with --api-key-env",
    problems="`batchrunner validate INPUT`",
)
SERVER = Door(
    retry="POST .../retry",
    window="completion_window",
    timeout="the server's request_timeout_s",
    concurrency="its concurrency",
    rates="the server's rpm or tpm",
    url="the server's upstream",
    key="the upstream's key",
    problems="GET /v1/files/{id}/validation",
)

_HINTS: dict[str, str] = {
    LineCode.REQUEST_TIMEOUT: "Too slow: raise {timeout}, lower {concurrency}, or ask for fewer tokens.",
    LineCode.BATCH_EXPIRED: "The deadline came first: run what is left with {retry} and a longer {window}.",
    LineCode.BATCH_CANCELLED: "The batch was cancelled: {retry} runs these lines.",
    LineCode.CONNECTION_ERROR: "The upstream broke the connection each time: see its log, then {retry}.",
    LineCode.INVALID_RESPONSE: "The answer was no usable JSON: see whether a proxy stands in front of the upstream.",
    LineCode.OUTCOME_UNKNOWN: "Perhaps processed, so not sent twice; {retry} of outcome_unknown sends it again.",
    LineCode.POISON_REQUEST: "Something died each time this line was under way: try it alone first.",
    LineCode.INPUT_LOST: "The input was gone or changed at the end: put it back and run what is missing.",
    LineCode.MODEL_NOT_SERVED: "No upstream names this model: add it to a table of batchrunner.toml, then {retry}.",
    "context_length_exceeded": "Prompt and max_tokens exceed the model's context: shorten one of them.",
    "model_not_found": "See which models the server has with `batchrunner doctor -u URL`; mend `model` in the input.",
    "400": "The request itself is refused: the message says why; mend these lines in the input.",
    "401": "The key was refused: set {key}; then {retry}.",
    "402": "The account has no credit left: top it up, then {retry}.",
    "403": "The key may not do this: check its project, model access and region; then {retry}.",
    "404": "Model or route does not exist: check `model`, `url` and {url} with `batchrunner doctor -u URL`.",
    "413": "The request body is larger than the upstream takes: shorten these lines.",
    "422": "The upstream cannot use these fields: the message names them; mend the input.",
    "429": "The upstream limits the rate or quota: set {rates}, or lower {concurrency}; then {retry}.",
    "4xx": "The upstream refuses these requests: the message says why; mend the input, then {retry}.",
    "3xx": "A redirect is never followed: give the upstream's final address as {url}.",
    "5xx": "The upstream failed on these lines each time: see its log, then {retry}.",
    "refused": "Refused before sending: mend these lines; {problems} lists every one.",
}
_TOO_LONG = re.compile(r"context.{0,20}(?:length|window|size)|max_model_len|too many tokens", re.IGNORECASE)
_NO_MODEL = re.compile(r"model.{0,80}(?:not exist|not found|unknown)", re.IGNORECASE)


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


@lru_cache(maxsize=4096)
def normalise(message: str) -> str:
    """Replace what differs between two failures of the same kind."""
    text = message[:_READ_CHARS_MAX]
    for pattern, placeholder in _PLACEHOLDERS:
        text = pattern.sub(placeholder, text)
    text = "".join(each if each.isprintable() else " " for each in text)
    text = " ".join(text.split())
    return text if len(text) <= _MESSAGE_CHARS_MAX else f"{text[:_MESSAGE_CHARS_MAX]}..."


def hint_for(failure: Failure, door: Door) -> str:
    """Say what the reader at that door can do about it."""
    return _hint(failure).format_map(asdict(door))


def _hint(failure: Failure) -> str:
    word = failure.code.rpartition(" ")[2]
    if word in _HINTS and not word.isdigit():
        return _HINTS[word]
    if word in set(ProblemCode) and failure.status is None:
        return _HINTS["refused"]
    if failure.status is None:
        return "The message says why; {retry} runs these lines again."
    if 400 <= failure.status < 500 and _TOO_LONG.search(failure.message):
        return _HINTS["context_length_exceeded"]
    if failure.status in (400, 404) and _NO_MODEL.search(failure.message):
        return _HINTS["model_not_found"]
    status = str(failure.status)
    return _HINTS.get(status) or _HINTS.get(f"{status[0]}xx") or _HINTS["5xx"]


@dataclass(slots=True)
class Group:
    """Failed lines of the same cause."""

    code: str
    message: str
    hint: str
    count: int = 0
    samples: list[dict[str, str | None]] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """The entry that `errors --json` prints and the server answers."""
        return {
            "code": self.code,
            "message": self.message,
            "count": self.count,
            "samples": self.samples,
            "hint": self.hint,
        }


class FailureGroups:
    """Failures by cause. Beyond a thousand different messages, a code has one group for the rest."""

    def __init__(self, door: Door) -> None:
        self.total = 0
        self._door = door
        self._groups: dict[tuple[str, str], Group] = {}

    def add(self, raw: bytes) -> None:
        """Take one line.

        Raises:
            UsageError: it is not a line of an errors file.
        """
        try:
            line = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise UsageError(f"line {self.total + 1:,} of the errors is not JSON: {error.msg}") from error
        hint = "Name OUTPUT.run or OUTPUT.errors.jsonl."
        if not isinstance(line, dict) or "custom_id" not in line or line.keys().isdisjoint(("response", "error")):
            raise UsageError(f"line {self.total + 1:,} is not a result line", hint=hint)
        failure = read_failure(line)
        if line.get("error") is None and failure.status is not None and 200 <= failure.status < 300:
            raise UsageError(f"line {self.total + 1:,} has not failed: its status is {failure.status}", hint=hint)
        self.add_failure(failure, _text(line.get("custom_id")), _text(line.get("id")))

    def add_failure(self, failure: Failure, custom_id: str | None, line_id: str | None) -> None:
        """Take one failure; `line_id` is the id of its result line, None where it has none."""
        self.total += 1
        group = self._group(failure)
        group.count += 1
        if len(group.samples) < _SAMPLES:
            group.samples.append({"custom_id": custom_id, "id": line_id})

    def groups(self) -> list[Group]:
        """The groups, largest first."""
        return sorted(self._groups.values(), key=lambda group: -group.count)

    def _group(self, failure: Failure) -> Group:
        code = printable(failure.code) or "unknown"
        key = (code, normalise(failure.message))
        if key not in self._groups and len(self._groups) >= _GROUPS_MAX:
            key = (code, "(other messages)")
        if key not in self._groups:
            self._groups[key] = Group(code, key[1], hint_for(failure, self._door))
        return self._groups[key]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def printable(text: str | None) -> str:
    """Show a name that somebody else chose without letting it steer a terminal."""
    return "".join(each if each.isprintable() else "?" for each in (text or "")[:200])
