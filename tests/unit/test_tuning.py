"""The set-up of a process: measured in a process of its own, because it cannot be undone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from batchrunner.tuning import take_long_turns

SCRIPT = """
import asyncio, gc, sys
from batchrunner.tuning import freeze_start_up, tune_process
if "blocked" in sys.argv:
    sys.modules["uvloop"] = None
factory = tune_process(use_uvloop="asyncio" not in sys.argv)
freeze_start_up()
async def main():
    return type(asyncio.get_running_loop()).__module__
with asyncio.Runner(loop_factory=factory) as runner:
    print(runner.run(main()), gc.get_threshold(), gc.get_freeze_count() > 1000)
"""


def set_up(argument: str) -> str:
    completed = subprocess.run(
        [sys.executable, "-c", SCRIPT, argument], capture_output=True, text=True, timeout=60, check=True
    )
    assert completed.stderr == ""
    return completed.stdout.strip()


def test_process_runs_uvloop_when_it_is_there() -> None:
    pytest.importorskip("uvloop")

    assert set_up("") == "uvloop (100000, 50, 100) True"


@pytest.mark.parametrize("argument", ["asyncio", "blocked"])
def test_process_runs_asyncio_otherwise(argument: str) -> None:
    assert set_up(argument) == "asyncio.unix_events (100000, 50, 100) True"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts page faults of glibc's allocator")
def test_read_buffers_stay_on_the_heap_after_raising_the_threshold() -> None:
    """Reads like asyncio's: a buffer that is mapped anew each time costs at least one page fault each time."""
    script = """
import resource, socket, sys
from batchrunner.tuning import raise_mmap_threshold
is_raised = sys.argv[1] == "raised" and raise_mmap_threshold()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
ours, theirs = socket.socketpair()
before = faults()
for _ in range(2000):
    theirs.send(b"x" * 600)
    ours.recv(256 * 1024)
print(is_raised, faults() - before)
"""

    def run(argument: str) -> tuple[str, int]:
        completed = subprocess.run(
            [sys.executable, "-c", script, argument], capture_output=True, text=True, timeout=60, check=True
        )
        is_raised, faults = completed.stdout.split()
        return is_raised, int(faults)

    is_raised, faults = run("raised")
    if is_raised == "False":
        pytest.skip("no glibc here")
    _, faults_before = run("default")

    assert faults_before >= 2000
    assert faults < 500


FILES_SCRIPT = """
import resource, sys
from batchrunner.tuning import allow_open_files
soft, hard, wanted = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
print(allow_open_files(wanted), *resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("limits", "granted"),
    [((64, 256, 128), (128, 128, 256)), ((64, 256, 1000), (256, 256, 256)), ((200, 256, 128), (128, 200, 256))],
)
def test_open_files_are_allowed_as_far_as_the_system_lets_them(
    limits: tuple[int, ...], granted: tuple[int, ...]
) -> None:
    completed = subprocess.run(
        [sys.executable, "-c", FILES_SCRIPT, *map(str, limits)], capture_output=True, text=True, timeout=60, check=True
    )

    assert tuple(map(int, completed.stdout.split())) == granted


TURNS_SCRIPT = """
import os, sys, threading
from batchrunner.tuning import take_long_turns
os.sched_setscheduler(0, getattr(os, sys.argv[1]), os.sched_param(0))
taken = take_long_turns()
policies = []
thread = threading.Thread(target=lambda: policies.append(os.sched_getscheduler(0)))
thread.start()
thread.join()
print(taken, policies == [getattr(os, sys.argv[2])])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the policy")
@pytest.mark.parametrize(
    ("before", "after", "is_taken"),
    [
        pytest.param("SCHED_OTHER", "SCHED_BATCH", True, id="the-usual-policy"),
        pytest.param("SCHED_IDLE", "SCHED_IDLE", False, id="a-chosen-policy"),
    ],
)
def test_threads_inherit_long_turns(before: str, after: str, is_taken: bool) -> None:
    completed = subprocess.run(
        [sys.executable, "-c", TURNS_SCRIPT, before, after], capture_output=True, text=True, timeout=60, check=True
    )

    assert completed.stdout.split() == [str(is_taken), "True"]


def refuse(*_: object) -> None:
    raise PermissionError(1, "Operation not permitted")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has the policy")
def test_process_goes_on_where_long_turns_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    before = os.sched_getscheduler(0)

    assert not take_long_turns()
    assert os.sched_getscheduler(0) == before


def test_process_goes_on_where_there_is_no_such_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "SCHED_BATCH", raising=False)

    assert not take_long_turns()
