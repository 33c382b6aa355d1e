"""Receivers of webhooks: registered, listed, changed, tried out, given new secrets, deleted.

Source: the webhook endpoints of the OpenAI API; `disabled_at` and what follows it are ours.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from batchrunner.addresses import URL_CHARS_MAX, url_problem
from batchrunner.api.envelope import Refusal, refused_if_missing
from batchrunner.api.http import Answer, ApiParts, Call, Route, json_answer
from batchrunner.api.paging import Page, page_of
from batchrunner.deliveries import DEFAULT_TYPES, EndpointId, EventId, EventType, Secrets, WebhookEndpoint, WebhookEvent
from batchrunner.errors import WebhookUnreachable
from batchrunner.holdings import KeyScope
from batchrunner.progress import seconds_of
from batchrunner.webhooks import (
    OLD_SECRET_KEPT,
    SECRET_BYTES,
    delivery_id,
    hint_of,
    sample_event,
    secret_of,
    signed_headers,
)

Name = Annotated[str, Meta(min_length=1, max_length=256)]
Url = Annotated[str, Meta(max_length=URL_CHARS_MAX)]
Types = Annotated[list[EventType], Meta(min_length=1, max_length=len(EventType))]


class EndpointRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a create."""

    name: Name
    url: Url
    event_types: Types


class EndpointChange(msgspec.Struct, frozen=True, kw_only=True):
    """The body of an update; what is not given stays. An endpoint that was disabled is told events again."""

    name: Name | None = None
    url: Url | None = None
    event_types: Types | None = None


