"""The command `doctor`."""

from __future__ import annotations

import resource
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.cli.calling import Called, call, simulator

KEY = "sk-this-must-never-be-seen"


@pytest.fixture(autouse=True)
def _bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))


def states(called: Called) -> dict[str, str]:
    return {check["name"]: check["state"] for check in called.json["checks"]}


@contextmanager
def server(status: int, body: bytes, **headers: str) -> Iterator[str]:
    """A server that answers everything alike."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as peer:
        thread = threading.Thread(target=peer.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{peer.server_port}/v1"
        finally:
            peer.shutdown()
            thread.join()


def test_a_good_upstream_is_ok_and_its_models_are_named():
    with simulator("--latency", "1ms") as url:
        called = call("doctor", "-u", url, "--json")

    assert called.code == 0
    assert set(states(called).values()) <= {"ok", "warn"}
    assert called.json["models"] == ["simulated", "simulated-embedding"]
    assert {"address", "name", "connection", "key", "models", "latency", "open files", "disk", "file system"} <= set(
        states(called)
    )


def test_the_text_form_has_a_line_for_each_check():
    with simulator("--latency", "1ms") as url:
        called = call("doctor", "-u", url)

    lines = called.out.splitlines()
    assert called.code == 0
    assert any(line.startswith("ok    models: 2: simulated") for line in lines)
    assert any(line.startswith("ok    key: OPENAI_API_KEY is not set") for line in lines)
    assert "\x1b" not in called.out


def test_a_refused_key_exits_4_and_is_never_printed(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    with simulator("--latency", "1ms", "--api-key", "another") as url:
        called = call("doctor", "-u", url, "--api-key-env", "MY_KEY", "--json")

    assert called.code == 4
    assert states(called)["key"] == "ok"
    assert states(called)["models"] == "fail"
    assert KEY not in called.out + called.err
    assert "Set the right key in MY_KEY." in called.out


def test_the_right_key_is_accepted(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with simulator("--latency", "1ms", "--api-key", KEY) as url:
        called = call("doctor", "-u", url, "--json")

    assert called.code == 0
    assert KEY not in called.out


def test_nobody_at_the_port_exits_1_and_still_looks_at_the_machine():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]

    called = call("doctor", "-u", f"http://127.0.0.1:{port}/v1", "--json")

    assert called.code == 1
    assert states(called)["connection"] == "fail"
    assert "models" not in states(called)
    assert "disk" in states(called)


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://user:secret@host/v1", "http://host/v1?a=b"])
def test_an_address_that_a_run_would_refuse_fails(url):
    called = call("doctor", "-u", url, "--json")

    assert called.code == 1
    assert states(called)["address"] == "fail"
    assert "secret" not in called.out


def test_an_unknown_host_fails():
    called = call("doctor", "-u", "http://no-such-host.invalid/v1", "--json")

    assert called.code == 1
    assert states(called)["name"] == "fail"


def test_plain_http_behind_https_fails_at_tls():
    with server(200, b"{}") as url:
        called = call("doctor", "-u", url.replace("http://", "https://"), "--json")

    assert called.code == 1
    assert states(called)["tls"] == "fail"


@pytest.mark.parametrize(
    ("status", "body", "state", "code"),
    [
        (404, b"not found", "warn", 0),
        (200, b"<html>", "warn", 0),
        (200, b'{"data": []}', "ok", 0),
        (301, b"", "fail", 1),
        (500, b"", "fail", 1),
        (403, b"", "fail", 4),
    ],
)
def test_what_the_answer_to_models_means(status, body, state, code):
    with server(status, body, Location="http://127.0.0.1:9/elsewhere") as url:
        called = call("doctor", "-u", url, "--json")

    assert called.code == code
    assert states(called)["models"] == state


def test_too_few_open_files_is_warned_of_with_the_command_that_helps(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1 << 20))
    with server(200, b'{"data": []}') as url:
        called = call("doctor", "-u", url, "--json")

    found = next(check for check in called.json["checks"] if check["name"] == "open files")
    assert called.code == 0
    assert found["state"] == "warn"
    assert found["hint"] == "ulimit -n 4224"


def test_without_an_address_it_exits_2():
    called = call("doctor")

    assert called.code == 2
    assert "OPENAI_BASE_URL" in called.err


def test_each_of_several_upstreams_is_looked_at(monkeypatch, tmp_path):
    with simulator("--latency", "1ms", "--api-key", KEY) as box, simulator("--latency", "1ms") as cloud:
        (tmp_path / "box.key").write_text(f"{KEY}\n")
        (tmp_path / "batchrunner.toml").write_text(
            f'[[upstream]]\nname = "box"\nbase_url = "{box}"\napi_key_file = "box.key"\n'
            f'[[upstream]]\nname = "cloud"\nbase_url = "{cloud}"\napi_key_env = "NOT_THERE"\n'
        )
        called = call("doctor", "--json")
        (tmp_path / "box.key").write_text("wrong")
        refused = call("doctor", "--json")

    assert called.code == 0
    assert states(called)["box: models"] == states(called)["cloud: models"] == "ok"
    assert "disk" in states(called)
    assert KEY not in called.out
    assert refused.code == 4
    assert (states(refused)["box: models"], states(refused)["cloud: models"]) == ("fail", "ok")
