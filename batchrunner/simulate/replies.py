"""The answers of the simulated upstream: each is a pure function of the request's body, so a swapped reply shows.

Knows OpenAI's shapes, and neither sockets nor time.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import math
import struct
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
import orjson

from batchrunner.simulate.media import mp3, mp4, png, wav
from batchrunner.simulate.rules import Fault, FaultKind
from batchrunner.simulate.wire import Answer, Request

MISSING_MODEL: Final = "missing-model"
_CHAT: Final = "/v1/chat/completions"
_COMPLETIONS: Final = "/v1/completions"
_EMBEDDINGS: Final = "/v1/embeddings"
_RESPONSES: Final = "/v1/responses"
_MODERATIONS: Final = "/v1/moderations"
_TRANSCRIPTIONS: Final = "/v1/audio/transcriptions"
_IMAGES: Final = "/v1/images/generations"
_IMAGE_EDITS: Final = "/v1/images/edits"
_VIDEOS: Final = ("/v1/videos", "/v1/videos/generations", "/v1/videos/edits", "/v1/videos/extensions")
_MUSIC: Final = "/v1/music/generations"
_SPEECH: Final = "/v1/audio/speech"
EVENT_STREAM: Final = b"text/event-stream; charset=utf-8"
_QUOTED_CHARACTERS: Final = 64
_STREAMED_CHARACTERS: Final = 8
_DIMENSIONS: Final = 8
_DIMENSIONS_MAX: Final = 4096
# Source: OpenAI's limit of the images of one request.
_IMAGES_MAX: Final = 10
# Times are derived from the body too, in the year after this instant: the same body has the same answer for ever.
_EPOCH: Final = 1_735_689_600
_YEAR_S: Final = 31_536_000
_MARKER_PREFIXES: Final = {
    _CHAT: "echo:",
    _COMPLETIONS: "echo:",
    _RESPONSES: "echo:",
    _EMBEDDINGS: "embd-",
    _MODERATIONS: "modr-",
    _TRANSCRIPTIONS: "echo:",
    _IMAGES: "image-",
    _IMAGE_EDITS: "edit-",
    **dict.fromkeys(_VIDEOS, "video-"),
    _MUSIC: "music-",
    _SPEECH: "speech-",
}
_CATEGORIES: Final = ("harassment", "hate", "illicit", "self-harm", "sexual", "violence")


class _Part(msgspec.Struct, gc=False):
    type: str = "text"
    text: str | None = None


class _Message(msgspec.Struct):
    role: str = "user"
    content: str | list[_Part] | None = None


class _ChatBody(msgspec.Struct):
    model: str
    messages: list[_Message]
    stream: bool | None = None


class _CompletionsBody(msgspec.Struct):
    model: str
    prompt: str | list[str | int | list[int]]
    stream: bool | None = None


class _EmbeddingsBody(msgspec.Struct):
    model: str
    input: str | list[str | int | list[int]]
    dimensions: int | None = None
    encoding_format: str | None = None


class _ResponsesBody(msgspec.Struct):
    model: str
    input: str | list[_Message]
    stream: bool | None = None


class _ModerationsBody(msgspec.Struct):
    input: str | list[str | _Part]
    model: str = "omni-moderation-latest"


class _ImagesBody(msgspec.Struct):
    prompt: str
    model: str = "simulated"
    n: int | None = None
    response_format: str | None = None


class _VideoBody(msgspec.Struct):
    prompt: str
    model: str = "simulated"
    response_format: str | None = None


class _SoundBody(msgspec.Struct):
    model: str
    input: str | None = None
    prompt: str | None = None
    response_format: str | None = None


_CHAT_BODY: Final = msgspec.json.Decoder(_ChatBody)
_COMPLETIONS_BODY: Final = msgspec.json.Decoder(_CompletionsBody)
_EMBEDDINGS_BODY: Final = msgspec.json.Decoder(_EmbeddingsBody)
_RESPONSES_BODY: Final = msgspec.json.Decoder(_ResponsesBody)
_MODERATIONS_BODY: Final = msgspec.json.Decoder(_ModerationsBody)
_IMAGES_BODY: Final = msgspec.json.Decoder(_ImagesBody)
_VIDEO_BODY: Final = msgspec.json.Decoder(_VideoBody)
_SOUND_BODY: Final = msgspec.json.Decoder(_SoundBody)


class _Refused(Exception):
    """The body cannot be answered; carries the answer that says so."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(answer.status)
        self.answer = answer


