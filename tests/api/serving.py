"""A real API server on a real socket, over a real store and blobs in a folder."""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import aiohttp
import orjson
from multidict import CIMultiDictProxy
from yarl import URL

from batchrunner.addresses import AddressRules
from batchrunner.api.auth import digest_of
from batchrunner.api.http import ApiParts, Route
from batchrunner.api.routes import build_app, described, make_runner
from batchrunner.api.vitals import Vitals
from batchrunner.blobs.local import LocalBlobs
from batchrunner.clock import SystemClock, SystemRng
from batchrunner.holdings import NO_LIMITS, ApiKey, KeyId, KeyLimits, KeyScope
from batchrunner.models import LOCAL_TENANT, TenantId
from batchrunner.ports import Clock, TenantScope
from batchrunner.poster import AiohttpPoster
from batchrunner.queue_pages import queue_routes
from batchrunner.serving import open_live
from batchrunner.settings import Settings
from batchrunner.store.sqlite import SqliteStore

LINE = b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":[]}}\n'
ALL_SCOPES = tuple(KeyScope)
# The table of a server, pages and all.
WHOLE = described(*queue_routes(b"secret"))
NO_KEYS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    """One answer, read to its end."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        return orjson.loads(self.body)


@dataclass(slots=True, kw_only=True)
class Served:
    """A server that runs, and a client of it."""

    port: int
    folder: Path
    parts: ApiParts
    session: aiohttp.ClientSession
    secret: str | None = None
    clock: Clock = field(default_factory=SystemClock)

    @property
    def base(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def scope(self) -> TenantScope:
        return self.parts.store.scope(LOCAL_TENANT)

    async def call(
        self,
        method: str,
        path: str,
        *,
        body: Any = None,
        json: Any = None,
        headers: Mapping[str, str] | None = None,
        secret: str | None = None,
    ) -> Reply:
        """Send one request; the path goes out as it stands, with its escapes."""
        sent = dict(headers or {})
        secret = secret or self.secret
        if secret is not None:
            sent.setdefault("Authorization", f"Bearer {secret}")
        if json is not None:
            body = orjson.dumps(json)
            sent.setdefault("Content-Type", "application/json")
        if isinstance(body, bytes):
            # The client warns of large bodies in one piece of bytes.
            body = io.BytesIO(body)
        url = URL(self.base + path, encoded=True)
        async with self.session.request(method, url, data=body, headers=sent) as answer:
            return Reply(status=answer.status, headers=answer.headers, body=await answer.read())

    async def upload(
        self, content: bytes = LINE, *, prefix: str = "/v1", filename: str = "in.jsonl", **fields: str
    ) -> Reply:
        """Upload a file as the Python SDK does, its fields before the file."""
        raw = form(fields={"purpose": "batch"} | fields, content=content, filename=filename)
        return await self.call("POST", f"{prefix}/files", body=raw, headers=FORM_HEADERS)

    def add_key(
        self,
        tenant: str,
        *,
        scopes: Sequence[KeyScope] = ALL_SCOPES,
        limits: KeyLimits = NO_LIMITS,
        secret: str | None = None,
    ) -> str:
        """Make a key and give its secret."""
        secret = secret or f"brk_{self.parts.rng.token_hex(16)}"
        key = ApiKey(
            id=KeyId(f"key_{self.parts.rng.token_hex(8)}"),
            tenant=TenantId(tenant),
            name="test",
            digest=digest_of(secret),
            shown=secret[:8],
            scopes=tuple(scopes),
            limits=limits,
            created_at=self.clock.now(),
        )
        self.parts.store.add_key(key)
        return secret


BOUNDARY = "----x8f3"
FORM_HEADERS = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def form(
    *,
    fields: Mapping[str, str],
    content: bytes | None = LINE,
    filename: str = "in.jsonl",
    name: str = "file",
    is_file_first: bool = False,
) -> bytes:
    """Write a form by hand, so that a test knows every byte of it. Fields of "" are left out."""
    texts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode()
        for key, value in fields.items()
        if value
    ]
    files = []
    if content is not None:
        head = f'Content-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'
        head = f"--{BOUNDARY}\r\n{head}Content-Type: application/octet-stream\r\n\r\n"
        files.append(head.encode() + content + b"\r\n")
    return b"".join(files + texts if is_file_first else texts + files) + f"--{BOUNDARY}--\r\n".encode()


@contextlib.asynccontextmanager
async def serving(
    folder: Path,
    *,
    is_open: bool = True,
    is_local: bool = True,
    settings: Settings | None = None,
    routes: Sequence[Route] = WHOLE,
    clock: Clock | None = None,
    upstream_keys: Mapping[str, str] = NO_KEYS,
) -> AsyncIterator[Served]:
    """Run the application until the block ends. It passes requests on where its settings name an upstream."""
    clock = clock or SystemClock()
    settings = settings or Settings()
    store = SqliteStore.open(folder / "state.db", clock)
    executor = ThreadPoolExecutor(8)
    rules = AddressRules(is_loopback_allowed=is_open)
    poster = AiohttpPoster(rules, clock)
    parts = ApiParts(
        store=store,
        blobs=LocalBlobs(folder / "blobs"),
        clock=clock,
        rng=SystemRng(),
        settings=settings,
        is_open=is_open,
        executor=executor,
        vitals=Vitals(is_local=is_local),
        addresses=rules,
        poster=poster,
        live=open_live(settings, upstream_keys, clock),
    )
    runner = make_runner(build_app(parts, routes), shutdown_s=1.0)
    await runner.setup()
    try:
        site = aiohttp.web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = runner.addresses[0][1]
        async with aiohttp.ClientSession() as session:
            yield Served(port=port, folder=folder, parts=parts, session=session, clock=clock)
    finally:
        await runner.cleanup()
        await poster.close()
        if parts.live is not None:
            await parts.live.close()
        executor.shutdown()
        store.close()
