"""What a blob may be called, wherever it is kept."""

from __future__ import annotations

import re

from batchrunner.errors import OwnError

_NAME = re.compile(r"(?!\.\.?(?:/|$))[A-Za-z0-9._-]+(?:/(?!\.\.?(?:/|$))[A-Za-z0-9._-]+)*")


def is_name(name: str) -> bool:
    """Tell whether this is a relative slash path of [A-Za-z0-9._-] parts."""
    return _NAME.fullmatch(name) is not None


def checked(name: str) -> str:
    """Give the name back. Raises: OwnError when it is none."""
    if not is_name(name):
        raise OwnError(f"{name!r} is not a blob's name")
    return name
