"""Media answers go to disk while they are read: whole under their name, or nothing of them is left."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from batchrunner.assets import Assets, AssetStream
from batchrunner.blobs.local import LocalBlobs
from batchrunner.clock import SystemClock
from batchrunner.errors import BatchrunnerError, BlobsUnavailable, DiskFull
from batchrunner.limits import ReadBudget
from batchrunner.models import Attempt, AttemptError, BatchId
from batchrunner.ports import BlobWriter
from batchrunner.settings import Settings
from batchrunner.upstream import AiohttpUpstream
from tests.hostile.cases import chunked
from tests.hostile.peer import LIMIT_S, Talk, answer, peer_with, until

MIB = 1024 * 1024
SPEECH = "/v1/audio/speech"
BATCH = BatchId("batch_1")
FOLDER = f"assets/{BATCH}"
PIECE = bytes(range(256)) * 4096
SOUND = PIECE * 3 + b"\n"


class HastyClock(SystemClock):
    """Waits for nothing."""

    async def sleep(self, duration_s: float) -> None:
        await asyncio.sleep(0)


class WatchedBudget(ReadBudget):
    """Remembers the most that was held."""

    most_bytes = 0

    def take(self, reader, size_bytes: int) -> None:
        super().take(reader, size_bytes)
        self.most_bytes = max(self.most_bytes, self._held_bytes)


class ShakyWriter:
    """A writer that raises what its disk has in store before it does anything."""

    def __init__(self, writer: BlobWriter, troubles: dict[str, list[BatchrunnerError]]) -> None:
        self._writer = writer
        self._troubles = troubles

    def _stumble(self, at: str) -> None:
        if self._troubles.get(at):
            raise self._troubles[at].pop(0)

    def write(self, chunk: bytes) -> None:
        assert len(chunk) <= 256 * 1024
        self._stumble("write")
        self._writer.write(chunk)

    def commit(self, last_part: str | None = None) -> None:
        self._stumble("commit")
        self._writer.commit(last_part)

    def abort(self) -> None:
        self._writer.abort()


class ShakyBlobs(LocalBlobs):
    """A folder on a disk that has trouble now and then."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.troubles: dict[str, list[BatchrunnerError]] = {}

    def writer(self, name: str):
        return ShakyWriter(super().writer(name), self.troubles)


class Line:
    """See AssetOwner."""

    def __init__(self, assets: Assets, number: int) -> None:
        self._assets = assets
        self._number = number

    def open_asset(self, content_type: str) -> AssetStream:
        return self._assets.open(BATCH, self._number, content_type)


class Scene:
    """An upstream whose media answers go into a folder."""

    def __init__(self, root: Path, url: str, *, asset_bytes_max: int = 512 * MIB, reply_bytes_max: int = MIB) -> None:
        self.blobs = ShakyBlobs(root)
        self.assets = Assets(self.blobs, HastyClock(), Settings())
        self.budget = WatchedBudget()
        self.troubles: list[str] = []
        self.assets.on_trouble = lambda error: self.troubles.append(error.code)
        self.upstream = AiohttpUpstream(
            url,
            clock=SystemClock(),
            budget=self.budget,
            asset_bytes_max=asset_bytes_max,
            reply_bytes_max=reply_bytes_max,
        )
        self._root = root

    async def send(self, number: int = 7) -> Attempt:
        sending = self.upstream.send(SPEECH, b"{}", idempotency_key=None, owner=Line(self.assets, number))
        return await asyncio.wait_for(sending, LIMIT_S)

    async def files(self) -> list[str]:
        """Everything in the folder, temporary files too, once nobody writes any more."""
        await asyncio.to_thread(self.assets.close)
        return sorted(path.name for path in (self._root / FOLDER).glob("*"))


@asynccontextmanager
async def scene(root: Path, script, **limits: int) -> AsyncIterator[Scene]:
    async with peer_with(script) as peer:
        made = Scene(root, peer.url, **limits)
        try:
            yield made
        finally:
            await made.upstream.close()
            await asyncio.to_thread(made.assets.close)


