"""Which batch server a command means, and what is the id of a batch; no heavy import, so that --help stays quick."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click

DEFAULT_SERVER = "http://127.0.0.1:8080/v1"
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """Where the batches are, as the user named it; `flag` repeats that in a command to type next."""

    base_url: str
    flag: str

    def command(self, *words: str) -> str:
        """Write a command for the same server."""
        return shlex.join(["batchrunner", *words]) + self.flag


def server_option(command: _F) -> _F:
    """Give a command the option --server."""
    return click.option(
        "--server",
        "server_address",
        metavar="URL",
        help="Base URL of the batch server; the key is read from BATCHRUNNER_API_KEY. "
        f"[BATCHRUNNER_SERVER, else {DEFAULT_SERVER}]",
    )(command)


def server_of(address: str | None) -> Server:
    """Find the server: the flag, the environment, or the one that `serve` starts by default."""
    flag = f" --server {shlex.quote(address)}" if address else ""
    return Server(base_url=address or os.environ.get("BATCHRUNNER_SERVER") or DEFAULT_SERVER, flag=flag)


def is_batch_id(text: Path | str) -> bool:
    """Tell the id of a batch on a server from a path."""
    name = str(text)
    return (name.startswith("batch_") or (name.isascii() and name.isdecimal())) and not Path(name).exists()
