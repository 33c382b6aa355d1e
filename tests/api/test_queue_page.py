"""The queue page on a real server: who may look, whose buttons work, and that each shows and does its own tenant's."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from batchrunner.api.http import Route
from batchrunner.api.routes import described
from batchrunner.api.vitals import STALLED_S
from batchrunner.clock import SystemClock
from batchrunner.dashboard.guard import FormTokens
from batchrunner.holdings import KeyLimits, KeyScope
from batchrunner.models import BatchId, TenantId
from batchrunner.orders import Pulse
from batchrunner.queue_pages import queue_routes
from batchrunner.settings import Settings
from batchrunner.store.sqlite import SqliteStore
from tests.api.batching import chat_lines, ended, make_batch, working
from tests.api.club import chat, created, show
from tests.api.receiving import carrying, receiving
from tests.api.serving import LINE, Reply, Served, serving
from tests.api.test_auth import MovedClock
from tests.generated import openapi

QUEUE = "/dashboard/queue"
SECRET = b"of this process"
PAGES = queue_routes(SECRET)
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
PROMPT = "the-words-of-a-prompt"


class LateClock(SystemClock):
    """The machine's clock with another date."""

    late = timedelta(0)

    def now(self) -> datetime:
        return super().now() + self.late


@asynccontextmanager
async def paging(folder: Path, **given: Any) -> AsyncIterator[Served]:
    async with serving(folder, routes=described(*PAGES), **given) as served:
        yield served


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    """An open server."""
    async with paging(tmp_path) as served:
        yield served


@pytest.fixture
async def keyed(tmp_path: Path) -> AsyncIterator[Served]:
    """A server with keys; its client has a key of tenant `acme` for everything."""
    async with paging(tmp_path, is_open=False) as served:
        served.secret = served.add_key("acme")
        yield served


def basic(secret: str, user: str = "anybody") -> dict[str, str]:
    return {"Authorization": f"Basic {base64.b64encode(f'{user}:{secret}'.encode()).decode()}"}


async def look(served: Served, path: str = QUEUE, **given: Any) -> str:
    reply = await served.call("GET", path, **given)
    assert reply.status == 200, reply.body
    return reply.body.decode()


def token_in(page: str) -> str:
    return re.findall(r'name="token" value="(\w+)"', page)[0]


async def press(served: Served, path: str, form: str, **headers: str) -> Reply:
    """Send a form as a browser does, and follow nothing."""
    sent = FORM | headers
    if served.secret is not None:
        sent |= basic(served.secret)
    url = f"{served.base}{path}"
    async with served.session.post(url, data=form, headers=sent, allow_redirects=False) as answer:
        return Reply(status=answer.status, headers=answer.headers, body=await answer.read())


def status_of(served: Served, batch_id: str, tenant: str) -> str:
    return served.parts.store.scope(TenantId(tenant)).batch(BatchId(batch_id)).status


def cancel_path(batch_id: str) -> str:
    return f"{QUEUE}/batches/{batch_id}/cancel"


@pytest.mark.parametrize("path", [QUEUE, f"{QUEUE}/", f"{QUEUE}?refresh=off"])
async def test_page_is_there_without_keys_and_is_kept_by_nobody(api: Served, path: str) -> None:
    reply = await api.call("GET", path)

    assert reply.status == 200
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    assert reply.headers["Cache-Control"] == "no-store"
    assert reply.headers["X-Frame-Options"] == "DENY"
    assert reply.headers["Referrer-Policy"] == "same-origin"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Content-Security-Policy"].startswith("default-src 'none'; ")
    assert ('http-equiv="refresh"' in reply.body.decode()) is ("off" not in path)


async def test_the_dashboard_leads_to_the_queue(api: Served) -> None:
    async with api.session.get(f"{api.base}/dashboard") as answer:
        assert str(answer.url) == f"{api.base}{QUEUE}"
        assert answer.status == 200


@pytest.mark.parametrize("path", [QUEUE, "/dashboard", f"{QUEUE}/batches/b"])
async def test_a_browser_is_asked_for_a_key(keyed: Served, path: str) -> None:
    keyed.secret = None

    reply = await keyed.call("GET", path)

    assert reply.status == 401
    assert reply.headers["WWW-Authenticate"] == 'Basic realm="batchrunner", charset="UTF-8"'
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    assert "the key as the password" in reply.body.decode()


