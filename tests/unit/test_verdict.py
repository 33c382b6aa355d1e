"""Every way an exchange can end, and what follows for its line."""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrunner.models import Attempt, AttemptError, LineCode, PauseReason
from batchrunner.verdict import (
    ACCEPT,
    CONNECTION_ERRORS,
    REFUSALS,
    GiveUp,
    RetryAfter,
    RetryPolicy,
    Verdict,
    is_late,
    is_sign_of_life,
    is_silent,
    is_unreached,
    judge,
    parse_retry_after,
    suspicion,
)

POLICY = RetryPolicy()
NOW = datetime(2026, 11, 21, 12, 0, 0, tzinfo=UTC)
E = AttemptError


def answer(status: int, body: bytes = b"{}", **fields) -> Attempt:
    return Attempt(status=status, body=body, content_type="application/json", **fields)


def failed(error: AttemptError, **fields) -> Attempt:
    return Attempt(error=error, elapsed_s=1.5, **fields)


def verdict_on(attempt: Attempt, **changed: Any) -> Verdict:
    fields: dict[str, Any] = {"policy": POLICY, "tries": 0, "waits": 0, "is_json": True, "has_error": False}
    return judge(attempt, **({"uniform": 0.5} | fields | changed))


def test_a_2xx_with_json_is_accepted() -> None:
    assert verdict_on(answer(200)) is ACCEPT
    assert verdict_on(answer(201)) is ACCEPT
    assert verdict_on(answer(200), tries=4, is_at_most_once=True) is ACCEPT


@pytest.mark.parametrize("media", ["audio/mpeg", "image/png", "video/mp4", "Application/Octet-Stream; x=1"])
def test_media_are_accepted_without_json(media: str) -> None:
    attempt = Attempt(status=200, body=b"\xff\xfb", content_type=media)

    assert verdict_on(attempt, is_json=False) is ACCEPT


def test_media_without_a_byte_are_not_accepted() -> None:
    attempt = Attempt(status=200, body=b"", content_type="audio/mpeg")

    assert isinstance(verdict_on(attempt, is_json=False), RetryAfter)


@pytest.mark.parametrize(
    ("attempt", "facts", "reason"),
    [
        (answer(408), {}, "status_408"),
        (answer(409), {}, "status_409"),
        (answer(425), {}, "status_425"),
        (answer(500), {}, "status_500"),
        (answer(501), {}, "status_501"),
        (answer(502), {}, "status_502"),
        (answer(504), {}, "status_504"),
        (answer(599), {}, "status_599"),
        (answer(200, b"<html>"), {"is_json": False}, "not_json"),
        (answer(204, b""), {"is_json": False}, "not_json"),
        (answer(200), {"has_error": True}, "error_body"),
        (answer(0), {}, "not_json"),
        (failed(E.RESET), {}, "reset"),
        (failed(E.TIMEOUT_TOTAL), {}, "timeout_total"),
        (failed(E.TIMEOUT_IDLE), {}, "timeout_idle"),
        (failed(E.TRUNCATED, status=200), {}, "truncated"),
        (failed(E.BAD_ENCODING, status=200), {}, "bad_encoding"),
        (failed(E.BAD_PROTOCOL), {}, "bad_protocol"),
    ],
)
def test_a_transient_failure_uses_a_try(attempt: Attempt, facts: dict[str, bool], reason: str) -> None:
    assert verdict_on(attempt, **facts) == RetryAfter(0.25, True, reason)


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (answer(429), "status_429"),
        (answer(503), "status_503"),
        (answer(529), "status_529"),
        (failed(E.TRUNCATED, status=429), "status_429"),
    ],
)
def test_an_upstream_that_is_full_uses_no_try_however_often(attempt: Attempt, reason: str) -> None:
    assert verdict_on(attempt, tries=4, waits=10_000) == RetryAfter(30.0, False, reason)


def test_an_upstream_that_is_absent_uses_no_try_and_is_asked_for_soon_however_often() -> None:
    assert verdict_on(failed(E.NOT_CONNECTED), tries=4, waits=0) == RetryAfter(0.25, False, "not_connected")
    assert verdict_on(failed(E.NOT_CONNECTED), tries=4, waits=10_000) == RetryAfter(5.0, False, "not_connected")