def saying(*messages: bytes, then_reset: bool = False):
    async def script(talk: Talk) -> None:
        while True:
            await talk.request()
            for message in messages:
                await talk.say_on(message)
            if then_reset:
                talk.reset()
                return

    return script


def name_of(content: bytes, number: int = 7) -> str:
    return f"asset_{number}_{hashlib.sha256(content).hexdigest()[:24]}.mp3"


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: audio/mpeg\r\n"


@pytest.mark.parametrize("framing", ["length", "chunked", "identity", "until the end", "in one read", "gzip"])
async def test_answer_is_kept_whole_and_its_json_stands_for_it(tmp_path: Path, framing: str) -> None:
    import gzip

    content = b"ID3" * 100 if framing == "in one read" else SOUND
    message = {
        "length": answer(content, Content_Type="Audio/MPEG; rate=1"),
        "chunked": chunked(content[:100], content[100:]).replace(b"\r\n", b"\r\nContent-Type: audio/mpeg\r\n", 1),
        "identity": answer(content, Content_Type="audio/mpeg", Content_Encoding="identity"),
        "until the end": HEAD + b"\r\n" + content,
        "in one read": answer(content, Content_Type="audio/mpeg"),
        "gzip": answer(gzip.compress(content), Content_Type="audio/mpeg", Content_Encoding="gzip"),
    }[framing]

    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.say_on(message)
        if framing == "until the end":
            talk.hang_up()
        await talk.gone()

    async with scene(tmp_path, script, reply_bytes_max=4 * MIB) as there:
        attempt = await there.send()
        files = await there.files()

    name = name_of(content)
    assert (attempt.error, attempt.status, attempt.content_type) == (None, 200, "application/json")
    assert json.loads(attempt.body) == {
        "object": "asset",
        "id": name.removesuffix(".mp3"),
        "content_type": "audio/mpeg",
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "url": f"assets/{name}",
    }
    assert files == [name]
    assert (tmp_path / FOLDER / name).read_bytes() == content


@pytest.mark.slow
async def test_answer_of_64_mb_is_never_held_whole(tmp_path: Path) -> None:
    pieces = 64
    declared = b"Content-Length: %d\r\n\r\n" % (pieces * len(PIECE))

    async with scene(tmp_path, saying(HEAD + declared, *[PIECE] * pieces)) as there:
        attempt = await there.send()
        most_bytes = there.budget.most_bytes

    assert attempt.error is None
    assert json.loads(attempt.body)["bytes"] == pieces * len(PIECE)
    assert json.loads(attempt.body)["sha256"] == hashlib.sha256(PIECE * pieces).hexdigest()
    assert 0 < most_bytes <= 2 * MIB
    assert there.budget._held_bytes == 0


@pytest.mark.parametrize("how", ["reset", "cut off", "over the cap, as announced", "over the cap", "cancelled"])
async def test_answer_that_does_not_come_to_its_end_leaves_nothing(tmp_path: Path, how: str) -> None:
    declared = b"Content-Length: %d\r\n\r\n" % (64 * MIB)
    begun = asyncio.Event()

    async def script(talk: Talk) -> None:
        await talk.request()
        if how == "over the cap":
            await talk.say_on(HEAD + b"\r\n")
        else:
            await talk.say_on(HEAD + declared)
        if how != "over the cap, as announced":
            for _ in range(3):
                await talk.say_on(PIECE)
        if how == "reset":
            talk.reset()
        elif how == "cut off":
            talk.hang_up()
        begun.set()
        await talk.gone()

    asset_bytes_max = 2 * MIB if how.startswith("over") else 512 * MIB
    async with scene(tmp_path, script, asset_bytes_max=asset_bytes_max) as there:
        sending = asyncio.create_task(there.send())
        if how == "cancelled":
            await begun.wait()
            await until(lambda: any(wire.received_bytes > 0 for wire in there.upstream._busy))
            sending.cancel()
        [outcome] = await asyncio.gather(sending, return_exceptions=True)
        files = await there.files()

    assert files == []
    assert there.budget._held_bytes == 0
    if how == "cancelled":
        assert isinstance(outcome, asyncio.CancelledError)
    elif how.startswith("over"):
        assert isinstance(outcome, Attempt)
        assert outcome.error is AttemptError.TOO_LARGE
        assert f"over {2 * MIB} bytes" in outcome.message
    else:
        assert isinstance(outcome, Attempt)
        assert outcome.error is AttemptError.TRUNCATED


