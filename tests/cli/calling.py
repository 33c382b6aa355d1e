"""Calls commands: in this process where that is enough, as processes where they live for a while."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from batchrunner.cli import main

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "batchrunner")
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
_LISTENING = "simulator listening on "


@dataclass(frozen=True, slots=True)
class Called:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self):
        """The object on stdout, which has to be all that is there."""
        return json.loads(self.out)


def call(*arguments: object, stdin: bytes = b"") -> Called:
    """Run a command in this process, with its errors made exit codes as for a user."""
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    given = io.TextIOWrapper(io.BytesIO(stdin))
    code = -1
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch.object(sys, "stdin", given):
        try:
            main([str(each) for each in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
    texts = []
    for stream in (out, err):
        stream.flush()
        texts.append(stream.buffer.getvalue().decode())
    return Called(code, *texts)


def spawn(*arguments: object, env: dict[str, str] | None = None, cwd: Path | None = None) -> subprocess.Popen[str]:
    """Start a command as a process of its own."""
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        env=env or ENVIRONMENT,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> Called:
    """Wait for a process to end."""
    out, err = process.communicate(timeout=120)
    return Called(process.returncode, out, err)


@contextmanager
def simulator(*arguments: str) -> Iterator[str]:
    """A simulated upstream in a process of its own; gives its URL."""
    with spawn("simulate", "--port", "0", *arguments) as process:
        assert process.stderr is not None
        try:
            yield process.stderr.readline().strip().removeprefix(_LISTENING)
        finally:
            process.kill()


@contextmanager
def batch_server(folder: Path, upstream: str, *arguments: str) -> Iterator[str]:
    """A batch server in processes of its own; gives its base URL."""
    where = ("--port", "0", "--data", folder, "-u", upstream)
    with spawn("serve", *where, *arguments) as process:
        assert process.stderr is not None
        base_url = process.stderr.readline().strip()
        # Its talk is read all the time, so that no pipe fills.
        reading = threading.Thread(target=process.stderr.read)
        reading.start()
        try:
            assert base_url.startswith("http://"), base_url
            yield base_url
        finally:
            process.terminate()
            reading.join()


def chat_line(custom_id: str, **body: object) -> bytes:
    """Make a request line; `body` goes on top of a small chat completion."""
    request = {"model": "m", "messages": [{"role": "user", "content": f"Say {custom_id}."}]} | body
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": request}
    return json.dumps(line).encode() + b"\n"
