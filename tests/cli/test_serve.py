"""What `serve` refuses before it starts anything, and where it listens and keeps its state."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from batchrunner.cli.server_folder import folder_of
from batchrunner.clock import SystemClock
from batchrunner.errors import PortTaken
from batchrunner.hosting import bind, is_loopback
from batchrunner.settings import Settings
from tests.cli.calling import call, spawn
from tests.unit.fanning import VirtualClock


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_is_known(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "::ffff:192.0.2.7"])
def test_what_others_may_reach_is_no_loopback(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("host", ["no such host", ""])
def test_host_that_means_no_address_is_refused(tmp_path: Path, host: str) -> None:
    refused = call("serve", "--data", tmp_path / "served", "--host", host)

    assert refused.code == 2
    assert f"--host {host}" in refused.err


@pytest.mark.parametrize(
    "url", ["ftp://box/v1", "localhost:8000", "http://", "http://me:hunter2@box/v1", "http://box/v1?a=b"]
)
def test_address_that_is_no_upstream_is_refused_before_anything_is_made(tmp_path: Path, url: str) -> None:
    refused = call("serve", "--data", tmp_path / "served", "--port", 0, "-u", url)

    assert refused.code == 2
    assert "base URL" in refused.err
    assert "hunter2" not in refused.err
    assert not (tmp_path / "served").exists()


def test_table_without_an_address_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "batchrunner.toml").write_text('[[upstream]]\nname = "box"\nbase_url = "box:8000"\n')

    refused = call("serve", "--data", tmp_path / "served", "--port", 0)

    assert refused.code == 2
    assert "box:8000" in refused.err


def test_server_ends_as_asked_when_nobody_reads_its_talk_any_more(tmp_path: Path) -> None:
    with spawn("serve", "--data", tmp_path / "served", "--port", 0, "--workers", 0) as server:
        assert server.stderr is not None
        assert server.stderr.readline().startswith("http://")
        server.stderr.close()
        try:
            server.terminate()
            code = server.wait(timeout=60)
        finally:
            server.kill()

    assert code == 0


async def test_free_port_is_the_same_at_all_addresses_and_nobody_listens_yet() -> None:
    sockets = await bind("localhost", 0, SystemClock())
    try:
        ports = {each.getsockname()[1] for each in sockets}
        assert len(ports) == 1
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", ports.pop()), timeout=5)
    finally:
        for each in sockets:
            each.close()


async def test_port_that_becomes_free_meanwhile_is_waited_for() -> None:
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]

    class Freeing(VirtualClock):
        async def sleep(self, duration_s: float) -> None:
            self.now_s += duration_s
            taken.close()

    sockets = await bind("127.0.0.1", port, Freeing())

    assert [each.getsockname()[1] for each in sockets] == [port]
    sockets[0].close()


async def test_port_that_stays_taken_is_refused_after_a_while() -> None:
    class Passing(VirtualClock):
        async def sleep(self, duration_s: float) -> None:
            self.now_s += duration_s

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=f"127.0.0.1 port {port}"):
            await bind("127.0.0.1", port, Passing())


async def test_address_of_another_machine_is_refused_at_once() -> None:
    with pytest.raises(PortTaken, match=r"192\.0\.2\.7"):
        await bind("192.0.2.7", 0, VirtualClock())


def test_folder_is_the_setting_else_of_xdg_else_in_the_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert folder_of(Settings()) == tmp_path / ".local" / "share" / "batchrunner"

    monkeypatch.setenv("XDG_DATA_HOME", "/somewhere")
    assert folder_of(Settings()) == Path("/somewhere/batchrunner")

    assert folder_of(Settings(server_folder="~/mine")) == tmp_path / "mine"
