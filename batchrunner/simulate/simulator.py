"""The upstream itself, for demos, tests and benchmarks.

It answers every body in its own way, takes its time, has few slots, fails as it is told to, and counts what came.
"""

from __future__ import annotations

import asyncio
import functools
import hashlib
import random
import signal
from collections import OrderedDict, deque
from collections.abc import Callable
from types import TracebackType
from typing import Final, Self

import orjson

from batchrunner.errors import UsageError
from batchrunner.simulate.connection import Connection
from batchrunner.simulate.replies import (
    ENDPOINTS,
    EVENT_STREAM,
    error_answer,
    faulty_answer,
    model_answer,
    models_answer,
    unknown_path_answer,
    wrong_method_answer,
)
from batchrunner.simulate.rules import (
    Fault,
    FaultKind,
    FaultRates,
    Latency,
    SimulatorSettings,
    changed_settings,
    parse_fault_rates,
    parse_latency,
    parse_script,
)
from batchrunner.simulate.tally import BodyCounts, SimulatorStats, Tally, body_key
from batchrunner.simulate.wire import Answer, Request, chunk_bytes, header_of

_BACKLOG: Final = 4096
_PAD: Final = b" " * (256 * 1024)
_REFUSE_DELAY_S: Final = 0.01
_SEEN: Final = b"/__seen/"


class _Exchange:
    """One request on its way to an answer; it counts in the tally that was current when it came."""

    __slots__ = ("connection", "digest", "fault", "is_counted", "is_working", "key", "request", "tally", "timer")

    def __init__(self, connection: Connection, request: Request, tally: Tally) -> None:
        self.connection = connection
        self.request = request
        self.tally = tally
        self.digest = hashlib.sha256(request.body).digest()
        self.key = body_key(self.digest)
        self.fault: Fault | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.is_working = False
        self.is_counted = False


