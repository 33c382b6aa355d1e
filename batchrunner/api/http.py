"""What every endpoint is made of: a Route of the table, the Call that reaches its handler, and the Answer it gives.

Handlers see no sockets and no other tenant; whatever blocks goes through `Call.blocking`.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import ParamSpec, Protocol, TypeVar

import msgspec
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from batchrunner.adding import OpenBatches
from batchrunner.addresses import AddressRules
from batchrunner.api.counting import Counts
from batchrunner.api.envelope import SERVER_ERROR, ErrorBody, ErrorEnvelope, Refusal, body_too_large
from batchrunner.api.job_groups import JobGroups
from batchrunner.api.malformed import Connection
from batchrunner.api.typed import StructT, read_json, read_parameters
from batchrunner.api.vitals import Vitals
from batchrunner.api.watching import Watching
from batchrunner.holdings import NO_LIMITS, ApiKey, KeyLimits, KeyScope, Replay
from batchrunner.live import Asked, Live
from batchrunner.models import TenantId
from batchrunner.outbox import Poster
from batchrunner.ports import Blobs, Clock, Rng, Store, TenantScope
from batchrunner.prices import Price, parse_price
from batchrunner.settings import MIB, Settings

JSON = "application/json"
# By either of these a request to the root names the dialect that it wants.
DIALECT_HEADER = "Batchrunner-Dialect"
DIALECT_PARAMETER = "dialect"
BODY_BYTES_MAX = MIB
# Longer ones are taken apart off the event loop.
LONG_BODY_BYTES = 128 * 1024
# A socket that gives nothing for so long is given up; one that trickles is held by the caps on bytes only.
BODY_IDLE_S = 60.0
# All bodies that are held whole at one time. What they are taken apart into is a few times as large.
HELD_BYTES_MAX = 64 * MIB
# Where a listing goes on.
_PLACES = frozenset({"after", "pagination_token"})

P = ParamSpec("P")
T = TypeVar("T")

_encode = msgspec.json.Encoder().encode
_PLACEHOLDER = re.compile(r"\{(\w+)\}")


class Reading:
    """Blobs that downloads of this process read just now, so that nobody deletes them. Of one event loop."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    @contextmanager
    def hold(self, name: str) -> Iterator[None]:
        """Count the blob as read while the block runs."""
        self._counts[name] += 1
        try:
            yield
        finally:
            self._counts[name] -= 1
            self._counts += Counter()

    def names(self) -> frozenset[str]:
        """Name what is being read. From any thread."""
        return frozenset(self._counts)


