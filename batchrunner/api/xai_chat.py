"""An answer of the Responses API as the chat completion that xAI shows for it. Pure.

Source: xAI's guide, whose results of `responses` stand under `chat_get_completion`.
"""

from __future__ import annotations

import msgspec
from msgspec import UNSET, Raw, UnsetType

_NULL = Raw(b"null")


class _Part(msgspec.Struct):
    type: str = ""
    text: str | None = None
    refusal: str | None = None


class _Item(msgspec.Struct):
    type: str = ""
    content: list[_Part] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None


class _Usage(msgspec.Struct):
    input_tokens: int = 0
    output_tokens: int = 0
    total_tokens: int | None = None
    input_tokens_details: Raw = _NULL
    output_tokens_details: Raw = _NULL
    cost_in_usd_ticks: int | UnsetType = UNSET


class _Response(msgspec.Struct):
    output: list[_Item]
    id: str = ""
    created_at: float = 0
    model: str = ""
    status: str | None = None
    usage: _Usage | None = None


class _Function(msgspec.Struct):
    name: str
    arguments: str


class _ToolCall(msgspec.Struct):
    id: str
    function: _Function
    type: str = "function"


class _Message(msgspec.Struct):
    content: str | None
    refusal: str | None = None
    tool_calls: list[_ToolCall] | UnsetType = UNSET
    role: str = "assistant"


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str
    index: int = 0


class _ChatUsage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: Raw
    completion_tokens_details: Raw
    cost_in_usd_ticks: int | UnsetType = UNSET


class _Chat(msgspec.Struct):
    id: str
    created: int
    model: str
    choices: list[_Choice]
    usage: _ChatUsage | None
    object: str = "chat.completion"


_read = msgspec.json.Decoder(_Response).decode
_encode = msgspec.json.Encoder().encode


def chat_of_response(body: Raw) -> Raw:
    """Turn a Responses body into a chat completion; any other body comes back as it is."""
    try:
        found = _read(body)
    except (msgspec.DecodeError, RecursionError):
        return body
    parts = [part for item in found.output if item.type == "message" for part in item.content or ()]
    texts = [part.text for part in parts if part.text is not None]
    refusals = [part.refusal for part in parts if part.refusal is not None]
    calls = [
        _ToolCall(item.call_id or "", _Function(item.name or "", item.arguments or ""))
        for item in found.output
        if item.type == "function_call"
    ]
    message = _Message("".join(texts) if texts else None, "".join(refusals) or None, calls or UNSET)
    reason = "tool_calls" if calls else "length" if found.status == "incomplete" else "stop"
    chat = _Chat(found.id, int(found.created_at), found.model, [_Choice(message, reason)], _usage(found.usage))
    return Raw(_encode(chat))


def _usage(usage: _Usage | None) -> _ChatUsage | None:
    if usage is None:
        return None
    total = usage.total_tokens if usage.total_tokens is not None else usage.input_tokens + usage.output_tokens
    return _ChatUsage(
        usage.input_tokens,
        usage.output_tokens,
        total,
        usage.input_tokens_details,
        usage.output_tokens_details,
        usage.cost_in_usd_ticks,
    )
