"""Tenant by verb by object, from the route table: whatever a stranger asks for is not there."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from batchrunner.api.health import opened
from batchrunner.api.http import Route
from batchrunner.api.routes import ROUTES
from batchrunner.models import TenantId
from tests.api.jobs import answer, jobs_made
from tests.api.serving import FORM_HEADERS, LINE, Served, form, serving

OBJECT_ROUTES = [route for route in ROUTES if route.parameters]
# What to send so that a request is refused for its object only: by path, a body that fits.
BODIES = {
    "/v1/uploads/{upload_id}/complete": b'{"part_ids":[]}',
    "/v1/batches/{batch_id}/retry": b"{}",
    "/xai/v1/batches/{batch_id}/requests": b'{"batch_requests":[{"batch_request":{"responses":{}}}]}',
    "/v1/webhook_endpoints/{webhook_endpoint_id}": b"{}",
    "/v1/webhook_endpoints/{webhook_endpoint_id}/test": b'{"event_type":"batch.completed"}',
}


def is_endless(route: Route) -> bool:
    return route.answer_media == "text/event-stream"


@dataclasses.dataclass(frozen=True, slots=True)
class Estate:
    """What one tenant has, by the name that a path gives it."""

    served: Served
    owned: dict[str, str]
    stranger: str


@pytest.fixture
async def estate(tmp_path: Path) -> AsyncIterator[Estate]:
    async with serving(tmp_path, is_open=False) as served:
        served.secret = served.add_key("acme")
        file_id = (await served.upload()).json["id"]
        wanted = {"bytes": len(LINE), "filename": "a", "mime_type": "m", "purpose": "batch"}
        owned = {
            "file_id": file_id,
            "upload_id": (await served.call("POST", "/v1/uploads", json=wanted)).json["id"],
        }
        if any(route.path == "/v1/batches" for route in ROUTES):
            order = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
            owned["batch_id"] = (await served.call("POST", "/v1/batches", json=order)).json["id"]
        job_id = pictured(served, TenantId("acme"))
        owned |= await tell_somebody(served) | {"asset_id": job_id, "job_id": job_id}
        yield Estate(served, owned, served.add_key("stranger"))


async def tell_somebody(served: Served) -> dict[str, str]:
    """Register a receiver and send it an event."""
    wanted = {"name": "mine", "url": "https://hooks.example/", "event_types": ["batch.completed"]}
    made = await served.call("POST", "/v1/webhook_endpoints", json=wanted)
    await served.call("POST", "/v1/webhook_events", json={"type": "batch.completed"})
    (delivery,) = (await served.call("GET", "/v1/webhook_deliveries")).json["data"]
    return {"webhook_endpoint_id": made.json["id"], "webhook_delivery_id": delivery["id"]}


def pictured(served: Served, tenant: TenantId) -> str:
    """Have a job made and answered with a picture."""
    (job,) = jobs_made(served, tenant=tenant)
    answer(served, [job], [{"data": [{"b64_json": "iVBORw0KGgo="}]}])
    return str(job.number)


def own(estate: Estate, name: str) -> str:
    return estate.owned[name]


def percent_encoded(estate: Estate, name: str) -> str:
    return "".join(f"%{byte:02X}" for byte in estate.owned[name].encode())


def twice_encoded(estate: Estate, name: str) -> str:
    return percent_encoded(estate, name).replace("%", "%25")


def upper_case(estate: Estate, name: str) -> str:
    return estate.owned[name].upper()


def of_another_kind(estate: Estate, name: str) -> str:
    return next(value for kind, value in estate.owned.items() if kind != name)


def with_an_end(estate: Estate, name: str) -> str:
    return f"{estate.owned[name]}%00"


async def ask(estate: Estate, route: Route, name: Callable[[Estate, str], str], secret: str | None, prefix: str) -> int:
    path = route.path
    for parameter in route.parameters:
        path = path.replace(f"{{{parameter}}}", name(estate, parameter))
    headers, body = {}, None
    if route.path in BODIES:
        headers, body = {"Content-Type": "application/json"}, BODIES[route.path]
    elif route.request_media.startswith("multipart/"):
        headers, body = dict(FORM_HEADERS), form(fields={}, name=route.file_field)
    # A stream of events goes on for as long as its batch does.
    method = "HEAD" if is_endless(route) else route.method
    reply = await estate.served.call(method, prefix + path, body=body, headers=headers, secret=secret)
    return reply.status


@pytest.mark.parametrize(
    ("route", "prefix"),
    [(route, prefix) for route in OBJECT_ROUTES for prefix in ("", "/openai") if route.dialect is None or not prefix],
    ids=lambda each: f"{each.method} {each.path}" if isinstance(each, Route) else each,
)
async def test_a_stranger_finds_nothing_and_changes_nothing(estate: Estate, route: Route, prefix: str) -> None:
    for name in (own, percent_encoded, twice_encoded, upper_case, of_another_kind, with_an_end):
        assert await ask(estate, route, name, estate.stranger, prefix) == 404, name.__name__

    assert await ask(estate, route, own, None, prefix) != 404


@pytest.mark.parametrize("route", OBJECT_ROUTES, ids=lambda route: f"{route.method} {route.path}")
async def test_the_owner_too_needs_the_very_id(estate: Estate, route: Route) -> None:
    for name in (twice_encoded, upper_case, of_another_kind, with_an_end):
        if name(estate, route.parameters[0]) == own(estate, route.parameters[0]):
            # A number has no upper case.
            continue
        assert await ask(estate, route, name, None, "") == 404, name.__name__


@pytest.mark.parametrize(
    "route",
    [each for each in ROUTES if each.method == "GET" and not each.parameters and each.scope and not is_endless(each)],
    ids=lambda route: route.path,
)
async def test_a_stranger_lists_nothing_of_others(estate: Estate, route: Route) -> None:
    reply = await estate.served.call("GET", route.path, secret=estate.stranger)

    assert reply.status == 200
    for owned in estate.owned.values():
        # A short number is in every page, the id that it is only in quotes.
        assert (f'"{owned}"' if owned.isdecimal() else owned).encode() not in reply.body


@pytest.mark.parametrize("route", opened(ROUTES), ids=lambda route: f"{route.method} {route.path}")
async def test_every_route_but_the_open_ones_wants_a_key(estate: Estate, route: Route) -> None:
    path = route.path.replace("{", "").replace("}", "")

    reply = await estate.served.call(route.method, path, headers={"Authorization": "Bearer wrong-secret-for-all"})

    assert (reply.status == 401) is (route.scope is not None)


async def test_a_cursor_of_another_tenant_is_unknown(estate: Estate) -> None:
    reply = await estate.served.call("GET", f"/v1/files?after={estate.owned['file_id']}", secret=estate.stranger)

    assert reply.status == 404


async def test_idempotency_keys_of_two_tenants_do_not_meet(estate: Estate) -> None:
    wanted = {"bytes": 5, "filename": "a", "mime_type": "m", "purpose": "batch"}
    key = {"Idempotency-Key": "k"}

    mine = await estate.served.call("POST", "/v1/uploads", json=wanted, headers=key)
    theirs = await estate.served.call("POST", "/v1/uploads", json=wanted, headers=key, secret=estate.stranger)

    assert mine.json["id"] != theirs.json["id"]
