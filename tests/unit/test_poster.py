"""Where a webhook may lead, asserted on the sockets: whatever is refused never gets as far as a connect."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from batchrunner.addresses import AddressRules, parse_networks, url_problem
from batchrunner.clock import SystemClock
from batchrunner.deliveries import Posted, PostError
from batchrunner.errors import UsageError
from batchrunner.poster import AiohttpPoster, Found

VECTORS = Path(__file__).parent / "webhook_vectors"


def vectors(name: str) -> list[str]:
    return (VECTORS / f"{name}.txt").read_text(encoding="utf-8").splitlines()


REFUSED = vectors("refused_addresses")
PUBLIC = vectors("public_addresses")
# As JSON, for some have line ends in them.
REFUSED_URLS = [json.loads(line) for line in vectors("refused_urls")]


def literal(address: str) -> str:
    return f"https://[{address}]/hook" if ":" in address else f"https://{address}/hook"


def answered(*addresses: str) -> list[Found]:
    return [
        (
            socket.AF_INET6 if ":" in each else socket.AF_INET,
            socket.SOCK_STREAM,
            6,
            "",
            (each, 443, 0, 0) if ":" in each else (each, 443),
        )
        for each in addresses
    ]


class Names:
    """A name server: each question takes the next answer, the last one stays."""

    def __init__(self, *answers: list[Found]) -> None:
        self._answers = list(answers)
        self.asked: list[tuple[str, int]] = []

    def __call__(self, host: str, port: int) -> list[Found]:
        self.asked.append((host, port))
        if not self._answers:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


@pytest.fixture
def connects(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The addresses that sockets were told to connect to; none of them gets anywhere."""
    seen: list[str] = []

    async def refuse(_loop: Any, _socket: socket.socket, address: tuple[Any, ...]) -> None:
        seen.append(str(address[0]))
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(asyncio.SelectorEventLoop, "sock_connect", refuse)
    return seen


async def posted(url: str, names: Names, rules: AddressRules | None = None) -> Posted:
    poster = AiohttpPoster(rules or AddressRules(), SystemClock(), lookup=names)
    try:
        return await poster.post(url, b"{}", {"content-type": "application/json"})
    finally:
        await poster.close()


@pytest.mark.parametrize("address", REFUSED)
async def test_no_connection_to_an_address_that_is_not_public(address: str, connects: list[str]) -> None:
    by_url = await posted(literal(address), Names())
    by_name = await posted("https://rebound.example/hook", Names(answered(address)))
    hidden = await posted("https://mixed.example/hook", Names(answered("93.184.216.34", address)))

    assert {by_url.error, by_name.error, hidden.error} == {PostError.ADDRESS_REFUSED}
    assert connects == []


@pytest.mark.parametrize("url", REFUSED_URLS)
async def test_no_connection_to_a_url_that_is_no_receivers(url: str, connects: list[str]) -> None:
    names = Names(answered("93.184.216.34"))

    got = await posted(url, names)

    assert got.error is PostError.ADDRESS_REFUSED
    assert (names.asked, connects) == ([], [])


