"""Run a command and tell what it cost: wall clock, CPU of all its processes, peak memory of each."""

from __future__ import annotations

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
# What is measured starts from compiled modules, as an installed command does.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
ENVIRONMENT["PYTHONPATH"] = str(ROOT)
_SAMPLE_S = 0.05


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A finished command. `cpu_s` is user + system of all its processes, peaks are resident memory by process id."""

    code: int
    wall_s: float
    cpu_s: float
    stdout: str
    stderr: str
    peak_bytes: dict[int, int] = field(default_factory=dict)

    @property
    def peak_max_bytes(self) -> int:
        return max(self.peak_bytes.values(), default=0)


class Command:
    """A command in a process group of its own. `wait` gives its cost; `kill` ends the whole group."""

    def __init__(
        self,
        arguments: Sequence[str],
        *,
        core: int | None = None,
        environment: dict[str, str] | None = None,
        is_sampled: bool = False,
        folder: Path | None = None,
    ) -> None:
        self._out = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `wait`
        self._err = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `wait`
        self.began_s = time.perf_counter()
        self._process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=self._out,
            stderr=self._err,
            cwd=folder,
            env={**ENVIRONMENT, **(environment or {})},
            start_new_session=True,
        )
        pin(self._process.pid, core)
        self._peaks: dict[int, int] = {}
        self._is_over = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        if is_sampled:
            self._sampler.start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_running(self) -> bool:
        """Look without reaping."""
        if self._process.returncode is not None:
            return False
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def kill(self) -> None:
        """End every process of the command at once."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)

    def wait(self) -> Ran:
        """Wait for the end and give the cost."""
        _, status, usage = os.wait4(self.pid, 0)
        wall_s = time.perf_counter() - self.began_s
        self._process.returncode = os.waitstatus_to_exitcode(status)
        self._is_over.set()
        if self._sampler.is_alive():
            self._sampler.join()
        return Ran(
            code=self._process.returncode,
            wall_s=wall_s,
            cpu_s=usage.ru_utime + usage.ru_stime,
            stdout=_drain(self._out),
            stderr=_drain(self._err),
            peak_bytes=dict(self._peaks),
        )

    def _sample(self) -> None:
        # The kernel keeps each process's high-water mark: a look now and then misses only what was got at the very end.
        while not self._is_over.wait(_SAMPLE_S):
            for pid in session_pids(self.pid):
                peak = peak_rss_bytes(pid)
                if peak is not None:
                    self._peaks[pid] = max(peak, self._peaks.get(pid, 0))


def _drain(stream: IO[bytes]) -> str:
    with stream:
        stream.seek(0)
        return stream.read().decode(errors="replace")


def measured(arguments: Sequence[str], *, core: int | None = None, is_sampled: bool = False) -> Ran:
    """Run a command to its end."""
    return Command(arguments, core=core, is_sampled=is_sampled).wait()


def pin(pid: int, core: int | None) -> None:
    """Keep a process that has just begun, and what it starts, on one core."""
    if core is not None:
        os.sched_setaffinity(pid, {core})


def cores() -> tuple[int | None, int | None]:
    """A core for the client and one for the upstream; None where there is only one, or no say."""
    if not hasattr(os, "sched_getaffinity"):
        return None, None
    allowed = sorted(os.sched_getaffinity(0))
    return (allowed[0], allowed[-1]) if len(allowed) > 1 else (None, None)


def session_pids(leader: int) -> list[int]:
    """The processes of a session."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if os.getsid(int(entry.name)) == leader:
                    found.append(int(entry.name))
    return found


def peak_rss_bytes(pid: int) -> int | None:
    """The most memory that a process has had resident since it began its program; None if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return None


def in_pairs(sides: dict[str, Callable[[], Ran]], pairs: int) -> dict[str, list[Ran]]:
    """Run all sides back to back, that many times; the order turns so that no side always gets the warmer machine."""
    rows: dict[str, list[Ran]] = {name: [] for name in sides}
    names = list(sides)
    for number in range(pairs):
        for name in names if number % 2 == 0 else reversed(names):
            ran = sides[name]()
            if ran.code != 0:
                raise RuntimeError(f"{name} ended with {ran.code}: {ran.stderr[-2000:]}")
            rows[name].append(ran)
    return rows


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder for one benchmark's files."""
    with tempfile.TemporaryDirectory(prefix="batchrunner-bench-") as name:
        yield Path(name)


def batchrunner(*arguments: str) -> list[str]:
    """The command line of our command."""
    return [sys.executable, "-m", "batchrunner", *arguments]
