"""Reads JSON bodies and query strings into typed structs, and says what does not fit in the API's own words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from batchrunner.api.envelope import (
    Refusal,
    invalid_type,
    invalid_value,
    missing_parameter,
    unknown_parameter,
    unparseable_json,
)

StructT = TypeVar("StructT", bound=msgspec.Struct)

_PLACE = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`\$(?P<path>.*)`)?$", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`")
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`")
_TYPE = re.compile(r"Expected `(.*)`, got `(.*)`")
_RANGE = re.compile(r"Expected `(int|float)` (<=|>=|<|>) (-?[0-9.]+)")
_LENGTH = re.compile(r"Expected `(str|array|object)` of length (<=|>=) (\d+)")
_STEP = re.compile(r"\.(?P<name>[^.\[\]]+)|\[(?P<index>\d+)\]|\[(?P<any>\.\.\.)\]")
_ENUM = re.compile(r"Invalid enum value (?:'(?P<text>.*)'|(?P<number>-?\d+))", re.DOTALL)

_WORDS = {
    "str": "a string",
    "int": "an integer",
    "float": "a decimal number",
    "bool": "a boolean",
    "array": "an array",
    "object": "an object",
    "null": "null",
}
_GOT = _WORDS | {"object": "an object"}
_ECHOED_CHARS_MAX = 200


def read_json(raw: bytes, kind: type[StructT], *, is_strict: bool) -> StructT:
    """Decode a body. Keys that the struct does not know are ignored, or refused when `is_strict`.

    Raises:
        Refusal: it is no JSON, or does not fit; param names the place.
    """
    try:
        found = msgspec.json.decode(raw, type=kind)
        if is_strict:
            _refuse_unknown(raw, kind)
        return found
    except msgspec.ValidationError as error:
        raise _refusal(str(error), _plain(raw), kind) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise unparseable_json() from None


def read_parameters(given: Mapping[str, object], kind: type[StructT]) -> StructT:
    """Convert a query string; parameters that the struct does not know are ignored.

    Raises:
        Refusal: a value does not fit.
    """
    try:
        return msgspec.convert(dict(given), kind, strict=False)
    except msgspec.ValidationError as error:
        raise _refusal(str(error), dict(given), kind) from None


def _plain(raw: bytes) -> object:
    """Decode once more without types, to find the place of a value that did not fit."""
    try:
        found: object = msgspec.json.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise unparseable_json() from None
    return found


def _refuse_unknown(raw: bytes, kind: type[msgspec.Struct]) -> None:
    known = set(kind.__struct_encode_fields__)
    for name in msgspec.json.decode(raw, type=dict[str, msgspec.Raw]):
        if name not in known:
            raise unknown_parameter(_echo(name))


def _refusal(text: str, given: object, kind: type[msgspec.Struct]) -> Refusal:
    """Turn a message of msgspec into the API's; the message is the only place where it tells what was wrong."""
    match = _PLACE.fullmatch(text)
    assert match is not None
    what, path = match["what"], match["path"] or ""
    steps, value = _locate(given, path, kind)
    if found := _MISSING.fullmatch(what):
        return missing_parameter(_dotted([*steps, found[1]]))
    if found := _UNKNOWN.fullmatch(what):
        return unknown_parameter(_dotted([*steps, _echo(found[1])]))
    param = _dotted(steps)
    if match["key"]:
        return _key_refusal(param, what)
    if found := _ENUM.fullmatch(what):
        return invalid_value(param, _echo(found["text"] or found["number"] or ""), _supported(kind, steps))
    if found := _TYPE.fullmatch(what):
        return _type_refusal(param, found[1], found[2])
    return _bound_refusal(param, what, value)


def _type_refusal(param: str, expected: str, got: str) -> Refusal:
    wanted = " or ".join(_WORDS.get(each, each) for each in expected.split(" | "))
    if not param:
        return Refusal(f"Invalid body: expected {wanted}, but got {_GOT.get(got, got)} instead.", code="invalid_type")
    return invalid_type(param, wanted, _GOT.get(got, got))


def _key_refusal(param: str, what: str) -> Refusal:
    if found := _LENGTH.fullmatch(what):
        message = f"Invalid '{param}': a key is too long. Expected keys with maximum length {found[3]}."
        return Refusal(message, param=param, code="string_above_max_length")
    return Refusal(f"Invalid '{param}': a key does not fit.", param=param, code="invalid_value")