async def test_a_key_is_taken_as_a_password_under_any_name_and_as_a_bearer_token(keyed: Served) -> None:
    secret, keyed.secret = keyed.secret, None
    assert secret is not None

    for headers in (basic(secret), basic(secret, ""), basic(secret, "Zoë"), {"Authorization": f"Bearer {secret}"}):
        await look(keyed, headers=headers)


@pytest.mark.parametrize(
    "told", ["Basic", "Basic !", "Basic eDp5", "Basic eA==", "Basic eDo=", "Basic /w==", "Digest x"]
)
async def test_no_other_word_is_a_key_and_none_is_shown(keyed: Served, told: str) -> None:
    reply = await keyed.call("GET", QUEUE, headers={"Authorization": told})

    assert reply.status == 401
    assert told.encode() not in reply.body


async def test_a_wrong_password_is_not_shown_at_all(keyed: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    wrong = "brk_this-is-a-wrong-secret-0123456789"

    reply = await keyed.call("GET", QUEUE, headers=basic(wrong))

    assert reply.status == 401
    assert b"brk_" not in reply.body
    assert wrong not in caplog.text


async def test_the_api_itself_takes_no_password(keyed: Served) -> None:
    secret, keyed.secret = keyed.secret, None
    assert secret is not None

    reply = await keyed.call("GET", "/v1/files", headers=basic(secret))

    assert reply.status == 401
    assert reply.headers["WWW-Authenticate"].startswith("Bearer")


async def test_looking_takes_the_scope_read_and_buttons_take_write(keyed: Served) -> None:
    batch_id = (await make_batch(keyed, LINE))["id"]
    reader = keyed.add_key("acme", scopes=[KeyScope.READ])
    writer = keyed.add_key("acme", scopes=[KeyScope.WRITE])

    of_reader = await look(keyed, headers=basic(reader))
    of_writer = await keyed.call("GET", QUEUE, headers=basic(writer))
    own_token = token_in(await look(keyed))
    keyed.secret = reader
    pressed = await press(keyed, cancel_path(batch_id), f"token={own_token}")

    assert batch_id in of_reader
    assert "<form" not in of_reader
    assert of_writer.status == pressed.status == 403
    assert of_writer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert status_of(keyed, batch_id, "acme") == "validating"


async def test_looks_count_as_requests_of_their_key(keyed: Served) -> None:
    keyed.secret = keyed.add_key("acme", limits=KeyLimits(rpm=2))

    replies = [await keyed.call("GET", QUEUE) for _ in range(2)]
    of_api = await keyed.call("GET", "/v1/files")
    replies.append(await keyed.call("GET", QUEUE))

    assert [reply.status for reply in replies] == [200, 200, 429]
    assert of_api.status == 429
    assert b"Too often" in replies[2].body
    # It is looked at again by itself, at the queue and not at what a form was sent to.
    assert b'content="10; url=/dashboard/queue"' in replies[2].body


async def test_a_tenant_sees_and_ends_its_own_batches_only(keyed: Served) -> None:
    batch_id = (await make_batch(keyed, LINE, metadata={"name": "of acme"}))["id"]
    keyed.secret = keyed.add_key("stranger")
    own = (await make_batch(keyed, LINE))["id"]

    page = await look(keyed)
    shown = await keyed.call("GET", f"{QUEUE}/batches/{batch_id}")
    ended = await press(keyed, cancel_path(batch_id), f"token={token_in(page)}")

    assert own in page
    assert batch_id not in page
    assert "of acme" not in page
    assert (shown.status, ended.status) == (404, 404)
    assert "of acme" not in shown.body.decode()
    assert status_of(keyed, batch_id, "acme") == "validating"


@pytest.mark.parametrize(
    ("form", "headers"),
    [
        ("", {}),
        ("token=", {}),
        ("token=0123456789", {}),
        ("token=%ff%fe", {}),
        ("token={others}", {}),
        ("token={strangers}", {}),
        ("token={own}" + "&a=b" * 10, {}),
        ("token={own}", {"Sec-Fetch-Site": "cross-site"}),
        ("token={own}", {"Sec-Fetch-Site": "same-site"}),
        ("token={own}", {"Origin": "https://evil.example"}),
        ("token={own}", {"Origin": "null"}),
    ],
)
async def test_a_form_that_is_not_of_this_page_changes_nothing(
    keyed: Served, form: str, headers: dict[str, str]
) -> None:
    batch_id = (await make_batch(keyed, LINE))["id"]
    tokens = {"own": token_in(await look(keyed))}
    for name, tenant in (("others", "acme"), ("strangers", "stranger")):
        keyed.add_key(tenant)
        key = keyed.parts.store.keys(tenant=TenantId(tenant))[-1]
        tokens[name] = FormTokens(SECRET).token(key.tenant, key.id)

    reply = await press(keyed, cancel_path(batch_id), form.format(**tokens), **headers)

    assert reply.status == 403
    assert reply.headers["Content-Type"] == "text/html; charset=utf-8"
    assert status_of(keyed, batch_id, "acme") == "validating"


@pytest.mark.parametrize(
    ("more", "leads_to"),
    [
        ("", QUEUE),
        ("&refresh=off", f"{QUEUE}?refresh=off"),
        ("&back={id}", f"{QUEUE}/batches/{{id}}"),
        ("&back=../../evil%3Fa%23b", f"{QUEUE}/batches/..%2F..%2Fevil%3Fa%23b"),
    ],
)
async def test_the_button_cancels_and_leads_back(keyed: Served, more: str, leads_to: str) -> None:
    batch_id = (await make_batch(keyed, LINE))["id"]
    own = {"Sec-Fetch-Site": "same-origin", "Origin": keyed.base}
    form = f"token={token_in(await look(keyed))}{more.format(id=batch_id)}"

    replies = [await press(keyed, cancel_path(batch_id), form, **own) for _ in range(2)]

    assert status_of(keyed, batch_id, "acme") == "cancelling"
    assert [reply.status for reply in replies] == [303, 303]
    assert replies[0].headers["Location"] == leads_to.format(id=batch_id)
    assert cancel_path(batch_id) not in await look(keyed)


async def test_what_has_ended_cannot_be_cancelled_any_more(api: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        batch_id = (await make_batch(api, LINE))["id"]
        token = token_in(await look(api))
        await ended(api, batch_id)

        reply = await press(api, cancel_path(batch_id), f"token={token}")

    assert reply.status == 409
    assert b"Cannot cancel a batch with status" in reply.body
    assert status_of(api, batch_id, "local") == "completed"


def retry_path(batch_id: str) -> str:
    return f"{QUEUE}/batches/{batch_id}/retry"


@contextmanager
def counting(served: Served) -> Iterator[list[str]]:
    """Note what the store is asked."""
    statements: list[str] = []
    store = served.parts.store
    assert isinstance(store, SqliteStore)

    def note(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    event.listen(store._readers, "before_cursor_execute", note)
    try:
        yield statements
    finally:
        event.remove(store._readers, "before_cursor_execute", note)


def job_path(number: str, verb: str) -> str:
    return f"{QUEUE}/jobs/{number}/{verb}"


async def test_jobs_are_shown_and_their_buttons_cancel_and_retry(keyed: Served, tmp_path: Path) -> None:
    batch_id = await created(keyed, chat("a"), chat("b"), label="Q2 shots")
    first, second = [each["id"] for each in (await show(keyed, batch_id))["jobs"]]
    page = await look(keyed)
    form = f"token={token_in(page)}"

    cancelled = await press(keyed, job_path(first, "cancel"), form)
    after_cancel = await look(keyed)
    retried = await press(keyed, job_path(first, "retry"), f"{form}&back={batch_id}")
    too_early = await press(keyed, job_path(second, "retry"), form)
    after_retry = await look(keyed, f"{QUEUE}/batches/{batch_id}")

    assert "Q2 shots" in page
    assert '<span class="badge">2 active</span>' in page
    assert (cancelled.status, cancelled.headers["Location"]) == (303, QUEUE)
    assert '<span class="badge">1 active</span>' in after_cancel
    assert '<span class="badge">1 canceled</span>' in after_cancel
    assert job_path(first, "retry") in after_cancel
    assert job_path(first, "cancel") not in after_cancel
    assert (retried.status, retried.headers["Location"]) == (303, f"{QUEUE}/batches/{batch_id}")
    assert too_early.status == 409
    assert after_retry.count('<span class="pill">queued</span>') == 2
    assert "validate: not needed, its jobs were checked when it was made. shards: waiting" in after_retry

    async with working(tmp_path):
        await ended(keyed, batch_id)
    done = await look(keyed, f"{QUEUE}/batches/{batch_id}")

    assert done.count('<span class="pill">processed</span>') == 2
    assert "seal: not needed, each job has its own result. notify: not needed." in done
    assert cancel_path(batch_id) not in done
    assert '<span class="badge">2 done</span>' in await look(keyed)


async def test_a_job_that_came_alone_is_of_no_batch(keyed: Served) -> None:
    asked = {"model": "some-model", "messages": [{"role": "user", "content": PROMPT}], "async": True}
    number = (await keyed.call("POST", "/v1/chat/completions", json=asked)).json["id"]

    page = await look(keyed)

    assert job_path(number, "cancel") in page
    assert "some-model" in page
    assert "There are no batches." in page
    assert f"{QUEUE}/batches/" not in page
    assert PROMPT not in page


async def test_the_button_of_a_batch_cancels_its_jobs(keyed: Served) -> None:
    batch_id = await created(keyed, chat("a"), chat("b"))

    reply = await press(keyed, cancel_path(batch_id), f"token={token_in(await look(keyed))}")

    assert reply.status == 303
    assert (await show(keyed, batch_id))["canceled"] == 2


async def test_the_button_of_a_batch_queues_its_failed_jobs_again(keyed: Served, tmp_path: Path) -> None:
    batch_id = await created(keyed, chat("good"), chat("bad", simulate=["400"]), chat("gone"), chat("worse" * 9_000))
    jobs = [each["id"] for each in (await show(keyed, batch_id))["jobs"]]
    fresh = await look(keyed)
    form = f"token={token_in(fresh)}"
    too_early = await press(keyed, retry_path(batch_id), form)
    await press(keyed, job_path(jobs[2], "cancel"), form)
    async with working(tmp_path):
        await ended(keyed, batch_id)
        over = await look(keyed)

        reply = await press(keyed, retry_path(batch_id), f"{form}&back={batch_id}")
        await ended(keyed, batch_id)

    done = await show(keyed, batch_id)
    assert retry_path(batch_id) not in fresh
    assert (too_early.status, too_early.headers["Content-Type"].partition(";")[0]) == (409, "text/html")
    assert "none of its jobs failed or was canceled" in too_early.body.decode()
    assert retry_path(batch_id) in over
    assert cancel_path(batch_id) not in over
    assert (reply.status, reply.headers["Location"]) == (303, f"{QUEUE}/batches/{batch_id}")
    assert [each["status"] for each in done["jobs"]] == ["PROCESSED"] * 4
    assert retry_path(batch_id) not in await look(keyed, f"{QUEUE}/batches/{batch_id}")
    for job_id, prompt in zip(jobs, ("good", "bad", "gone", "worse"), strict=True):
        result = (await keyed.call("GET", f"/v1/jobs/{job_id}")).json["result"]
        assert prompt in result["choices"][0]["message"]["content"]


async def test_a_batch_whose_time_is_over_has_no_button_to_retry(tmp_path: Path) -> None:
    clock = LateClock()
    async with paging(tmp_path, clock=clock) as served:
        batch_id = await created(served, chat("a"))
        await served.call("POST", f"/v1/batches/{batch_id}/cancel")
        before = await look(served, f"{QUEUE}/batches/{batch_id}")
        clock.late = timedelta(days=15)
        # A clock that jumps so far is believed the second time.
        for _ in range(2):
            served.parts.store.sweep()

        pages = [await look(served, path) for path in (QUEUE, f"{QUEUE}/batches/{batch_id}")]
        reply = await press(served, retry_path(batch_id), f"token={token_in(before)}")

    assert retry_path(batch_id) in before
    assert "/retry" not in "".join(pages)
    assert (reply.status, b"not kept any more" in reply.body) == (409, True)


@pytest.mark.parametrize("form", ["", "token=0"])
async def test_the_retry_of_a_batch_takes_a_token_a_key_and_jobs(keyed: Served, form: str) -> None:
    batch_id = await created(keyed, chat("a"))
    await keyed.call("POST", f"/v1/batches/{batch_id}/cancel")
    of_a_file = (await make_batch(keyed, LINE))["id"]
    token = token_in(await look(keyed))
    owner = keyed.secret

    wrong = await press(keyed, retry_path(batch_id), form)
    other = await press(keyed, retry_path(of_a_file), f"token={token}")
    keyed.secret = keyed.add_key("stranger")
    await make_batch(keyed, LINE)
    stranger = await press(keyed, retry_path(batch_id), f"token={token_in(await look(keyed))}")

    assert (wrong.status, other.status, stranger.status) == (403, 409, 404)
    keyed.secret = owner
    assert (await show(keyed, batch_id))["canceled"] == 1


async def test_the_queue_asks_the_store_as_often_however_many_batches_there_are(api: Served) -> None:
    asked: list[list[str]] = []
    for count in (1, 5):
        made = [await created(api, chat("a"), chat("b")) for _ in range(count)]
        for each in made:
            await api.call("POST", f"/v1/batches/{each}/cancel")
        with counting(api) as statements:
            page = await look(api)
        asked.append(statements)
        assert all(retry_path(each) in page for each in made)

    assert len(asked[0]) == len(asked[1]) <= 5, asked


@pytest.mark.parametrize("verb", ["cancel", "retry"])
async def test_a_stranger_finds_no_job(keyed: Served, verb: str) -> None:
    batch_id = await created(keyed, chat("a"), label="of acme")
    (number,) = [each["id"] for each in (await show(keyed, batch_id))["jobs"]]
    owner, keyed.secret = keyed.secret, keyed.add_key("stranger")
    await make_batch(keyed, LINE)
    page = await look(keyed)

    reply = await press(keyed, job_path(number, verb), f"token={token_in(page)}")

    assert reply.status == 404
    assert "There are no jobs." in page
    keyed.secret = owner
    assert (await show(keyed, batch_id))["queued"] == 1


@pytest.mark.parametrize("form", ["", "token=0"])
@pytest.mark.parametrize("verb", ["cancel", "retry"])
async def test_a_button_of_a_job_takes_the_token_of_its_page(keyed: Served, verb: str, form: str) -> None:
    batch_id = await created(keyed, chat("a"))
    (number,) = [each["id"] for each in (await show(keyed, batch_id))["jobs"]]

    assert (await press(keyed, job_path(number, verb), form)).status == 403

    assert (await show(keyed, batch_id))["queued"] == 1


async def test_a_server_that_takes_no_jobs_says_so(tmp_path: Path) -> None:
    async with paging(tmp_path, settings=Settings(async_enabled=False)) as served:
        assert "No jobs are taken" in await look(served)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 403),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Sec-Fetch-Site": "same-site", "Origin": "http://localhost:3000"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 303),
        ({}, 303),
    ],
)
async def test_no_other_page_presses_buttons_of_a_server_without_keys(
    api: Served, headers: dict[str, str], status: int
) -> None:
    batch_id = (await make_batch(api, LINE))["id"]
    form = f"token={token_in(await look(api))}"

    assert (await press(api, cancel_path(batch_id), form, **headers)).status == status

    assert (status_of(api, batch_id, "local") == "cancelling") is (status == 303)