@pytest.mark.parametrize("address", REFUSED)
async def test_sockets_refuse_addresses_that_nothing_before_them_refused(
    address: str, connects: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connector asks no resolver for an address: the last check stands where sockets are made."""
    monkeypatch.setattr("batchrunner.poster.url_problem", lambda _url, _rules: None)
    asked = Names()

    got = await posted(literal(address), asked)

    assert got.error is PostError.ADDRESS_REFUSED
    assert connects == []


def test_there_are_vectors_enough() -> None:
    vectors = [*REFUSED, *REFUSED_URLS]

    assert len(set(vectors)) == len(vectors) >= 200


@pytest.mark.parametrize("address", PUBLIC)
async def test_public_addresses_are_connected_to(address: str, connects: list[str]) -> None:
    got = await posted("https://public.example:8443/hook?a=b", names := Names(answered(address)))

    assert (got.error, connects) == (PostError.UNREACHABLE, [address])
    assert names.asked == [("public.example", 8443)]


@pytest.mark.parametrize(
    "url",
    ["https://1.1.1.1/", "https://[2606:4700:4700::1111]/", "HTTPS://1.1.1.1/", "https://xn--bcher-kva.example/"],
)
async def test_public_urls_are_connected_to(url: str, connects: list[str]) -> None:
    await posted(url, Names(answered("1.1.1.1")))

    assert len(connects) == 1


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST",
        "localhost.",
        "a.localhost",
        "localtest.me",
        "127.0.0.1.nip.io",
        "metadata",
        "kubernetes",
    ],
)
async def test_names_are_judged_by_where_they_lead(host: str, connects: list[str]) -> None:
    got = await posted(f"https://{host}/", Names(answered("127.0.0.1")))

    assert (got.error, connects) == (PostError.ADDRESS_REFUSED, [])


async def test_a_name_that_changes_between_attempts_is_judged_at_each(connects: list[str]) -> None:
    poster = AiohttpPoster(AddressRules(), SystemClock(), lookup=Names(answered("93.184.216.34"), answered("10.0.0.1")))

    got = [(await poster.post("https://rebind.example/", b"{}", {})).error for _ in range(2)]
    await poster.close()

    assert got == [PostError.UNREACHABLE, PostError.ADDRESS_REFUSED]
    assert connects == ["93.184.216.34"], "the address that was checked is the one that is connected to"


async def test_an_unknown_name_is_told_as_such(connects: list[str]) -> None:
    got = await posted("https://unknown.example/", Names())

    assert (got.error, got.message) == (PostError.UNREACHABLE, "the host name is not known")


# -- what a laptop and an operator may allow ---------------------------------------------------------------------------

LAPTOP = AddressRules(is_loopback_allowed=True)
OFFICE = AddressRules(networks=parse_networks(["10.1.0.0/16", "fd00:1::/32"]))


@pytest.mark.parametrize(
    ("rules", "url", "leads_to", "is_let"),
    [
        (LAPTOP, "http://localhost:3000/hook", "127.0.0.1", True),
        (LAPTOP, "http://localhost:3000/hook", "::1", True),
        (LAPTOP, "http://127.0.0.1:3000/hook", "127.0.0.1", True),
        (LAPTOP, "https://[::1]:3000/hook", "::1", True),
        (LAPTOP, "http://example.com/", "93.184.216.34", False),
        (LAPTOP, "https://example.com/", "93.184.216.34", True),
        (LAPTOP, "https://example.com/", "10.0.0.1", False),
        (LAPTOP, "http://example.com/", "169.254.169.254", False),
        (LAPTOP, "http://example.com/", "::ffff:127.0.0.1", False),
        (LAPTOP, "http://0.0.0.0:3000/", "0.0.0.0", False),
        (OFFICE, "http://hooks.office/", "10.1.2.3", True),
        (OFFICE, "http://hooks.office/", "fd00:1::5", True),
        (OFFICE, "http://hooks.office/", "10.2.0.1", False),
        (OFFICE, "http://hooks.office/", "93.184.216.34", False),
        (OFFICE, "https://hooks.office/", "127.0.0.1", False),
    ],
)
async def test_what_is_allowed_is_let_through_and_nothing_else(
    rules: AddressRules, url: str, leads_to: str, is_let: bool, connects: list[str]
) -> None:
    got = await posted(url, Names(answered(leads_to)), rules)

    assert connects == ([leads_to] if is_let else [])
    assert got.error is (PostError.UNREACHABLE if is_let else PostError.ADDRESS_REFUSED)


def test_a_network_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="webhook_networks"):
        parse_networks(["10.0.0.0/33"])


@pytest.mark.parametrize("scheme", ["https", "http"])
def test_ports_of_other_services_are_refused_to_all(scheme: str) -> None:
    ports = itertools.chain(range(1, 1024), [2049, 6379, 11211])

    refused = [port for port in ports if url_problem(f"{scheme}://127.0.0.1:{port}/", LAPTOP)]

    assert {22, 25, 53, 6379, 11211} <= set(refused)
    assert not {80, 443} & set(refused)


# -- answers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
async def receiver() -> AsyncIterator[tuple[str, list[str]]]:
    """A receiver on this machine, and the paths that were asked for."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        asked.append(request.path)
        match request.path.strip("/").split("/"):
            case ["redirect", code]:
                return web.Response(status=int(code), headers={"Location": "/taken"})
            case ["status", code]:
                return web.Response(status=int(code), headers={"Retry-After": "17"})
            case ["endless"]:
                response = web.StreamResponse()
                await response.prepare(request)
                while True:
                    await response.write(b"x" * 65536)
            case ["silent"]:
                await asyncio.Event().wait()
            case ["cut"]:
                assert request.transport is not None
                request.transport.abort()
        return web.Response(text="thanks")

    app = web.Application()
    app.router.add_post("/{path:.*}", answer)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    yield f"http://127.0.0.1:{runner.addresses[0][1]}", asked
    await runner.cleanup()


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(receiver: tuple[str, list[str]], code: int) -> None:
    base, asked = receiver

    got = await posted(f"{base}/redirect/{code}", Names(), LAPTOP)

    assert (got.status, got.is_taken, asked) == (code, False, [f"/redirect/{code}"])


@pytest.mark.parametrize(("code", "is_taken"), [(200, True), (204, True), (299, True), (400, False), (500, False)])
async def test_only_2xx_is_taken(receiver: tuple[str, list[str]], code: int, is_taken: bool) -> None:
    got = await posted(f"{receiver[0]}/status/{code}", Names(), LAPTOP)

    assert (got.status, got.is_taken, got.retry_after_s) == (code, is_taken, 17.0)


async def test_an_answer_without_an_end_is_not_read(receiver: tuple[str, list[str]]) -> None:
    got = await posted(f"{receiver[0]}/endless", Names(), LAPTOP)

    assert got.is_taken
    assert got.elapsed_s < 5


async def test_a_connection_that_is_cut_is_an_error(receiver: tuple[str, list[str]]) -> None:
    got = await posted(f"{receiver[0]}/cut", Names(), LAPTOP)

    assert (got.status, got.error) == (None, PostError.BROKEN_ANSWER)


async def test_silence_is_a_timeout(receiver: tuple[str, list[str]]) -> None:
    poster = AiohttpPoster(LAPTOP, SystemClock(), timeout_s=0.2)

    got = await poster.post(f"{receiver[0]}/silent", b"{}", {})
    await poster.close()

    assert (got.status, got.error, got.message) == (None, PostError.TIMEOUT, "no answer within 0.2 s")


async def test_a_name_server_that_is_silent_delays_no_other_name(receiver: tuple[str, list[str]]) -> None:
    port = int(receiver[0].rpartition(":")[2])
    let_go = threading.Event()

    def lookup(host: str, _port: int) -> list[Found]:
        if host == "silent.example":
            let_go.wait(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port))]

    poster = AiohttpPoster(LAPTOP, SystemClock(), lookup=lookup)
    waiting = [asyncio.create_task(poster.post("https://silent.example/", b"{}", {})) for _ in range(100)]
    await asyncio.sleep(0)
    got = await poster.post(f"http://other.example:{port}/status/204", b"{}", {})
    for each in waiting:
        each.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    let_go.set()
    await poster.close()

    assert got.status == 204


async def test_a_certificate_that_nobody_trusts_is_told_as_such() -> None:
    certificates = Path(__file__).parents[1] / "hostile" / "certificates"
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "localhost.crt", certificates / "localhost.key")
    server = await asyncio.start_server(lambda _reader, _writer: None, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]

    got = await posted(f"https://127.0.0.1:{port}/", Names(), LAPTOP)
    server.close()

    assert got.error is PostError.TLS