@pytest.mark.parametrize("error", [each for each in E if each not in {E.TOO_LARGE, E.ABORTED}])
def test_what_went_down_with_the_upstream_uses_no_try(error: AttemptError) -> None:
    verdict = verdict_on(failed(error), tries=4, is_death=True)

    assert isinstance(verdict, RetryAfter)
    assert not verdict.uses_try


def test_what_we_aborted_may_go_out_again_at_once() -> None:
    assert verdict_on(failed(E.ABORTED), tries=4) == RetryAfter(0.0, False, "aborted")


@pytest.mark.parametrize("status", [400, 401, 403, 404, 413, 422, 499, 300, 301, 304, 307])
def test_other_3xx_and_4xx_fail_at_once_and_keep_the_answer(status: int) -> None:
    verdict = verdict_on(answer(status))

    assert isinstance(verdict, GiveUp)
    assert verdict.code is None
    assert str(status) in verdict.message


def test_a_redirect_is_named() -> None:
    verdict = verdict_on(answer(302))

    assert isinstance(verdict, GiveUp)
    assert "redirect, which is not followed" in verdict.message


def test_too_large_an_answer_is_not_paid_twice() -> None:
    verdict = verdict_on(failed(E.TOO_LARGE, status=200, message="over 32 MiB"))

    assert isinstance(verdict, GiveUp)
    assert verdict.code is LineCode.INVALID_RESPONSE
    assert "larger than the limit" in verdict.message
    assert "over 32 MiB" in verdict.message


@pytest.mark.parametrize(
    ("attempt", "facts", "code"),
    [
        (answer(500), {}, None),
        (answer(408), {}, None),
        (answer(200), {"is_json": False}, LineCode.INVALID_RESPONSE),
        (answer(200), {"has_error": True}, LineCode.INVALID_RESPONSE),
        (answer(700), {}, LineCode.INVALID_RESPONSE),
        (failed(E.RESET), {}, LineCode.CONNECTION_ERROR),
        (failed(E.TIMEOUT_TOTAL), {}, LineCode.REQUEST_TIMEOUT),
        (failed(E.TIMEOUT_IDLE), {}, LineCode.REQUEST_TIMEOUT),
        (failed(E.TRUNCATED, status=200), {}, LineCode.INVALID_RESPONSE),
        (failed(E.BAD_ENCODING, status=200), {}, LineCode.INVALID_RESPONSE),
        (failed(E.BAD_PROTOCOL), {}, LineCode.INVALID_RESPONSE),
    ],
)
def test_the_last_try_ends_the_line(attempt: Attempt, facts: dict[str, bool], code: LineCode | None) -> None:
    assert isinstance(verdict_on(attempt, tries=3, **facts), RetryAfter)

    verdict = verdict_on(attempt, tries=4, waits=2, **facts)

    assert isinstance(verdict, GiveUp)
    assert verdict.code is code
    assert verdict.message.startswith("gave up after 5 tries and 2 more that found the upstream unavailable")


def test_one_try_means_no_retry() -> None:
    verdict = verdict_on(answer(500), policy=RetryPolicy(max_tries=1))

    assert verdict == GiveUp(None, "gave up after 1 try; the last one: status 500")


@pytest.mark.parametrize(
    "attempt", [failed(E.NOT_CONNECTED), answer(429), failed(E.RESET, status=429), answer(503, b"")]
)
def test_at_most_once_repeats_what_was_surely_not_processed(attempt: Attempt) -> None:
    verdict = verdict_on(attempt, is_at_most_once=True)

    assert isinstance(verdict, RetryAfter)
    assert not verdict.uses_try


