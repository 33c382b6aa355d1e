"""The rules for one input line: its bytes become a RequestLine, or the LineProblem that refuses them.

A key that occurs twice counts by its last value, as in nearly every parser, while the bytes are forwarded as they are.
"""

from __future__ import annotations

import codecs
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Literal, NamedTuple

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from batchrunner.errors import InputChanged
from batchrunner.models import LineProblem, RequestLine


class ProblemCode(StrEnum):
    """Every code of a LineProblem. Source: `errors.data[]` of OpenAI's Batch object; the rest fills its gaps."""

    INVALID_JSON_LINE = "invalid_json_line"
    LINE_TOO_LONG = "line_too_long"
    TOO_DEEPLY_NESTED = "too_deeply_nested"
    MISSING_REQUIRED_PARAMETER = "missing_required_parameter"
    INVALID_TYPE = "invalid_type"
    INVALID_CUSTOM_ID = "invalid_custom_id"
    INVALID_METHOD = "invalid_method"
    INVALID_URL = "invalid_url"
    URL_NOT_FOUND = "url_not_found"
    DUPLICATE_CUSTOM_ID = "duplicate_custom_id"
    STREAMING_UNSUPPORTED = "streaming_unsupported"
    INVALID_REQUEST = "invalid_request"
    MISMATCHED_MODEL = "mismatched_model"
    EMPTY_FILE = "empty_file"
    FILE_TOO_LARGE = "file_too_large"
    TOO_MANY_TASKS = "too_many_tasks"
    TOO_MANY_ERRORS = "too_many_errors"


class Needs(NamedTuple):
    """What a body must hold for its endpoint: a model or not, and one of `fields` (the first is the usual one)."""

    has_model: bool
    fields: tuple[str, ...] = ()


CHAT_COMPLETIONS = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
EMBEDDINGS = "/v1/embeddings"

# Media endpoints and moderations have default models; where a vendor takes several shapes, no field is asked for.
NEEDS: Mapping[str, Needs] = MappingProxyType(
    {
        CHAT_COMPLETIONS: Needs(True, ("messages",)),
        COMPLETIONS: Needs(True, ("prompt",)),
        "/v1/responses": Needs(True, ("input", "prompt")),
        EMBEDDINGS: Needs(True, ("input",)),
        "/v1/moderations": Needs(False, ("input",)),
        "/v1/images/generations": Needs(False, ("prompt",)),
        "/v1/images/edits": Needs(False, ("prompt",)),
        **dict.fromkeys(("/v1/videos", "/v1/videos/generations", "/v1/videos/edits"), Needs(False)),
        **dict.fromkeys(("/v1/videos/extensions", "/v1/music/generations"), Needs(False)),
        "/v1/audio/speech": Needs(True, ("input",)),
        "/v1/rerank": Needs(True, ("query",)),
        "/v1/score": Needs(True),
        "/v1/messages": Needs(True, ("messages",)),
    }
)
ENDPOINTS: tuple[str, ...] = tuple(NEEDS)

_INFERRED = (("messages", CHAT_COMPLETIONS), ("input", EMBEDDINGS), ("prompt", COMPLETIONS))
_SPOKEN = {CHAT_COMPLETIONS: "Chat Completions: ", COMPLETIONS: "Completions: ", "/v1/responses": "Responses: "}


