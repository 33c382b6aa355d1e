"""Files of requests as users have them: plain, packed, or from stdin."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from batchrunner.errors import UsageError

PACKED = (".gz", ".zst")
_READ_BYTES = 1 << 20
# So much of a .zst file at a time, since each unpacks to up to 32,000 times as much.
_PACKED_BYTES = 1 << 12


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
        raise _cannot_unpack(path, str(error), tool="gzip") from error


def _unzstandarded(path: Path) -> Iterator[bytes]:
    import zstandard

    packer, frame = zstandard.ZstdDecompressor(), None
    try:
        with path.open("rb") as packed:
            for piece in iter(lambda: packed.read(_PACKED_BYTES), b""):
                rest = piece
                while rest:
                    frame = frame or packer.decompressobj()
                    yield frame.decompress(rest)
                    rest = frame.unused_data
                    frame = None if frame.eof else frame
    except (OSError, zstandard.ZstdError) as error:
        raise _cannot_unpack(path, str(error), tool="zstd") from error
    if frame is not None:
        # What a reader of streams gives up to there looks like a whole file.
        raise _cannot_unpack(path, "it ends within a frame; is it cut short?", tool="zstd")


def _cannot_unpack(path: Path, why: str, *, tool: str) -> UsageError:
    return UsageError(f"{path} cannot be unpacked: {why}", hint=f"See what `{tool} -t {path}` says; pack it anew.")
