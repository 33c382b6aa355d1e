"""What one exchange means for its line: accept the answer, try again later, or give up.

Pure rules; the caller reads the answer, keeps count of tries and owns the deadline.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import NamedTuple, assert_never

import msgspec

from batchrunner.models import Attempt, AttemptError, LineCode, PauseReason

# "Upstream not there or full": the line is not at fault, so it waits as long as the batch lives.
REFUSALS = frozenset({429, 503, 529})
# The upstream died, or was not there. A truncated answer is none of these: somebody had begun to give it.
CONNECTION_ERRORS = frozenset({AttemptError.NOT_CONNECTED, AttemptError.RESET})
# A gateway that could not reach its server answered in its place. Source: RFC 9110 section 15.6.3; 521 to 523 are
# Cloudflare's.
GATEWAY_ERRORS = frozenset({502, 521, 522, 523})
# What a gateway may say without having asked its server: 503 and 504 come from a server that is full or slow as well.
_UNSURE_OF_LIFE = GATEWAY_ERRORS | {503, 504}
_TIMEOUTS = frozenset({AttemptError.TIMEOUT_TOTAL, AttemptError.TIMEOUT_IDLE})
TRANSIENT_4XX = frozenset({408, 409, 425})
MEDIA_TYPES = ("audio/", "image/", "video/", "application/octet-stream")
# Servers that answer an unknown model with 400 name it by this code. Source: OpenAI API, error code `model_not_found`.
_MODEL_CODE = b"model_not_found"
_HEADER_CHARS_MAX = 64
_DOUBLINGS_MAX = 16
# How long a line waits at most that reached nobody: the probes of an outage pace all sends, however many lines wait.
UNREACHED_WAIT_MAX_S = 5.0


class RetryPolicy(msgspec.Struct, frozen=True, gc=False, kw_only=True):
    """How often and how long a line may be repeated. `max_tries` counts attempts that use one, the first included."""

    max_tries: int = 5
    backoff_base_s: float = 0.5
    backoff_cap_s: float = 60.0
    retry_after_max_s: float = 600.0


class Accept(msgspec.Struct, frozen=True, gc=False):
    """The answer is the line's result."""


class RetryAfter(msgspec.Struct, frozen=True, gc=False):
    """Send the line again, not before `wait_s` from now. `reason` is one of a closed set of words, fit for a metric."""

    wait_s: float
    uses_try: bool
    reason: str


class GiveUp(msgspec.Struct, frozen=True, gc=False):
    """The line has failed. With `code` None the answer is kept as the line's response and its `error` is null."""

    code: LineCode | None
    message: str


Verdict = Accept | RetryAfter | GiveUp

ACCEPT = Accept()


def judge(
    attempt: Attempt,
    *,
    policy: RetryPolicy,
    tries: int,
    waits: int,
    is_json: bool,
    has_error: bool,
    uniform: float,
    is_at_most_once: bool = False,
    is_death: bool = False,
) -> Verdict:
    """Decide what follows from an exchange.

    `tries` counts the line's earlier attempts that used one up, `waits` those that did not. `is_json` and `has_error`
    describe the body of a 2xx: is it valid JSON, and is that JSON an error object. `is_death` says that the attempt
    went down with the whole upstream, which uses up no line's tries. `uniform` from [0, 1) draws the jitter.
    """
    if attempt.error is None and 200 <= attempt.status < 300 and ((is_json and not has_error) or is_media(attempt)):
        return ACCEPT
    if is_at_most_once and not _is_surely_unprocessed(attempt):
        return _once(attempt, has_error=has_error)
    reason, code, uses_try = _cause(attempt, has_error=has_error)
    if not reason:
        return GiveUp(code, _describe(attempt, has_error=has_error))
    if attempt.error is AttemptError.ABORTED:
        # We ended it ourselves; whether the line goes out again is for whoever did so to say.
        return RetryAfter(0.0, False, reason)
    if is_death and attempt.error is not None:
        return RetryAfter(_backoff_s(attempt, waits, policy, uniform), False, "upstream_down")
    if not uses_try:
        wait_s = _backoff_s(attempt, waits, policy, uniform)
        return RetryAfter(min(wait_s, UNREACHED_WAIT_MAX_S) if is_unreached(attempt) else wait_s, False, reason)
    if tries + 1 >= policy.max_tries:
        return GiveUp(code, _exhausted(attempt, tries=tries + 1, waits=waits, has_error=has_error))
    return RetryAfter(_backoff_s(attempt, tries, policy, uniform), True, reason)


