"""A client of any server of OpenAI's Batch API: it uploads, creates, asks, cancels and downloads, and tries again what
a busy or restarting server could not do. What only our own servers have it asks for, and tells when it is not there.
"""

from __future__ import annotations

import contextlib
import email.utils
import json
import os
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import UTC
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeVar
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec
import tenacity

from batchrunner.errors import (
    BatchrunnerError,
    KeyRefused,
    NotFound,
    PayloadTooLarge,
    PermissionRefused,
    QuotaExceeded,
    ServerRefused,
    ServerUnavailable,
    TransitionRefused,
    UsageError,
    WebhookUnreachable,
)
from batchrunner.ports import Clock, Rng

SEALED = frozenset({"completed", "failed", "expired", "cancelled"})
# How a batch of jobs ends, which inference.club's clients made: without files.
ENDED = SEALED | {"DONE"}
# A server that never answered is most likely not there; one that did restarts, or its disk is being cleared.
FIRST_CONTACT_S = 10.0
OUTAGE_S = 600.0
RETRY_AFTER_MAX_S = 60.0
PAGE_LINES = 5_000
_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10.0, sock_read=120.0)
_BACKOFF_S, _BACKOFF_MAX_S = 0.25, 8.0
_READ_BYTES = 1 << 18
_SPOOLED_BYTES = 8 << 20
_ERROR_BYTES_MAX = 64 << 10

_T = TypeVar("_T")
Write = Callable[[bytes], object]


class Counts(msgspec.Struct, frozen=True):
    """Lines of a batch; expired and cancelled ones are in neither `completed` nor `failed`."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchProblem(msgspec.Struct, frozen=True):
    """Why a batch failed, one line of it."""

    code: str | None = None
    message: str | None = None
    line: int | None = None


class BatchProblems(msgspec.Struct, frozen=True):
    """Why a batch failed."""

    data: list[BatchProblem] = []


class LiveProgress(msgspec.Struct, frozen=True):
    """What our own servers tell of a batch that runs."""

    rate: float = 0.0
    in_flight: int = 0
    eta_earliest_at: int | None = None
    eta_latest_at: int | None = None


class RemoteBatch(msgspec.Struct, frozen=True):
    """A batch as a server shows it; what another server may lack has a default."""

    id: str
    status: str
    endpoint: str = ""
    request_counts: Counts | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: BatchProblems | None = None
    paused_reason: str | None = None
    blocked_by: str | None = None
    progress: LiveProgress | None = None

    @property
    def counts(self) -> Counts:
        """Its counts, zeros where a server shows none."""
        return self.request_counts or Counts()

    @property
    def has_ended(self) -> bool:
        """Whether nothing about it will change any more."""
        return self.status in ENDED

    @property
    def is_sealed(self) -> bool:
        """Whether its files have all its lines."""
        return self.status in SEALED


class FailedSample(msgspec.Struct, frozen=True):
    """One line of a group of failures."""

    custom_id: str | None = None
    id: str | None = None


class FailedGroup(msgspec.Struct, frozen=True):
    """Failed lines with one cause."""

    code: str
    message: str
    count: int
    samples: list[FailedSample]
    hint: str


class FailedLines(msgspec.Struct, frozen=True):
    """All failed lines of a batch, the largest group first."""

    total: int
    groups: list[FailedGroup]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown:
    """A batch, and the JSON in which the server showed it."""

    batch: RemoteBatch
    raw: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Finished lines behind a sequence number. Whoever gets it closes `content`, which stands at its start."""

    content: IO[bytes]
    line_count: int
    last_sequence: str


class _File(msgspec.Struct, frozen=True):
    id: str


class _Listing(msgspec.Struct, frozen=True):
    data: list[RemoteBatch]


class _Complaint(msgspec.Struct, frozen=True):
    message: str = ""
    code: str | None = None


class _Envelope(msgspec.Struct, frozen=True):
    error: _Complaint