async def test_pages_tell_how_a_batch_goes_from_its_creation_to_its_notification(api: Served, tmp_path: Path) -> None:
    async with receiving() as receiver, carrying(api):
        hook = f"{receiver.base}/in/a-secret-path?key=hidden"
        batch_id = (await make_batch(api, chat_lines(["a", "b"]), webhook_url=hook))["id"]
        path = f"{QUEUE}/batches/{batch_id}"
        before = await look(api, path)
        async with working(tmp_path):
            await ended(api, batch_id)
        await receiver.wait(1)
        # It has been taken, but the note of that may be on its way.
        async with asyncio.timeout(10):
            while "notify: done" not in (after := await look(api, path)):
                assert "notify: running" in after

    assert "validate: waiting. shards: waiting. seal: waiting. notify: waiting." in before
    assert (
        "validate: done, 2 lines. shards: done, 2 of 2 lines answered; from line 1: done. seal: done, 1 file." in after
    )
    assert '<td data-label="Event">batch.completed</td>' in after
    for page in (before, after):
        assert "secret-path" not in page
        assert "hidden=" not in page
        assert "key=" not in page


async def test_a_batch_whose_input_is_bad_shows_its_problems(api: Served, tmp_path: Path) -> None:
    async with working(tmp_path):
        batch_id = (await make_batch(api, LINE + b"{nope\n"))["id"]
        await ended(api, batch_id)

    page = await look(api, f"{QUEUE}/batches/{batch_id}")

    assert "validate: failed, 1 problem. shards: not needed. seal: not needed." in page
    assert '<td data-label="Code">invalid_json_line</td>' in page