def expected_reply(body: bytes, url: str) -> str:
    """Return the text that stands in the good answer to this body at this url, and in the answer to no other body.

    The url is the path, such as `/v1/chat/completions`.

    Raises:
        KeyError: no model endpoint has this path.
    """
    return _MARKER_PREFIXES[url] + hashlib.sha256(body).hexdigest()[:16]


def error_answer(status: int, message: str, *, code: str | None = None, param: str | None = None) -> Answer:
    """Return an answer in OpenAI's error envelope, its type chosen by the status."""
    match status:
        case 429:
            kind = "rate_limit_error"
        case 401:
            kind = "authentication_error"
        case _:
            kind = "invalid_request_error" if status < 500 else "server_error"
    error = {"message": message, "type": kind, "param": param, "code": code}
    return Answer(status, orjson.dumps({"error": error}))


def models_answer() -> Answer:
    """Return the list of models; any other name is answered as well."""
    names = ("simulated", "simulated-embedding")
    models = [{"id": name, "object": "model", "created": _EPOCH, "owned_by": "batchrunner"} for name in names]
    return Answer(200, orjson.dumps({"object": "list", "data": models}))


def model_answer(path: bytes, body: bytes, digest: bytes) -> Answer:
    """Return the answer of the endpoint at this path (one of ENDPOINTS) to a body with this SHA-256 digest.

    A body that the endpoint cannot read is answered 400, the model `missing-model` 404.
    """
    try:
        made = ENDPOINTS[path](body, digest)
        return made if isinstance(made, Answer) else Answer(200, made)
    except _Refused as refused:
        return refused.answer
    except msgspec.ValidationError as error:
        return error_answer(400, f"The request body does not fit this endpoint: {error}")
    except (ValueError, RecursionError):
        return error_answer(400, "We could not parse the JSON body of your request.")


def unknown_path_answer(request: Request) -> Answer:
    """Return the answer to a path that leads nowhere."""
    target = f"{request.method.decode('latin-1')} {request.path.decode('latin-1')}"
    return error_answer(404, f"Invalid URL ({target})", code="unknown_url")


def wrong_method_answer(request: Request, right: str) -> Answer:
    """Return the answer to a method that the path does not take."""
    method = request.method.decode("latin-1")
    answer = error_answer(405, f"Not allowed to {method} on this path, {right} only.", code="method_not_supported")
    return answer._replace(headers=((b"Allow", right.encode()),))


def faulty_answer(fault: Fault, good: Answer) -> Answer:
    """Return the whole answer that a fault puts in the place of the good one; faults below HTTP leave it as it is."""
    match fault.kind:
        case FaultKind.STATUS:
            return _status_answer(fault)
        case FaultKind.GARBAGE:
            return Answer(200, b"{]<<this is not JSON>>" + good.body[:32])
        case FaultKind.ERROR_200:
            return error_answer(500, "The server had an error.", code="server_error")._replace(status=200)
        case FaultKind.REDIRECT:
            return Answer(302, b"", headers=((b"Location", b"/v1/redirected"),))
        case FaultKind.HTML:
            page = b"<!doctype html><html><head><title>Gateway</title></head><body>Please log in.</body></html>\n"
            return Answer(200, page, b"text/html; charset=utf-8")
        case FaultKind.GZIP:
            packed = gzip.compress(good.body, compresslevel=1, mtime=0)
            return good._replace(body=packed, headers=((b"Content-Encoding", b"gzip"),))
        case FaultKind.BAD_UTF8:
            return good._replace(body=good.body.replace(b'"object":"', b'"note":"\xff\xfe\xc3(","object":"', 1))
        case _:
            return good


def _status_answer(fault: Fault) -> Answer:
    code = "rate_limit_exceeded" if fault.status == 429 else None
    answer = error_answer(fault.status, f"The simulator was told to answer {fault.status}.", code=code)
    if fault.retry_after_s is None:
        return answer
    if fault.retry_after_s < 1.0:
        return answer._replace(headers=((b"retry-after-ms", b"%d" % round(fault.retry_after_s * 1000)),))
    return answer._replace(headers=((b"Retry-After", b"%d" % math.ceil(fault.retry_after_s)),))


