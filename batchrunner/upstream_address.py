"""Where an upstream is: its base URL, and the address of a line below it."""

from __future__ import annotations

import re
from urllib.parse import urlsplit

from yarl import URL

from batchrunner.errors import UsageError

_LINE_URL = re.compile(r"(/[A-Za-z0-9._~!$&'()*+,;=:@%-]+)+")


def join_url(base_url: str, line_url: str) -> URL:
    """Give the address of a line: its url less the leading /v1, appended to the base URL (without a path: plus /v1).

    Raises:
        UsageError: either of them is not what it should be.
    """
    base = parse_base(base_url)
    if not _LINE_URL.fullmatch(line_url) or {".", ".."} & set(line_url.split("/")):
        raise UsageError(f"url {line_url[:100]!r}: not a plain path like /v1/chat/completions")
    rest = line_url.removeprefix("/v1")
    if not rest.startswith("/"):
        rest = line_url
    return base.with_path(base.raw_path + rest, encoded=True)


def parse_base(base_url: str) -> URL:
    """Read a base URL; its path ends without a slash and is never empty.

    Raises:
        UsageError: it is not what a base URL should be; a password in it is not repeated.
    """
    hint = "Give it like http://localhost:8000/v1; the key goes into OPENAI_API_KEY."
    try:
        has_userinfo = "@" in urlsplit(base_url).netloc
        base = URL(base_url)
        port = base.port
    except ValueError as error:
        raise UsageError("the base URL is not a valid URL", hint=hint) from error
    if has_userinfo:
        # The address is not repeated: it holds a password.
        raise UsageError("the base URL must not hold a user name or password", hint=hint)
    if base.scheme not in {"http", "https"} or not base.raw_host or not port:
        raise UsageError(f"base URL {base_url!r}: not an http:// or https:// address", hint=hint)
    if re.search(r"[\x00-\x20\x7f\\]", base_url) or "?" in base_url or "#" in base_url:
        raise UsageError(f"base URL {base_url!r}: no query, fragment, space or backslash may be in it", hint=hint)
    return base.with_path(base.raw_path.rstrip("/") or "/v1", encoded=True)