def is_media(attempt: Attempt) -> bool:
    """Tell whether the answer is audio, an image, a video or bytes: it is kept as an asset, not as JSON."""
    return (
        bool(attempt.body)
        and attempt.error is None
        and 200 <= attempt.status < 300
        and is_media_type(attempt.content_type)
    )


def is_media_type(content_type: str) -> bool:
    """Tell whether a Content-Type names audio, an image, a video or bytes."""
    return content_type.lstrip().lower().startswith(MEDIA_TYPES)


def is_unreached(attempt: Attempt) -> bool:
    """Tell whether the upstream may be gone: the connection broke, or a gateway answered in its place."""
    return attempt.error in CONNECTION_ERRORS or (attempt.error is None and attempt.status in GATEWAY_ERRORS)


def unreached_since_s(attempt: Attempt) -> float:
    """Tell since when an exchange was in vain. One that never connected was so from its start, however late that shows,
    as with a TLS handshake that nobody answers.
    """
    if attempt.error is AttemptError.NOT_CONNECTED:
        return attempt.started_at_s
    return attempt.started_at_s + attempt.elapsed_s


def is_late(attempt: Attempt) -> bool:
    """Tell whether no answer came in time: the line may ask for too much, or nobody be there."""
    return attempt.error in _TIMEOUTS or (attempt.error is None and attempt.status == 504)


def is_silent(attempt: Attempt) -> bool:
    """Tell whether a door may have answered behind which nobody is; not if it says when to come back."""
    return attempt.error is None and attempt.status == 503 and attempt.retry_after_s is None


def is_sign_of_life(attempt: Attempt) -> bool:
    """Tell whether only a living upstream answers so, however badly."""
    return attempt.error is None and attempt.status not in _UNSURE_OF_LIFE


def nobody_there(attempt: Attempt) -> Attempt:
    """Give an exchange as one that did not reach the upstream, which uses up no line's try."""
    return Attempt(
        error=AttemptError.NOT_CONNECTED,
        status=attempt.status,
        message=attempt.message,
        started_at_s=attempt.started_at_s,
        elapsed_s=attempt.elapsed_s,
    )


def suspicion(attempt: Attempt) -> PauseReason | None:
    """Tell whether every line would be answered so: a refused key, or a model or route that does not exist."""
    if attempt.error is not None:
        return None
    if attempt.status in {401, 403}:
        return PauseReason.AUTHENTICATION
    if attempt.status == 404 or (attempt.status == 400 and _MODEL_CODE in attempt.body[:4096]):
        return PauseReason.MODEL_UNKNOWN
    return None


def parse_retry_after(retry_after_ms: str | None, retry_after: str | None, now: datetime) -> float | None:
    """Read how long an answer asks to stay away, in seconds, at least 0; None when no header says anything sensible.

    Source: RFC 9110 section 10.2.3 (seconds or HTTP date); `retry-after-ms` goes first, as in the OpenAI SDKs.
    """
    milliseconds = _number(retry_after_ms)
    if milliseconds is not None:
        return milliseconds / 1000.0
    seconds = _number(retry_after)
    if seconds is not None or retry_after is None or len(retry_after) > _HEADER_CHARS_MAX:
        return seconds
    try:
        due = parsedate_to_datetime(retry_after)
        due = due if due.tzinfo else due.replace(tzinfo=UTC)
        return max(0.0, (due - now).total_seconds())
    except (ValueError, OverflowError, TypeError, IndexError):
        return None


def _number(header: str | None) -> float | None:
    if header is None or len(header) > _HEADER_CHARS_MAX:
        return None
    try:
        number = float(header)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0.0 else None


def _is_surely_unprocessed(attempt: Attempt) -> bool:
    """A 503 with a body may come from a proxy whose server died at work; an empty one is a door that stayed shut."""
    if attempt.error is AttemptError.NOT_CONNECTED or attempt.status == 429:
        return True
    return attempt.status == 503 and attempt.error is None and not attempt.body


def _once(attempt: Attempt, *, has_error: bool) -> GiveUp:
    """End a line that may be sent only once."""
    what = _describe(attempt, has_error=has_error)
    if attempt.error is AttemptError.TOO_LARGE or (attempt.error is None and 200 <= attempt.status < 300):
        return GiveUp(LineCode.INVALID_RESPONSE, f"{what}; not repeated, because the line may be sent only once")
    if attempt.error is None and 300 <= attempt.status < 500:
        return GiveUp(None, what)
    return GiveUp(LineCode.OUTCOME_UNKNOWN, f"{what}; the request may have been processed and may be sent only once")


