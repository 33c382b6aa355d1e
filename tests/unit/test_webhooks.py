"""The rules of webhooks: signatures, the schedule at its edges, what an answer means, samples."""

from __future__ import annotations

import base64
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
import standardwebhooks
from hypothesis import given
from hypothesis import strategies as st

from batchrunner.deliveries import (
    DeliveryAttempt,
    DeliveryId,
    DeliveryState,
    Dispatch,
    EndpointId,
    EndReason,
    EventId,
    EventType,
    Posted,
    PostError,
    Secrets,
)
from batchrunner.errors import UsageError
from batchrunner.models import TenantId
from batchrunner.webhooks import (
    ATTEMPTS_MAX,
    LAST_AFTER,
    WAITS_S,
    check_secret,
    hint_of,
    judge,
    next_attempt_at,
    receiver_of,
    sample_event,
    secret_of,
    signed_headers,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ANA = TenantId("ana")


def dispatch_of(**changes) -> Dispatch:
    plain = Dispatch(
        id=DeliveryId("wh_1"),
        epoch=3,
        tenant=ANA,
        type=EventType.COMPLETED,
        endpoint_id=None,
        url="https://hooks.example/",
        receiver="ana https://hooks.example",
        body=b"{}",
        secrets=Secrets(secret=secret_of("00" * 32)),
        attempt=DeliveryAttempt(number=3, started_at=NOW),
        attempt_count=1,
        first_at=NOW,
    )
    return replace(plain, **changes)


@given(secret=st.binary(min_size=24, max_size=64), body=st.binary(max_size=200))
def test_signatures_are_those_of_standard_webhooks(secret: bytes, body: bytes) -> None:
    text = secret_of(secret.hex())
    now = datetime.now(UTC)

    ours = signed_headers("wh_1", "batch.completed", body, [text], now)["webhook-signature"]

    try:
        theirs = standardwebhooks.Webhook(text).sign("wh_1", now, body.decode())
    except UnicodeDecodeError:
        return
    assert ours == theirs


def test_each_valid_secret_signs() -> None:
    until = NOW + timedelta(hours=24)
    secrets = Secrets(secret=secret_of("22" * 32)).rotated(secret_of("11" * 32), old_until=until, now=NOW)

    both = signed_headers("wh_1", "t", b"{}", secrets.valid(NOW), NOW)["webhook-signature"].split(" ")
    one = signed_headers("wh_1", "t", b"{}", secrets.valid(until), NOW)["webhook-signature"].split(" ")

    assert len(both) == 2
    assert one == both[:1]


def test_an_endpoint_is_called_by_its_id_and_a_url_by_the_deliverys() -> None:
    own = signed_headers("wh_1", "t", b"{}", ["whsec_AAAA"], NOW)
    registered = signed_headers("wh_1", "t", b"{}", ["whsec_AAAA"], NOW, endpoint_id=EndpointId("we_1"))

    assert (own["x-inference-webhook-id"], registered["x-inference-webhook-id"]) == ("wh_1", "we_1")
    assert own["webhook-id"] == registered["webhook-id"] == "wh_1"


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_!!!", "whsec_" + base64.b64encode(b"short").decode(), "plain"])
def test_a_poor_secret_is_refused(secret: str) -> None:
    with pytest.raises(UsageError):
        check_secret(secret)


def test_a_good_secret_is_taken_and_shown_by_its_end() -> None:
    secret = secret_of("ab" * 24)

    assert check_secret(secret) == secret
    assert hint_of(secret) == f"whsec_...{secret[-4:]}"


@pytest.mark.parametrize(("count", "wait_s"), list(enumerate(WAITS_S, start=1)))
def test_waits_are_those_of_the_schedule_give_or_take_a_tenth(count: int, wait_s: float) -> None:
    found = [
        next_attempt_at(count, first_at=NOW, now=NOW, retry_after_s=None, chance=chance) for chance in (0.0, 0.5, 1.0)
    ]

    assert [round((each - NOW).total_seconds(), 6) for each in found if each] == pytest.approx(
        [0.9 * wait_s, wait_s, 1.1 * wait_s]
    )


def test_the_last_attempt_is_at_72_hours_and_never_later() -> None:
    now = NOW + timedelta(hours=52)

    assert next_attempt_at(9, first_at=NOW, now=now, retry_after_s=None, chance=0.0) == NOW + LAST_AFTER
    early = next_attempt_at(9, first_at=NOW, now=now, retry_after_s=None, chance=1.0)
    assert early == now + timedelta(hours=18)
    assert next_attempt_at(10, first_at=NOW, now=now, retry_after_s=None, chance=0.0) is None
    assert next_attempt_at(2, first_at=NOW, now=NOW + LAST_AFTER, retry_after_s=None, chance=0.0) is None


@given(
    count=st.integers(1, ATTEMPTS_MAX),
    gone_s=st.floats(0, 300_000),
    retry_after_s=st.none() | st.floats(0, 1e300),
    chance=st.floats(0, 1),
)
def test_no_attempt_is_before_now_or_after_the_end(
    count: int, gone_s: float, retry_after_s: float | None, chance: float
) -> None:
    now = NOW + timedelta(seconds=gone_s)
    due_at = next_attempt_at(count, first_at=NOW, now=now, retry_after_s=retry_after_s, chance=chance)

    assert due_at is None or now <= due_at <= NOW + LAST_AFTER


@pytest.mark.parametrize(("status", "is_honoured"), [(429, True), (503, True), (500, False), (408, False)])
def test_retry_after_of_a_busy_receiver_is_honoured(status: int, is_honoured: bool) -> None:
    posted = Posted(status=status, retry_after_s=100.0)

    found = judge(dispatch_of(), posted, NOW, chance=0.5)

    assert found.due_at == NOW + timedelta(seconds=100 if is_honoured else 5)


def test_a_short_retry_after_does_not_hurry() -> None:
    found = judge(dispatch_of(attempt_count=2), Posted(status=429, retry_after_s=1.0), NOW, chance=0.5)

    assert found.due_at == NOW + timedelta(seconds=300)


@pytest.mark.parametrize(
    ("posted", "state", "reason"),
    [
        (Posted(status=200), DeliveryState.DELIVERED, None),
        (Posted(status=204), DeliveryState.DELIVERED, None),
        (Posted(status=301), DeliveryState.PENDING, None),
        (Posted(status=400), DeliveryState.PENDING, None),
        (Posted(status=410), DeliveryState.UNDELIVERED, EndReason.GONE),
        (Posted(status=500), DeliveryState.PENDING, None),
        (Posted(error=PostError.TIMEOUT), DeliveryState.PENDING, None),
        (Posted(error=PostError.ADDRESS_REFUSED), DeliveryState.PENDING, None),
    ],
)
def test_what_an_answer_means(posted: Posted, state: DeliveryState, reason: EndReason | None) -> None:
    found = judge(dispatch_of(), posted, NOW, chance=0.5)

    assert (found.state, found.reason) == (state, reason)
    assert (found.epoch, found.attempt.number, found.attempt.status) == (3, 3, posted.status)


@pytest.mark.parametrize("kind", sorted(EventType))
def test_samples_are_batches_in_the_status_of_the_event(kind: EventType) -> None:
    event = sample_event(kind, ANA, EventId("evt_1"), NOW)
    told = msgspec.json.decode(event.body)

    status = kind.removeprefix("batch.")
    assert (told["id"], told["type"], told["data"]["status"]) == ("evt_1", kind, status)
    assert told["data"][f"{status}_at"] == told["created_at"] == int(NOW.timestamp())
    counts = told["data"]["progress"]
    done = counts["succeeded"] + counts["failed"] + counts["expired"] + counts["cancelled"]
    assert done + counts["remaining"] == counts["total"]
    assert (told["data"]["errors"] is not None) == (kind is EventType.FAILED)


def test_receivers_are_told_apart_by_tenant_and_origin() -> None:
    same = {receiver_of(ANA, f"https://a.example{path}") for path in ("/", "/x?y=z")}
    others = {
        receiver_of(ANA, "https://b.example/"),
        receiver_of(ANA, "https://a.example:8443/"),
        receiver_of(TenantId("ben"), "https://a.example/"),
    }

    assert len(same) == 1
    assert len(same | others) == 4
