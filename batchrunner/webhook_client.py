"""What the command line asks of our own servers about webhooks: secrets, receivers, the log, events as they come."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import quote, urlencode

import aiohttp
import msgspec

from batchrunner.client import BatchClient
from batchrunner.errors import ServerRefused, ServerUnavailable, TransitionRefused

_T = TypeVar("_T")

_JSON = {"Content-Type": "application/json"}
_LINE_BYTES_MAX = 1 << 24


class RemoteSecret(msgspec.Struct, frozen=True):
    """What signs for the batches' own URLs."""

    signing_secret: str


class RemoteEndpoint(msgspec.Struct, frozen=True):
    """A receiver."""

    id: str
    name: str
    url: str
    event_types: list[str]
    disabled_reason: str | None = None


class RemoteAttempt(msgspec.Struct, frozen=True):
    """One POST."""

    status_code: int | None = None
    error: str | None = None
    elapsed_ms: int | None = None


class RemoteDelivery(msgspec.Struct, frozen=True):
    """The telling of one event to one receiver."""

    id: str
    status: str
    event_type: str
    batch_id: str
    url: str
    created_at: int
    next_attempt_at: int | None = None
    reason: str | None = None
    attempts: list[RemoteAttempt] = []


class RemoteTest(msgspec.Struct, frozen=True):
    """What a receiver answered to a test."""

    status_code: int


class RemoteEvent(msgspec.Struct, frozen=True):
    """The head of an event."""

    id: str
    type: str


class _Endpoints(msgspec.Struct, frozen=True):
    data: list[RemoteEndpoint]


class _Deliveries(msgspec.Struct, frozen=True):
    data: list[RemoteDelivery]


@dataclass(frozen=True, slots=True)
class Heard:
    """An event off the stream, and its JSON as receivers get it."""

    event: RemoteEvent
    body: bytes


class WebhookClient(BatchClient):
    """A client that also knows what only our own servers have."""

    async def secret(self) -> str:
        """Give what signs for the batches' own URLs."""
        return _decoded(await self._json("GET", "/webhook_secret"), RemoteSecret).signing_secret

    async def rotate_secret(self, *, keeps_old: bool) -> str:
        """Have the server sign with another secret, and for a day with the old one too."""
        raw = await self._post("/webhook_secret/rotate", {"keep_old_secret_active_for_24_hours": keeps_old})
        return _decoded(raw, RemoteSecret).signing_secret

    async def endpoints(self, wanted: Mapping[str, str]) -> tuple[list[RemoteEndpoint], bytes]:
        """Give the newest receivers, and the JSON of the page."""
        raw = await self._json("GET", f"/webhook_endpoints?{urlencode(wanted)}")
        return _decoded(raw, _Endpoints).data, raw

    async def deliveries(self, wanted: Mapping[str, str]) -> tuple[list[RemoteDelivery], bytes]:
        """Give the newest deliveries, and the JSON of the page."""
        raw = await self._json("GET", f"/webhook_deliveries?{urlencode(wanted)}")
        return _decoded(raw, _Deliveries).data, raw

    async def test_endpoint(self, endpoint_id: str, event_type: str) -> int:
        """Have a sample sent to a receiver and give the status that it answered."""
        path = f"/webhook_endpoints/{quote(endpoint_id, safe='')}/test"
        return _decoded(await self._post(path, {"event_type": event_type}), RemoteTest).status_code

    async def resend(self, delivery_id: str) -> RemoteDelivery:
        """Have a delivery begun again."""
        try:
            raw = await self._json("POST", f"/webhook_deliveries/{quote(delivery_id, safe='')}/resend")
        except TransitionRefused as error:
            raise TransitionRefused(error.message, hint="Any change of a disabled receiver enables it.") from error
        return _decoded(raw, RemoteDelivery)

    async def trigger(self, event_type: str, url: str | None) -> RemoteEvent:
        """Have a sample event told."""
        wanted = {"type": event_type} | ({"url": url} if url is not None else {})
        return _decoded(await self._post("/webhook_events", wanted), RemoteEvent)

    async def listen(self, hear: Callable[[Heard], Awaitable[None]], *, begin: Callable[[], None]) -> None:
        """Hand over events as they come, for ever; a stream that breaks off is resumed where it broke. `begin` is
        called once: what happens from then on is heard.

        Raises: as the others.
        """
        last, has_begun = "", False

        async def take(answer: aiohttp.ClientResponse) -> None:
            nonlocal last, has_begun
            fields: dict[str, bytes] = {}
            async for line in _lines(answer):
                if not has_begun:
                    has_begun = True
                    begin()
                # Whatever comes says that the server is there.
                self._progress_s = self._clock.monotonic_s()
                if line and not line.startswith(b":"):
                    name, _, value = line.partition(b": ")
                    fields[name.decode()] = value
                elif not line:
                    if "data" in fields:
                        await hear(Heard(_decoded(fields["data"], RemoteEvent), fields["data"]))
                    last = fields.get("id", b"").decode() or last
                    fields = {}

        async def once() -> None:
            headers = {"Last-Event-ID": last} if last else {}
            await self._once("GET", "/webhook_events", take, headers=headers)

        while True:
            await self._again(once)
            # It ended as it should: the server ends, and another one may come.
            await self._clock.sleep(1.0)

    async def _post(self, path: str, fields: Mapping[str, object]) -> bytes:
        return await self._json("POST", path, body=msgspec.json.encode(fields), headers=_JSON)


async def _lines(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """Give the lines of an answer; a batch with many problems makes a long one."""
    rest = b""
    async for chunk in answer.content.iter_any():
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            yield line
        if len(rest) > _LINE_BYTES_MAX:
            raise ServerUnavailable("the server sends a line without an end")


def _decoded(raw: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as error:
        message = f"the server knows no webhooks: {error}"
        raise ServerRefused(message, hint="Is --server the base URL of a batchrunner server, with its /v1?") from error