async def test_a_paused_batch_says_so(api: Served) -> None:
    batch_id = (await make_batch(api, LINE))["id"]
    await api.call("POST", f"/v1/batches/{batch_id}/pause")

    assert "It is paused: operator." in await look(api, f"{QUEUE}/batches/{batch_id}")


async def test_no_page_shows_a_prompt_an_answer_or_a_key(keyed: Served, tmp_path: Path) -> None:
    line = LINE.replace(b'"messages":[]', b'"messages":[{"role":"user","content":"%b"}]' % PROMPT.encode())
    bad = line.replace(b"messages", b"input").replace(b'"a"', b'"b"')
    async with working(tmp_path):
        made = [await make_batch(keyed, content, on_invalid="skip") for content in (line, line + bad)]
        answers = [await ended(keyed, each["id"]) for each in made]

    pages = [await look(keyed), *[await look(keyed, f"{QUEUE}/batches/{each['id']}") for each in made]]

    assert [each["request_counts"]["completed"] for each in answers] == [1, 1]
    for page in pages:
        assert PROMPT not in page
        assert str(keyed.secret) not in page
        assert "assistant" not in page


@pytest.mark.parametrize("path", [f"{QUEUE}/batches/nobody", f"{QUEUE}/batches/%00", f"{QUEUE}/batches/%3Cscript%3E"])
async def test_an_unknown_batch_is_not_found(api: Served, path: str) -> None:
    reply = await api.call("GET", path)

    assert reply.status == 404
    assert b"<script>" not in reply.body


