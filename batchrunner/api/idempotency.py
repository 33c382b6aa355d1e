"""Idempotency-Key of every create: the first request holds the key while it works, and every later one gets its
answer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace

import msgspec
import orjson

from batchrunner.api.envelope import Refusal
from batchrunner.api.http import LONG_BODY_BYTES, Answer, Call
from batchrunner.errors import IdempotencyMismatch
from batchrunner.holdings import Replay

logger = logging.getLogger(__name__)

HEADER = "Idempotency-Key"
LEASE_S = 15.0
_RENEW_S = 5.0
_KEY_CHARS_MAX = 255


async def answer_once(call: Call) -> Answer:
    """Run the handler of a create, or give the answer that its Idempotency-Key has already."""
    key = call.request.headers.get(HEADER)
    if key is None or call.route.present is None:
        return await call.route.handler(call)
    check_key(key)
    fingerprint = None if call.route.is_streamed_in else await _fingerprint(call)
    name = f"{call.route.method} {call.route.path}"
    if call.path_params:
        name += " " + "/".join(call.path_params.values())
    done = await call.blocking(call.scope.begin_idempotent, name, key, fingerprint, lease_s=LEASE_S)
    if done is not None and fingerprint is not None:
        return await answer_again(call, done)
    call.replay = done or Replay(route=name, key=key, fingerprint=fingerprint)
    call.replayed = done
    if done is not None:
        return await call.route.handler(call)
    return await _first_time(call, call.replay)


async def answer_again(call: Call, done: Replay) -> Answer:
    """Give the answer of the first request; where it died before answering, the object as it is now."""
    headers = {"idempotent-replayed": "true"}
    if done.body is not None:
        return Answer(body=done.body, status=done.status, headers=headers)
    assert call.route.present is not None
    assert done.object_id is not None
    answer = await call.route.present(call, done.object_id)
    return replace(answer, headers={**answer.headers, **headers})


def fields_fingerprint(call: Call, fields: Mapping[str, str], sha256: str) -> str:
    """Give the fingerprint of a streamed create, from its form fields and its content's digest."""
    known = orjson.dumps([call.route.path, dict(fields), sha256], option=orjson.OPT_SORT_KEYS)
    return hashlib.sha256(known).hexdigest()


async def settle_streamed(call: Call, fingerprint: str) -> Answer | None:
    """Say what a streamed create turned out to be: None when it is the first, otherwise the answer to give.

    Raises:
        IdempotencyMismatch: the key belongs to another request.
    """
    if call.replay is None:
        return None
    done, call.replay = call.replayed, replace(call.replay, fingerprint=fingerprint)
    if done is None:
        return None
    if done.fingerprint != fingerprint:
        raise IdempotencyMismatch("the Idempotency-Key was used for a request with another content")
    return await answer_again(call, done)


async def _first_time(call: Call, held: Replay) -> Answer:
    async with _renewing(call, held):
        try:
            answer = await call.route.handler(call)
        except BaseException:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.shield(asyncio.ensure_future(_drop(call, held)))
            raise
    assert call.replay is not None
    finished = replace(call.replay, status=answer.status, body=answer.body)
    await call.blocking(call.scope.finish_idempotent, finished)
    return answer


async def _drop(call: Call, held: Replay) -> None:
    try:
        await call.blocking(call.scope.drop_idempotent, held.route, held.key)
    except Exception:
        # The lease runs out by itself; the error that is on its way tells more.
        logger.exception("an idempotency key was not let go", extra={"action": "idempotency_kept"})


@contextlib.asynccontextmanager
async def _renewing(call: Call, held: Replay) -> AsyncIterator[None]:
    """Keep the key while a long request comes in."""
    renewing = asyncio.ensure_future(_renew(call, held))
    try:
        yield
    finally:
        renewing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await renewing


async def _renew(call: Call, held: Replay) -> None:
    while True:
        await call.parts.clock.sleep(_RENEW_S)
        try:
            await call.blocking(call.scope.renew_idempotent, held.route, held.key, lease_s=LEASE_S)
        except Exception:
            logger.exception("an idempotency key was not renewed", extra={"action": "idempotency_renew_failed"})


def check_key(key: str) -> None:
    """Raises: Refusal when a key is none that can be kept."""
    if not 1 <= len(key) <= _KEY_CHARS_MAX or not key.isascii() or not key.isprintable():
        raise Refusal(
            f"Invalid '{HEADER}': expected 1 to {_KEY_CHARS_MAX} printable ASCII characters.",
            param=HEADER,
            code="invalid_value",
        )


async def _fingerprint(call: Call) -> str:
    """Tell equal requests by what their body says, whatever its spacing and the order of its keys."""
    raw = await call.body()
    said = await call.blocking(_said_at_length, raw) if len(raw) > LONG_BODY_BYTES else _said(raw)
    return hashlib.sha256(f"{call.route.method} {call.path}\n".encode() + said).hexdigest()


def _said(raw: bytes) -> bytes:
    # Of what is no JSON the handler will say so; an empty body is what it is.
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError, orjson.JSONEncodeError):
        return orjson.dumps(msgspec.json.decode(raw), option=orjson.OPT_SORT_KEYS)
    return raw


def _said_at_length(raw: bytes) -> bytes:
    """Take apart only the outermost object: all of a long body as objects would be many times its size."""
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        members = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
        return msgspec.json.encode(dict(sorted(members.items())))
    return raw