async def test_empty_sound_is_no_asset(tmp_path: Path) -> None:
    async def script(talk: Talk) -> None:
        await talk.request()
        await talk.say_on(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        await until(lambda: any(wire.received_bytes == 0 for wire in there.upstream._busy))
        await talk.say_on(b"0\r\n\r\n")
        await talk.gone()

    async with scene(tmp_path, script) as there:
        attempt = await there.send()
        files = await there.files()

    assert (attempt.error, attempt.body, attempt.content_type, files) == (None, b"", "audio/mpeg", [])


async def test_same_bytes_of_the_same_line_again_are_the_same_asset(tmp_path: Path) -> None:
    async with scene(tmp_path, saying(answer(SOUND, Content_Type="audio/mpeg"))) as there:
        first = await there.send()
        again = await there.send()
        files = await there.files()

    assert first.body == again.body
    assert files == [name_of(SOUND)]


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_full_disk_is_waited_out_in_mid_answer(tmp_path: Path, is_streamed: bool) -> None:
    content = SOUND if is_streamed else b"ID3" * 1000

    async with scene(tmp_path, saying(answer(content, Content_Type="audio/mpeg"))) as there:
        there.blobs.troubles = {
            "write": [DiskFull("no space"), BlobsUnavailable("gone"), DiskFull("no space")],
            "commit": [DiskFull("no space")] * 2,
        }
        attempt = await there.send()
        files = await there.files()

    assert attempt.error is None
    assert there.troubles == ["disk_full", "blobs_unavailable", "disk_full", "disk_full", "disk_full"]
    assert files == [name_of(content)]
    assert (tmp_path / FOLDER / files[0]).read_bytes() == content


async def test_streamed_answer_that_a_disk_has_lost_is_sent_for_again(tmp_path: Path) -> None:
    async with scene(tmp_path, saying(answer(SOUND, Content_Type="audio/mpeg"))) as there:
        there.blobs.troubles = {"commit": [BlobsUnavailable("the sync failed")]}
        lost = await there.send()
        kept = await there.send()
        files = await there.files()

    assert lost.error is AttemptError.ABORTED
    assert "the sync failed" in lost.message
    assert kept.error is None
    assert files == [name_of(SOUND)]


async def test_answer_in_one_piece_that_a_disk_has_lost_is_written_again(tmp_path: Path) -> None:
    content = b"ID3" * 1000
    sends = 0

    async def script(talk: Talk) -> None:
        nonlocal sends
        while True:
            await talk.request()
            sends += 1
            talk.say(answer(content, Content_Type="audio/mpeg"))

    async with scene(tmp_path, script) as there:
        there.blobs.troubles = {"commit": [BlobsUnavailable("the sync failed")]}
        attempt = await there.send()
        files = await there.files()

    assert (attempt.error, sends) == (None, 1)
    assert files == [name_of(content)]


async def test_refusal_that_is_called_a_sound_is_no_asset(tmp_path: Path) -> None:
    page = b'{"error":"%b"}' % (b"x" * 500_000)
    refusal = answer(page, "400 Bad Request", Content_Type="audio/mpeg")

    async with scene(tmp_path, saying(refusal)) as there:
        attempt = await there.send()
        files = await there.files()

    assert (attempt.status, attempt.body, files) == (400, page, [])


async def test_many_at_once_share_the_budget_and_all_are_kept(tmp_path: Path) -> None:
    count = 24

    async with scene(tmp_path, saying(answer(SOUND, Content_Type="audio/mpeg"))) as there:
        there.budget.set_limit(4 * MIB)
        attempts = await asyncio.gather(*(there.send(number) for number in range(count)))
        most_bytes = there.budget.most_bytes
        files = await there.files()

    assert [attempt.error for attempt in attempts] == [None] * count
    assert files == sorted(name_of(SOUND, number) for number in range(count))
    # One read each comes before anybody can know.
    assert most_bytes <= 4 * MIB + count * 256 * 1024
    assert there.budget._held_bytes == 0