@pytest.mark.parametrize(
    ("attempt", "facts", "code"),
    [
        *[(failed(error), {}, LineCode.OUTCOME_UNKNOWN) for error in E if error not in {E.NOT_CONNECTED, E.TOO_LARGE}],
        (failed(E.TOO_LARGE), {}, LineCode.INVALID_RESPONSE),
        (failed(E.TRUNCATED, status=503), {}, LineCode.OUTCOME_UNKNOWN),
        (answer(500), {}, LineCode.OUTCOME_UNKNOWN),
        (answer(503), {}, LineCode.OUTCOME_UNKNOWN),
        (answer(529), {}, LineCode.OUTCOME_UNKNOWN),
        (answer(408), {}, None),
        (answer(409), {}, None),
        (answer(400), {}, None),
        (answer(302), {}, None),
        (answer(200), {"is_json": False}, LineCode.INVALID_RESPONSE),
        (answer(200), {"has_error": True}, LineCode.INVALID_RESPONSE),
        (answer(0), {}, LineCode.OUTCOME_UNKNOWN),
    ],
)
def test_at_most_once_never_repeats_anything_else(
    attempt: Attempt, facts: dict[str, bool], code: LineCode | None
) -> None:
    for is_death in (False, True):
        verdict = verdict_on(attempt, is_at_most_once=True, is_death=is_death, **facts)

        assert isinstance(verdict, GiveUp)
        assert verdict.code is code


def test_backoff_doubles_to_its_cap_with_full_jitter() -> None:
    waits = [verdict_on(answer(500), tries=tries, uniform=1.0, policy=RetryPolicy(max_tries=20)) for tries in range(9)]

    assert [each.wait_s for each in waits if isinstance(each, RetryAfter)] == [0.5, 1, 2, 4, 8, 16, 32, 60, 60]
    assert verdict_on(answer(500), uniform=0.0) == RetryAfter(0.0, True, "status_500")


def test_retry_after_is_a_floor_and_is_clamped() -> None:
    asked = verdict_on(answer(429, retry_after_s=20.0), uniform=0.0)
    clamped = verdict_on(answer(429, retry_after_s=1e9), uniform=0.999)

    assert asked == RetryAfter(20.0, False, "status_429")
    assert isinstance(clamped, RetryAfter)
    assert 600.0 <= clamped.wait_s <= 600.5


@given(
    asked_s=st.none() | st.floats(),
    uniform=st.floats(0, 1, exclude_max=True),
    waits=st.integers(0, 10**9),
)
def test_no_retry_after_makes_a_wait_that_is_not_sane(asked_s: float | None, uniform: float, waits: int) -> None:
    verdict = verdict_on(answer(429, retry_after_s=asked_s), uniform=uniform, waits=waits)

    assert isinstance(verdict, RetryAfter)
    assert 0.0 <= verdict.wait_s <= 600.5


@pytest.mark.parametrize(
    ("milliseconds", "value", "seconds"),
    [
        (None, None, None),
        ("1500", None, 1.5),
        ("1500", "9", 1.5),
        ("soon", "9", 9.0),
        ("-1", "9", 9.0),
        (None, "0", 0.0),
        (None, "2.5", 2.5),
        (None, " 7 ", 7.0),
        (None, "-3", None),
        (None, "nan", None),
        (None, "inf", None),
        (None, "1e400", None),
        (None, "", None),
        (None, "tomorrow", None),
        (None, "9" * 1000, None),
        (None, "Sat, 21 Nov 2026 12:00:30 GMT", 30.0),
        (None, "Sat, 21 Nov 2026 11:00:00 GMT", 0.0),
        (None, "Sat, 21 Nov 2026 12:00:30 -0000", 30.0),
        (None, "Sat, 99 Nov 2026 12:00:30 GMT", None),
    ],
)
def test_retry_after_is_read_in_all_its_forms(
    milliseconds: str | None, value: str | None, seconds: float | None
) -> None:
    assert parse_retry_after(milliseconds, value, NOW) == seconds


@given(st.none() | st.text(), st.none() | st.text())
def test_no_header_value_breaks_the_reader(milliseconds: str | None, value: str | None) -> None:
    seconds = parse_retry_after(milliseconds, value, NOW)

    assert seconds is None or (math.isfinite(seconds) and seconds >= 0.0)