@dataclass(frozen=True, slots=True, kw_only=True)
class LineRules:
    """What the lines of one batch must keep to.

    `endpoint` is the batch's own, None where lines may mix. With `is_url_equal_to_endpoint`, a line's `url` must be it.
    `wants_url` and `model` are learned: whether the first line had a `url`, and in strict mode the first line's model.
    """

    endpoint: str | None = None
    endpoints: tuple[str, ...] = ENDPOINTS
    wants_url: bool | None = None
    model: str | None = None
    is_strict: bool = False
    is_url_equal_to_endpoint: bool = True
    custom_id_chars_max: int = 512
    line_bytes_max: int = 16 * 1024 * 1024
    depth_max: int = 128
    needs: Mapping[str, Needs] = field(init=False, repr=False, compare=False)
    needs_of_given: Mapping[str, Needs] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        needs = {url: NEEDS.get(url, Needs(False)) for url in self.endpoints}
        is_bound = self.endpoint is not None and self.is_url_equal_to_endpoint
        object.__setattr__(self, "needs", needs)
        object.__setattr__(
            self, "needs_of_given", {url: need for url, need in needs.items() if not is_bound or url == self.endpoint}
        )

    @property
    def is_url_required(self) -> bool:
        """Tell whether a line without `url` is refused."""
        return self.is_strict or self.wants_url is True

    @property
    def is_settled(self) -> bool:
        """Tell whether nothing is left to learn from the lines."""
        return self.model is not None if self.is_strict else self.wants_url is not None

    def learn_url(self, raw: bytes) -> LineRules:
        """Give the rules after a first line: if it has a `url`, every line must. What is no object teaches nothing."""
        if self.wants_url is not None:
            return self
        try:
            given = _decode_loose(raw)
        except (msgspec.DecodeError, RecursionError):
            return self
        return replace(self, wants_url=_present(given.url))

    def learn_model(self, line: RequestLine) -> LineRules:
        """Give the rules after an accepted line: in strict mode the first one's model binds all the others."""
        if not self.is_strict or self.model is not None:
            return self
        return replace(self, model=model_of(line))


class _Fields(Struct, gc=False):
    messages: Raw | UnsetType = UNSET
    input: Raw | UnsetType = UNSET
    prompt: Raw | UnsetType = UNSET
    query: Raw | UnsetType = UNSET


class Body(_Fields, gc=False):
    """What a body says of itself, in the types that nearly every body has."""

    model: str | None = None
    stream: bool | None = None


class _LooseBody(_Fields, gc=False):
    model: Raw | UnsetType = UNSET
    stream: Raw | UnsetType = UNSET


class _Line(Struct, gc=False):
    custom_id: str
    method: Literal["POST"]
    body: Raw
    url: str | None = None


class _LooseLine(Struct, gc=False):
    custom_id: Raw | UnsetType = UNSET
    method: Raw | UnsetType = UNSET
    url: Raw | UnsetType = UNSET
    body: Raw | UnsetType = UNSET


NULL = Raw(b"null")
_decode_line = msgspec.json.Decoder(_Line).decode
_decode_body = msgspec.json.Decoder(Body).decode
_decode_loose = msgspec.json.Decoder(_LooseLine).decode
_decode_loose_body = msgspec.json.Decoder(_LooseBody).decode
_decode_text = msgspec.json.Decoder(str).decode

_OPENERS = b"[{"
NOT_OPENERS = bytes(byte for byte in range(256) if byte not in _OPENERS + b"\n")
_NOT_BRACKETS = bytes(byte for byte in range(256) if byte not in b"[]{}")
AS_SQUARE = bytes.maketrans(b"{}", b"[]")
# What is decoded takes up to four times its bytes, to be thrown away: it should not leave the cache.
_UTF8_SLICE_BYTES = 64 * 1024


def model_of(line: RequestLine) -> str | None:
    """Give the model that an accepted line asks for; None where its endpoint has a default."""
    return _decode_body(line.body).model


def is_blank(raw: bytes) -> bool:
    """Tell whether a line holds nothing but white space; such lines keep their number and are no requests."""
    return not raw or raw.isspace()


def is_utf8(raw: bytes) -> bool:
    """Tell whether all bytes are valid UTF-8, in parts that a JSON decoder would skip too."""
    if raw.isascii():
        return True
    start, size_bytes = 0, len(raw)
    try:
        with memoryview(raw) as view:
            while start < size_bytes:
                end = start + _UTF8_SLICE_BYTES
                start += codecs.utf_8_decode(view[start:end], "strict", end >= size_bytes)[1]
    except UnicodeDecodeError:
        return False
    return True


