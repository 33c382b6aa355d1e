"""Statements on what workers do at this moment; nothing is decided by it."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection, select, update

from batchrunner.holdings import LiveShare
from batchrunner.models import BatchId, SessionId
from batchrunner.store.moments import Moment
from batchrunner.store.tables import sessions

_FRESH_FOR_S = 5.0


def report_live(conn: Connection, session: SessionId, shares: Sequence[LiveShare], moment: Moment) -> None:
    """Replace what a session said."""
    said = {"live": tuple(shares), "live_at": moment.boot_s}
    conn.execute(update(sessions).where(sessions.c.id == session).values(said))


def live_of_batch(conn: Connection, batch_id: BatchId, moment: Moment) -> list[LiveShare]:
    """Read what sessions said of a batch a moment ago; there are few sessions, and each works on few batches."""
    fresh = (sessions.c.boot_id == moment.boot_id, sessions.c.live_at >= moment.boot_s - _FRESH_FOR_S)
    found = conn.execute(select(sessions.c.live).where(*fresh).order_by(sessions.c.id)).scalars()
    return [share for shares in found for share in shares if share.batch_id == batch_id]
