"""Webhooks over HTTP: receivers, events off a real wire that others' code verifies, the log, and sending again."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pytest
import standardwebhooks
from openai import AsyncOpenAI, InvalidWebhookSignatureError

from batchrunner.deliveries import DEFAULT_TYPES, EventType
from batchrunner.holdings import KeyScope
from tests.api.batching import chat_lines, ended, make_batch, working
from tests.api.receiving import Got, Receiver, carrying, receiving
from tests.api.serving import Served, serving

WANTED: dict[str, Any] = {
    "name": "mine",
    "url": "https://hooks.example/a",
    "event_types": ["batch.completed", "batch.failed"],
}


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as made:
        yield made


async def register(api: Served, **changes: Any) -> Any:
    reply = await api.call("POST", "/v1/webhook_endpoints", json=WANTED | changes)
    assert reply.status == 200, reply.body
    return reply.json


async def trigger(api: Served, kind: str = "batch.completed", **more: Any) -> Any:
    reply = await api.call("POST", "/v1/webhook_events", json={"type": kind} | more)
    assert reply.status == 200, reply.body
    return reply.json


async def deliveries(api: Served, query: str = "") -> list[Any]:
    reply = await api.call("GET", f"/v1/webhook_deliveries{query}")
    assert reply.status == 200, reply.body
    found: list[Any] = reply.json["data"]
    return found


async def settled(api: Served, delivery_id: str, *, status: str = "delivered") -> Any:
    """Wait until a delivery is recorded as over."""
    async with asyncio.timeout(20):
        while True:
            shown = (await api.call("GET", f"/v1/webhook_deliveries/{delivery_id}")).json
            if shown["status"] == status:
                return shown


def client(api: Served, *, strict: bool = False) -> AsyncOpenAI:
    prefix = "/openai/v1" if strict else "/v1"
    return AsyncOpenAI(base_url=api.base + prefix, api_key=api.secret or "none", max_retries=0)


# -- what others' code says of what we send ----------------------------------------------------------------------------


def verify_openai(got: Got, secret: str) -> str:
    unwrapped: Any = openai.OpenAI(api_key="none").webhooks.unwrap(got.body, got.headers, secret=secret)
    assert unwrapped.id == got.event["id"]
    if unwrapped.type != "batch.in_progress":
        assert unwrapped.data.id == got.event["data"]["id"]
    kind: str = unwrapped.type
    return kind


def verify_standard(got: Got, secret: str) -> str:
    found = standardwebhooks.Webhook(secret).verify(got.body, dict(got.headers))
    kind: str = found["type"]
    return kind


@pytest.mark.parametrize("verify", [verify_openai, verify_standard])
@pytest.mark.parametrize("is_rotated", [False, True])
@pytest.mark.parametrize("kind", sorted(EventType))
async def test_foreign_verifiers_accept_every_event(
    api: Served, receiver: Receiver, kind: EventType, is_rotated: bool, verify: Any
) -> None:
    made = await register(api, url=f"{receiver.base}/sdk", event_types=[kind])
    secrets = [made["signing_secret"]]
    if is_rotated:
        body = {"keep_old_secret_active_for_24_hours": True}
        path = f"/v1/webhook_endpoints/{made['id']}/rotate_secret"
        secrets.append((await api.call("POST", path, json=body)).json["signing_secret"])

    async with carrying(api):
        await trigger(api, kind)
        (got,) = await receiver.wait(1)

    for secret in secrets:
        assert verify(got, secret) == kind
    assert len(set(secrets)) == len(secrets)
    assert got.headers["x-inference-event"] == kind
    assert got.headers["x-inference-webhook-id"] == made["id"]


@pytest.mark.parametrize(
    "change",
    [
        lambda got: Got(got.path, got.headers, got.body.replace(b"batch_test", b"batch_tesu")),
        lambda got: Got(got.path, got.headers | {"webhook-id": "wh_other"}, got.body),
        lambda got: Got(
            got.path, got.headers | {"webhook-timestamp": str(int(got.headers["webhook-timestamp"]) + 1)}, got.body
        ),
        lambda got: Got(got.path, got.headers | {"webhook-signature": "v1,AAAA"}, got.body),
    ],
)
async def test_foreign_verifiers_refuse_what_was_tampered_with(api: Served, receiver: Receiver, change: Any) -> None:
    made = await register(api, url=receiver.base)
    async with carrying(api):
        await trigger(api)
        (got,) = await receiver.wait(1)

    with pytest.raises(InvalidWebhookSignatureError):
        verify_openai(change(got), made["signing_secret"])
    with pytest.raises(standardwebhooks.WebhookVerificationError):
        verify_standard(change(got), made["signing_secret"])


async def test_an_old_secret_that_was_not_kept_verifies_nothing(api: Served, receiver: Receiver) -> None:
    made = await register(api, url=receiver.base)
    await api.call("POST", f"/v1/webhook_endpoints/{made['id']}/rotate_secret")
    async with carrying(api):
        await trigger(api)
        (got,) = await receiver.wait(1)

    with pytest.raises(InvalidWebhookSignatureError):
        verify_openai(got, made["signing_secret"])


NODE = shutil.which("node")


@pytest.mark.skipif(NODE is None, reason="there is no node here")
async def test_node_verifies_by_the_same_rules(api: Served, receiver: Receiver, tmp_path: Path) -> None:
    """WebCrypto, as the Node SDK uses it; that SDK itself is in the tests of the real parts."""
    made = await register(api, url=receiver.base)
    async with carrying(api):
        await trigger(api)
        (got,) = await receiver.wait(1)

    (tmp_path / "body").write_bytes(got.body)
    script = """
      const [secret, id, timestamp, signatures] = process.argv.slice(2);
      const body = require("fs").readFileSync("body", "utf8");
      (async () => {
        const raw = Buffer.from(secret.replace("whsec_", ""), "base64");
        const key = await crypto.subtle.importKey("raw", raw, {name: "HMAC", hash: "SHA-256"}, false, ["verify"]);
        const text = new TextEncoder().encode(`${id}.${timestamp}.${body}`);
        const signature = Buffer.from(signatures.split(" ")[0].slice(3), "base64");
        process.exit(await crypto.subtle.verify("HMAC", key, signature, text) ? 0 : 1);
      })();
    """
    (tmp_path / "verify.js").write_text(script)
    words = [made["signing_secret"], got.id, got.headers["webhook-timestamp"], got.headers["webhook-signature"]]
    command = ["node", "verify.js", *words]
    ran = await asyncio.to_thread(subprocess.run, command, cwd=tmp_path, check=False)
    assert ran.returncode == 0


# -- a batch from its create to its event ------------------------------------------------------------------------------


async def test_a_batch_tells_its_url_the_whole_batch(api: Served, receiver: Receiver) -> None:
    secret = (await api.call("GET", "/v1/webhook_secret")).json["signing_secret"]

    async with working(api.folder), carrying(api):
        batch = await make_batch(api, chat_lines(["a", "b"]), webhook_url=f"{receiver.base}/hook?x=1")
        (got,) = await receiver.wait(1)
        shown = await ended(api, batch["id"])
        (delivery,) = await deliveries(api, f"?batch_id={batch['id']}")
        told = await settled(api, delivery["id"])

    assert verify_openai(got, secret) == verify_standard(got, secret) == "batch.completed"
    assert got.event["data"] == shown
    assert got.event["created_at"] == shown["completed_at"]
    assert (got.path, got.headers["content-type"]) == ("/hook", "application/json")
    assert got.headers["x-inference-webhook-id"] == got.id == delivery["id"]
    assert told["attempts"][0]["status_code"] == 200
    assert (told["event_id"], told["webhook_endpoint_id"]) == (got.event["id"], None)


async def test_a_strict_batch_tells_what_openai_has(api: Served, receiver: Receiver) -> None:
    await register(api, url=receiver.base)
    async with working(api.folder), carrying(api):
        file_id = (await api.upload(chat_lines(["a"]))).json["id"]
        order = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        batch = (await api.call("POST", "/openai/v1/batches", json=order)).json
        (got,) = await receiver.wait(1)

    assert list(got.event["data"]) == list(batch)


async def test_the_servers_own_url_is_told_of_batches_that_name_none(tmp_path: Path, receiver: Receiver) -> None:
    from batchrunner.settings import Settings

    settings = Settings(webhook_url=f"{receiver.base}/default")
    async with serving(tmp_path, settings=settings) as api, working(api.folder), carrying(api):
        await make_batch(api, chat_lines(["a"]))
        await receiver.wait(1)
        await make_batch(api, chat_lines(["b"]), webhook_url=f"{receiver.base}/own")
        await receiver.wait(2)

    assert [each.path for each in receiver.got] == ["/default", "/own"]


async def test_the_first_attempt_comes_within_a_second_of_the_status(api: Served, receiver: Receiver) -> None:
    came_at: list[datetime] = []

    def answer(_number: int) -> int:
        came_at.append(datetime.now(UTC))
        return 200

    receiver.answer = answer
    async with carrying(api):
        await trigger(api, url=receiver.base)
        await receiver.wait(1)
        (delivery,) = api.scope.deliveries(limit=1)

    assert (came_at[0] - delivery.created_at).total_seconds() < 1.0


# -- openai-python's own calls -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [False, True])
async def test_openai_python_manages_endpoints(api: Served, receiver: Receiver, strict: bool) -> None:
    async with client(api, strict=strict) as sdk:
        made = await sdk.webhooks.create(name="one", url=receiver.base, event_types=["batch.completed"])
        others = [
            await sdk.webhooks.create(name=f"n{number}", url=receiver.base, event_types=["batch.failed"])
            for number in range(3)
        ]
        listed = [each.id async for each in sdk.webhooks.list(limit=2)]
        found = await sdk.webhooks.retrieve(made.id)
        changed = await sdk.webhooks.update(made.id, name="two", event_types=["batch.expired"])
        rotated = await sdk.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
        tested = await sdk.webhooks.test(made.id, event_type="batch.completed")
        types = await sdk.webhooks.event_types.list()
        deleted = await sdk.webhooks.delete(made.id)
        with pytest.raises(openai.NotFoundError):
            await sdk.webhooks.retrieve(made.id)

    assert made.signing_secret.startswith("whsec_")
    assert listed == [each.id for each in (*reversed(others), made)]
    assert (found.id, found.name, found.url, found.object) == (made.id, "one", receiver.base, "webhook_endpoint")
    assert found.signing_secret_hint == f"whsec_...{made.signing_secret[-4:]}"
    assert (changed.name, changed.event_types) == ("two", ["batch.expired"])
    assert rotated.signing_secret != made.signing_secret
    assert (tested.status_code, tested.success, tested.event_type) == (200, True, "batch.completed")
    assert [each for each in types.data if each in DEFAULT_TYPES] == list(DEFAULT_TYPES)
    assert (deleted.id, deleted.deleted, deleted.object) == (made.id, True, "webhook_endpoint.deleted")
    assert verify_openai(receiver.got[0], rotated.signing_secret) == "batch.completed"
    assert verify_openai(receiver.got[0], made.signing_secret) == "batch.completed"


async def test_a_test_tells_what_the_receiver_answered(api: Served) -> None:
    async with receiving(lambda _number: 418) as refusing, client(api) as sdk:
        made = await sdk.webhooks.create(name="one", url=refusing.base, event_types=["batch.completed"])
        tested = await sdk.webhooks.test(made.id, event_type="batch.failed")

    assert tested.status_code == 418
    assert await deliveries(api) == [], "a test is neither logged nor repeated"


async def test_a_test_of_a_receiver_that_is_not_there_is_refused(api: Served) -> None:
    made = await register(api, url="http://127.0.0.1:1023/")

    reply = await api.call("POST", f"/v1/webhook_endpoints/{made['id']}/test", json={"event_type": "batch.failed"})

    assert (reply.status, reply.json["error"]["code"]) == (400, "webhook_unreachable")


# -- refusals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"name": ""}, "name"),
        ({"name": None}, "name"),
        ({"event_types": []}, "event_types"),
        ({"event_types": ["response.completed"]}, "event_types[0]"),
        ({"url": "http://hooks.example/"}, "url"),
        ({"url": "https://127.0.0.1/"}, "url"),
        ({"url": "https://user:pass@hooks.example/"}, "url"),
        ({"url": "https://hooks.example:22/"}, "url"),
    ],
)
async def test_an_endpoint_that_cannot_be_is_refused(keyed: Served, changes: dict[str, Any], param: str) -> None:
    for path in ("/v1/webhook_endpoints", f"/v1/webhook_endpoints/{(await register(keyed))['id']}"):
        reply = await keyed.call("POST", path, json=WANTED | changes)

        if changes != {"name": None} or path == "/v1/webhook_endpoints":
            assert (reply.status, reply.json["error"]["param"]) == (400, param), reply.body


async def test_a_server_with_keys_sends_nothing_to_its_own_machine(keyed: Served, receiver: Receiver) -> None:
    async with carrying(keyed):
        await register(keyed, url=receiver.base.replace("http://127.0.0.1", "https://localhost"))
        await trigger(keyed)
        async with asyncio.timeout(20):
            while not (attempts := (await deliveries(keyed))[0]["attempts"]) or attempts[0]["error"] is None:
                pass

    assert (attempts[0]["error"], attempts[0]["status_code"]) == ("address_refused", None)
    assert receiver.got == []


async def test_secrets_and_changes_need_a_key_that_writes(keyed: Served) -> None:
    reader = keyed.add_key("acme", scopes=[KeyScope.READ])
    made = await register(keyed)

    listed = await keyed.call("GET", "/v1/webhook_endpoints", secret=reader)
    secret = await keyed.call("GET", "/v1/webhook_secret", secret=reader)

    assert (listed.status, secret.status) == (200, 403)
    assert made["signing_secret"].encode() not in listed.body


async def test_the_tenants_secret_is_stable_and_rotates(keyed: Served) -> None:
    first = (await keyed.call("GET", "/v1/webhook_secret")).json
    again = (await keyed.call("GET", "/v1/webhook_secret")).json
    body = {"keep_old_secret_active_for_24_hours": True}
    rotated = (await keyed.call("POST", "/v1/webhook_secret/rotate", json=body)).json
    other = (await keyed.call("GET", "/v1/webhook_secret", secret=keyed.add_key("other"))).json

    assert first == again
    assert first["old_secret_until"] is None
    assert rotated["signing_secret"] != first["signing_secret"]
    assert rotated["old_secret_until"] is not None
    assert other["signing_secret"] not in (first["signing_secret"], rotated["signing_secret"])


async def test_an_idempotent_create_gives_the_same_endpoint_and_secret(api: Served) -> None:
    headers = {"Idempotency-Key": "k"}
    first = await api.call("POST", "/v1/webhook_endpoints", json=WANTED, headers=headers)
    again = await api.call("POST", "/v1/webhook_endpoints", json=WANTED, headers=headers)

    assert first.json == again.json
    assert len((await api.call("GET", "/v1/webhook_endpoints")).json["data"]) == 1


# -- the log -----------------------------------------------------------------------------------------------------------


async def test_a_refusing_receiver_is_in_the_log_and_resend_works(api: Served) -> None:
    async with receiving(lambda number: 500 if number == 1 else 200) as receiver, carrying(api):
        await trigger(api, url=receiver.base)
        await receiver.wait(1)
        (delivery,) = await deliveries(api)
        async with asyncio.timeout(20):
            while not (waiting := (await deliveries(api))[0])["attempts"][0]["status_code"]:
                pass
        reply = await api.call("POST", f"/v1/webhook_deliveries/{delivery['id']}/resend")
        await receiver.wait(2)
        told = await settled(api, delivery["id"])

    assert (waiting["status"], waiting["attempt_count"]) == ("pending", 1)
    assert waiting["next_attempt_at"] - waiting["attempts"][0]["started_at"] in (4, 5, 6)
    assert reply.status == 200
    assert [each["status_code"] for each in told["attempts"]] == [500, 200]
    assert receiver.got[0].id == receiver.got[1].id == delivery["id"]


async def test_the_log_is_narrowed_and_paged(api: Served) -> None:
    made = await register(api)
    for kind in ("batch.completed", "batch.failed", "batch.failed"):
        await trigger(api, kind)
    await trigger(api, "batch.expired", url="https://hooks.example/b")

    everything = await deliveries(api)
    first = (await api.call("GET", "/v1/webhook_deliveries?limit=3")).json
    rest = (await api.call("GET", f"/v1/webhook_deliveries?limit=3&after={first['last_id']}")).json

    assert [each["id"] for each in (*first["data"], *rest["data"])] == [each["id"] for each in everything]
    assert (first["has_more"], rest["has_more"]) == (True, False)
    assert len(await deliveries(api, "?event_type=batch.failed")) == 2
    assert len(await deliveries(api, f"?webhook_endpoint_id={made['id']}")) == 3
    assert len(await deliveries(api, "?status=delivered")) == 0
    assert (await api.call("GET", "/v1/webhook_deliveries?status=lost")).status == 400


async def test_resend_to_a_deleted_endpoint_is_refused(api: Served) -> None:
    made = await register(api)
    await trigger(api)
    (delivery,) = await deliveries(api)
    await api.call("DELETE", f"/v1/webhook_endpoints/{made['id']}")

    reply = await api.call("POST", f"/v1/webhook_deliveries/{delivery['id']}/resend")

    assert (reply.status, reply.headers["x-should-retry"]) == (409, "false")


# -- events as a stream ------------------------------------------------------------------------------------------------


async def test_events_are_streamed_and_the_stream_resumes(api: Served) -> None:
    first = await trigger(api, "batch.failed")
    places: list[str] = []
    seen: list[tuple[str, str, Any]] = []

    async def follow(count: int, **headers: str) -> None:
        async with api.session.get(f"{api.base}/v1/webhook_events", headers=headers) as answer:
            assert answer.headers["Content-Type"] == "text/event-stream"
            fields: dict[str, str] = {}
            async for raw in answer.content:
                line = raw.decode().rstrip("\n")
                if line.startswith(": listening"):
                    begun.set()
                elif line and not line.startswith(":"):
                    name, _, fields[name] = line.partition(": ")
                elif "data" not in fields:
                    places.append(fields["id"])
                else:
                    seen.append((fields["event"], fields["id"], json.loads(fields["data"])))
                    fields = {}
                    if len(seen) >= count:
                        return

    begun = asyncio.Event()
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        group.create_task(follow(1))
        await begun.wait()
        made = await trigger(api, "batch.completed")
    await trigger(api, "batch.expired")
    async with asyncio.timeout(20):
        await follow(2, **{"Last-Event-ID": seen[0][1]})

    assert [each[0] for each in seen] == ["batch.completed", "batch.expired"], "what was before is not told"
    assert seen[0][2]["id"] == made["id"]
    assert places == [first["id"], seen[0][1]], "where it begins is told at once"
    assert [each[1] for each in seen] == [each[2]["id"] for each in seen], "a place tells nothing of other tenants"


async def test_a_stream_whose_place_is_not_kept_any_more_tells_all_that_is(api: Served) -> None:
    made = [await trigger(api, kind) for kind in ("batch.failed", "batch.expired")]
    headers = {"Last-Event-ID": "evt_dropped"}
    told = b""
    async with asyncio.timeout(20), api.session.get(f"{api.base}/v1/webhook_events", headers=headers) as answer:
        while told.count(b"\n\n") < 3:
            told += await answer.content.readany()

    places = [line.removeprefix(b"id: ").decode() for line in told.splitlines() if line.startswith(b"id: ")]
    assert places == ["evt_none", *(each["id"] for each in made)]
