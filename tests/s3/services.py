"""S3 services for tests, one process each for the whole session: moto in a thread, SeaweedFS, and the JuiceFS gateway,
which ignores preconditions.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import boto3
from botocore.config import Config

ACCESS_KEY, SECRET_KEY = "testing-key", "testing-secret"
BUCKET = "batches"
_START_S = 60.0
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": ACCESS_KEY,
    "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True, slots=True)
class Service:
    """A running service: where it answers, and its process, if it has one of its own."""

    url: str
    process: subprocess.Popen[bytes] | None = None


def client_of(url: str):
    """Make a bare boto3 client, for what tests arrange and look up behind the program's back."""
    return boto3.client(
        "s3",
        endpoint_url=url,
        region_name="us-east-1",
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=Config(
            s3={"addressing_style": "path"},
            retries={"total_max_attempts": 3},
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        ),
    )


def free_port() -> int:
    """Find a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _program(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found is not None, f"{name} is not installed: make test installs it"
    return found


def _make_bucket(url: str) -> None:
    give_up_at_s = time.monotonic() + _START_S
    while True:
        try:
            client_of(url).create_bucket(Bucket=BUCKET)
        except Exception:
            # It listens before it can do anything. The client sends each request several times, with pauses of its own.
            if time.monotonic() > give_up_at_s:
                raise
        else:
            return


@contextlib.contextmanager
def _started(command: list[str], url: str, folder: Path, env: dict[str, str], *, says: bytes) -> Iterator[Service]:
    """Run a service that says this when it can be reached."""
    # SeaweedFS leaves caches in the folder for temporary files, under names that another user's would have too.
    surroundings = os.environ | {"TMPDIR": str(folder)} | env
    talk: deque[bytes] = deque(maxlen=50)
    is_there: Future[bool] = Future()
    with subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=surroundings
    ) as process:
        following = threading.Thread(target=_follow, args=(process, says, talk, is_there))
        following.start()
        try:
            assert is_there.result(_START_S), f"the service ended: {b''.join(talk).decode(errors='replace')}"
            yield Service(url, process)
        finally:
            process.kill()
            following.join()


def _follow(process: subprocess.Popen[bytes], says: bytes, talk: deque[bytes], is_there: Future[bool]) -> None:
    """Read all that a service says, so that no pipe fills."""
    assert process.stdout is not None
    for line in process.stdout:
        talk.append(line)
        if says in line and not is_there.done():
            is_there.set_result(True)
    if not is_there.done():
        is_there.set_result(False)


@contextlib.contextmanager
def moto(_folder: Path) -> Iterator[Service]:
    """Run moto in a thread of this process."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    try:
        _make_bucket(url)
        yield Service(url)
    finally:
        server.stop()


def distinct_ports(count: int) -> list[int]:
    """Find free ports whose gRPC siblings, 10,000 above, are free as well."""
    found: list[int] = []
    while len(found) < count:
        port = free_port()
        if port < 55_000 and port not in found:
            found.append(port)
    return found


@contextlib.contextmanager
def seaweedfs(
    folder: Path,
    *flags: str,
    port: int | None = None,
    ports: list[int] | None = None,
    env: dict[str, str] | None = None,
) -> Iterator[Service]:
    """Run SeaweedFS: its whole stack in one process. With four `ports` it may be one that ran there before."""
    is_new = ports is None or not any(folder.iterdir())
    master, volume, filer, s3 = ports or distinct_ports(4)
    s3 = port or s3
    url = f"http://127.0.0.1:{s3}"
    command = [
        _program("weed"),
        "server",
        f"-dir={folder}",
        "-ip=127.0.0.1",
        "-s3",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-master.volumeSizeLimitMB=128",
        "-volume.max=100",
        f"-master.port={master}",
        f"-volume.port={volume}",
        f"-filer.port={filer}",
        f"-s3.port={s3}",
        *flags,
    ]
    keys = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
    with _started(command, url, folder, keys | (env or {}), says=b"Start Seaweed S3 API Server") as service:
        if is_new:
            _make_bucket(url)
        yield service


@contextlib.contextmanager
def juicefs(folder: Path) -> Iterator[Service]:
    """Run the JuiceFS gateway over a folder."""
    meta = f"sqlite3://{folder}/meta.db"
    program = _program("juicefs")
    making = [program, "format", "--storage", "file", "--bucket", f"{folder}/data/", meta, "files"]
    subprocess.run(making, check=True, capture_output=True)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [program, "gateway", meta, f"127.0.0.1:{port}", "--multi-buckets", "--no-banner", "--no-usage-report"]
    command += ["--log", str(folder / "gateway.log"), "--cache-dir", str(folder / "cache")]
    keys = {"MINIO_ROOT_USER": ACCESS_KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY}
    with _started(command, url, folder, keys, says=b"IAM initialization complete") as service:
        _make_bucket(url)
        yield service
