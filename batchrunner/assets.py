"""Media answers on their way into Blobs: written piece by piece, in threads of their own, named by line and content.

A full disk is waited out in mid answer, for the answer is paid.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import msgspec

from batchrunner.errors import BatchrunnerError, BlobsUnavailable, DiskFull, NameTaken
from batchrunner.models import BatchId
from batchrunner.ports import Blobs, BlobWriter, Clock
from batchrunner.settings import Settings

_T = TypeVar("_T")

# What a BlobWriter takes whole or not at all, so that it can be written again.
_PIECE_BYTES = 256 * 1024
_THREADS = 4
_RETRY_S = 1.0
# Source: the IANA names of what speech, image and video endpoints answer with.
_SUFFIXES: Mapping[str, str] = {
    "audio/mpeg": ".mp3",
    "audio/mp3": ".mp3",
    "audio/wav": ".wav",
    "audio/x-wav": ".wav",
    "audio/flac": ".flac",
    "audio/aac": ".aac",
    "audio/ogg": ".ogg",
    "audio/opus": ".opus",
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "image/gif": ".gif",
    "video/mp4": ".mp4",
    "video/webm": ".webm",
}
MEDIA_TYPES = frozenset(_SUFFIXES)
_encode = msgspec.json.Encoder().encode


def asset_file(asset_id: str, content_type: str) -> str:
    """Give the last part of an asset's name in Blobs, and of its url."""
    return f"{asset_id}{_SUFFIXES.get(content_type, '.bin')}"


def asset_blob(batch_id: BatchId, asset_id: str, content_type: str) -> str:
    """Give the name of an asset in Blobs."""
    return f"assets/{batch_id}/{asset_file(asset_id, content_type)}"


class Assets:
    """The media answers of one worker session. `on_trouble` is called on the loop each time one cannot be written."""

    def __init__(self, blobs: Blobs, clock: Clock, settings: Settings) -> None:
        self.on_trouble: Callable[[BatchrunnerError], None] = _ignore
        self._blobs = blobs
        self._clock = clock
        self._url = settings.assets_url
        self._threads = ThreadPoolExecutor(max_workers=_THREADS, thread_name_prefix="assets")

    def open(self, batch_id: BatchId, line_number: int, content_type: str) -> AssetStream:
        """Begin the asset of a line. Writes nothing yet."""
        return AssetStream(self, batch_id, line_number, content_type)

    def close(self) -> None:
        """Return once everything begun has ended. Blocks."""
        self._threads.shutdown(wait=True)

    def writer(self, name: str) -> BlobWriter:
        """Open a blob. Blocks."""
        return self._blobs.writer(name)

    def url(self, name: str) -> str:
        """Where the reader of a result line finds the asset."""
        return f"{self._url}/{name}"

    def submit(self, function: Callable[[], None]) -> None:
        """Have something done that nobody waits for."""
        self._threads.submit(function)

    async def call(self, function: Callable[[], _T], *, until_kept: bool) -> _T:
        """Have something done, again and again while the disk is full, and `until_kept` while Blobs does not answer.

        Raises:
            BlobsUnavailable: it failed, a moment ago, and must not be repeated.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await loop.run_in_executor(self._threads, function)
            except (DiskFull, BlobsUnavailable) as error:
                self.on_trouble(error)
                # Whoever would try at once again would do so without end.
                await self._clock.sleep(_RETRY_S)
                if isinstance(error, BlobsUnavailable) and not until_kept:
                    raise


class AssetStream:
    """See AssetSink."""

    def __init__(self, assets: Assets, batch_id: BatchId, line_number: int, content_type: str) -> None:
        self._assets = assets
        self._folder = f"assets/{batch_id}"
        self._line_number = line_number
        self._content_type = content_type
        # Whoever aborts does not wait for the thread that is writing.
        self._lock = threading.Lock()
        self._is_aborted = False
        self._writer: BlobWriter | None = None
        self._pieces: deque[bytes] = deque()
        self._sha256 = hashlib.sha256()
        self._size_bytes = 0

    async def write(self, chunks: Sequence[bytes]) -> None:
        """See AssetSink."""
        for chunk in chunks:
            self._pieces.extend(chunk[at : at + _PIECE_BYTES] for at in range(0, len(chunk), _PIECE_BYTES))
        await self._assets.call(self._write, until_kept=True)

    async def finish(self) -> bytes:
        """See AssetSink."""
        return await self._assets.call(self._commit, until_kept=False)

    def abort(self) -> None:
        """See AssetSink."""
        self._is_aborted = True
        self._assets.submit(self._drop)

    def _write(self) -> None:
        with self._lock:
            if self._is_aborted:
                return
            if self._writer is None:
                self._writer = self._assets.writer(f"{self._folder}/line_{self._line_number}")
            while self._pieces:
                piece = self._pieces[0]
                self._writer.write(piece)
                self._sha256.update(piece)
                self._size_bytes += len(piece)
                self._pieces.popleft()

    def _commit(self) -> bytes:
        sha256 = self._sha256.hexdigest()
        asset_id = f"asset_{self._line_number}_{sha256[:24]}"
        name = asset_file(asset_id, self._content_type)
        with self._lock:
            assert self._writer is not None
            try:
                self._writer.commit(name)
            except NameTaken:
                # The same bytes of the same line, from a holder that died before it could say so.
                self._writer.abort()
            self._writer = None
        asset = {
            "object": "asset",
            "id": asset_id,
            "content_type": self._content_type,
            "bytes": self._size_bytes,
            "sha256": sha256,
            "url": self._assets.url(name),
        }
        return _encode(asset)

    def _drop(self) -> None:
        with self._lock:
            self._pieces.clear()
            if self._writer is not None:
                self._writer.abort()


def _ignore(_error: BatchrunnerError) -> None:
    """Stands where nobody listens yet."""