class Simulator:
    """The upstream, listening while its `async with` block runs.

    Raises on entering:
        OSError: the address cannot be listened on.
    """

    def __init__(self, settings: SimulatorSettings | None = None) -> None:
        """Make an upstream that does not listen yet.

        Raises:
            UsageError: a setting does not fit.
        """
        self._settings = SimulatorSettings()
        self._latency: Latency = parse_latency("0")
        self._fault_rates: FaultRates = parse_fault_rates("")
        self._apply(settings or self._settings)
        self._rng = random.Random(self._settings.seed)
        self._tally = Tally()
        self._working = 0
        self._waiting: OrderedDict[_Exchange, None] = OrderedDict()
        self._exchanges: dict[Connection, _Exchange] = {}
        self._connections: set[Connection] = set()
        self._watchers: list[tuple[Callable[[SimulatorStats], bool], asyncio.Future[SimulatorStats]]] = []
        self._request_number = 0
        self._is_filling = False
        self._server: asyncio.Server | None = None
        self._reopening: asyncio.Task[None] | None = None
        self._port = self._settings.port

    @property
    def settings(self) -> SimulatorSettings:
        """The settings in force."""
        return self._settings

    @property
    def port(self) -> int:
        """The port listened on."""
        return self._port

    @property
    def url(self) -> str:
        """The base URL that SDKs take, ending in /v1."""
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        return f"http://{host}:{self._port}/v1"

    async def __aenter__(self) -> Self:
        """Listen."""
        await self._listen()
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop listening and hang up on everybody."""
        if self._reopening is not None:
            self._reopening.cancel()
            await asyncio.wait([self._reopening])
        server, self._server = self._server, None
        if server is not None:
            server.close()
        self._hang_up()
        if server is not None:
            await server.wait_closed()
        if self._reopening is not None and not self._reopening.cancelled():
            self._reopening.result()

    def stats(self) -> SimulatorStats:
        """Return the counters as they stand."""
        return self._tally.read(working=self._working, waiting=len(self._waiting), connections=len(self._connections))

    def seen(self, body: bytes) -> BodyCounts:
        """Return what became of the sends of this body."""
        return self._tally.body(body_key(hashlib.sha256(body).digest()))

    def reset(self) -> None:
        """Start counting, and every script, from zero."""
        self._tally = Tally()

    def change(self, settings: SimulatorSettings) -> None:
        """Put other settings in force while running; a new host, port or seed has no effect any more.

        Raises:
            UsageError: a setting does not fit; then none is changed.
        """
        self._apply(settings)
        self._fill()

    async def wait_until(self, is_reached: Callable[[SimulatorStats], bool]) -> SimulatorStats:
        """Return the first counters for which the condition holds, now or after some request or connection to come."""
        stats = self.stats()
        if is_reached(stats):
            return stats
        reached: asyncio.Future[SimulatorStats] = asyncio.get_running_loop().create_future()
        self._watchers.append((is_reached, reached))
        return await reached

    def refuse(self, duration_s: float) -> None:
        """Hang up on everybody and take no connection for a while, as a server that restarts; twice is as once."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        self._hang_up()
        self._reopening = asyncio.get_running_loop().create_task(self._reopen(duration_s))

    def take(self, connection: Connection, request: Request) -> None:
        """Take a request from a connection; see `Desk`."""
        if request.path not in ENDPOINTS:
            connection.answer(self._side_answer(request))
        elif request.method != b"POST":
            connection.answer(wrong_method_answer(request, "POST"))
        else:
            self._admit(_Exchange(connection, request, self._tally))
        if self._watchers:
            self._wake_watchers()

    def opened(self, connection: Connection) -> None:
        """Note a new connection; see `Desk`."""
        self._connections.add(connection)
        if self._watchers:
            self._wake_watchers()

    def lost(self, connection: Connection) -> None:
        """Free what a lost client held; see `Desk`."""
        self._connections.discard(connection)
        exchange = self._exchanges.get(connection)
        if exchange is not None:
            if not exchange.is_counted:
                exchange.is_counted = True
                exchange.tally.abandon()
            self._release(exchange)
        if self._watchers:
            self._wake_watchers()

    def next_request_number(self) -> int:
        """Return a new number; see `Desk`."""
        self._request_number += 1
        return self._request_number

    def _apply(self, settings: SimulatorSettings) -> None:
        for name, limit in (("slots", settings.slots), ("queue", settings.queue)):
            if limit is not None and limit < 0:
                raise UsageError(f"{name} is {limit}, at least 0")
        latency = parse_latency(settings.latency)
        self._fault_rates = parse_fault_rates(settings.faults)
        self._latency = latency
        self._settings = settings

    async def _listen(self) -> None:
        server = await asyncio.get_running_loop().create_server(
            lambda: Connection(self), self._settings.host, self._port, backlog=_BACKLOG
        )
        self._server = server
        self._port = server.sockets[0].getsockname()[1]

    async def _reopen(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s)
        await self._listen()

    def _hang_up(self) -> None:
        for exchange in [*self._exchanges.values()]:
            if not exchange.is_counted:
                self._count_fault(exchange, "refuse", None)
            self._forget(exchange)
        for connection in [*self._connections]:
            connection.abort()

    def _wake_watchers(self) -> None:
        stats = self.stats()
        for watcher in [*self._watchers]:
            is_reached, reached = watcher
            if reached.done() or is_reached(stats):
                self._watchers.remove(watcher)
                if not reached.done():
                    reached.set_result(stats)

    # From the request to its slot.

    def _admit(self, exchange: _Exchange) -> None:
        appearance_index = exchange.tally.arrive(exchange.key)
        refusal = self._refusal(exchange.request)
        if refusal is None:
            try:
                exchange.fault = self._choose_fault(exchange.request.body, appearance_index)
            except UsageError as error:
                refusal = error_answer(400, error.message, param="simulate")
        settings = self._settings
        if refusal is not None:
            self._settle(exchange, refusal)
        elif settings.slots is None or self._working < settings.slots:
            self._begin(exchange)
        elif settings.queue is None or len(self._waiting) < settings.queue:
            self._exchanges[exchange.connection] = exchange
            self._waiting[exchange] = None
        else:
            message = f"All {settings.slots} slots are taken and {settings.queue} requests wait."
            answer = error_answer(429, message, code="rate_limit_exceeded")
            self._settle(exchange, answer._replace(headers=((b"Retry-After", b"1"),)))

    def _refusal(self, request: Request) -> Answer | None:
        if self._settings.is_down:
            return error_answer(503, "The simulator was told to be down.")
        if self._settings.api_key is not None:
            sent = header_of(request.head, b"authorization")
            if sent != b"Bearer " + self._settings.api_key.encode():
                return error_answer(401, "Incorrect API key provided.", code="invalid_api_key")
        return None

    def _choose_fault(self, body: bytes, appearance_index: int) -> Fault | None:
        if b'"simulate"' in body:
            script = parse_script(body)
            if script is not None:
                return script.fault_at(appearance_index)
        return self._fault_rates.draw(self._rng)

    def _begin(self, exchange: _Exchange) -> None:
        self._working += 1
        exchange.is_working = True
        latency_s = self._latency.draw_s(self._rng)
        if latency_s <= 0.0 and exchange.fault is None:
            self._deliver(exchange)
            return
        self._exchanges[exchange.connection] = exchange
        if latency_s <= 0.0:
            self._deliver(exchange)
        else:
            exchange.timer = asyncio.get_running_loop().call_later(latency_s, self._deliver_late, exchange)

    def _fill(self) -> None:
        # Answering at once frees a slot at once, which would come back here: the loop does it without depth.
        if self._is_filling:
            return
        self._is_filling = True
        try:
            while self._waiting and (self._settings.slots is None or self._working < self._settings.slots):
                exchange, _ = self._waiting.popitem(last=False)
                self._begin(exchange)
        finally:
            self._is_filling = False

    def _forget(self, exchange: _Exchange) -> None:
        self._exchanges.pop(exchange.connection, None)
        self._waiting.pop(exchange, None)
        if exchange.timer is not None:
            exchange.timer.cancel()
            exchange.timer = None
        if exchange.is_working:
            exchange.is_working = False
            self._working -= 1

    def _release(self, exchange: _Exchange) -> None:
        self._forget(exchange)
        if self._waiting:
            self._fill()

    # From the slot to the answer.

    def _deliver_late(self, exchange: _Exchange) -> None:
        self._deliver(exchange)
        if self._watchers:
            self._wake_watchers()

    def _deliver(self, exchange: _Exchange) -> None:
        answer = model_answer(exchange.request.path, exchange.request.body, exchange.digest)
        if answer.content_type == EVENT_STREAM and exchange.fault is None:
            self._exchanges[exchange.connection] = exchange
            exchange.connection.write(exchange.connection.pack_head(answer, None))
            self._stream(exchange, deque(answer.body.splitlines(keepends=True)))
        elif exchange.fault is None or answer.status != 200:
            self._settle(exchange, answer)
        else:
            self._deliver_fault(exchange, exchange.fault, answer)

    def _settle(self, exchange: _Exchange, answer: Answer, fault: Fault | None = None) -> None:
        """Count and send a whole answer."""
        exchange.is_counted = True
        if answer.status == 200 and (fault is None or fault.is_good_answer):
            exchange.tally.answer_well(exchange.key, answer.status)
        else:
            exchange.tally.fault(exchange.key, fault.name if fault else str(answer.status), answer.status)
        self._release(exchange)
        exchange.connection.answer(answer)

    def _count_fault(self, exchange: _Exchange, name: str, status: int | None) -> None:
        exchange.is_counted = True
        exchange.tally.fault(exchange.key, name, status)

    def _deliver_fault(self, exchange: _Exchange, fault: Fault, good: Answer) -> None:
        connection = exchange.connection
        match fault.kind:
            case FaultKind.STALL:
                # The slot stays taken until the client gives up.
                self._count_fault(exchange, fault.name, None)
            case FaultKind.RESET:
                self._count_fault(exchange, fault.name, None)
                self._release(exchange)
                connection.reset()
            case FaultKind.RESET_MID | FaultKind.TRUNCATE:
                self._count_fault(exchange, fault.name, 200)
                connection.write(connection.pack(good)[: -len(good.body) // 2])
                self._release(exchange)
                if fault.kind is FaultKind.TRUNCATE:
                    connection.close()
                else:
                    connection.reset_soon()
            case FaultKind.DRIP:
                self._count_fault(exchange, fault.name, 200)
                packed = connection.pack(good)
                connection.write(packed[: -len(good.body)])
                self._drip(exchange, good.body, 0)
            case FaultKind.HUGE:
                self._count_fault(exchange, fault.name, 200)
                self._begin_huge(exchange, good)
            case _:
                self._settle(exchange, faulty_answer(fault, good), fault)

    def _stream(self, exchange: _Exchange, lines: deque[bytes]) -> None:
        """Send one event, which is a line and an empty one, and have the next follow; each is a chunk."""
        exchange.connection.write(chunk_bytes(lines.popleft() + lines.popleft()))
        if lines:
            wait_s = self._settings.stream_interval_s
            exchange.timer = asyncio.get_running_loop().call_later(wait_s, self._stream, exchange, lines)
            return
        exchange.connection.write(chunk_bytes(b""))
        exchange.is_counted = True
        exchange.tally.answer_well(exchange.key, 200)
        self._release(exchange)
        exchange.connection.finish()
        if self._watchers:
            self._wake_watchers()

    def _drip(self, exchange: _Exchange, body: bytes, position: int) -> None:
        if position == len(body):
            self._release(exchange)
            exchange.connection.finish()
            return
        exchange.connection.write(body[position : position + 1])
        exchange.timer = asyncio.get_running_loop().call_later(
            self._settings.drip_interval_s, self._drip, exchange, body, position + 1
        )

    def _begin_huge(self, exchange: _Exchange, good: Answer) -> None:
        """Send the good answer with so much white space before its end that it has the size wanted."""
        padding_bytes = max(0, self._settings.huge_bytes - len(good.body))
        length = len(good.body) + padding_bytes
        exchange.connection.write(exchange.connection.pack_head(good, length) + good.body[:-1])
        self._pump(exchange, padding_bytes)

    def _pump(self, exchange: _Exchange, padding_bytes: int) -> None:
        connection = exchange.connection
        while padding_bytes:
            if connection.is_paused:
                connection.when_drained(functools.partial(self._pump, exchange, padding_bytes))
                return
            piece = _PAD[:padding_bytes]
            padding_bytes -= len(piece)
            connection.write(piece)
        connection.write(b"}")
        self._release(exchange)
        connection.finish()

    # Beside the model endpoints.

    def _side_answer(self, request: Request) -> Answer:
        if request.path.startswith(b"/__"):
            return self._control_answer(request)
        refusal = self._refusal(request)
        if refusal is not None:
            return refusal
        if request.path != b"/v1/models":
            return unknown_path_answer(request)
        return models_answer() if request.method == b"GET" else wrong_method_answer(request, "GET")

    def _control_answer(self, request: Request) -> Answer:
        match request.method, request.path:
            case b"GET", b"/__stats":
                return Answer(200, orjson.dumps(self.stats()))
            case b"GET", path if path.startswith(_SEEN):
                return self._seen_answer(path.removeprefix(_SEEN))
            case b"POST", b"/__reset":
                self.reset()
                return Answer(200, b"{}")
            case b"POST", b"/__control":
                return self._changed_answer(request.body)
            case _:
                return unknown_path_answer(request)

    def _seen_answer(self, hexadecimal: bytes) -> Answer:
        try:
            digest = bytes.fromhex(hexadecimal.decode("ascii"))
        except ValueError:
            digest = b""
        if len(digest) != hashlib.sha256().digest_size:
            return error_answer(400, "The path does not end in a SHA-256 digest of 64 hexadecimal digits.")
        return Answer(200, orjson.dumps(self._tally.body(body_key(digest))._asdict()))

    def _changed_answer(self, body: bytes) -> Answer:
        try:
            settings, refuse_s = changed_settings(self._settings, body)
            self.change(settings)
        except UsageError as error:
            return error_answer(400, error.message)
        if refuse_s is not None:
            # The client that asks for it gets its answer first.
            asyncio.get_running_loop().call_later(_REFUSE_DELAY_S, self.refuse, refuse_s)
        names = ("slots", "queue", "latency", "faults", "is_down")
        return Answer(200, orjson.dumps({name: getattr(settings, name) for name in names}))


async def serve_until_signalled(
    settings: SimulatorSettings,
    announce: Callable[[Simulator], None],
) -> SimulatorStats:
    """Serve until SIGTERM or SIGINT and return the last counters; `announce` is called once it listens.

    Raises:
        OSError: the address cannot be listened on.
        UsageError: a setting does not fit.
    """
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    async with Simulator(settings) as simulator:
        announce(simulator)
        await stopped.wait()
        return simulator.stats()