class _AgainError(Exception):
    """A try that may succeed the next time: the error it is for the user if it does not, and how long to wait."""

    def __init__(self, error: BatchrunnerError, *, wait_s: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.wait_s = wait_s


class BatchClient:
    """One server, one key. `tell` gets a sentence whenever the server lets us wait."""

    def __init__(
        self, base_url: str, api_key: str | None, *, clock: Clock, rng: Rng, tell: Callable[[str], object]
    ) -> None:
        self.base_url = server_url(base_url)
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._clock = clock
        self._rng = rng
        self._tell = tell
        self._session: aiohttp.ClientSession | None = None
        self._was_answered = False
        self._progress_s = 0.0

    async def __aenter__(self) -> Self:
        """Open the connections."""
        self._session = aiohttp.ClientSession(timeout=_TIMEOUT, headers=self._headers, auto_decompress=True)
        return self

    async def __aexit__(
        self, _type: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        """Close the connections."""
        assert self._session is not None
        await self._session.close()

    async def greet(self) -> None:
        """See that the server is there and takes the key, before anything large is sent. Raises: as the others."""
        await self._json("GET", "/batches?limit=1")

    async def upload(self, path: Path, *, filename: str) -> str:
        """Upload a file of requests and give its id. Sent again after a failure, it is still one file."""
        key = self._rng.token_hex(16)

        async def send() -> bytes:
            with path.open("rb") as stream:
                form = aiohttp.FormData()
                form.add_field("purpose", "batch")
                form.add_field("file", stream, filename=filename, content_type="application/jsonl")
                return await self._once("POST", "/files", _read_whole, body=form, headers={"Idempotency-Key": key})

        return _decode(await self._again(send), _File).id

    async def create(self, fields: Mapping[str, object]) -> Shown:
        """Create a batch. Sent again after a failure, it is still one batch on a server that knows Idempotency-Key."""
        headers = {"Idempotency-Key": self._rng.token_hex(16), "Content-Type": "application/json"}
        return _shown(await self._json("POST", "/batches", body=json.dumps(fields).encode(), headers=headers))

    async def batch(self, batch_id: str) -> Shown:
        """Show a batch."""
        return _shown(await self._json("GET", _path(batch_id)))

    async def newest(self) -> list[RemoteBatch]:
        """Give the newest batches, newest first."""
        return _decode(await self._json("GET", "/batches"), _Listing).data

    async def cancel(self, batch_id: str) -> Shown:
        """Cancel a batch; again is no error.

        Raises:
            TransitionRefused: it has ended in another way.
        """
        return _shown(await self._json("POST", f"{_path(batch_id)}/cancel"))

    async def failures(self, batch_id: str) -> FailedLines | None:
        """Group the failed lines of a batch that is there; None when the server has no such call."""
        try:
            return _decode(await self._json("GET", f"{_path(batch_id)}/errors"), FailedLines)
        except NotFound:
            return None

    async def finished(self, batch_id: str, *, after: str, outcome: str | None) -> Page | None:
        """Give finished lines behind `after` ("0" for the first), a page at most, of a batch that is there.

        None when the server has no such call, or keeps these lines in the batch's files only.
        """
        wanted = f"?after={after}&limit={PAGE_LINES}" + (f"&outcome={outcome}" if outcome else "")
        try:
            return await self._again(lambda: self._once("GET", f"{_path(batch_id)}/results{wanted}", _read_page))
        except NotFound:
            return None

    async def download(self, file_id: str, write: Write, *, start: int = 0) -> int:
        """Write a file's bytes from `start` on and give its size; a broken transfer goes on where it broke."""
        position = start

        async def take(answer: aiohttp.ClientResponse) -> None:
            nonlocal position
            # A server without ranges sends everything again.
            left_out = position if answer.status == 200 else 0
            async for chunk in answer.content.iter_chunked(_READ_BYTES):
                fresh = chunk[left_out:]
                left_out = max(0, left_out - len(chunk))
                write(fresh)
                position += len(fresh)
                self._progress_s = self._clock.monotonic_s()

        async def fetch() -> None:
            headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={position}-"} if position else {})
            await self._once("GET", f"/files/{quote(file_id, safe='')}/content", take, headers=headers)

        with contextlib.suppress(_RangeBehindEndError):
            await self._again(fetch)
        return position

    # -- one exchange, again and again -----------------------------------------------------------------------------

    async def _json(
        self, method: str, path: str, *, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> bytes:
        return await self._again(lambda: self._once(method, path, _read_whole, body=body, headers=headers))

    async def _again(self, attempt: Callable[[], Awaitable[_T]]) -> _T:
        """Try until it succeeds, is refused for good, or the server stays away for too long."""
        self._progress_s = self._clock.monotonic_s()
        retrying = tenacity.AsyncRetrying(
            retry=tenacity.retry_if_exception_type(_AgainError),
            wait=self._wait_s,
            stop=self._is_enough,
            before_sleep=self._tell_wait,
            sleep=self._clock.sleep,
            reraise=True,
        )

        async def tried() -> _T:
            return await attempt()

        try:
            return await retrying(tried)
        except _AgainError as last:
            raise last.error from last.__cause__

    async def _once(
        self,
        method: str,
        path: str,
        read: Callable[[aiohttp.ClientResponse], Awaitable[_T]],
        *,
        body: bytes | aiohttp.FormData | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> _T:
        assert self._session is not None
        url = self.base_url + path
        try:
            async with self._session.request(method, url, data=body, headers=headers, allow_redirects=False) as answer:
                self._was_answered = True
                if answer.status not in (200, 206):
                    raise await _complaint(answer)
                return await read(answer)
        except aiohttp.InvalidURL as error:
            raise UsageError(f"--server: {self.base_url} is no address") from error
        except aiohttp.ClientSSLError as error:
            raise self._gone(error) from error
        except (aiohttp.ClientError, TimeoutError, ConnectionError) as error:
            raise _AgainError(self._gone(error)) from error

    def _gone(self, error: BaseException) -> ServerUnavailable:
        said = str(error) or type(error).__name__
        if isinstance(error, aiohttp.ClientConnectorError):
            # asyncio puts the address again where the reason would stand.
            number = error.os_error.errno or 0
            said = os.strerror(number) if number > 0 else error.os_error.strerror or said
        if not self._was_answered:
            return ServerUnavailable(f"cannot connect to {self.base_url}: {said}")
        return ServerUnavailable(f"{self.base_url} does not answer any more: {said}")

    def _is_enough(self, _state: tenacity.RetryCallState) -> bool:
        patience_s = OUTAGE_S if self._was_answered else FIRST_CONTACT_S
        return self._clock.monotonic_s() - self._progress_s >= patience_s

    def _wait_s(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, _AgainError) and error.wait_s is not None:
            return error.wait_s
        most_s = min(_BACKOFF_MAX_S, _BACKOFF_S * 2.0 ** min(state.attempt_number, 10))
        return most_s * (0.5 + self._rng.uniform() / 2)

    def _tell_wait(self, state: tenacity.RetryCallState) -> None:
        # The first failures are nothing to speak of.
        if state.attempt_number == 3 and state.outcome is not None:
            self._tell(f"{state.outcome.exception()}; trying again")


class _RangeBehindEndError(Exception):
    """All bytes of the file are there already."""


def server_url(text: str) -> str:
    """Bring a server's address to what SDKs call base_url: without a path it gets /v1.

    Raises:
        UsageError: it is no http address.
    """
    parts = urlsplit(text if "://" in text else f"http://{text}")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(f"--server: {text!r} is no address of a server", hint="Write http://127.0.0.1:8080/v1.")
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/') or '/v1'}"


# -- answers -----------------------------------------------------------------------------------------------------------


async def _read_whole(answer: aiohttp.ClientResponse) -> bytes:
    return await answer.read()


async def _read_page(answer: aiohttp.ClientResponse) -> Page:
    """Take a page whole before anybody sees it: one that broke off is asked for again."""
    content = tempfile.SpooledTemporaryFile(max_size=_SPOOLED_BYTES)  # noqa: SIM115 - closed by who reads it
    line_count = 0
    try:
        async for chunk in answer.content.iter_chunked(_READ_BYTES):
            content.write(chunk)
            line_count += chunk.count(b"\n")
    except BaseException:
        content.close()
        raise
    content.seek(0)
    return Page(
        content=content,
        line_count=line_count,
        last_sequence=answer.headers.get("X-Last-Sequence", "0"),
    )


async def _complaint(answer: aiohttp.ClientResponse) -> Exception:
    """Make an error of an answer that is none of ours to use."""
    if answer.status == 416:
        return _RangeBehindEndError()
    raw = await answer.content.read(_ERROR_BYTES_MAX)
    try:
        said = msgspec.json.decode(raw, type=_Envelope).error
    except msgspec.DecodeError:
        said = _Complaint(f"the server answered {answer.status} {answer.reason or ''}".strip())
    error = _error_of(answer.status, said)
    if _may_come_again(answer):
        return _AgainError(error, wait_s=_asked_wait_s(answer.headers))
    return error


def _may_come_again(answer: aiohttp.ClientResponse) -> bool:
    verdict = answer.headers.get("x-should-retry")
    if verdict in ("true", "false"):
        return verdict == "true"
    # A conflict is final unless the server names a time; SDKs try it again for nothing.
    return answer.status in (408, 429) or answer.status >= 500 or (answer.status == 409 and _names_wait(answer.headers))


def _names_wait(headers: Mapping[str, str]) -> bool:
    return "retry-after" in headers or "retry-after-ms" in headers


def _asked_wait_s(headers: Mapping[str, str]) -> float | None:
    """Give the wait that a server asks for, None for none that can be read; the HTTP date needs no great care."""
    for name, unit_s in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        try:
            return min(RETRY_AFTER_MAX_S, max(0.0, float(headers.get(name, "")) * unit_s))
        except ValueError:
            continue
    return _until_date_s(headers)


def _until_date_s(headers: Mapping[str, str]) -> float | None:
    """Read Retry-After as an HTTP date, against the server's own Date."""
    try:
        then, now = (email.utils.parsedate_to_datetime(headers[name]) for name in ("retry-after", "date"))
    except (KeyError, ValueError):
        return None
    wait_s = (then.replace(tzinfo=UTC) - now.replace(tzinfo=UTC)).total_seconds()
    return min(RETRY_AFTER_MAX_S, max(0.0, wait_s))


def _error_of(status: int, said: _Complaint) -> BatchrunnerError:
    message = said.message or f"the server answered {status}"
    match status:
        case 401:
            return KeyRefused(message, hint="Set BATCHRUNNER_API_KEY to a key of this server.")
        case 403:
            return PermissionRefused(message)
        case 404 | 410:
            hint = "Check the id, and that --server and BATCHRUNNER_API_KEY are those it was submitted with."
            return NotFound(message, hint=hint)
        case 409:
            return TransitionRefused(message)
        case 413:
            return PayloadTooLarge(message)
        case 429:
            return QuotaExceeded(message)
        case _ if status >= 500:
            return ServerUnavailable(message)
        case _:
            return WebhookUnreachable(message) if said.code == WebhookUnreachable.code else ServerRefused(message)


def _path(batch_id: str) -> str:
    return f"/batches/{quote(batch_id, safe='')}"


def _shown(raw: bytes) -> Shown:
    return Shown(batch=_decode(raw, RemoteBatch), raw=raw)


def _decode(raw: bytes, kind: type[_T]) -> _T:
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.DecodeError as error:
        message = f"the server's answer is not that of a Batch API: {error}"
        raise ServerRefused(message, hint="Is --server the base URL of a batch server, with its /v1?") from error
