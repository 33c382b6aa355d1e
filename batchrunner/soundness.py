"""Judges many input lines at once, for the usual case that nothing is wrong with any of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from io import BytesIO
from operator import attrgetter
from typing import Annotated, Literal, NamedTuple, Protocol

import msgspec
from msgspec import UNSET, Raw, Struct

from batchrunner.lines import AS_SQUARE, NOT_OPENERS, NULL, Body, LineRules, accepted_url, is_utf8


class _WholeLine(Struct, gc=False):
    custom_id: str
    method: Literal["POST"]
    body: Body
    url: str | None = None


class _Object(Struct, gc=False):
    """An object of which nothing is kept."""


class _UniformBody(Protocol):
    content: Raw | list[_Object]


class _UniformLine(Protocol):
    """A line whose method, url and model were compared while it was read, and whose body was seen not to stream."""

    custom_id: str
    body: _UniformBody


_decode_line = msgspec.json.Decoder(_WholeLine).decode


_MESSAGES = "messages"
# Every sound line is an object, and so is its body.
_OPENED = 2
# The smallest objects take eight times their bytes once they are listed.
_LISTED_BYTES_MAX = 1 << 20
# With shorter ones, looking at many stretches costs more than looking at each byte.
_STEP_BYTES_MIN = 4096
# Longer ones, copied twice, leave the nearest cache.
_STEP_BYTES_MAX = 32 * 1024


class SoundLines(NamedTuple):
    """What is known of a block in which every line is sound: ids in line order, and the models that occur.

    `opened`: at least so many brackets open in the other lines, whichever single line is left out.
    """

    custom_ids: list[str]
    models: set[str | None]
    opened: int


def sound_lines(block: bytes, rules: LineRules) -> SoundLines | None:
    """Judge many lines at once, several times faster than one by one. None: something is odd, look at each line."""
    if len(block) > rules.line_bytes_max or not is_utf8(block):
        return None
    found = _uniform_lines(block, rules) or _typed_lines(block, rules)
    return None if found is None or _is_any_too_deep(block, found, rules.depth_max) else found


def _is_any_too_deep(block: bytes, found: SoundLines, depth_max: int) -> bool:
    """Tell whether more brackets than allowed open in any line; some may lie in strings or side by side."""
    if _are_openers_few(block, len(found.custom_ids), found.opened, depth_max):
        return False
    return b"[" * (depth_max + 1) in block.translate(AS_SQUARE, NOT_OPENERS)


def _are_openers_few(block: bytes, count: int, opened: int, openers_max: int) -> bool:
    """Tell quickly whether no more brackets open in any line: beside those of the others, or in stretches of lines.

    Rare bytes are found several times faster than each byte is looked at.
    """
    in_first = _opener_count(_first_line(block))
    # Looked at only if it may come out well, all lines being like the first.
    if in_first * count - opened <= openers_max and _opener_count(block) - opened <= openers_max:
        return True
    # Three quarters of what is allowed.
    line_count = 3 * openers_max // (4 * in_first)
    step_bytes = min(len(block) // count * (line_count - 1), _STEP_BYTES_MAX)
    if step_bytes < _STEP_BYTES_MIN:
        return False
    start = 0
    while start < len(block):
        end = block.find(b"\n", start + step_bytes) + 1 or len(block)
        if _opener_count(block[start:end]) > openers_max:
            return False
        start = end
    return True


def _opener_count(content: bytes) -> int:
    return len(content) - len(content.replace(b"{", b"").replace(b"[", b""))


def _first_line(block: bytes) -> bytes:
    return block[: block.find(b"\n") + 1] or block


def _uniform_lines(block: bytes, rules: LineRules) -> SoundLines | None:
    """Judge lines that all name the url and the model of the first. None: they do not, or something is wrong."""
    try:
        first = _decode_line(_first_line(block))
        needs = rules.needs_of_given.get(first.url or "")
        if needs is None or not needs.fields or first.url is None or not first.body.model:
            return None
        if rules.model is not None and first.body.model != rules.model:
            return None
        is_listed = needs.fields[0] == _MESSAGES and len(block) <= _LISTED_BYTES_MAX
        # A list of objects takes no more time than its bytes would, and each is known to open a bracket.
        held = list[_Object] if is_listed else Raw
        decode = _uniform_decoder(first.url, first.body.model, needs.fields[0], held, rules.custom_id_chars_max)
        lines = list(map(decode, BytesIO(block)))
    except (msgspec.DecodeError, RecursionError):
        return None
    custom_ids = [line.custom_id for line in lines]
    if "\0" in "".join(custom_ids):
        return None
    opened = _OPENED * (len(lines) - 1)
    lengths = [len(line.body.content) for line in lines]
    if is_listed:
        opened += len(lines) - 1 + sum(lengths) - max(lengths)
    # Comparing lengths first spares the comparison of contents.
    elif len(NULL) in lengths and NULL in [line.body.content for line in lines]:
        return None
    return SoundLines(custom_ids, {first.body.model}, opened)


@lru_cache(maxsize=16)
def _uniform_decoder(
    url: str, model: str, field: str, held: object, id_chars_max: int
) -> Callable[[bytes], _UniformLine]:
    content = ("content", held, msgspec.field(name=field))
    custom_id = Annotated[str, msgspec.Meta(min_length=1, max_length=id_chars_max)]
    body = msgspec.defstruct("_Body", [("model", Literal[model]), content, ("stream", None, None)], gc=False)
    line = msgspec.defstruct(
        "_Line",
        [("custom_id", custom_id), ("method", Literal["POST"]), ("url", Literal[url]), ("body", body)],
        gc=False,
    )
    return msgspec.json.Decoder(line).decode  # type: ignore[return-value]


def _typed_lines(block: bytes, rules: LineRules) -> SoundLines | None:
    try:
        lines = list(map(_decode_line, BytesIO(block)))
    except (msgspec.DecodeError, RecursionError):
        return None
    bodies = [line.body for line in lines]
    found = SoundLines([line.custom_id for line in lines], {body.model for body in bodies}, _OPENED * (len(lines) - 1))
    if _are_alike_and_sound(lines, bodies, found, rules):
        return found
    urls = (accepted_url(line.custom_id, line.url, line.body, rules) for line in lines)
    return None if None in urls else found


def _are_alike_and_sound(lines: list[_WholeLine], bodies: list[Body], found: SoundLines, rules: LineRules) -> bool:
    """Check what `accepted_url` checks, column by column, for lines with one given url."""
    urls = {line.url for line in lines}
    needs = rules.needs_of_given.get(urls.pop() or "") if len(urls) == 1 else None
    if needs is None or (needs.has_model and not found.models.isdisjoint((None, ""))):
        return False
    if rules.model is not None and found.models != {rules.model}:
        return False
    if not _are_usable(found.custom_ids, rules):
        return False
    if any([body.stream for body in bodies]):  # noqa: C419  a list is twice as fast as a generator
        return False
    if not needs.fields:
        return True
    values = list(map(attrgetter(needs.fields[0]), bodies))
    return UNSET not in values and NULL not in values


def _are_usable(custom_ids: list[str], rules: LineRules) -> bool:
    lengths = set(map(len, custom_ids))
    return 0 < min(lengths) <= max(lengths) <= rules.custom_id_chars_max and "\0" not in "".join(custom_ids)