def parse_line(raw: bytes, line_number: int, rules: LineRules) -> RequestLine | LineProblem:
    """Judge one line, which comes without its 0x0A. Duplicates are a matter of the whole file and not seen here."""
    try:
        line = _decode_line(raw)
        url = accepted_url(line.custom_id, line.url, _decode_body(line.body), rules)
    except (msgspec.DecodeError, RecursionError):
        return _inspect(raw, line_number, rules)
    if url is None or len(raw) > rules.line_bytes_max or not is_utf8(raw) or _is_too_deep(raw, rules.depth_max):
        return _inspect(raw, line_number, rules)
    return RequestLine(line_number, line.custom_id, url, bytes(line.body))


def reparse(raw: bytes, line_number: int, rules: LineRules) -> RequestLine:
    """Take apart a line that validation accepted, without checking it again.

    Raises:
        InputChanged: it is not a line that validation could have accepted.
    """
    try:
        line = _decode_line(raw)
        url = line.url or _inferred_url(_decode_body(line.body), rules)
    except (msgspec.DecodeError, RecursionError):
        # Explicit nulls and the like, which only the slow way takes.
        found = _inspect(raw, line_number, rules)
        if isinstance(found, RequestLine):
            return found
        raise InputChanged(f"line {line_number} is not what was validated: {found.message}") from None
    if url is None:
        raise InputChanged(f"line {line_number} is not what was validated: it has no url")
    return RequestLine(line_number, line.custom_id, url, bytes(line.body))


def iter_lines(buffer: bytes, first_line: int, skipped: Container[int], rules: LineRules) -> Iterator[RequestLine]:
    """Give the requests of a shard's bytes in order: neither blank lines nor refused ones."""
    position, number = 0, first_line - 1
    while position < len(buffer):
        end = buffer.find(b"\n", position)
        end = len(buffer) if end < 0 else end
        number += 1
        raw = buffer[position:end]
        position = end + 1
        if number not in skipped and not is_blank(raw):
            yield reparse(raw, number, rules)


def accepted_url(custom_id: str, url: str | None, body: Body, rules: LineRules) -> str | None:
    """Give where a sound line goes. None: something is wrong, or so unusual that `_inspect` has to tell."""
    if not 0 < len(custom_id) <= rules.custom_id_chars_max or "\0" in custom_id or body.stream:
        return None
    if url is not None:
        needs = rules.needs_of_given.get(url)
    else:
        url = _inferred_url(body, rules)
        needs = rules.needs.get(url) if url is not None else None
    if needs is None:
        return None
    if needs.has_model and not body.model:
        return None
    if rules.model is not None and body.model != rules.model:
        return None
    if needs.fields and not _present(getattr(body, needs.fields[0])):
        return None
    return url


def _present(value: Raw | UnsetType) -> bool:
    return value is not UNSET and value != NULL


def _inferred_url(body: _Fields, rules: LineRules) -> str | None:
    """Give where a body without `url` goes.

    A body that fits the batch's endpoint goes there: `input` is a word of responses as well as of embeddings.
    """
    if rules.is_url_required:
        return None
    own = rules.needs.get(rules.endpoint or "")
    if own is not None and any(_present(getattr(body, name)) for name in own.fields):
        return rules.endpoint
    for name, url in _INFERRED:
        if _present(getattr(body, name)):
            return url
    return rules.endpoint


def _is_too_deep(raw: bytes, depth_max: int) -> bool:
    """Tell whether valid JSON is nested deeper than allowed; exact, and cheap for lines with few brackets."""
    if len(raw) <= 2 * depth_max or len(raw.translate(None, NOT_OPENERS)) <= depth_max:
        return False
    # What remains are brackets of one kind, outside of strings: each round takes the innermost level away.
    brackets = b"".join(_outside_strings(raw)).translate(AS_SQUARE, _NOT_BRACKETS)
    for _ in range(depth_max):
        if not brackets:
            return False
        brackets = brackets.replace(b"[]", b"")
    return bool(brackets)