class Held:
    """Bytes of bodies that this process holds in memory. Of one event loop.

    Nobody waits for room: whoever sent slowly would keep all others waiting.
    """

    def __init__(self, size_bytes_max: int = HELD_BYTES_MAX) -> None:
        self.size_bytes = 0
        self._size_bytes_max = size_bytes_max

    def take(self, size_bytes: int) -> None:
        """Count more bytes. Raises: Refusal when there is no room for them."""
        if self.size_bytes + size_bytes > self._size_bytes_max:
            raise Refusal(
                "The server is busy with other large requests.",
                status=503,
                kind=SERVER_ERROR,
                code="busy",
                retry_after_s=1.0,
            )
        self.size_bytes += size_bytes

    def give_back(self, size_bytes: int) -> None:
        """Count bytes no more."""
        self.size_bytes -= size_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiParts:
    """What the API is made of. `executor` runs whatever blocks; `is_open` means no keys, which is for loopback only.

    `reading` names the blobs that must not be deleted now, `heavy` lets one long job at a time into the executor,
    `vitals` tell how the server does and whether it is about to end, `watching` holds the batches that are followed,
    `counts` the failures that were counted, `held` how much of bodies is in memory. `addresses` says where webhooks may
    go, `poster` sends one. `live` passes on what is answered at once, None where no upstream is named. `open_batches`
    remembers the ids of requests in open ones, `job_groups` gathers jobs that come alone.
    """

    store: Store
    blobs: Blobs
    clock: Clock
    rng: Rng
    settings: Settings
    is_open: bool
    executor: Executor
    reading: Reading = field(default_factory=Reading)
    heavy: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1))
    vitals: Vitals = field(default_factory=Vitals)
    watching: Watching = field(default_factory=Watching)
    counts: Counts = field(default_factory=Counts)
    held: Held = field(default_factory=Held)
    addresses: AddressRules = field(default_factory=AddressRules)
    poster: Poster | None = None
    live: Live | None = None
    open_batches: OpenBatches = field(default_factory=OpenBatches)
    job_groups: JobGroups = field(default_factory=JobGroups)

    @property
    def prices(self) -> tuple[Price, ...]:
        """What tokens cost."""
        return tuple(parse_price(each) for each in self.settings.prices)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a handler gives: whole bytes, or `chunks` to be streamed; `size_bytes` is their sum where it is known.

    Chunks are not asked for when only the head is wanted; a generator's `finally` runs in any case once it was started,
    and any other iterator's `aclose` is called. With `is_endless` they stop when the server does.
    """

    body: bytes = b""
    status: int = 200
    content_type: str = JSON
    headers: Mapping[str, str] = field(default_factory=dict)
    chunks: AsyncIterator[bytes] | None = None
    size_bytes: int | None = None
    is_endless: bool = False


def json_answer(value: msgspec.Struct, *, status: int = 200) -> Answer:
    """Answer with a struct, in the order of its fields."""
    return Answer(body=_encode(value), status=status)


class Handler(Protocol):
    """What answers the calls of a route: a coroutine function."""

    __name__: str

    def __call__(self, call: Call, /) -> Awaitable[Answer]:
        """Answer one call. Raises: Refusal, or any error of the tree."""


# Gives the answer to a create whose first request died between making the object and answering.
Presenter = Callable[["Call", str], Awaitable[Answer]]
# Tells whether a request that came to the root is one of a dialect's. Raises: Refusal.
Recognizer = Callable[["Call"], Awaitable[bool]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """One row of the table. `path` holds `{name}` for what is looked up; paths under /v1 are served, strictly, under
    /openai/v1 as well.

    A row of a `dialect` stands under the dialect's name (/xai/v1/...), and at the root too: alone where no other row
    has its path and method, otherwise for those requests that ask for the dialect by name or that it `recognizes`. Its
    refusals have the shape of `error`.

    `scope` is what a key must have, None asks for no key. A route that creates has `present`, which answers with the
    object of that id, and takes an Idempotency-Key. `request`, `query` and `answer` describe; handlers read by them.
    `accepted` describes what comes with 202: instead of 200 where there is no `answer`. Under /openai/v1
    `strict_request` and `strict_answer` stand in for what they are named after. What `leads_on` answers with 303.

    A page for people has `refuse`, which shows a refusal as another page; its key may be the password of HTTP Basic.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    scope: KeyScope | None = KeyScope.READ
    request: type[msgspec.Struct] | None = None
    query: type[msgspec.Struct] | None = None
    answer: type[msgspec.Struct] | None = None
    accepted: type[msgspec.Struct] | None = None
    strict_request: type[msgspec.Struct] | None = None
    strict_answer: type[msgspec.Struct] | None = None
    leads_on: bool = False
    # What does not fit into a struct: the media type of the request or of a streamed answer.
    request_media: str = JSON
    answer_media: str = JSON
    # Of a form: the field with the bytes.
    file_field: str = "file"
    body_bytes_max: int = BODY_BYTES_MAX
    present: Presenter | None = None
    is_streamed_in: bool = False
    dialect: str | None = None
    recognizes: Recognizer | None = None
    error: type[ErrorBody] = ErrorEnvelope
    refuse: Callable[[Refusal], Answer] | None = None

    @property
    def name(self) -> str:
        """What it does, as one word: the handler's name, behind that of its dialect."""
        return f"{self.dialect}_{self.handler.__name__}" if self.dialect is not None else self.handler.__name__

    @property
    def root_path(self) -> str:
        """The path without the name of its dialect."""
        return self.path if self.dialect is None else self.path.removeprefix(f"/{self.dialect}")

    @property
    def is_create(self) -> bool:
        """Tell whether it takes an Idempotency-Key."""
        return self.present is not None

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names in the path, in order."""
        return tuple(_PLACEHOLDER.findall(self.path))


@dataclass(slots=True, kw_only=True)
class Call:
    """One request on its way through a handler. `is_strict` means that it wants OpenAI's API and nothing else, as under
    /openai/v1; `is_pure` that it asks for its route's dialect by name, so that the answer need not suit others.

    `replay` is to be handed to the Store's create, which notes what was made for the request's Idempotency-Key.
    `replayed` is the answer that a streamed create has already; whether it is one and the same shows only at its end.
    """

    parts: ApiParts
    route: Route
    request: web.Request
    request_id: str
    path: str
    path_params: Mapping[str, str]
    is_strict: bool
    tenant: TenantId
    is_pure: bool = False
    key: ApiKey | None = None
    replay: Replay | None = None
    replayed: Replay | None = None
    # What the body asks for, once somebody has looked.
    asked: Asked | None = None
    _body: bytes | None = None
    _held_bytes: int = 0

    @property
    def scope(self) -> TenantScope:
        """The caller's view of the Store; its methods block."""
        return self.parts.store.scope(self.tenant)

    @property
    def limits(self) -> KeyLimits:
        """What the caller's key is limited to."""
        return self.key.limits if self.key is not None else NO_LIMITS

    def parameters(self, kind: type[StructT]) -> StructT:
        """Read the query string; of a name given twice the last counts. Clients write down an empty place in a listing
        as well, which means its beginning. Raises: Refusal.
        """
        given = self.request.query.items()
        return read_parameters({name: value for name, value in given if value or name not in _PLACES}, kind)

    @property
    def has_listener(self) -> bool:
        """Whether the caller is still there."""
        transport = self.request.transport
        return transport is not None and not transport.is_closing()

    def on_hang_up(self, step: Callable[[], None] | None) -> None:
        """Have a step made if the caller hangs up before it has its whole answer; None unmakes it."""
        connection = self.request.protocol
        assert isinstance(connection, Connection)
        connection.on_hang_up = step

    def require_listener(self) -> None:
        """Begin nothing long for nobody. Raises: Refusal when the caller has hung up."""
        if not self.has_listener:
            raise Refusal("The caller has hung up.", status=499, code="caller_gone")

    async def blocking(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Run what blocks, such as any method of Store and Blobs, off the event loop."""
        return await self.start(function, *args, **kwargs)

    def start(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> asyncio.Future[T]:
        """Begin what blocks; the caller awaits its end."""
        loop = asyncio.get_running_loop()
        return loop.run_in_executor(self.parts.executor, partial(function, *args, **kwargs))

    async def body(self, size_bytes_max: int | None = None) -> bytes:
        """Read the whole body. Raises: Refusal when it is above the route's cap, or the one that is given, stops
        coming, or has no room.
        """
        if self._body is None:
            pieces = []
            async for piece in self.incoming(size_bytes_max or self.route.body_bytes_max):
                self.parts.held.take(len(piece))
                self._held_bytes += len(piece)
                pieces.append(piece)
            self._body = b"".join(pieces)
        return self._body

    def let_go(self) -> None:
        """Say that the body is not needed any more: an answer may take long."""
        self._body = self.asked = None
        self.parts.held.give_back(self._held_bytes)
        self._held_bytes = 0

    async def json(self, kind: type[StructT]) -> StructT:
        """Read the body as a struct; under /openai/v1 with no unknown keys. Raises: Refusal."""
        raw = await self.body()
        if len(raw) > LONG_BODY_BYTES:
            return await self.blocking(read_json, raw, kind, is_strict=self.is_strict)
        return read_json(raw, kind, is_strict=self.is_strict)

    async def json_if_any(self, kind: type[StructT]) -> StructT:
        """Read the body as a struct that needs no field, which may be left out altogether. Raises: Refusal."""
        return await self.json(kind) if (await self.body()).strip() else kind()

    async def incoming(self, size_bytes_max: int) -> AsyncIterator[bytes]:
        """Give the body as it comes.

        Raises:
            Refusal: above the cap, compressed, too slow, or broken off.
        """
        encoding = self.request.headers.get("Content-Encoding", "identity")
        if encoding.strip().lower() not in ("", "identity"):
            # A megabyte would hold the event loop for seconds, even after it was refused.
            raise Refusal("The request body is compressed; send it as it is.", status=415, code="unsupported_encoding")
        announced = self.request.content_length
        if announced is not None and announced > size_bytes_max:
            raise body_too_large(size_bytes_max)
        size_bytes = 0
        while piece := await self._piece():
            size_bytes += len(piece)
            if size_bytes > size_bytes_max:
                raise body_too_large(size_bytes_max)
            yield piece

    async def _piece(self) -> bytes:
        try:
            async with asyncio.timeout(BODY_IDLE_S):
                return await self.request.content.readany()
        except TimeoutError:
            raise Refusal("The request body did not arrive in time.", status=408, code="request_timeout") from None
        except (web.RequestPayloadError, HttpProcessingError, ConnectionError) as error:
            raise Refusal("The request body ended early or is broken.", code="incomplete_body") from error
