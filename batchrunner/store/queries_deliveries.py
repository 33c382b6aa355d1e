"""Statements on deliveries in hands: who may take which, what came of it, and the log of it all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

import msgspec
from sqlalchemy import (
    ColumnElement,
    Connection,
    RowMapping,
    and_,
    bindparam,
    delete,
    exists,
    func,
    or_,
    select,
    update,
)

from batchrunner.deliveries import (
    Appointments,
    DeliveryAttempt,
    DeliveryFilter,
    DeliveryId,
    DeliveryState,
    Dispatch,
    EndpointId,
    EndReason,
    PostError,
    Recorded,
    Secrets,
)
from batchrunner.errors import NotFound, TransitionRefused
from batchrunner.models import SessionId, TenantId
from batchrunner.store.moments import Moment
from batchrunner.store.queries_webhooks import disable_endpoint, endpoint_of_tenant, signing_secrets
from batchrunner.store.tables import webhook_deliveries, webhook_endpoints, webhook_events
from batchrunner.webhooks import is_failing_too_long, tenant_of

_ATTEMPTS_KEPT = 50
_DROPPED_MAX = 1000
_RECEIVER_ENDED = (EndReason.ENDPOINT_DELETED, EndReason.ENDPOINT_DISABLED)
_DISABLED_GONE = "it answered 410 Gone"
_DISABLED_FAILING = "it has failed for 5 days"

_rows = webhook_deliveries
_c = webhook_deliveries.c


# -- taking ------------------------------------------------------------------------------------------------------------


def _is_free(moment: Moment) -> ColumnElement[bool]:
    """Due, and in nobody's hands that may still move."""
    unheld = or_(_c.lease_until.is_(None), _c.lease_until <= moment.boot_s, _c.boot_id != moment.boot_id)
    return and_(_c.state == DeliveryState.PENDING, _c.due_at <= moment.wall, unheld)


def receivers_due(conn: Connection, moment: Moment) -> list[str]:
    """Name whom something waits for; walks from one receiver to the next, however much waits for each."""
    first = select(func.min(_c.receiver).label("receiver")).where(_c.state == DeliveryState.PENDING)
    walk = first.cte("walk", recursive=True)
    onward = select(func.min(_c.receiver)).where(_c.state == DeliveryState.PENDING, _c.receiver > walk.c.receiver)
    walk = walk.union_all(select(onward.scalar_subquery()).where(walk.c.receiver.is_not(None)))
    waits = exists().where(_c.receiver == walk.c.receiver, _is_free(moment))
    return list(conn.execute(select(walk.c.receiver).where(walk.c.receiver.is_not(None), waits)).scalars())


def turns_of(receivers: Sequence[str], wanted: Appointments) -> list[tuple[str, int]]:
    """Share out the room: those with the least under way first, and nobody more than is left for others. Whoever hangs
    thus finds an end, be it a receiver or a tenant with many, and who comes later finds room.
    """
    tenants: Counter[str] = Counter()
    for receiver, count in wanted.busy.items():
        tenants[tenant_of(receiver)] += count
    room, turns = wanted.room, []
    for receiver in sorted(receivers, key=lambda each: (tenants[tenant_of(each)], wanted.busy.get(each, 0))):
        held, tenant = wanted.busy.get(receiver, 0), tenant_of(receiver)
        rest = _half(room - tenants[tenant])
        count = min(room, wanted.each_max - held, _half(rest - held))
        if count > 0:
            turns.append((receiver, count))
            tenants[tenant] += count
            room -= count
    return turns


def _half(count: int) -> int:
    return (count + 1) // 2


def take(conn: Connection, wanted: Appointments, turns: Sequence[tuple[str, int]], moment: Moment) -> list[Dispatch]:
    """Take deliveries; guards, by epoch and lease, that each is in one hand, and that the attempt is on record."""
    found = _fitting((row for each in turns for row in _front(conn, *each, moment)), wanted.bytes_max)
    own: dict[TenantId, Secrets | None] = {}
    taken = [_dispatch(conn, row, own, moment) for row in found]
    values = [
        {
            "d_id": each.id,
            "epoch": each.epoch,
            "session": wanted.session,
            "lease_until": moment.boot_s + wanted.lease_s,
            "boot_id": moment.boot_id,
            "attempt_count": each.attempt_count,
            "first_at": each.first_at,
            "attempts": _with_attempt(row["attempts"], each.attempt),
        }
        for row, each in zip(found, taken, strict=True)
    ]
    if values:
        conn.execute(update(_rows).where(_c.id == bindparam("d_id")), values)
    return taken


