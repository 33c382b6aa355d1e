"""Statements on Idempotency-Keys: who holds one, what it made, which answer belongs to it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import ColumnElement, Connection, RowMapping, and_, delete, func, insert, select, update

from batchrunner.errors import IdempotencyMismatch, IdempotencyRunning
from batchrunner.holdings import Replay
from batchrunner.models import TenantId
from batchrunner.store.moments import Moment
from batchrunner.store.rows import replay_of
from batchrunner.store.tables import IdempotencyState, idempotency

KEPT_FOR = timedelta(hours=24)


def _is_row(tenant: TenantId, route: str, key: str) -> ColumnElement[bool]:
    return and_(idempotency.c.tenant == tenant, idempotency.c.route == route, idempotency.c.key == key)


def _row(conn: Connection, tenant: TenantId, route: str, key: str, moment: Moment) -> RowMapping | None:
    """Read the row, locked; one that is over its time is removed."""
    mine = _is_row(tenant, route, key)
    row = conn.execute(select(idempotency).where(mine).with_for_update()).mappings().one_or_none()
    if row is None or row["created_at"] > moment.wall - KEPT_FOR or _is_held(row, moment):
        return row
    conn.execute(delete(idempotency).where(mine))
    return None


def _is_held(row: RowMapping, moment: Moment) -> bool:
    is_running = row["state"] is IdempotencyState.RUNNING
    return is_running and row["boot_id"] == moment.boot_id and row["lease_until"] >= moment.boot_s


def _require_same(row: RowMapping, fingerprint: str | None) -> None:
    if None not in (row["fingerprint"], fingerprint) and row["fingerprint"] != fingerprint:
        raise IdempotencyMismatch("this Idempotency-Key was used for another request")


def begin(
    conn: Connection,
    tenant: TenantId,
    route: str,
    key: str,
    moment: Moment,
    *,
    fingerprint: str | None,
    lease_s: float,
) -> Replay | None:
    """Take a key that is free or whose holder died; guards that two requests never hold it together."""
    row = _row(conn, tenant, route, key, moment)
    lease = {"lease_until": moment.boot_s + lease_s, "boot_id": moment.boot_id, "fingerprint": fingerprint}
    if row is None:
        fresh = {"tenant": tenant, "route": route, "key": key, "created_at": moment.wall}
        conn.execute(insert(idempotency).values(fresh | lease | {"state": IdempotencyState.RUNNING}))
        return None
    if row["state"] is IdempotencyState.DONE:
        _require_same(row, fingerprint)
        return replay_of(row)
    if _is_held(row, moment):
        _require_same(row, fingerprint)
        raise IdempotencyRunning("the first request with this Idempotency-Key has not ended")
    conn.execute(update(idempotency).where(_is_row(tenant, route, key)).values(lease))
    return None


def renew(conn: Connection, tenant: TenantId, route: str, key: str, moment: Moment, *, lease_s: float) -> None:
    """Extend the lease of a key; guards that an answer that is kept has none."""
    running = and_(_is_row(tenant, route, key), idempotency.c.state == IdempotencyState.RUNNING)
    lease = {"lease_until": moment.boot_s + lease_s, "boot_id": moment.boot_id}
    conn.execute(update(idempotency).where(running).values(lease))


def finish(conn: Connection, tenant: TenantId, replay: Replay, moment: Moment) -> None:
    """Keep an answer; guards that the first one stays."""
    row = _row(conn, tenant, replay.route, replay.key, moment)
    values = {"state": IdempotencyState.DONE, "status": replay.status, "body": replay.body, "lease_until": None}
    if row is None:
        _insert_done(conn, tenant, replay, moment, values | {"object_id": replay.object_id})
    elif row["body"] is None and (row["object_id"] is None or replay.object_id in (None, row["object_id"])):
        kept = {
            "object_id": func.coalesce(idempotency.c.object_id, replay.object_id),
            "fingerprint": func.coalesce(idempotency.c.fingerprint, replay.fingerprint),
        }
        conn.execute(update(idempotency).where(_is_row(tenant, replay.route, replay.key)).values(values | kept))


def note_made(conn: Connection, tenant: TenantId, replay: Replay, object_id: str, moment: Moment) -> str | None:
    """Note, in the transaction that makes it, which object belongs to a key; gives the id of an earlier one instead.

    Guards that a request that lost its lease and the one that took it over do not both make something.
    """
    row = _row(conn, tenant, replay.route, replay.key, moment)
    values = _made(replay, object_id)
    if row is None:
        _insert_done(conn, tenant, replay, moment, values)
        return None
    _require_same(row, replay.fingerprint)
    if row["object_id"] is not None:
        return str(row["object_id"])
    if row["state"] is IdempotencyState.DONE:
        raise IdempotencyRunning("the first request with this Idempotency-Key has just ended")
    fingerprint = replay.fingerprint if row["fingerprint"] is None else row["fingerprint"]
    mine = _is_row(tenant, replay.route, replay.key)
    conn.execute(update(idempotency).where(mine).values(values | {"fingerprint": fingerprint}))
    return None


def made_before(conn: Connection, tenant: TenantId, replay: Replay, moment: Moment) -> str | None:
    """Read the id of what was made under a key that is not over its time."""
    mine = (_is_row(tenant, replay.route, replay.key), idempotency.c.created_at > moment.wall - KEPT_FOR)
    return conn.execute(select(idempotency.c.object_id).where(*mine)).scalar_one_or_none()


def note_all_made(
    conn: Connection, tenant: TenantId, made: Sequence[tuple[Replay, str]], moment: Moment
) -> list[str | None]:
    """Do as `note_made` for many keys, no two of them the same; nearly always none was there before."""
    keys = [replay.key for replay, _ in made]
    named = select(idempotency.c.route, idempotency.c.key)
    found = conn.execute(named.where(idempotency.c.tenant == tenant, idempotency.c.key.in_(keys)))
    known = {(row.route, row.key) for row in found}
    fresh = [
        _done(tenant, replay, moment, _made(replay, object_id))
        for replay, object_id in made
        if (replay.route, replay.key) not in known
    ]
    if fresh:
        conn.execute(insert(idempotency), fresh)
    return [
        note_made(conn, tenant, replay, object_id, moment) if (replay.route, replay.key) in known else None
        for replay, object_id in made
    ]


def _made(replay: Replay, object_id: str) -> dict[str, object]:
    return {"state": IdempotencyState.DONE, "status": replay.status, "object_id": object_id, "lease_until": None}


def _insert_done(conn: Connection, tenant: TenantId, replay: Replay, moment: Moment, values: dict[str, object]) -> None:
    conn.execute(insert(idempotency).values(_done(tenant, replay, moment, values)))


def _done(tenant: TenantId, replay: Replay, moment: Moment, values: dict[str, object]) -> dict[str, object]:
    whose = {"tenant": tenant, "route": replay.route, "key": replay.key, "fingerprint": replay.fingerprint}
    return whose | {"created_at": moment.wall, "boot_id": moment.boot_id} | values


def drop(conn: Connection, tenant: TenantId, route: str, key: str) -> None:
    """Forget a request; guards that an answer stays."""
    running = and_(_is_row(tenant, route, key), idempotency.c.state == IdempotencyState.RUNNING)
    conn.execute(delete(idempotency).where(running))


def drop_old(conn: Connection, moment: Moment) -> int:
    """Remove what is over its time, unless a request still holds it."""
    old = idempotency.c.created_at <= moment.wall - KEPT_FOR
    held = and_(
        idempotency.c.state == IdempotencyState.RUNNING,
        idempotency.c.boot_id == moment.boot_id,
        idempotency.c.lease_until >= moment.boot_s,
    )
    return conn.execute(delete(idempotency).where(old, ~held)).rowcount