async def test_a_warning_stands_there_while_there_is_work_and_no_worker(tmp_path: Path) -> None:
    clock = MovedClock()
    async with paging(tmp_path, clock=clock) as served:
        idle = await look(served)
        await make_batch(served, LINE)
        never = await look(served)
        served.parts.vitals.feel(Pulse(worker_count=1, ticking_count=1), clock.monotonic_s())
        working_now = await look(served)
        clock.ahead_s = STALLED_S + 1
        served.parts.vitals.feel(Pulse(worker_count=1, ticking_count=0), clock.monotonic_s())
        stalled = await look(served)

    assert ["Nothing moves" in page for page in (idle, never, working_now, stalled)] == [False, True, False, True]


async def test_pages_are_part_of_the_described_api(keyed: Served) -> None:
    reply = await keyed.call("GET", "/openapi.json")

    assert reply.body + b"\n" == openapi()
    document = reply.json
    shown = document["paths"]["/dashboard/queue"]["get"]
    assert set(shown["responses"]["200"]["content"]) == {"text/html"}
    assert {"basic": []} in shown["security"]
    sent = document["paths"]["/dashboard/queue/jobs/{job_id}/retry"]["post"]
    assert set(sent["requestBody"]["content"]) == {"application/x-www-form-urlencoded"}
    assert {"200", "303"} & set(sent["responses"]) == {"303"}


@pytest.mark.parametrize("route", PAGES, ids=lambda route: f"{route.method} {route.path}")
async def test_every_page_wants_a_key(keyed: Served, route: Route) -> None:
    keyed.secret = None

    reply = await keyed.call(route.method, route.path.replace("{", "").replace("}", ""))

    assert reply.status == 401
