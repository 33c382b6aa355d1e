"""One `[[upstream]]` table of batchrunner.toml: where lines go that ask for its models, how many at a time, how fast.

A key is never in it, only the name of the variable or file that holds one.
"""

from __future__ import annotations

import re
from typing import Annotated

import msgspec
from msgspec import Meta, inspect

from batchrunner.errors import UsageError

_HINT = "See docs/operations.md, Several upstreams."
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"

_Text = Annotated[str, Meta(min_length=1)]
_Count = Annotated[int, Meta(ge=1)]


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One upstream. `models` of None takes every model that no table names."""

    name: Annotated[
        Annotated[str, Meta(pattern=_NAME)],
        Meta(description="what messages, logs and metrics call it: letters, digits, dots, dashes, underscores"),
    ]
    base_url: Annotated[_Text, Meta(description="what the SDKs call base_url")]
    api_key_env: Annotated[
        _Text | None, Meta(description="name of the environment variable that holds its key; unset sends none")
    ] = None
    api_key_file: Annotated[
        _Text | None, Meta(description="file that holds its key instead, from the folder of batchrunner.toml on")
    ] = None
    models: Annotated[
        Annotated[tuple[_Text, ...], Meta(min_length=1)] | None,
        Meta(description="the models that it serves, `*` for any characters; unset takes all that no table names"),
    ] = None
    aliases: Annotated[
        dict[str, _Text], Meta(description="model names that lines may use, and what they are called here")
    ] = {}
    window: Annotated[
        _Count | None, Meta(description="requests in flight, for all workers together; unset finds it by itself")
    ] = None
    rpm: Annotated[_Count | None, Meta(description="requests a minute, for all workers together")] = None
    tpm: Annotated[_Count | None, Meta(description="tokens a minute, for all workers together")] = None
    weight: Annotated[
        Annotated[int, Meta(ge=0)],
        Meta(description="its part of the lines that others have room for as well; 0 gets lines when those are down"),
    ] = 1


def describe_target() -> list[tuple[str, object, str]]:
    """Name, default and meaning of every key of the table; one that must be given has `...` as its default."""
    table = inspect.type_info(Target)
    assert isinstance(table, inspect.StructType)
    rows: list[tuple[str, object, str]] = []
    for key in table.fields:
        default = ... if key.required else getattr(_PLAIN, key.name)
        assert isinstance(key.type, inspect.Metadata)
        rows.append((key.name, default, (key.type.extra_json_schema or {})["description"]))
    return rows


_PLAIN = Target(name="plain", base_url="")


def read_targets(value: object, origin: str) -> tuple[Target, ...]:
    """Read what TOML gives for `upstream`.

    Raises:
        UsageError: something in it does not fit; the message names the origin, the table and the key.
    """
    if isinstance(value, tuple) and all(isinstance(each, Target) for each in value):
        return value
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UsageError(
            f"{origin}: upstream: write one or more [[upstream]] tables into a batchrunner.toml", hint=_HINT
        )
    targets = tuple(_read(table, f"{origin}: [[upstream]] {number}") for number, table in enumerate(value, 1))
    names = [target.name for target in targets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{origin}: [[upstream]]: name {twice!r} stands there twice", hint=_HINT)
    if targets and not any(target.weight for target in targets):
        raise UsageError(f"{origin}: [[upstream]]: every weight is 0; one upstream at least needs more", hint=_HINT)
    return targets


def _read(table: object, what: str) -> Target:
    try:
        target = msgspec.convert(table, Target)
    except msgspec.ValidationError as error:
        raise UsageError(f"{what}: {error}", hint=_HINT) from error
    if target.api_key_env and target.api_key_file:
        raise UsageError(f"{what}: api_key_env and api_key_file: give one of them", hint=_HINT)
    return target


def wildcards(name: str) -> str:
    """Give the pattern of a model's name with `*` for any characters; it never goes back: each part is looked for once,
    where it comes first.
    """
    first, *rest = map(re.escape, name.split("*"))
    if not rest:
        return first
    *middle, last = rest
    return f"{first}{''.join(f'(?>.*?{each})' for each in middle)}.*{last}"
