"""Writes every file of this folder, the same bytes each time: `python sample_inputs/generate.py [FOLDER]`.

The expectations of `every_error.jsonl` hold for the endpoint /v1/chat/completions.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHAT = "/v1/chat/completions"
EMBEDDINGS = "/v1/embeddings"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"

SUBJECTS = ("rivers", "bridges", "bread", "glaciers", "lighthouses", "violins", "bees", "printing", "maps", "tides")
QUESTIONS = (
    "In one sentence, why do people write about {}?",
    "Name three facts about {}.",
    "What would change if there were no {}?",
    "Explain {} to a child of six.",
)
GREETINGS = ("Grüße aus Köln", "¿Qué tal?", "こんにちは", "Привет", "👋🏽")


def line(custom_id: str, url: str, body: dict[str, Any]) -> dict[str, Any]:
    """Make one request line."""
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def chat_body(prompt: str, *, model: str = "small-chat", tokens_max: int = 64) -> dict[str, Any]:
    """Make the body of a chat completion."""
    return {"model": model, "messages": [{"role": "user", "content": prompt}], "max_tokens": tokens_max}


def prompt_for(index: int) -> str:
    """Ask something different for each index."""
    subject = SUBJECTS[index % len(SUBJECTS)]
    question = QUESTIONS[index // len(SUBJECTS) % len(QUESTIONS)]
    return f"{question.format(subject)} (question {index + 1})"


def chat_lines(count: int) -> Iterator[dict[str, Any]]:
    """Chat requests with a system message in every third line and another script in every seventh."""
    for index in range(count):
        body = chat_body(prompt_for(index))
        if index % 3 == 0:
            body["messages"].insert(0, {"role": "system", "content": "Answer briefly."})
        if index % 7 == 0:
            body["messages"][-1]["content"] += f" {GREETINGS[index // 7 % len(GREETINGS)]}"
        yield line(f"chat-{index + 1:04}", CHAT, body)


def embedding_lines(count: int) -> Iterator[dict[str, Any]]:
    """Embedding requests; every fourth line has a list of inputs."""
    for index in range(count):
        text = prompt_for(index)
        given = [text, text.upper()] if index % 4 == 0 else text
        yield line(f"embedding-{index + 1:04}", EMBEDDINGS, {"model": "small-embedding", "input": given})


def mixed_lines(count: int) -> Iterator[dict[str, Any]]:
    """Several models and endpoints in turn."""
    for index in range(count):
        prompt = prompt_for(index)
        yield (
            line(f"mixed-{index + 1:04}", CHAT, chat_body(prompt)),
            line(f"mixed-{index + 1:04}", CHAT, chat_body(prompt, model="large-chat", tokens_max=256)),
            line(f"mixed-{index + 1:04}", EMBEDDINGS, {"model": "small-embedding", "input": prompt}),
            line(f"mixed-{index + 1:04}", COMPLETIONS, {"model": "small-text", "prompt": prompt, "max_tokens": 32}),
            line(f"mixed-{index + 1:04}", RESPONSES, {"model": "small-chat", "input": prompt}),
        )[index % 5]


def encode(value: dict[str, Any]) -> bytes:
    """Write one line as people write it: UTF-8, a space after each separator."""
    return json.dumps(value, ensure_ascii=False).encode()


def changed(custom_id: str, /, **fields: object) -> bytes:
    """Make a good chat line with some fields set to other values; None drops the field."""
    good = line(custom_id, CHAT, chat_body(f"Say {custom_id}.")) | fields
    return encode({name: value for name, value in good.items() if value is not None})


def without(name: str) -> bytes:
    """Make a chat line that lacks one field."""
    return changed(f"without-{name}", **{name: None})


def with_body(custom_id: str, /, **fields: object) -> bytes:
    """Make a chat line whose body has some fields set to other values; None drops the field."""
    body = chat_body(f"Say {custom_id}.") | fields
    return changed(custom_id, body={name: value for name, value in body.items() if value is not None})


def every_error() -> Iterator[tuple[bytes, str | None, str | None]]:
    """Each physical line without its newline, with the code and param of its refusal; None, None for a good one."""
    bom, deep = b"\xef\xbb\xbf", b"[" * 200 + b"]" * 200
    good, no_json = (None, None), ("invalid_json_line", None)
    yield bom + changed("good-after-byte-order-mark"), *good
    yield b"{this is not JSON", *no_json
    yield b"[1, 2, 3]", *no_json
    yield b'"a string"', *no_json
    yield changed("good-with-carriage-return") + b"\r", *good
    yield b"", *good
    yield b"   \t", *good
    yield b"\r", *good
    yield without("custom_id"), "missing_required_parameter", "custom_id"
    yield without("method"), "missing_required_parameter", "method"
    yield without("url"), "missing_required_parameter", "url"
    yield without("body"), "missing_required_parameter", "body"
    yield changed("placeholder", custom_id=17), "invalid_type", "custom_id"
    yield changed("method-is-a-number", method=1), "invalid_type", "method"
    yield changed("url-is-a-list", url=[CHAT]), "invalid_type", "url"
    yield changed("body-is-a-string", body="hello"), "invalid_type", "body"
    yield changed("method-get", method="GET"), "invalid_method", "method"
    yield encode(line("good-for-another-endpoint", EMBEDDINGS, {"model": "m", "input": "x"})), "invalid_url", "url"
    yield changed("url-unknown", url="/v1/chat/completion"), "url_not_found", "url"
    yield changed("url-absolute", url="http://localhost/v1/chat/completions"), "url_not_found", "url"
    yield changed("url-climbs", url="/v1/../admin"), "url_not_found", "url"
    yield changed("good-and-repeated"), *good
    yield changed("good-and-repeated"), "duplicate_custom_id", "custom_id"
    yield with_body("streaming", stream=True), "streaming_unsupported", "body.stream"
    yield with_body("good-not-streaming", stream=False), *good
    yield with_body("stream-is-a-word", stream="yes"), "invalid_type", "body.stream"
    yield with_body("model-is-a-number", model=4), "invalid_type", "body.model"
    yield with_body("no-model", model=None), "invalid_request", "body.model"
    yield with_body("no-messages", messages=None), "invalid_request", "body.messages"
    yield changed("latin-1").replace(b"Say latin-1", b"Caf\xe9"), *no_json
    yield changed("bad-utf-8-in-a-skipped-part").replace(b'"user"', b'"us\xffer"'), *no_json
    yield changed("too-deep").replace(b'"max_tokens": 64', b'"nested": ' + deep), "too_deeply_nested", None
    yield changed("not-a-number").replace(b"64", b"NaN"), *no_json
    yield changed("two-values") + b" {}", *no_json
    yield changed("cut-short")[:-20], *no_json
    yield changed("placeholder", custom_id="x" * 513), "invalid_custom_id", "custom_id"
    yield changed("placeholder", custom_id=""), "invalid_custom_id", "custom_id"
    yield changed("placeholder", custom_id="a\0b"), "invalid_custom_id", "custom_id"
    yield encode(line("", CHAT, {}) | {"custom_id": None}), "missing_required_parameter", "custom_id"
    yield changed("good-without-final-newline"), *good


def files() -> dict[str, bytes]:
    """Give the name and the bytes of every file that belongs in this folder."""

    def lines(values: Iterator[dict[str, Any]]) -> bytes:
        return b"".join(encode(value) + b"\n" for value in values)

    cases = list(every_error())
    expected = [
        {"line": number, "code": code, "param": param} for number, (_, code, param) in enumerate(cases, 1) if code
    ]
    rows = ",\n".join(f"  {json.dumps(each)}" for each in expected)
    return {
        "chat.jsonl": lines(chat_lines(20)),
        "chat_1000.jsonl": lines(chat_lines(1000)),
        "embeddings.jsonl": lines(embedding_lines(20)),
        "mixed.jsonl": lines(mixed_lines(25)),
        "every_error.jsonl": b"\n".join(raw for raw, _, _ in cases),
        "every_error.expected.json": f"[\n{rows}\n]\n".encode(),
    }


def main() -> None:
    """Write the files into the folder named, or beside this script."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    for name, content in files().items():
        (folder / name).write_bytes(content)
        print(f"{folder / name}: {len(content)} bytes")


if __name__ == "__main__":
    main()
