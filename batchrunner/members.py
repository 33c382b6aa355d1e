"""The members of a body's outermost object, in its raw bytes: one renamed or cut out, every other byte as it was."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

_TOKEN = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[{}\[\]:,]', re.DOTALL)
_decode_text = msgspec.json.Decoder(str).decode
_encode = msgspec.json.Encoder().encode


def renamed(body: bytes, aliases: Mapping[str, str]) -> bytes:
    """Give a body, which is valid JSON, with the model that an alias stands for; every other byte is as it was."""
    parts: list[bytes] = []
    copied_to = depth = 0
    is_key, key = True, b""
    for match in _TOKEN.finditer(body):
        token = match[0]
        match token:
            case b"{" | b"[":
                depth += 1
            case b"}" | b"]":
                depth -= 1
            case b",":
                is_key = is_key or depth == 1
            case b":":
                is_key = is_key and depth != 1
            case _ if depth != 1:
                pass
            case _ if is_key:
                key = token
            case _ if _decode_text(key) == "model":
                real = aliases.get(_decode_text(token))
                if real is not None:
                    parts += (body[copied_to : match.start()], _encode(real))
                    copied_to = match.end()
    return b"".join((*parts, body[copied_to:])) if parts else body


def without_member(body: bytes, name: str) -> bytes:
    """Give an object, which is valid JSON, without every member of that name."""
    kept: list[bytes] = []
    depth, key = 0, None
    start = end = first = 0
    for match in _TOKEN.finditer(body):
        token = match[0]
        if token in b"}]":
            depth -= 1
        if (token == b"," and depth == 1) or (token == b"}" and depth == 0):
            end = match.start()
            if key is not None and _decode_text(key) != name:
                kept.append(body[start:end])
            start, key = match.end(), None
        elif token in b"{[":
            depth += 1
            if depth == 1:
                first = start = match.end()
        elif depth == 1 and key is None and token != b":":
            key = token
    return body[:first] + b",".join(kept) + body[end:]
