"""Files of requests to measure with, and the check that an output holds them all, in order."""

from __future__ import annotations

import json
from pathlib import Path

import orjson

LINE_URL = "/v1/chat/completions"


def write_requests(path: Path, count: int, *, line_bytes: int = 600, prompt: str = "") -> Path:
    """Write that many different chat requests, each line of about that size."""
    empty = len(_line(count, prompt, ""))
    filler = "x" * max(0, line_bytes - empty)
    with path.open("w") as stream:
        for number in range(count):
            stream.write(_line(number, prompt, filler))
    return path


def _line(number: int, prompt: str, filler: str) -> str:
    body = {"model": "sim", "messages": [{"role": "user", "content": f"{prompt} {number} {filler}"}]}
    return json.dumps({"custom_id": f"request-{number}", "method": "POST", "url": LINE_URL, "body": body}) + "\n"


def is_in_order(output: Path, count: int) -> bool:
    """Tell whether an output holds each of `write_requests`' lines once, in input order, each with a good answer."""
    number = 0
    with output.open("rb") as stream:
        for number, raw in enumerate(stream, start=1):
            line = orjson.loads(raw)
            if line["custom_id"] != f"request-{number - 1}" or line["response"]["status_code"] != 200:
                return False
    return number == count