@given(st.datetimes(min_value=datetime(1970, 1, 2), max_value=datetime(9999, 12, 30)))  # noqa: DTZ001
def test_every_http_date_is_read(moment: datetime) -> None:
    due = moment.replace(microsecond=0, tzinfo=UTC)

    seconds = parse_retry_after(
        None, due.strftime("%a, %d %b ") + f"{due.year:04d}" + due.strftime(" %H:%M:%S GMT"), NOW
    )

    assert seconds == max(0.0, (due - NOW) / timedelta(seconds=1))


@pytest.mark.parametrize(
    ("attempt", "reason"),
    [
        (answer(401), PauseReason.AUTHENTICATION),
        (answer(403), PauseReason.AUTHENTICATION),
        (answer(404), PauseReason.MODEL_UNKNOWN),
        (answer(400, b'{"error":{"code":"model_not_found"}}'), PauseReason.MODEL_UNKNOWN),
        (answer(400, b'{"error":{"code":"bad_temperature"}}'), None),
        (answer(200, b"model_not_found"), None),
        (answer(500), None),
        (failed(E.RESET, status=401), None),
    ],
)
def test_what_would_be_so_for_every_line_is_suspicious(attempt: Attempt, reason: PauseReason | None) -> None:
    assert suspicion(attempt) is reason


def test_messages_say_what_the_transport_said_and_no_byte_of_the_body() -> None:
    told = verdict_on(failed(E.RESET, message="reset by peer"), tries=4)
    quiet = verdict_on(answer(400, b'{"secret":"sesame"}'))

    assert isinstance(told, GiveUp)
    assert isinstance(quiet, GiveUp)
    assert told.message.endswith("the connection was lost before the answer came after 1.5 s (reset by peer)")
    assert "sesame" not in quiet.message


def test_refusals_and_connection_errors_are_what_the_window_and_the_breaker_count() -> None:
    assert {429, 503, 529} == REFUSALS
    assert {E.NOT_CONNECTED, E.RESET} == CONNECTION_ERRORS


@pytest.mark.parametrize("error", [E.TIMEOUT_TOTAL, E.TIMEOUT_IDLE])
def test_a_timeout_is_told_once(error: AttemptError) -> None:
    verdict = verdict_on(failed(error, message="no whole answer within 2 s"), tries=POLICY.max_tries - 1)

    assert isinstance(verdict, GiveUp)
    assert verdict.message == "gave up after 5 tries; the last one: no whole answer within 2 s"


@pytest.mark.parametrize("status", [502, 521, 522, 523])
def test_gateway_that_answers_in_place_of_its_server_tells_of_nobody(status: int) -> None:
    assert is_unreached(answer(status))
    assert not is_sign_of_life(answer(status))


@pytest.mark.parametrize("status", [503, 504])
def test_answer_that_server_or_gateway_may_have_given_proves_neither_life_nor_death(status: int) -> None:
    assert not is_unreached(answer(status))
    assert not is_sign_of_life(answer(status))


@pytest.mark.parametrize(
    ("attempt", "late", "silent"),
    [
        (answer(503), False, True),
        (answer(504), True, False),
        (failed(E.TIMEOUT_TOTAL), True, False),
        (failed(E.TIMEOUT_IDLE), True, False),
        (answer(503, retry_after_s=1.0), False, False),
        (answer(500), False, False),
        (answer(502), False, False),
        (answer(429), False, False),
        (failed(E.RESET), False, False),
        (failed(E.TRUNCATED, status=503), False, False),
    ],
)
def test_door_answers_503_without_a_time_to_come_back_and_what_comes_too_late_is_another_thing(
    attempt: Attempt, late: bool, silent: bool
) -> None:
    assert is_late(attempt) is late
    assert is_silent(attempt) is silent


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500, 529])
def test_any_other_answer_is_a_sign_of_life(status: int) -> None:
    assert is_sign_of_life(answer(status))
    assert not is_unreached(answer(status))


@pytest.mark.parametrize("error", [*AttemptError])
def test_no_failed_exchange_is_a_sign_of_life(error: AttemptError) -> None:
    assert not is_sign_of_life(failed(error))
    assert is_unreached(failed(error)) is (error in CONNECTION_ERRORS)
