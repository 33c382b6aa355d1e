"""Whether the server lives, whether it is ready, and what it counts: for supervisors, load balancers and Prometheus."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import msgspec

from batchrunner.api.auth import check_open_door
from batchrunner.api.exposition import TEXT, Counts, expose
from batchrunner.api.http import Answer, ApiParts, Call, Route, json_answer
from batchrunner.errors import BatchrunnerError, DiskFull, SchemaNewer
from batchrunner.holdings import KeyScope
from batchrunner.metrics import Latencies
from batchrunner.orders import Pulse

logger = logging.getLogger(__name__)

# The parent speaks once a second.
PULSE_FRESH_S = 5.0
_CHECK_S = 5.0
_LOOKED_FOR = "ready"

Outcome = Literal["ok", "failed"]


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """The process answers."""

    status: Literal["ok"] = "ok"


class Check(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one part stands; `detail` is for whoever is on the machine."""

    status: Outcome
    detail: str | None = None


_OK = Check(status="ok")


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """Whether work can be taken and done. `failed` names the checks that keep it from that."""

    status: Literal["ready", "unready"]
    failed: tuple[str, ...]
    checks: dict[str, Check]


async def healthz(call: Call) -> Answer:  # noqa: ARG001 - handlers are called alike
    """Say that the process lives."""
    return json_answer(Health())


async def readyz(call: Call) -> Answer:
    """Look at every part that work needs; 503 names those that fail."""
    checks = {
        **await _stored(call),
        "workers": _workers(call.parts.vitals.pulse, call.parts.clock.monotonic_s() - call.parts.vitals.pulsed_at_s),
        "closing": Check(status="failed" if call.parts.vitals.closing.is_set() else "ok"),
    }
    failed = tuple(name for name, check in checks.items() if check.status == "failed")
    if not call.parts.vitals.is_local:
        checks = {name: Check(status=check.status) for name, check in checks.items()}
    ready = Readiness(status="unready" if failed else "ready", failed=failed, checks=checks)
    return json_answer(ready, status=503 if failed else 200)


async def _stored(call: Call) -> dict[str, Check]:
    try:
        async with asyncio.timeout(_CHECK_S):
            return await call.blocking(_check_stored, call)
    except TimeoutError:
        late = Check(status="failed", detail=f"no answer within {_CHECK_S:.0f} s")
        return dict.fromkeys(("store", "schema", "blobs"), late)


def _check_stored(call: Call) -> dict[str, Check]:
    parts = call.parts
    store = schema = _looked(parts.store.check)
    if store.status == "failed":
        is_schema = (store.detail or "").startswith(SchemaNewer.code)
        store, schema = (_OK, store) if is_schema else (store, _OK)
    blobs = _looked(lambda: _check_blobs(parts))
    return {"store": store, "schema": schema, "blobs": blobs}


def _looked(look: Callable[[], None]) -> Check:
    try:
        look()
    except BatchrunnerError as error:
        logger.warning("not ready: %s", error, extra={"action": "unready", "code": error.code})
        return Check(status="failed", detail=f"{error.code}: {error.message}")
    return _OK


def _check_blobs(parts: ApiParts) -> None:
    free_bytes, wanted_bytes = parts.blobs.free_bytes(), parts.settings.reserve_bytes
    if free_bytes is None:
        # A bucket has no space to tell of, but it has to answer.
        parts.blobs.exists(_LOOKED_FOR)
    elif free_bytes < wanted_bytes:
        raise DiskFull(f"{free_bytes:,} bytes are left, at least {wanted_bytes:,} are wanted")


def _workers(pulse: Pulse, age_s: float) -> Check:
    """Without workers of its own (`--workers 0`) a server is ready when it can take work."""
    if age_s > PULSE_FRESH_S:
        return Check(status="failed", detail="the parent process says nothing")
    if pulse.worker_count and not pulse.ticking_count:
        return Check(status="failed", detail=f"none of {pulse.worker_count} workers has reported for a while")
    if not pulse.has_upstream:
        return Check(status="ok", detail="no upstream is named: batches wait")
    trouble = f"; {pulse.trouble}" if pulse.trouble else ""
    return Check(status="ok", detail=f"{pulse.ticking_count} of {pulse.worker_count}{trouble}")


async def metrics(call: Call) -> Answer:
    """Give all counts in the text format of Prometheus."""
    if call.key is None:
        check_open_door(call.request)
    vitals = call.parts.vitals
    counts = Counts(
        pulse=vitals.pulse,
        answered=dict(vitals.answered),
        latencies=Latencies(list(vitals.latencies.counts)),
        posted=dict(vitals.posts.outcomes),
        post_latencies=Latencies(list(vitals.posts.latencies.counts)),
    )
    if (live := call.parts.live) is not None:
        counts = replace(
            counts,
            live_begun=dict(live.begun),
            live_failures=dict(live.failures),
            live_in_flight={place.target.name: place.in_flight for place in live.places},
        )
    return Answer(body=await call.blocking(_exposed, call, counts), content_type=TEXT)


def _exposed(call: Call, counts: Counts) -> bytes:
    """A scrape is answered as far as it can be: what has gone wrong is what it is for."""
    try:
        counts = replace(counts, free_bytes=call.parts.blobs.free_bytes())
        counts = replace(counts, batches=call.parts.store.unfinished_counts())
        found = call.parts.store.delivery_counts()
        counts = replace(counts, deliveries={str(state): count for state, count in found.items()})
    except BatchrunnerError as error:
        logger.warning("metrics are not complete: %s", error, extra={"action": "metrics_partial", "code": error.code})
    return expose(counts)


ROUTES: tuple[Route, ...] = (
    Route(
        method="GET", path="/healthz", handler=healthz, summary="Tell that the server lives", scope=None, answer=Health
    ),
    Route(
        method="GET",
        path="/readyz",
        handler=readyz,
        summary="Tell whether the server can take work and do it",
        scope=None,
        answer=Readiness,
    ),
    Route(
        method="GET",
        path="/metrics",
        handler=metrics,
        summary="Give the counts of the server",
        scope=KeyScope.ADMIN,
        answer_media=TEXT,
    ),
)


def opened(routes: Sequence[Route]) -> tuple[Route, ...]:
    """Give the table of a server that listens on loopback only: its metrics need no key."""
    return tuple(replace(route, scope=None) if route.path == "/metrics" else route for route in routes)
