"""Statements on API keys: only digests are known here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime

from sqlalchemy import Connection, RowMapping, exists, insert, or_, select, update

from batchrunner.errors import NameTaken, NotFound
from batchrunner.holdings import ApiKey, KeyId
from batchrunner.models import TenantId
from batchrunner.store.moments import Moment
from batchrunner.store.tables import keys


def add_key(conn: Connection, key: ApiKey) -> None:
    """Insert a key; guards that id and digest name one key, and lets the same insert be repeated."""
    taken = select(keys.c.id, keys.c.digest).where(or_(keys.c.id == key.id, keys.c.digest == key.digest))
    found = conn.execute(taken).all()
    if not found:
        conn.execute(insert(keys).values({each.name: getattr(key, each.name) for each in fields(ApiKey)}))
    elif [tuple(row) for row in found] != [(key.id, key.digest)]:
        raise NameTaken(f"the key id {key.id} is taken")


def find_key(conn: Connection, digest: str, moment: Moment) -> RowMapping | None:
    """Read the key with a digest; guards that one that has ended is like a missing one."""
    valid = (
        or_(keys.c.expires_at.is_(None), keys.c.expires_at > moment.wall),
        or_(keys.c.revoked_at.is_(None), keys.c.revoked_at > moment.wall),
    )
    return conn.execute(select(keys).where(keys.c.digest == digest, *valid)).mappings().one_or_none()


def all_keys(conn: Connection, tenant: TenantId | None) -> Sequence[RowMapping]:
    """List keys, oldest first."""
    query = select(keys).order_by(keys.c.created_at, keys.c.id)
    return conn.execute(query if tenant is None else query.where(keys.c.tenant == tenant)).mappings().all()


def has_keys(conn: Connection) -> bool:
    """Tell whether there is any key."""
    return bool(conn.execute(select(exists(select(keys.c.id)))).scalar_one())


def revoke_key(conn: Connection, key_id: KeyId, at: datetime) -> RowMapping:
    """Write the end of a key; guards that an end is never put off."""
    later = or_(keys.c.revoked_at.is_(None), keys.c.revoked_at > at)
    conn.execute(update(keys).where(keys.c.id == key_id, later).values(revoked_at=at))
    row = conn.execute(select(keys).where(keys.c.id == key_id)).mappings().one_or_none()
    if row is None:
        raise NotFound(f"no key {key_id}")
    return row
