"""The command `simulate`, as a process of its own."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner

from batchrunner.cli.simulate import simulate
from batchrunner.simulate import expected_reply

COMMAND = [sys.executable, "-c", "from batchrunner.cli.simulate import simulate; simulate()"]
LISTENING = re.compile(r"simulator listening on (http://127\.0\.0\.1:\d+/v1)\n")


@contextmanager
def running(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    with subprocess.Popen([*COMMAND, "--port", "0", *arguments], stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            match = LISTENING.fullmatch(process.stderr.readline())
            assert match is not None
            yield process, match[1]
        finally:
            process.kill()


def port_of(url: str) -> int:
    return int(url.rsplit(":", 1)[1].removesuffix("/v1"))


def test_it_says_where_it_listens_and_answers_there():
    body = json.dumps({"model": "m", "messages": [{"role": "user", "content": "hi"}]}).encode()
    with (
        running("--latency", "1ms") as (_, url),
        urllib.request.urlopen(f"{url}/chat/completions", data=body, timeout=20) as response,
    ):
        reply = response.read()

    assert expected_reply(body, "/v1/chat/completions").encode() in reply


@pytest.mark.parametrize(
    ("fault", "error", "least_bytes"),
    [("reset", ConnectionResetError, 0), ("reset_mid", ConnectionResetError, 200), ("truncate", None, 200)],
)
def test_faults_below_http_look_the_same_on_the_event_loop_of_the_command(fault, error, least_bytes):
    body = json.dumps({"model": "m", "messages": [], "simulate": fault}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    received, raised = b"", None
    with (
        running("--latency", "0") as (_, url),
        socket.create_connection(("127.0.0.1", port_of(url)), timeout=20) as client,
    ):
        client.sendall(head + body)
        try:
            while piece := client.recv(65536):
                received += piece
        except ConnectionResetError as reset:
            raised = type(reset)

    assert raised is error
    assert len(received) >= least_bytes


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_it_cleanly_with_a_client_connected(number):
    with running() as (process, url), socket.create_connection(("127.0.0.1", port_of(url)), timeout=20):
        process.send_signal(number)
        _, said = process.communicate(timeout=20)

    assert process.returncode == 0
    assert said == "simulator stopped: 0 requests, 0 answered, 0 faulted, 0 repeated without need\n"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--latency", "soon"], "duration 'soon' is not a number"),
        (["--faults", "boom:0.1"], "fault 'boom' is neither"),
        (["--slots", "-1"], "--slots"),
        (["--port", "70000"], "--port"),
    ],
)
def test_a_flag_that_does_not_fit_exits_2_and_says_why(arguments, said):
    result = CliRunner().invoke(simulate, arguments)

    assert result.exit_code == 2
    assert said in result.output


def test_a_port_in_use_exits_1_and_names_it():
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        result = CliRunner().invoke(simulate, ["--port", str(port)])

    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port}: " in result.output


def test_help_does_not_load_the_server():
    script = "import sys; from batchrunner.cli.simulate import simulate; print('batchrunner.simulate' in sys.modules)"

    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)

    assert result.stdout == "False\n"