def _bound_refusal(param: str, what: str, value: object) -> Refusal:
    """Numbers and lengths out of range. Source: the wording and codes of the OpenAI API for these."""
    if found := _RANGE.fullmatch(what):
        is_above = found[2].startswith("<")
        name = "integer" if found[1] == "int" else "decimal"
        side = "above maximum" if is_above else "below minimum"
        message = (
            f"Invalid '{param}': {name} {side} value. Expected a value {found[2]} {found[3]}, but got "
            f"{_echo(str(value))} instead."
        )
        return Refusal(message, param=param, code=f"{name}_{'above_max' if is_above else 'below_min'}_value")
    if found := _LENGTH.fullmatch(what):
        return _length_refusal(param, found[1], int(found[3]), value, is_above=found[2] == "<=")
    return Refusal(f"Invalid value for '{param}'.", param=param or None, code="invalid_value")


def _length_refusal(param: str, kind: str, limit: int, value: object, *, is_above: bool) -> Refusal:
    length = len(value) if isinstance(value, str | list | dict) else 0
    side = "maximum" if is_above else "minimum"
    suffix = "above_max" if is_above else "below_min"
    extent = "long" if is_above else "short"
    if kind == "object":
        many = "many" if is_above else "few"
        bound = "at most" if is_above else "at least"
        message = f"too {many} properties. Expected an object with {bound} {limit} properties, but got an object with "
        return Refusal(
            f"Invalid '{param}': {message}{length} properties instead.", param=param, code=f"object_{suffix}_properties"
        )
    if kind == "array" and not length:
        message = f"empty array. Expected an array with minimum length {limit}, but got an empty array instead."
        return Refusal(f"Invalid '{param}': {message}", param=param, code="empty_array")
    name, article = ("string", "a") if kind == "str" else ("array", "an")
    message = (
        f"Invalid '{param}': {name} too {extent}. Expected {article} {name} with {side} length {limit}, but got "
        f"{article} {name} with length {length} instead."
    )
    return Refusal(message, param=param, code=f"{name}_{suffix}_length")


def _locate(given: object, path: str, kind: type[msgspec.Struct]) -> tuple[list[str], object]:
    """Follow msgspec's path into what was given. Of a map it does not name the key: the first that is refused is it."""
    steps: list[str] = []
    value = given
    for step in _STEP.finditer(path):
        if step["name"] is not None and isinstance(value, dict):
            steps.append(step["name"])
            value = value.get(step["name"])
        elif step["index"] is not None and isinstance(value, list):
            steps.append(step["index"])
            value = value[int(step["index"])]
        elif step["any"] is not None and isinstance(value, dict):
            key = _refused_key(given, steps, value, kind)
            steps.append(_echo(key))
            value = value[key]
    return steps, value


def _refused_key(given: object, steps: Sequence[str], members: Mapping[str, object], kind: type[msgspec.Struct]) -> str:
    for key, member in members.items():
        try:
            msgspec.convert(_with(given, steps, {key: member}), kind)
        except msgspec.ValidationError:
            return key
    return next(iter(members))


def _with(given: object, steps: Sequence[str], value: object) -> object:
    """Copy what was given with another value at one place."""
    if not steps:
        return value
    if isinstance(given, dict):
        return given | {steps[0]: _with(given[steps[0]], steps[1:], value)}
    assert isinstance(given, list)
    copied = list(given)
    copied[int(steps[0])] = _with(given[int(steps[0])], steps[1:], value)
    return copied


def _supported(kind: type[msgspec.Struct], steps: Sequence[str]) -> list[str]:
    """List the values of the enum or literal that stands at a place of a struct."""
    found: msgspec.inspect.Type = msgspec.inspect.type_info(kind)
    for step in steps:
        found = _inside(found, step)
    for each in _choices(found):
        if isinstance(each, msgspec.inspect.EnumType):
            return [str(member.value) for member in each.cls]
        if isinstance(each, msgspec.inspect.LiteralType):
            return [str(value) for value in each.values]
    return []


def _inside(found: msgspec.inspect.Type, step: str) -> msgspec.inspect.Type:
    for each in _choices(found):
        if isinstance(each, msgspec.inspect.StructType):
            for member in each.fields:
                if member.encode_name == step:
                    return member.type
        if isinstance(each, msgspec.inspect.DictType):
            return each.value_type
        if isinstance(each, msgspec.inspect.ListType | msgspec.inspect.VarTupleType):
            return each.item_type
    return found


def _choices(found: msgspec.inspect.Type) -> Sequence[msgspec.inspect.Type]:
    if isinstance(found, msgspec.inspect.Metadata):
        return _choices(found.type)
    return found.types if isinstance(found, msgspec.inspect.UnionType) else (found,)


def _dotted(steps: Sequence[str]) -> str:
    """Write a place as the API does: `metadata.tags`, `requests[3].body`."""
    text = ""
    for step in steps:
        text += f"[{step}]" if step.isdigit() and text else f".{step}" if text else step
    return text


def _echo(text: str) -> str:
    """What a caller sent may be long and may hold anything; it is shown cut, with control characters escaped."""
    shown = "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)
    return shown if len(shown) <= _ECHOED_CHARS_MAX else f"{shown[:_ECHOED_CHARS_MAX]}..."
