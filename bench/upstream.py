"""The simulated upstream as a process of its own, on a core of its own, and what it has counted."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import urllib.request
from collections.abc import Iterator

from bench.measuring import ENVIRONMENT, batchrunner, pin


class Upstream:
    """A running simulator."""

    def __init__(self, base_url: str) -> None:
        self.base_url = base_url
        self._origin = base_url.removesuffix("/v1")

    def stats(self) -> dict[str, int]:
        """What it has counted so far."""
        with urllib.request.urlopen(f"{self._origin}/__stats", timeout=10) as answer:
            return json.load(answer)

    def control(self, **settings: object) -> None:
        """Change how it behaves from now on."""
        request = urllib.request.Request(f"{self._origin}/__control", json.dumps(settings).encode(), method="POST")
        urllib.request.urlopen(request, timeout=10).close()


@contextlib.contextmanager
def simulator(*options: str, core: int | None = None, latency: str = "0") -> Iterator[Upstream]:
    """Start a simulator and stop it at the end."""
    process = subprocess.Popen(
        batchrunner("simulate", "--port", "0", "--latency", latency, *options),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    pin(process.pid, core)
    assert process.stderr is not None
    try:
        said = process.stderr.readline()
        if " on http" not in said:
            raise RuntimeError(f"the simulator did not start: {said}{process.stderr.read()}")
        yield Upstream(said.strip().rpartition(" ")[2])
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate()
