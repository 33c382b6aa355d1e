"""Column kinds that both databases share: instants, packed JSON and checked words."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Any

import msgspec
from sqlalchemy import BigInteger, Dialect, Enum, Integer, Text
from sqlalchemy.types import TypeDecorator

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)

# SQLite grows row ids by itself only in a column that is called INTEGER.
RowNumber = BigInteger().with_variant(Integer, "sqlite")


class Instant(TypeDecorator[datetime]):
    """Aware UTC time as integer microseconds since 1970: exact, sortable and the same in every database."""

    impl = BigInteger
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:  # noqa: ARG002
        """Turn a time into microseconds."""
        return None if value is None else (value - _EPOCH) // _MICROSECOND

    def process_result_value(self, value: Any | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Turn microseconds into a time."""
        return None if value is None else _EPOCH + timedelta(microseconds=value)


class Packed(TypeDecorator[Any]):
    """A small value as JSON text, decoded into the shape that the column names."""

    impl = Text
    cache_ok = True

    def __init__(self, shape: Any) -> None:
        super().__init__()
        self.shape = shape
        self._decoder = msgspec.json.Decoder(shape)

    def process_bind_param(self, value: Any | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Write JSON."""
        return None if value is None else msgspec.json.encode(value).decode()

    def process_result_value(self, value: Any | None, dialect: Dialect) -> Any:  # noqa: ARG002
        """Read JSON."""
        return None if value is None else self._decoder.decode(value)


def word_of(members: type[StrEnum], name: str) -> Enum:
    """Make a text column that holds the enum's values, checked by a constraint of that name."""
    return Enum(
        members,
        name=name,
        native_enum=False,
        create_constraint=True,
        validate_strings=True,
        length=max(16, *(len(member.value) for member in members)),
        values_callable=lambda each: [member.value for member in each],
    )