def _fitting(rows: Iterator[RowMapping], bytes_max: int) -> list[RowMapping]:
    """Give rows for as long as there is room for their bodies, and the first one always."""
    found: list[RowMapping] = []
    for row in rows:
        bytes_max -= len(row["body"])
        if found and bytes_max < 0:
            break
        found.append(row)
    return found


_ENDPOINT = ("secret", "old_secrets")


def _front(conn: Connection, receiver: str, count: int, moment: Moment) -> Sequence[RowMapping]:
    endpoint = [webhook_endpoints.c[name].label(f"endpoint_{name}") for name in _ENDPOINT]
    query = (
        select(_rows, webhook_events.c.body, *endpoint)
        .join(webhook_events, webhook_events.c.id == _c.event_id)
        .outerjoin(webhook_endpoints, webhook_endpoints.c.id == _c.endpoint_id)
        .where(_c.receiver == receiver, _is_free(moment))
        .order_by(_c.due_at, _c.serial)
        .limit(count)
        .with_for_update(skip_locked=True, of=_rows)
    )
    return conn.execute(query).mappings().all()


def _dispatch(conn: Connection, row: RowMapping, own: dict[TenantId, Secrets | None], moment: Moment) -> Dispatch:
    tenant = TenantId(row["tenant"])
    if row["endpoint_id"] is not None:
        secrets: Secrets | None = Secrets(secret=row["endpoint_secret"], old=row["endpoint_old_secrets"])
    else:
        if tenant not in own:
            own[tenant] = signing_secrets(conn, tenant)
        secrets = own[tenant]
    attempts: tuple[DeliveryAttempt, ...] = row["attempts"]
    # One whose holder died before it could tell is no failure of the receiver's.
    was_cut = bool(attempts) and not _is_ended(attempts[-1])
    epoch = row["epoch"] + 1
    return Dispatch(
        id=DeliveryId(row["id"]),
        epoch=epoch,
        tenant=tenant,
        type=row["type"],
        endpoint_id=row["endpoint_id"],
        url=row["url"],
        receiver=row["receiver"],
        body=row["body"].encode(),
        secrets=secrets,
        attempt=DeliveryAttempt(number=epoch, started_at=moment.wall),
        attempt_count=max(1, row["attempt_count"] + (0 if was_cut else 1)),
        first_at=row["first_at"] or moment.wall,
    )


def _is_ended(attempt: DeliveryAttempt) -> bool:
    return attempt.elapsed_s is not None or attempt.error is not None


def _with_attempt(attempts: Sequence[DeliveryAttempt], new: DeliveryAttempt) -> tuple[DeliveryAttempt, ...]:
    """Add an attempt to the log, or its end; one before it that has none was cut short."""
    before = [
        each if _is_ended(each) else msgspec.structs.replace(each, error=PostError.UNKNOWN)
        for each in attempts
        if each.number != new.number
    ]
    return (*before[1 - _ATTEMPTS_KEPT :], new)


# -- recording ---------------------------------------------------------------------------------------------------------


def record(conn: Connection, recorded: Sequence[Recorded], moment: Moment) -> None:
    """Write ends of attempts; guards each by its epoch, and that one whose receiver was ended meanwhile is not begun
    again: it ends as it came.
    """
    held = select(_c.id, _c.attempts).where(_c.id.in_([each.id for each in recorded]))
    logs = {row.id: row.attempts for row in conn.execute(held)}
    for each in recorded:
        is_over = each.state is not DeliveryState.PENDING
        values: dict[str, object] = {
            "state": each.state,
            "reason": each.reason,
            "due_at": each.due_at,
            "ended_at": moment.wall if is_over else None,
            "attempts": _with_attempt(logs.get(each.id, ()), each.attempt),
            "session": None,
            "lease_until": None,
        }
        mine = (_c.id == each.id, _c.epoch == each.epoch)
        if conn.execute(update(_rows).where(*mine, _c.state == DeliveryState.PENDING).values(values)).rowcount:
            if each.endpoint_id is not None:
                _note_endpoint(conn, each.endpoint_id, each, moment)
            continue
        if each.state is not DeliveryState.DELIVERED:
            values = {name: values[name] for name in ("attempts", "session", "lease_until")}
        conn.execute(update(_rows).where(*mine, _c.reason.in_(_RECEIVER_ENDED)).values(values))


