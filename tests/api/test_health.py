"""What supervisors, load balancers and Prometheus ask, and what they are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from batchrunner.api.http import Answer, Call, Route
from batchrunner.deliveries import Posted
from batchrunner.holdings import KeyScope, UpstreamLive
from batchrunner.metrics import METRICS, Tally
from batchrunner.orders import Pulse
from batchrunner.settings import Settings
from tests.api.serving import Served, serving


def pulse(api: Served, said: Pulse | None = None) -> None:
    api.parts.vitals.feel(said or Pulse(worker_count=2, ticking_count=2), api.clock.monotonic_s())


def numbers(text: bytes) -> dict[tuple[str, ...], float]:
    """Read what Prometheus would."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


async def test_health_is_told_whatever_else_is_wrong(api: Served) -> None:
    answer = await api.call("GET", "/healthz")

    assert (answer.status, answer.json) == (200, {"status": "ok"})


async def test_ready_server_names_every_check(api: Served) -> None:
    pulse(api)

    answer = await api.call("GET", "/readyz")

    assert answer.status == 200
    assert answer.json["status"] == "ready"
    assert {name: check["status"] for name, check in answer.json["checks"].items()} == dict.fromkeys(
        ["store", "schema", "blobs", "workers", "closing"], "ok"
    )


async def test_parent_that_says_nothing_makes_it_unready(api: Served) -> None:
    answer = await api.call("GET", "/readyz")

    assert answer.status == 503
    assert answer.json["failed"] == ["workers"]
    assert "parent" in answer.json["checks"]["workers"]["detail"]


async def test_workers_that_do_not_tick_make_it_unready(api: Served) -> None:
    pulse(api, Pulse(worker_count=2, ticking_count=0))
    assert (await api.call("GET", "/readyz")).json["failed"] == ["workers"]

    pulse(api, Pulse(worker_count=2, ticking_count=1))
    assert (await api.call("GET", "/readyz")).status == 200


async def test_server_without_workers_of_its_own_is_ready(api: Served) -> None:
    pulse(api, Pulse(worker_count=0))

    assert (await api.call("GET", "/readyz")).status == 200


async def test_schema_of_another_version_is_named(api: Served) -> None:
    pulse(api)
    with api.parts.store.writing() as conn:  # type: ignore[attr-defined]
        conn.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")

    answer = await api.call("GET", "/readyz")

    assert answer.status == 503
    assert answer.json["failed"] == ["schema"]
    assert "9999" in answer.json["checks"]["schema"]["detail"]


async def test_full_disk_is_named(tmp_path: Path) -> None:
    async with serving(tmp_path, settings=Settings(reserve_bytes=1 << 60)) as api:
        pulse(api)

        answer = await api.call("GET", "/readyz")

    assert answer.status == 503
    assert answer.json["failed"] == ["blobs"]
    assert "disk_full" in answer.json["checks"]["blobs"]["detail"]


async def test_strangers_are_told_no_details_and_need_a_key_for_metrics(tmp_path: Path) -> None:
    async with serving(tmp_path, is_open=False, is_local=False) as api:
        answer = await api.call("GET", "/readyz")
        assert answer.status == 503
        assert answer.json["failed"] == ["workers"]
        assert answer.json["checks"]["workers"] == {"status": "failed"}
        assert (await api.call("GET", "/healthz")).status == 200

        assert (await api.call("GET", "/metrics")).status == 401
        reader = api.add_key("acme", scopes=[KeyScope.READ, KeyScope.WRITE])
        assert (await api.call("GET", "/metrics", secret=reader)).status == 403
        admin = api.add_key("acme", scopes=[KeyScope.ADMIN])
        assert (await api.call("GET", "/metrics", secret=admin)).status == 200


async def test_keyed_server_on_loopback_gives_metrics_without_a_key_but_to_no_web_page(tmp_path: Path) -> None:
    async with serving(tmp_path, is_open=False) as api:
        assert (await api.call("GET", "/v1/files")).status == 401
        assert (await api.call("GET", "/metrics")).status == 200

        foreign = await api.call("GET", "/metrics", headers={"Origin": "https://elsewhere.example"})

    assert foreign.status == 403


@pytest.fixture
async def upstreamed(tmp_path: Path) -> AsyncIterator[Served]:
    """An open server that knows an upstream."""
    async with serving(tmp_path, settings=Settings(base_url="http://127.0.0.1:9/v1")) as served:
        yield served