class SecretRotation(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a rotation."""

    keep_old_secret_active_for_24_hours: bool = False


class EndpointTest(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a test."""

    event_type: EventType


class ListEndpoints(msgspec.Struct, frozen=True):
    """The query of a listing."""

    after: str | None = None
    limit: Annotated[int, Meta(ge=1, le=100)] = 20


class EndpointObject(msgspec.Struct, frozen=True, kw_only=True):
    """A receiver as the API shows it. `failing_since` is its first failure since its last success."""

    id: str
    object: Literal["webhook_endpoint"] = "webhook_endpoint"
    name: str
    url: str
    event_types: tuple[EventType, ...]
    created_at: int
    updated_at: int
    signing_secret_hint: str
    failing_since: int | None
    disabled_at: int | None
    disabled_reason: str | None


class EndpointWithSecret(EndpointObject, frozen=True, kw_only=True):
    """A receiver with its secret, which is shown when it is made and when it is rotated."""

    signing_secret: str


class EndpointList(Page, frozen=True, kw_only=True):
    """A page of receivers, newest first; the next one is behind `last_id`."""

    data: tuple[EndpointObject, ...]


class EndpointDeleted(msgspec.Struct, frozen=True, kw_only=True):
    """What is left of a deleted receiver."""

    id: str
    object: Literal["webhook_endpoint.deleted"] = "webhook_endpoint.deleted"
    deleted: bool = True


class EndpointTested(msgspec.Struct, frozen=True, kw_only=True):
    """What a receiver answered to a test; `success` says that it answered, `status_code` what."""

    object: Literal["webhook_endpoint.test"] = "webhook_endpoint.test"
    webhook_endpoint_id: str
    event_type: EventType
    status_code: int
    success: bool = True


class EventTypeList(msgspec.Struct, frozen=True, kw_only=True):
    """What can be asked for."""

    object: Literal["list"] = "list"
    data: tuple[EventType, ...]


class SigningSecret(msgspec.Struct, frozen=True, kw_only=True):
    """What signs for the batches' own URLs, and until when the one before signs as well."""

    object: Literal["webhook_secret"] = "webhook_secret"
    signing_secret: str
    old_secret_until: int | None


def _plain(endpoint: WebhookEndpoint) -> EndpointObject:
    return EndpointObject(
        id=endpoint.id,
        name=endpoint.name,
        url=endpoint.url,
        event_types=endpoint.event_types,
        created_at=seconds_of(endpoint.created_at),
        updated_at=seconds_of(endpoint.updated_at),
        signing_secret_hint=hint_of(endpoint.secrets.secret),
        failing_since=seconds_of(endpoint.failing_since),
        disabled_at=seconds_of(endpoint.disabled_at),
        disabled_reason=endpoint.disabled_reason,
    )


def _with_secret(endpoint: WebhookEndpoint) -> EndpointWithSecret:
    members = msgspec.structs.asdict(_plain(endpoint))
    return EndpointWithSecret(signing_secret=endpoint.secrets.secret, **members)


def check_url(parts: ApiParts, url: str | None, *, param: str) -> None:
    """Raises: Refusal when it can be no receiver's; where it leads is checked at each attempt."""
    if url is not None and (why := url_problem(url, parts.addresses)):
        raise Refusal(f"Invalid '{param}': {why}.", param=param, code="invalid_url")


def _endpoint_id(call: Call) -> EndpointId:
    return EndpointId(call.path_params["webhook_endpoint_id"])


def no_such_endpoint(endpoint_id: str) -> Refusal:
    """An unknown id, in the words used for files."""
    return Refusal(f"No such WebhookEndpoint object: {endpoint_id}", status=404, param="id")


def new_secret(parts: ApiParts) -> str:
    """Draw a signing secret."""
    return secret_of(parts.rng.token_hex(SECRET_BYTES))


def new_sample(call: Call, kind: EventType, at: datetime) -> WebhookEvent:
    """Make an event of a batch that never was."""
    return sample_event(kind, call.tenant, EventId(f"evt_test_{call.parts.rng.token_hex(12)}"), at)


async def create_webhook_endpoint(call: Call) -> Answer:
    """Register a receiver."""
    wanted = await call.json(EndpointRequest)
    check_url(call.parts, wanted.url, param="url")
    now = call.parts.clock.now()
    endpoint = WebhookEndpoint(
        id=EndpointId(f"we_{call.parts.rng.token_hex(16)}"),
        tenant=call.tenant,
        name=wanted.name,
        url=wanted.url,
        event_types=tuple(dict.fromkeys(wanted.event_types)),
        secrets=Secrets(secret=new_secret(call.parts)),
        created_at=now,
        updated_at=now,
    )
    return json_answer(_with_secret(await call.blocking(call.scope.add_endpoint, endpoint, replay=call.replay)))


async def present_webhook_endpoint(call: Call, endpoint_id: str) -> Answer:
    """Show the receiver that an earlier request with the same Idempotency-Key made."""
    return json_answer(_with_secret(await call.blocking(call.scope.endpoint, EndpointId(endpoint_id))))


async def retrieve_webhook_endpoint(call: Call) -> Answer:
    """Show one receiver."""
    return json_answer(_plain(await _found(call)))


async def _found(call: Call) -> WebhookEndpoint:
    endpoint_id = _endpoint_id(call)
    with refused_if_missing(no_such_endpoint(endpoint_id)):
        return await call.blocking(call.scope.endpoint, endpoint_id)


async def list_webhook_endpoints(call: Call) -> Answer:
    """Give a page of the tenant's receivers."""
    wanted = call.parameters(ListEndpoints)
    after = EndpointId(wanted.after) if wanted.after is not None else None
    with refused_if_missing(no_such_endpoint(wanted.after or "")):
        found = await call.blocking(call.scope.endpoints, limit=wanted.limit + 1, after=after)
    return json_answer(page_of(EndpointList, list(map(_plain, found)), limit=wanted.limit))


async def update_webhook_endpoint(call: Call) -> Answer:
    """Change a receiver, and enable it if it was disabled."""
    wanted = await call.json(EndpointChange)
    check_url(call.parts, wanted.url, param="url")
    types = tuple(dict.fromkeys(wanted.event_types)) if wanted.event_types is not None else None
    endpoint_id = _endpoint_id(call)
    with refused_if_missing(no_such_endpoint(endpoint_id)):
        changed = await call.blocking(
            call.scope.change_endpoint, endpoint_id, name=wanted.name, url=wanted.url, event_types=types
        )
    return json_answer(_plain(changed))


async def delete_webhook_endpoint(call: Call) -> Answer:
    """Forget a receiver; what it was still to be told is given up."""
    endpoint_id = _endpoint_id(call)
    with refused_if_missing(no_such_endpoint(endpoint_id)):
        await call.blocking(call.scope.delete_endpoint, endpoint_id)
    return json_answer(EndpointDeleted(id=endpoint_id))


async def _rotation(call: Call) -> datetime | None:
    """Read how long the old secret is to sign as well."""
    wanted = await call.json_if_any(SecretRotation)
    return call.parts.clock.now() + OLD_SECRET_KEPT if wanted.keep_old_secret_active_for_24_hours else None


async def rotate_webhook_endpoint_secret(call: Call) -> Answer:
    """Sign with a new secret, and for a day with the old one too if that is wanted."""
    old_until = await _rotation(call)
    endpoint_id, secret = _endpoint_id(call), new_secret(call.parts)
    with refused_if_missing(no_such_endpoint(endpoint_id)):
        rotated = await call.blocking(call.scope.rotate_endpoint_secret, endpoint_id, secret, old_until=old_until)
    return json_answer(_with_secret(rotated))


async def test_webhook_endpoint(call: Call) -> Answer:
    """Send one event of a batch that never was, at once, and tell the answer; it is neither logged nor repeated."""
    wanted = await call.json(EndpointTest)
    endpoint = await _found(call)
    parts = call.parts
    now = parts.clock.now()
    event = new_sample(call, wanted.event_type, now)
    body = event.body.encode()
    told_id, secrets = delivery_id(event.id, endpoint.id), endpoint.secrets.valid(now)
    headers = signed_headers(told_id, wanted.event_type, body, secrets, now, endpoint_id=endpoint.id)
    if parts.poster is None:
        raise Refusal("This server sends no webhooks.", status=503, code="webhooks_off")
    posted = await parts.poster.post(endpoint.url, body, headers)
    if posted.status is None:
        why = f"The endpoint did not answer: {posted.error} ({posted.message})."
        raise Refusal(why, status=WebhookUnreachable.http_status, param="url", code=WebhookUnreachable.code)
    return json_answer(
        EndpointTested(webhook_endpoint_id=endpoint.id, event_type=wanted.event_type, status_code=posted.status)
    )


async def list_webhook_event_types(_call: Call) -> Answer:
    """List what can be asked for; `batch.in_progress` no SDK knows."""
    return json_answer(EventTypeList(data=(*DEFAULT_TYPES, EventType.IN_PROGRESS)))


def _signing(secrets: Secrets) -> Answer:
    until = max((each.until for each in secrets.old), default=None)
    return json_answer(SigningSecret(signing_secret=secrets.secret, old_secret_until=seconds_of(until)))


async def retrieve_webhook_secret(call: Call) -> Answer:
    """Show what signs for the batches' own URLs; asked for the first time it is made."""
    return _signing(await call.blocking(call.scope.signing_secrets, new_secret(call.parts)))


async def rotate_webhook_secret(call: Call) -> Answer:
    """Sign for the batches' own URLs with a new secret, and for a day with the old one too if that is wanted."""
    old_until = await _rotation(call)
    return _signing(await call.blocking(call.scope.rotate_signing_secret, new_secret(call.parts), old_until=old_until))


_ONE = "/v1/webhook_endpoints/{webhook_endpoint_id}"

ROUTES = (
    Route(
        method="POST",
        path="/v1/webhook_endpoints",
        handler=create_webhook_endpoint,
        summary="Register a receiver of events; its signing secret is shown in this answer only",
        scope=KeyScope.WRITE,
        request=EndpointRequest,
        answer=EndpointWithSecret,
        present=present_webhook_endpoint,
    ),
    Route(
        method="GET",
        path="/v1/webhook_endpoints",
        handler=list_webhook_endpoints,
        summary="List receivers, newest first",
        query=ListEndpoints,
        answer=EndpointList,
    ),
    Route(method="GET", path=_ONE, handler=retrieve_webhook_endpoint, summary="Show a receiver", answer=EndpointObject),
    Route(
        method="POST",
        path=_ONE,
        handler=update_webhook_endpoint,
        summary="Change a receiver; one that was disabled is told events again",
        scope=KeyScope.WRITE,
        request=EndpointChange,
        answer=EndpointObject,
    ),
    Route(
        method="DELETE",
        path=_ONE,
        handler=delete_webhook_endpoint,
        summary="Delete a receiver; what it was still to be told is given up",
        scope=KeyScope.WRITE,
        answer=EndpointDeleted,
    ),
    Route(
        method="POST",
        path=f"{_ONE}/rotate_secret",
        handler=rotate_webhook_endpoint_secret,
        summary="Give a receiver a new signing secret",
        scope=KeyScope.WRITE,
        request=SecretRotation,
        answer=EndpointWithSecret,
    ),
    Route(
        method="POST",
        path=f"{_ONE}/test",
        handler=test_webhook_endpoint,
        summary="Send a receiver a sample event and tell its answer",
        scope=KeyScope.WRITE,
        request=EndpointTest,
        answer=EndpointTested,
    ),
    Route(
        method="GET",
        path="/v1/webhook_event_types",
        handler=list_webhook_event_types,
        summary="List the types of events",
        answer=EventTypeList,
    ),
    Route(
        method="GET",
        path="/v1/webhook_secret",
        handler=retrieve_webhook_secret,
        summary="Show the secret that signs for the URLs of batches",
        scope=KeyScope.WRITE,
        answer=SigningSecret,
    ),
    Route(
        method="POST",
        path="/v1/webhook_secret/rotate",
        handler=rotate_webhook_secret,
        summary="Sign for the URLs of batches with a new secret",
        scope=KeyScope.WRITE,
        request=SecretRotation,
        answer=SigningSecret,
    ),
)