def _check(model: str, *, is_stream: bool | None) -> None:
    if model == MISSING_MODEL:
        message = f"The model `{MISSING_MODEL}` does not exist or you do not have access to it."
        raise _Refused(error_answer(404, message, code="model_not_found", param="model"))
    if is_stream:
        message = "The simulator streams chat completions only."
        raise _Refused(error_answer(400, message, code="unsupported_value", param="stream"))


def _tokens(body: bytes, digest: bytes) -> tuple[int, int, int, int]:
    """Return plausible counts: prompt, its cached part, completion, its reasoning part."""
    prompt = (len(body) + 3) // 4
    reasoning = digest[8] & 15
    return prompt, prompt // 4, 16 + (digest[9] & 31) + reasoning, reasoning


def _created_at(digest: bytes) -> int:
    return _EPOCH + int.from_bytes(digest[10:14], "big") % _YEAR_S


def _text_of(content: str | list[_Part] | None) -> str:
    if isinstance(content, list):
        return next((part.text for part in content if part.text is not None), "")
    return content or ""


def _last_user_text(messages: Sequence[_Message]) -> str:
    return next((_text_of(message.content) for message in reversed(messages) if message.role == "user"), "")


def _echo(marker: str, text: str) -> bytes:
    return orjson.dumps(f"echo:{marker} {text[:_QUOTED_CHARACTERS]}")


def _usage(body: bytes, digest: bytes) -> bytes:
    prompt, cached, completion, reasoning = _tokens(body, digest)
    return (
        b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d,'
        b'"prompt_tokens_details":{"cached_tokens":%d,"audio_tokens":0},"completion_tokens_details":'
        b'{"reasoning_tokens":%d,"audio_tokens":0,"accepted_prediction_tokens":0,"rejected_prediction_tokens":0}}'
        % (prompt, completion, prompt + completion, cached, reasoning)
    )


def _chat(body: bytes, digest: bytes) -> bytes | Answer:
    request = _CHAT_BODY.decode(body)
    _check(request.model, is_stream=False)
    marker = digest[:8].hex()
    if request.stream:
        text = f"echo:{marker} {_last_user_text(request.messages)[:_QUOTED_CHARACTERS]}"
        return Answer(200, _chat_events(request.model, text, marker, _created_at(digest)), EVENT_STREAM)
    return (
        b'{"id":"chatcmpl-%b","object":"chat.completion","created":%d,"model":%b,"choices":[{"index":0,"message":'
        b'{"role":"assistant","content":%b,"refusal":null,"annotations":[]},"logprobs":null,"finish_reason":"stop"}],'
        b'"usage":%b,"service_tier":"default","system_fingerprint":"fp_simulated"}'
        % (
            marker.encode(),
            _created_at(digest),
            orjson.dumps(request.model),
            _echo(marker, _last_user_text(request.messages)),
            _usage(body, digest),
        )
    )


def _chat_events(model: str, text: str, marker: str, created_at: int) -> bytes:
    """Return all events of a streamed answer: who speaks, the text in small pieces, why it ends, and the end."""
    pieces = [text[start : start + _STREAMED_CHARACTERS] for start in range(0, len(text), _STREAMED_CHARACTERS)]
    deltas: list[tuple[dict[str, str], str | None]] = [({"role": "assistant", "content": ""}, None)]
    deltas += [({"content": piece}, None) for piece in pieces]
    head = {"id": f"chatcmpl-{marker}", "object": "chat.completion.chunk", "created": created_at, "model": model}
    events = [
        head | {"choices": [{"index": 0, "delta": delta, "finish_reason": reason}]}
        for delta, reason in [*deltas, ({}, "stop")]
    ]
    return b"".join(b"data: " + orjson.dumps(each) + b"\n\n" for each in events) + b"data: [DONE]\n\n"


def _split_inputs(given: str | list[str | int | list[int]]) -> list[str]:
    """Return one text per answer wanted; a prompt of token numbers quotes nothing."""
    if isinstance(given, str):
        return [given]
    if given and all(isinstance(item, int) for item in given):
        return [""]
    return [item if isinstance(item, str) else "" for item in given]


