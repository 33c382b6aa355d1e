"""Small real media as bytes: a picture, two kinds of sound and a film without a track, each with a comment inside.

Pure functions of what they are given; knows neither requests nor answers.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final

_SIDE_PIXELS: Final = 8
_SAMPLES_PER_S: Final = 8000
_SAMPLES: Final = 800
# MPEG-2 layer III at 24 kHz and 32 kbit/s, one channel, no checksum: a frame is 96 bytes, and one of zeros is silence.
_MP3_FRAME: Final = b"\xff\xf3\x44\xc4" + bytes(92)
_MP3_FRAMES: Final = 4


def png(comment: str, pixels: bytes) -> bytes:
    """Return a picture of 8 by 8 grey values, taken from `pixels` again and again, with a comment."""
    values = (pixels * _SIDE_PIXELS * _SIDE_PIXELS)[: _SIDE_PIXELS * _SIDE_PIXELS]
    rows = b"".join(b"\0" + values[start : start + _SIDE_PIXELS] for start in range(0, len(values), _SIDE_PIXELS))
    header = struct.pack(">IIBBBBB", _SIDE_PIXELS, _SIDE_PIXELS, 8, 0, 0, 0, 0)
    chunks = [
        (b"IHDR", header),
        (b"tEXt", b"Comment\0" + comment.encode()),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_png_chunk(kind, content) for kind, content in chunks)


def _png_chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def wav(comment: str, pitch: int) -> bytes:
    """Return a tenth of a second of a saw whose period is 8 samples and `pitch` more, with a comment."""
    period = 8 + pitch
    samples = bytes(place % period * 255 // period for place in range(_SAMPLES))
    form = struct.pack("<HHIIHH", 1, 1, _SAMPLES_PER_S, _SAMPLES_PER_S, 1, 8)
    text = comment.encode() + b"\0"
    info = b"INFO" + _riff_chunk(b"ICMT", text)
    return _riff_chunk(
        b"RIFF", b"WAVE" + _riff_chunk(b"fmt ", form) + _riff_chunk(b"LIST", info) + _riff_chunk(b"data", samples)
    )


def _riff_chunk(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def mp3(comment: str) -> bytes:
    """Return a moment of silence with a comment as its title."""
    text = b"\3" + comment.encode()
    frame = b"TIT2" + struct.pack(">IH", len(text), 0) + text
    return b"ID3\3\0\0" + _syncsafe(len(frame)) + frame + _MP3_FRAME * _MP3_FRAMES


def _syncsafe(number: int) -> bytes:
    """Write a number seven bits to the byte, so that no decoder takes it for a frame."""
    return bytes(number >> shift & 0x7F for shift in (21, 14, 7, 0))


def mp4(comment: str) -> bytes:
    """Return a film without a track, and a comment in its free space."""
    matrix = struct.pack(">9I", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    head = bytes(12) + struct.pack(">IIIH", 1000, 0, 0x10000, 0x100) + bytes(10) + matrix + bytes(24)
    movie = _box(b"mvhd", head + struct.pack(">I", 1))
    return _box(b"ftyp", b"isom\0\0\2\0isommp41") + _box(b"moov", movie) + _box(b"free", comment.encode())


def _box(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", 8 + len(content)) + kind + content
