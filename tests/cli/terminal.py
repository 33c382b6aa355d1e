"""A terminal that keeps what a person would see: enough of one for rich's panels, and a process that talks to it."""

from __future__ import annotations

import fcntl
import os
import re
import struct
import subprocess
import termios
from collections.abc import Mapping, Sequence
from pathlib import Path

COLUMNS, ROWS = 160, 50
_TOKEN = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])|[\r\n]|[^\x1b\r\n]+|\x1b")


class Screen:
    """All rows ever written, as they look in the end."""

    def __init__(self) -> None:
        self._rows: list[str] = [""]
        self._row = 0
        self._column = 0

    @property
    def rows(self) -> list[str]:
        """From the first to the last, without trailing blanks."""
        return [row.rstrip() for row in self._rows]

    def feed(self, text: str) -> None:
        """Write what a process sent."""
        for token in _TOKEN.finditer(text):
            match token.group(2) or token.group():
                case "\n":
                    self._row += 1
                    if self._row == len(self._rows):
                        self._rows.append("")
                case "\r":
                    self._column = 0
                case "A":
                    self._row = max(0, self._row - int(token.group(1) or 1))
                case "K":
                    self._erase(token.group(1))
                case word if token.group(2) is None:
                    self._write(word)

    def _erase(self, which: str) -> None:
        row = self._rows[self._row]
        self._rows[self._row] = "" if which == "2" else row[: self._column]

    def _write(self, word: str) -> None:
        row = self._rows[self._row].ljust(self._column)
        self._rows[self._row] = row[: self._column] + word + row[self._column + len(word) :]
        self._column += len(word)


def watch(command: Sequence[str], *, cwd: Path, env: Mapping[str, str]) -> tuple[int, Screen]:
    """Run a command with a terminal as its stderr; gives its exit code and the screen that it left."""
    terminal, end = os.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
    with subprocess.Popen(
        command, cwd=cwd, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=end
    ) as process:
        os.close(end)
        sent = b"".join(iter(lambda: _read(terminal), b""))
    os.close(terminal)
    screen = Screen()
    screen.feed(sent.decode())
    return process.returncode, screen


def _read(terminal: int) -> bytes:
    """What came, nothing when the last process has closed the other end, which Linux tells by an error."""
    try:
        return os.read(terminal, 65536)
    except OSError:
        return b""