def _completions(body: bytes, digest: bytes) -> bytes:
    request = _COMPLETIONS_BODY.decode(body)
    _check(request.model, is_stream=request.stream)
    marker = digest[:8].hex()
    choices = b",".join(
        b'{"text":%b,"index":%d,"logprobs":null,"finish_reason":"stop"}' % (_echo(marker, text), index)
        for index, text in enumerate(_split_inputs(request.prompt))
    )
    return b'{"id":"cmpl-%b","object":"text_completion","created":%d,"model":%b,"choices":[%b],"usage":%b}' % (
        marker.encode(),
        _created_at(digest),
        orjson.dumps(request.model),
        choices,
        _usage(body, digest),
    )


def _embeddings(body: bytes, digest: bytes) -> bytes:
    request = _EMBEDDINGS_BODY.decode(body)
    _check(request.model, is_stream=False)
    size = _DIMENSIONS if request.dimensions is None else request.dimensions
    if not 1 <= size <= _DIMENSIONS_MAX:
        message = f"dimensions is {size}, at least 1 and at most {_DIMENSIONS_MAX}"
        raise _Refused(error_answer(400, message, param="dimensions"))
    is_base64 = request.encoding_format == "base64"
    vectors = [
        {"object": "embedding", "index": index, "embedding": _embedding(digest, index, size=size, is_base64=is_base64)}
        for index in range(len(_split_inputs(request.input)))
    ]
    prompt = _tokens(body, digest)[0]
    usage = {"prompt_tokens": prompt, "total_tokens": prompt}
    # OpenAI sends no id here; vLLM does, and a checker needs the marker.
    reply_id = f"embd-{digest[:8].hex()}"
    return orjson.dumps(
        {"object": "list", "id": reply_id, "data": vectors, "model": request.model, "usage": usage},
    )


def _embedding(digest: bytes, index: int, *, size: int, is_base64: bool) -> str | list[float]:
    seed = hashlib.shake_256(digest + index.to_bytes(8, "big")).digest(size)
    vector = [(byte - 127.5) / 128.0 for byte in seed]
    return base64.b64encode(struct.pack(f"<{size}f", *vector)).decode() if is_base64 else vector


def _responses(body: bytes, digest: bytes) -> bytes:
    request = _RESPONSES_BODY.decode(body)
    _check(request.model, is_stream=request.stream)
    marker = digest[:8].hex()
    text = request.input if isinstance(request.input, str) else _last_user_text(request.input)
    prompt, cached, completion, reasoning = _tokens(body, digest)
    return (
        b'{"id":"resp_%b","object":"response","created_at":%d,"status":"completed","error":null,'
        b'"incomplete_details":null,"instructions":null,"metadata":{},"model":%b,"output":[{"id":"msg_%b",'
        b'"type":"message","status":"completed","role":"assistant","content":[{"type":"output_text","text":%b,'
        b'"annotations":[]}]}],"parallel_tool_calls":true,"temperature":1.0,"tool_choice":"auto","tools":[],"top_p":1.0,'
        b'"usage":{"input_tokens":%d,"input_tokens_details":{"cached_tokens":%d},"output_tokens":%d,'
        b'"output_tokens_details":{"reasoning_tokens":%d},"total_tokens":%d}}'
        % (
            marker.encode(),
            _created_at(digest),
            orjson.dumps(request.model),
            marker.encode(),
            _echo(marker, text),
            prompt,
            cached,
            completion,
            reasoning,
            prompt + completion,
        )
    )


def _moderations(body: bytes, digest: bytes) -> bytes:
    request = _MODERATIONS_BODY.decode(body)
    _check(request.model, is_stream=False)
    is_text_list = isinstance(request.input, list) and all(isinstance(item, str) for item in request.input)
    count = len(request.input) if is_text_list else 1
    result = {
        "flagged": False,
        "categories": dict.fromkeys(_CATEGORIES, False),
        "category_scores": {name: digest[place] / 25600.0 for place, name in enumerate(_CATEGORIES)},
    }
    return orjson.dumps({"id": f"modr-{digest[:8].hex()}", "model": request.model, "results": [result] * count})


def _transcription(body: bytes, digest: bytes) -> bytes:
    return orjson.dumps({"text": f"echo:{digest[:8].hex()} {len(body)} bytes"})


def _image_edit(body: bytes, digest: bytes) -> bytes:
    marker = f"edit-{digest[:8].hex()}"
    if body.lstrip().startswith(b"{"):
        return _pictures(_IMAGES_BODY.decode(body), marker, digest)
    return orjson.dumps({"created": _created_at(digest), "data": [{"url": f"https://images.example/{marker}.png"}]})


