"""`run` on a terminal: what its worker processes say stands above the panel, whole, and stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.cli.calling import COMMAND, ENVIRONMENT, ROOT, chat_line, simulator
from tests.cli.terminal import watch

SAID = 30
# A library in the workers that talks on stderr as soon as they open a connection, while the panel is up.
CHATTER = f"""
import os, sys, traceback

def talk(event, _arguments, said=[]):
    if event == "socket.connect" and not said:
        said.append(True)
        for number in range({SAID}):
            os.write(2, f"chatter {{os.getpid()}} {{number:02}}\\n".encode())
        try:
            raise RuntimeError("odd")
        except RuntimeError:
            traceback.print_exc()

if "batchrunner.working" in sys.orig_argv:
    sys.addaudithook(talk)
"""


@pytest.mark.slow
def test_words_of_worker_processes_stand_above_the_panel_and_stay(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(CHATTER)
    (tmp_path / "in.jsonl").write_bytes(b"".join(chat_line(f"c{number}") for number in range(24)))
    environment = {name: value for name, value in ENVIRONMENT.items() if name not in {"NO_COLOR", "COLUMNS", "LINES"}}
    environment |= {"TERM": "xterm", "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    flags = ["--workers", "2", "--concurrency", "4"]

    with simulator("--latency", "250ms") as url:
        command = [*COMMAND, "run", "in.jsonl", "-o", "out.jsonl", "-u", url, *flags]
        code, screen = watch(command, cwd=tmp_path, env=environment)

    rows = screen.rows
    chatter = [row.split()[1:] for row in rows if row.startswith("chatter ")]
    assert code == 0, rows
    for worker in {pid for pid, _ in chatter}:
        assert [number for pid, number in chatter if pid == worker] == [f"{number:02}" for number in range(SAID)]
    assert len(chatter) == SAID * rows.count("RuntimeError: odd") > 0
    assert rows.count("Traceback (most recent call last):") == rows.count("RuntimeError: odd")
    assert not any("in flight" in row for row in rows)