class _Cause(NamedTuple):
    """Why an answer is no result. An empty `reason` means that no repeat would help; `code` is for the line's end."""

    reason: str
    code: LineCode | None
    uses_try: bool


def _cause(attempt: Attempt, *, has_error: bool) -> _Cause:
    status = attempt.status
    if status in REFUSALS:
        return _Cause(f"status_{status}", None, uses_try=False)
    if attempt.error is not None:
        return _cause_of_error(attempt.error)
    if 500 <= status < 600 or status in TRANSIENT_4XX:
        return _Cause(f"status_{status}", None, uses_try=True)
    if 300 <= status < 500:
        return _Cause("", None, uses_try=True)
    return _Cause("error_body" if has_error else "not_json", LineCode.INVALID_RESPONSE, uses_try=True)


def _cause_of_error(error: AttemptError) -> _Cause:
    match error:
        case AttemptError.NOT_CONNECTED | AttemptError.ABORTED:
            return _Cause(error.value, LineCode.CONNECTION_ERROR, uses_try=False)
        case AttemptError.RESET:
            return _Cause(error.value, LineCode.CONNECTION_ERROR, uses_try=True)
        case AttemptError.TIMEOUT_TOTAL | AttemptError.TIMEOUT_IDLE:
            return _Cause(error.value, LineCode.REQUEST_TIMEOUT, uses_try=True)
        case AttemptError.TRUNCATED | AttemptError.BAD_ENCODING | AttemptError.BAD_PROTOCOL:
            return _Cause(error.value, LineCode.INVALID_RESPONSE, uses_try=True)
        case AttemptError.TOO_LARGE:
            # The same prompt would be paid again for an answer of the same size.
            return _Cause("", LineCode.INVALID_RESPONSE, uses_try=True)
        case _:
            assert_never(error)


def _backoff_s(attempt: Attempt, repeats: int, policy: RetryPolicy, uniform: float) -> float:
    """Full jitter; what the answer asked for is a floor, spread a little so that not all come back at one instant."""
    ceiling_s = min(policy.backoff_cap_s, policy.backoff_base_s * 2.0 ** min(repeats, _DOUBLINGS_MAX))
    asked_s = attempt.retry_after_s
    if asked_s is None or not asked_s > 0.0:
        return uniform * ceiling_s
    return max(min(asked_s, policy.retry_after_max_s) + uniform * policy.backoff_base_s, uniform * ceiling_s)


def _exhausted(attempt: Attempt, *, tries: int, waits: int, has_error: bool) -> str:
    waited = f" and {waits} more that found the upstream unavailable" if waits else ""
    noun = "try" if tries == 1 else "tries"
    return f"gave up after {tries} {noun}{waited}; the last one: {_describe(attempt, has_error=has_error)}"


_ERROR_WORDS = {
    AttemptError.NOT_CONNECTED: "the upstream could not be reached",
    AttemptError.RESET: "the connection was lost before the answer came",
    AttemptError.TIMEOUT_TOTAL: "no complete answer within the total deadline",
    AttemptError.TIMEOUT_IDLE: "the upstream fell silent for longer than the idle deadline",
    AttemptError.TRUNCATED: "the answer ended before its announced length",
    AttemptError.TOO_LARGE: "the answer is larger than the limit",
    AttemptError.BAD_ENCODING: "the answer could not be decompressed",
    AttemptError.BAD_PROTOCOL: "the answer is not valid HTTP",
    AttemptError.ABORTED: "the request was aborted on our side",
}


def _describe(attempt: Attempt, *, has_error: bool) -> str:
    """Say what happened, with the transport's own words behind; never a byte of the body."""
    status = attempt.status
    if attempt.error in _TIMEOUTS and attempt.message:
        # The transport's own words say all that ours do, with the numbers.
        return attempt.message
    if attempt.error is not None:
        what = f"{_ERROR_WORDS[attempt.error]} after {attempt.elapsed_s:.1f} s"
    elif 200 <= status < 300:
        what = f"status {status} with {'an error object' if has_error else 'a body that is not JSON'}"
    elif 300 <= status < 400:
        what = f"status {status}: a redirect, which is not followed; use the upstream's final URL"
    else:
        what = f"status {status}"
    return f"{what} ({attempt.message})" if attempt.message else what
