"""Files of requests as users have them: plain, packed, or from stdin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from batchrunner.errors import UsageError

PACKED = (".gz", ".zst")
_READ_BYTES = 1 << 20


class Readable(Protocol):
    """What can be read a piece at a time."""

    def read(self, size: int, /) -> bytes:
        """Give the next bytes, none at the end."""


def pieces_of(stream: Readable) -> Iterator[bytes]:
    """Give what is still there."""
    while piece := stream.read(_READ_BYTES):
        yield piece


def plain(path: Path) -> Iterator[bytes]:
    """Give the bytes of a file, unpacked if it is a .gz or .zst file.

    Raises:
        UsageError: the file is not what its name says.
    """
    match path.suffix:
        case ".gz":
            yield from _gunzipped(path)
        case ".zst":
            yield from _unzstandarded(path)
        case _:
            with path.open("rb") as stream:
                yield from pieces_of(stream)


def _gunzipped(path: Path) -> Iterator[bytes]:
    import gzip

    try:
        with gzip.open(path, "rb") as stream:
            yield from pieces_of(stream)
    except (OSError, EOFError) as error:
        raise UsageError(f"{path} cannot be unpacked: {error}") from error


def _unzstandarded(path: Path) -> Iterator[bytes]:
    import zstandard

    try:
        with (
            path.open("rb") as packed,
            zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True) as stream,
        ):
            yield from pieces_of(stream)
    except zstandard.ZstdError as error:
        raise UsageError(f"{path} cannot be unpacked: {error}") from error