async def test_every_metric_of_the_table_is_there_and_counts(upstreamed: Served) -> None:
    api = upstreamed
    tally = Tally(attempts=9, succeeded=5, failed=1, retries=3, tokens_in=70, tokens_out=30, damages=2)
    tally.failures["429"] = 3
    for _ in range(4):
        tally.latencies.add(0.25)
    api.parts.vitals.posts.add(Posted(status=204, elapsed_s=0.1))
    upstreams = (
        UpstreamLive(name="box", window=5, bound_by="growing", in_flight=3),
        UpstreamLive(name="cloud", window=3, bound_by="failures", in_flight=1, is_down=True),
    )
    said = Pulse(worker_count=1, ticking_count=1, in_flight=4, waiting=6, window=8, tally=tally.to_wire())
    pulse(api, msgspec.structs.replace(said, upstreams=upstreams))
    assert api.parts.live is not None
    api.parts.live.failures["not_connected"] += 2
    await api.call("GET", "/healthz")

    answer = await api.call("GET", "/metrics")

    assert answer.headers["content-type"].startswith("text/plain")
    found = numbers(answer.body)
    names = {name for name, *_ in found}
    for metric in METRICS:
        assert (f"{metric.name}_count" if metric.kind == "histogram" else metric.name) in names, metric.name
    assert found["batchrunner_attempts_total",] == 9
    assert found["batchrunner_webhook_attempts_total", "delivered"] == 1
    assert found["batchrunner_webhook_latency_seconds_count",] == 1
    assert found["batchrunner_webhook_deliveries", "pending"] == 0
    assert found["batchrunner_lines_total", "succeeded"] == 5
    assert found["batchrunner_lines_total", "failed"] == 1
    assert found["batchrunner_failures_total", "429"] == 3
    assert found["batchrunner_tokens_total", "output"] == 30
    assert found["batchrunner_in_flight",] == 4
    assert (found["batchrunner_upstream_up", "box"], found["batchrunner_upstream_up", "cloud"]) == (1, 0)
    assert found["batchrunner_upstream_in_flight", "box"] == 3
    assert found["batchrunner_upstream_window", "cloud"] == 3
    assert found["batchrunner_workers",] == 1
    assert found["batchrunner_batches", "in_progress"] == 0
    assert found["batchrunner_free_bytes",] > 0
    assert found["batchrunner_http_requests_total", "200"] == 1
    assert found["batchrunner_latency_seconds_count",] == 4
    assert found["batchrunner_latency_seconds_sum",] == pytest.approx(1.0, rel=0.09)
    assert found["batchrunner_latency_seconds_bucket", "0.128"] == 0
    assert found["batchrunner_latency_seconds_bucket", "0.256"] == 4
    assert found["batchrunner_live_requests_total", "default"] == 0
    assert found["batchrunner_live_failures_total", "not_connected"] == 2
    assert found["batchrunner_live_in_flight", "default"] == 0


async def test_labels_are_closed_sets(api: Served) -> None:
    """However many ids are asked for, no answer has more series than the one before."""
    pulse(api)
    await api.call("GET", "/v1/files/file-a")
    before = set(numbers((await api.call("GET", "/metrics")).body))
    for number in range(5):
        await api.call("GET", f"/v1/files/file-{number}")

    after = set(numbers((await api.call("GET", "/metrics")).body))

    assert {each for each in after - before if each != ("batchrunner_http_requests_total", "200")} == set()


async def test_stream_of_events_ends_when_the_server_is_to_end(tmp_path: Path) -> None:
    asked_on, closed = asyncio.Event(), asyncio.Event()

    async def chunks():
        try:
            yield b"data: 1\n\n"
            asked_on.set()
            await asyncio.Event().wait()
        finally:
            closed.set()

    async def events(call: Call) -> Answer:
        return Answer(content_type="text/event-stream", chunks=chunks(), is_endless=True)

    route = Route(method="GET", path="/v1/stream", handler=events, summary="Give events")
    async with serving(tmp_path, routes=[route]) as api, asyncio.timeout(30.0):
        asking = asyncio.create_task(api.call("GET", "/v1/stream"))
        await asked_on.wait()
        api.parts.vitals.closing.set()
        answer = await asking

    assert answer.body == b"data: 1\n\n"
    assert closed.is_set()
