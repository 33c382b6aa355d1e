"""Keys: who may call, what, and how often; and an open server that no web page can use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from batchrunner.clock import SystemClock
from batchrunner.holdings import KeyLimits, KeyScope
from tests.api.serving import Served, serving


@dataclass(slots=True)
class MovedClock(SystemClock):
    """The machine's clock, put forward by hand."""

    ahead_s: float = 0.0

    def monotonic_s(self) -> float:
        return super(MovedClock, self).monotonic_s() + self.ahead_s


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer {key}"},
        {"Authorization": "bearer  {key} "},
        {"api-key": "{key}"},
        {"Authorization": "", "api-key": "{key}"},
    ],
)
async def test_a_key_is_taken_as_bearer_and_as_azure_sends_it(keyed: Served, headers: dict[str, str]) -> None:
    sent = {name: value.format(key=keyed.secret) for name, value in headers.items()}
    keyed.secret = None

    reply = await keyed.call("GET", "/v1/files?api-version=2026-01-01", headers=sent)

    assert reply.status == 200


@pytest.mark.parametrize("header", ["Bearer", "Bearer ", "Basic abc", "token"])
async def test_what_is_no_bearer_token_is_no_key(keyed: Served, header: str) -> None:
    reply = await keyed.call("GET", "/v1/files", headers={"Authorization": header})

    assert reply.status == 401
    assert reply.json["error"]["message"].startswith("You didn't provide an API key.")


async def test_a_wrong_key_is_not_written_down(keyed: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    secret = "sk-this-is-a-wrong-secret-0123456789"

    reply = await keyed.call("GET", "/v1/files", secret=secret)

    assert reply.status == 401
    assert secret.encode() not in reply.body
    assert secret not in caplog.text


@pytest.mark.parametrize(
    ("scope", "method", "path", "status"),
    [
        (KeyScope.READ, "GET", "/v1/files", 200),
        (KeyScope.READ, "POST", "/v1/files", 403),
        (KeyScope.READ, "DELETE", "/v1/files/x", 403),
        (KeyScope.WRITE, "GET", "/v1/files", 403),
        (KeyScope.WRITE, "DELETE", "/v1/files/x", 404),
        (KeyScope.ADMIN, "GET", "/v1/files", 403),
    ],
)
async def test_a_scope_stands_for_itself(keyed: Served, scope: KeyScope, method: str, path: str, status: int) -> None:
    secret = keyed.add_key("acme", scopes=[scope])

    assert (await keyed.call(method, path, secret=secret)).status == status


async def test_a_revoked_key_works_for_five_seconds_at_most(tmp_path: Path) -> None:
    clock = MovedClock()
    async with serving(tmp_path, is_open=False, clock=clock) as served:
        served.secret = served.add_key("acme")
        assert (await served.call("GET", "/v1/files")).status == 200
        (key,) = served.parts.store.keys()
        served.parts.store.revoke_key(key.id, at=clock.now())
        clock.ahead_s = 5.5

        assert (await served.call("GET", "/v1/files")).status == 401


async def test_a_rate_limit_flows_back(tmp_path: Path) -> None:
    clock = MovedClock()
    async with serving(tmp_path, is_open=False, clock=clock) as served:
        served.secret = served.add_key("acme", limits=KeyLimits(rpm=3))
        other = served.add_key("acme", limits=KeyLimits(rpm=3))

        replies = [await served.call("GET", "/v1/files") for _ in range(4)]
        of_other = await served.call("GET", "/v1/files", secret=other)
        clock.ahead_s = 21
        later = await served.call("GET", "/v1/files")

    assert [reply.status for reply in replies] == [200, 200, 200, 429]
    assert [reply.headers["x-ratelimit-remaining-requests"] for reply in replies] == ["2", "1", "0", "0"]
    assert (replies[3].json["error"]["type"], replies[3].json["error"]["code"]) == ("requests", "rate_limit_exceeded")
    assert 1 <= int(replies[3].headers["Retry-After"]) <= 20
    assert "x-should-retry" not in replies[3].headers
    assert of_other.status == 200
    assert later.status == 200


@pytest.mark.parametrize("authorization", [None, "Bearer anything", "Basic x"])
async def test_an_open_server_takes_any_authorization_and_none(api: Served, authorization: str | None) -> None:
    headers = {"Authorization": authorization} if authorization else {}

    assert (await api.call("GET", "/v1/files", headers=headers)).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "localhost:8080"}, 200),
        ({"Host": "[::1]:8080"}, 200),
        ({"Host": "127.0.0.1"}, 200),
        ({"Host": "evil.example:8080"}, 403),
        ({"Host": "127.0.0.1.evil.example"}, 403),
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
)
async def test_an_open_server_is_closed_to_web_pages_of_others(
    api: Served, headers: dict[str, str], status: int
) -> None:
    """A page may send simple requests anywhere, and its name may be made to point at this machine."""
    assert (await api.call("GET", "/v1/files", headers=headers)).status == status