def _note_endpoint(conn: Connection, endpoint_id: EndpointId, each: Recorded, moment: Moment) -> None:
    """Remember since when a receiver has failed; one that has for too long, or is gone, is told nothing more."""
    of_id = webhook_endpoints.c.id == endpoint_id
    since: datetime | None = conn.execute(select(webhook_endpoints.c.failing_since).where(of_id)).scalar_one()
    if each.state is DeliveryState.DELIVERED:
        if since is not None:
            conn.execute(update(webhook_endpoints).where(of_id).values(failing_since=None))
        return
    if since is None:
        since = each.attempt.started_at
        conn.execute(update(webhook_endpoints).where(of_id).values(failing_since=since))
    if each.reason is EndReason.GONE:
        disable_endpoint(conn, endpoint_id, _DISABLED_GONE, moment)
    elif is_failing_too_long(since, each.attempt_count, moment.wall):
        disable_endpoint(conn, endpoint_id, _DISABLED_FAILING, moment)


def give_back(conn: Connection, session: SessionId) -> int:
    """End a session's hold; its attempts that did not end are seen as cut short by the next holder."""
    values = {"session": None, "lease_until": None}
    return conn.execute(update(_rows).where(_c.session == session).values(values)).rowcount


# -- the log -----------------------------------------------------------------------------------------------------------


def delivery_of_tenant(conn: Connection, tenant: TenantId, delivery_id: DeliveryId) -> RowMapping:
    """Read a delivery; guards that another tenant's looks like a missing one."""
    query = select(_rows).where(_c.id == delivery_id, _c.tenant == tenant)
    row = conn.execute(query).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no webhook delivery {delivery_id}")
    return row


def deliveries_of_tenant(
    conn: Connection, tenant: TenantId, *, limit: int, after: DeliveryId | None, only: DeliveryFilter
) -> Sequence[RowMapping]:
    """List a tenant's deliveries, newest first."""
    wanted = {"state": only.state, "type": only.type, "batch_id": only.batch_id, "endpoint_id": only.endpoint_id}
    narrowed = [_c[name] == value for name, value in wanted.items() if value is not None]
    query = select(_rows).where(_c.tenant == tenant, *narrowed)
    if after is not None:
        query = query.where(_c.serial < delivery_of_tenant(conn, tenant, after)["serial"])
    return conn.execute(query.order_by(_c.serial.desc()).limit(limit)).mappings().all()


def resend(conn: Connection, tenant: TenantId, delivery_id: DeliveryId, moment: Moment) -> RowMapping:
    """Begin a delivery again; guards that its receiver may be told, and leaves one that is under way alone."""
    row = delivery_of_tenant(conn, tenant, delivery_id)
    if row["endpoint_id"] is not None:
        try:
            endpoint = endpoint_of_tenant(conn, tenant, row["endpoint_id"])
        except NotFound:
            raise TransitionRefused(f"the endpoint of {delivery_id} was deleted") from None
        if endpoint["disabled_at"] is not None:
            reason = endpoint["disabled_reason"]
            raise TransitionRefused(f"the endpoint {endpoint['id']} is disabled: {reason}; change it first")
    again: dict[str, object] = {"state": DeliveryState.PENDING, "reason": None, "due_at": moment.wall, "ended_at": None}
    again |= {"attempt_count": 0, "first_at": None}
    may_begin = or_(_c.session.is_(None), _c.state != DeliveryState.PENDING)
    conn.execute(update(_rows).where(_c.id == delivery_id, may_begin).values(again))
    return delivery_of_tenant(conn, tenant, delivery_id)


def counts_by_state(conn: Connection) -> dict[DeliveryState, int]:
    """Count deliveries."""
    counted = select(_c.state, func.count().label("total")).group_by(_c.state)
    found = {row.state: row.total for row in conn.execute(counted)}
    return {state: found.get(state, 0) for state in DeliveryState}


def drop_old(conn: Connection, moment: Moment, *, kept_for: timedelta) -> None:
    """Drop what has been over for long, then events and deleted receivers that none of the rest is of."""
    until = moment.wall - kept_for
    # Only what is over has an end.
    old = select(_c.id).where(_c.ended_at <= until).limit(_DROPPED_MAX)
    conn.execute(delete(_rows).where(_c.id.in_(old)))
    events = webhook_events.c
    untold = ~exists().where(_c.event_id == events.id)
    bare = select(events.id).where(events.created_at <= until, untold).limit(_DROPPED_MAX)
    conn.execute(delete(webhook_events).where(events.id.in_(bare)))
    endpoints = webhook_endpoints.c
    unused = ~exists().where(_c.endpoint_id == endpoints.id)
    deleted = select(endpoints.id).where(endpoints.deleted_at <= until, unused).limit(_DROPPED_MAX)
    conn.execute(delete(webhook_endpoints).where(endpoints.id.in_(deleted)))
