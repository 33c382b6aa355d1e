"""Statements on what workers do at this moment; nothing is decided by it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, bindparam, select, update

from batchrunner.holdings import LiveShare
from batchrunner.models import BatchId, SessionId
from batchrunner.store.moments import Moment
from batchrunner.store.tables import sessions

_FRESH_FOR_S = 5.0
# Built once: it is asked for with every look at a batch.
_LIVE = (
    select(sessions.c.live)
    .where(sessions.c.boot_id == bindparam("b_boot_id"), sessions.c.live_at >= bindparam("b_since_s"))
    .order_by(sessions.c.id)
)


def report_live(conn: Connection, session: SessionId, shares: Sequence[LiveShare], moment: Moment) -> None:
    """Replace what a session said."""
    said = {"live": tuple(shares), "live_at": moment.boot_s}
    conn.execute(update(sessions).where(sessions.c.id == session).values(said))


def live_of_batch(conn: Connection, batch_id: BatchId, moment: Moment) -> list[LiveShare]:
    """Read what sessions said of a batch a moment ago; there are few sessions, and each works on few batches."""
    fresh = {"b_boot_id": moment.boot_id, "b_since_s": moment.boot_s - _FRESH_FOR_S}
    found = conn.execute(_LIVE, fresh).scalars()
    return [share for shares in found for share in shares if share.batch_id == batch_id]