def _outside_strings(raw: bytes) -> list[bytes]:
    # Without escaped characters, every other part between quotes is a string.
    return raw.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]


class _Refused(Exception):
    """A line fails a check; the first one that fails is reported."""

    def __init__(self, code: ProblemCode, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param


def _inspect(raw: bytes, line_number: int, rules: LineRules) -> RequestLine | LineProblem:
    """Judge one line check by check, in the order of the catalogue. Slower than the typed way, and complete."""
    custom_id: str | None = None
    try:
        given = _read_object(raw, rules)
        # The id is looked up first, so that whatever else is wrong can be reported under it.
        custom_id = _usable_custom_id(given.custom_id, rules)
        body = _check_shape(given, rules)
        url = _check_values(given, body, rules)
        _check_body(body, url, rules)
    except _Refused as refused:
        return LineProblem(refused.code, refused.message, refused.param, line_number, custom_id)
    if custom_id is None or given.body is UNSET:
        raise AssertionError(f"line {line_number} passed every check without an id or a body")
    return RequestLine(line_number, custom_id, url, bytes(given.body))


def _read_object(raw: bytes, rules: LineRules) -> _LooseLine:
    if len(raw) > rules.line_bytes_max:
        raise _Refused(ProblemCode.LINE_TOO_LONG, too_long_message(rules, len(raw)))
    sentence = "This line is not parseable as valid JSON"
    try:
        raw.decode()
        line = _decode_loose(raw)
        if _is_too_deep(raw, rules.depth_max):
            raise RecursionError
    except UnicodeDecodeError as error:
        message = f"{sentence}: its byte {error.start} is not valid UTF-8."
        raise _Refused(ProblemCode.INVALID_JSON_LINE, message) from None
    except RecursionError:
        message = f"This line is nested too deeply: at most {rules.depth_max} levels are allowed."
        raise _Refused(ProblemCode.TOO_DEEPLY_NESTED, message) from None
    except msgspec.ValidationError:
        message = f"{sentence}: expected an object, but got {_kind(raw.strip())} instead."
        raise _Refused(ProblemCode.INVALID_JSON_LINE, message) from None
    except msgspec.DecodeError:
        raise _Refused(ProblemCode.INVALID_JSON_LINE, f"{sentence}.") from None
    return line


def too_long_message(rules: LineRules, size_bytes: int) -> str:
    """Say how long a line is and how long it may be."""
    return f"This line is {size_bytes} bytes long, at most {rules.line_bytes_max} bytes are allowed."


def _usable_custom_id(value: Raw | UnsetType, rules: LineRules) -> str | None:
    if value is UNSET or _kind(bytes(value)) != "a string":
        return None
    text = _decode_text(value)
    return None if _wrong_with(text, rules) else text


def _wrong_with(custom_id: str, rules: LineRules) -> str:
    """Say why a custom_id cannot be used; nothing if it can."""
    if not custom_id:
        return "it is empty"
    if len(custom_id) > rules.custom_id_chars_max:
        return f"it is {len(custom_id)} characters long, at most {rules.custom_id_chars_max} are allowed"
    return "it holds a NUL character" if "\0" in custom_id else ""


def _check_shape(given: _LooseLine, rules: LineRules) -> _LooseBody:
    """Check that the four parameters are there and of the right type."""
    _require("custom_id", given.custom_id, "a string")
    _require("method", given.method, "a string")
    if rules.is_url_required or _present(given.url):
        _require("url", given.url, "a string")
    return _decode_loose_body(_require("body", given.body, "an object"))


def _require(name: str, value: Raw | UnsetType, kind: str) -> Raw:
    if value is UNSET or value == NULL:
        raise _Refused(ProblemCode.MISSING_REQUIRED_PARAMETER, f"Missing required parameter: '{name}'.", name)
    _check_kind(name, value, kind)
    return value


def _check_kind(name: str, value: Raw, kind: str) -> None:
    got = _kind(bytes(value))
    if got != kind:
        message = f"Invalid type for '{name}': expected {kind}, but got {got} instead."
        raise _Refused(ProblemCode.INVALID_TYPE, message, name)


def _kind(value: bytes) -> str:
    """Name the type of a valid JSON value by its first character."""
    match value[:1]:
        case b'"':
            return "a string"
        case b"{":
            return "an object"
        case b"[":
            return "an array"
        case b"t" | b"f":
            return "a boolean"
        case b"n":
            return "null"
        case _:
            return "a decimal number" if set(value) & set(b".eE") else "an integer"


def _check_values(given: _LooseLine, body: _LooseBody, rules: LineRules) -> str:
    """Check id, method and url, and give the url."""
    if wrong := _wrong_with(_text(given.custom_id), rules):
        raise _Refused(ProblemCode.INVALID_CUSTOM_ID, f"Invalid 'custom_id': {wrong}.", "custom_id")
    method = _text(given.method)
    if method != "POST":
        message = f"Invalid method: {quoted(method)}. Only 'POST' is supported."
        raise _Refused(ProblemCode.INVALID_METHOD, message, "method")
    if _present(given.url):
        url = _text(given.url)
    else:
        inferred = _inferred_url(body, rules)
        if inferred is None:
            raise _Refused(ProblemCode.MISSING_REQUIRED_PARAMETER, "Missing required parameter: 'url'.", "url")
        url = inferred
    # Only listed paths pass, character by character: no scheme, host, `..`, query or control character can.
    if url not in rules.needs:
        message = f"The provided url {quoted(url)} is not supported by the Batch API."
        raise _Refused(ProblemCode.URL_NOT_FOUND, message, "url")
    if _present(given.url) and url not in rules.needs_of_given:
        message = "The URL provided for this request does not match the batch endpoint."
        raise _Refused(ProblemCode.INVALID_URL, message, "url")
    return url


def _text(value: Raw | UnsetType) -> str:
    return "" if value is UNSET else _decode_text(value)


def _check_body(body: _LooseBody, url: str, rules: LineRules) -> None:
    """Check what an endpoint cannot do without; everything else in a body is the model server's to judge."""
    needs = rules.needs[url]
    if body.stream is not UNSET and body.stream != NULL:
        _check_kind("body.stream", body.stream, "a boolean")
        if bytes(body.stream) == b"true":
            message = f"{_SPOKEN.get(url, '')}Streaming is not supported in the Batch API."
            raise _Refused(ProblemCode.STREAMING_UNSUPPORTED, message, "body.stream")
    model = None
    if body.model is not UNSET and body.model != NULL:
        _check_kind("body.model", body.model, "a string")
        model = _text(body.model)
    if needs.has_model and not model:
        raise _Refused(ProblemCode.INVALID_REQUEST, "Model parameter is required.", "body.model")
    if rules.model is not None and model != rules.model:
        message = (
            f"The model {quoted(model or '')} for this request does not match the rest of the batch. "
            "Each batch must contain requests for a single model."
        )
        raise _Refused(ProblemCode.MISMATCHED_MODEL, message, "body.model")
    if needs.fields and not any(_present(getattr(body, name)) for name in needs.fields):
        name = needs.fields[0]
        raise _Refused(ProblemCode.INVALID_REQUEST, f"{name.capitalize()} parameter is required.", f"body.{name}")


def quoted(text: str, *, chars_max: int = 512) -> str:
    """Put a caller's value between quotes for a message: cut where it is long, control characters escaped."""
    shown = text if len(text) <= chars_max else text[:chars_max] + "..."
    return "'" + "".join(each if each.isprintable() else ascii(each)[1:-1] for each in shown) + "'"