def _images(body: bytes, digest: bytes) -> bytes:
    return _pictures(_IMAGES_BODY.decode(body), f"image-{digest[:8].hex()}", digest)


def _pictures(request: _ImagesBody, marker: str, digest: bytes) -> bytes:
    """Return as many pictures as are wanted, no two alike; addresses lead to a name that stands for none."""
    _check(request.model, is_stream=False)
    count = 1 if request.n is None else request.n
    if not 1 <= count <= _IMAGES_MAX:
        raise _Refused(error_answer(400, f"n is {count}, at least 1 and at most {_IMAGES_MAX}", param="n"))
    is_base64 = _is_base64(request.response_format)
    pictures = []
    for number in range(1, count + 1):
        name = f"{marker}-{number}"
        given = _base64(png(name, bytes([number]) + digest)) if is_base64 else f"https://images.example/{name}.png"
        revised = f"{marker} {request.prompt[:_QUOTED_CHARACTERS]}"
        pictures.append({"b64_json" if is_base64 else "url": given, "revised_prompt": revised})
    return orjson.dumps({"created": _created_at(digest), "data": pictures})


def _videos(body: bytes, digest: bytes) -> bytes:
    request = _VIDEO_BODY.decode(body)
    _check(request.model, is_stream=False)
    marker = f"video-{digest[:8].hex()}"
    is_base64 = _is_base64(request.response_format)
    given = {"b64_json": _base64(mp4(marker))} if is_base64 else {"url": f"https://videos.example/{marker}.mp4"}
    head = {"id": marker, "object": "video", "created_at": _created_at(digest), "model": request.model}
    return orjson.dumps(head | {"status": "completed", "data": [given]})


def _music(body: bytes, digest: bytes) -> bytes | Answer:
    request = _SOUND_BODY.decode(body)
    marker = f"music-{digest[:8].hex()}"
    if request.response_format != "b64_json":
        return _sound(request, marker, digest, needed="prompt")
    sound = _sound(msgspec.structs.replace(request, response_format="wav"), marker, digest, needed="prompt")
    return orjson.dumps({"id": marker, "model": request.model, "audio": {"data": _base64(sound.body), "format": "wav"}})


def _speech(body: bytes, digest: bytes) -> Answer:
    return _sound(_SOUND_BODY.decode(body), f"speech-{digest[:8].hex()}", digest, needed="input")


def _sound(request: _SoundBody, marker: str, digest: bytes, *, needed: str) -> Answer:
    """Return sound, as mp3 unless another form is wanted."""
    _check(request.model, is_stream=False)
    if getattr(request, needed) is None:
        raise _Refused(error_answer(400, f"The request body does not fit this endpoint: no `{needed}`", param=needed))
    match request.response_format:
        case None | "mp3":
            return Answer(200, mp3(marker), b"audio/mpeg")
        case "wav":
            return Answer(200, wav(marker, digest[8]), b"audio/wav")
        case _:
            message = "The simulator gives sound as mp3 or wav only."
            raise _Refused(error_answer(400, message, code="unsupported_value", param="response_format"))


def _is_base64(response_format: str | None) -> bool:
    if response_format not in (None, "url", "b64_json"):
        message = "The simulator gives media as url or b64_json only."
        raise _Refused(error_answer(400, message, code="unsupported_value", param="response_format"))
    return response_format == "b64_json"


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()


ENDPOINTS: Final[dict[bytes, Callable[[bytes, bytes], bytes | Answer]]] = {
    _CHAT.encode(): _chat,
    _COMPLETIONS.encode(): _completions,
    _EMBEDDINGS.encode(): _embeddings,
    _RESPONSES.encode(): _responses,
    _MODERATIONS.encode(): _moderations,
    # A form is looked at for its bytes only.
    _TRANSCRIPTIONS.encode(): _transcription,
    _IMAGES.encode(): _images,
    _IMAGE_EDITS.encode(): _image_edit,
    **{url.encode(): _videos for url in _VIDEOS},
    _MUSIC.encode(): _music,
    _SPEECH.encode(): _speech,
}
"""Each model endpoint's path, and what makes its good answer from a body and the body's digest."""
