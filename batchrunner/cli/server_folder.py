"""The data folder of a server: where it lies, and its store, or that of a run, for a command beside those at work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from batchrunner.settings import Settings

if TYPE_CHECKING:
    from batchrunner.app import Adapters

_F = TypeVar("_F", bound=Callable[..., Any])


def folder_option(command: _F) -> _F:
    """Give a command the option --data."""
    return click.option(
        "--data",
        "server_folder",
        metavar="DIR",
        type=click.Path(file_okay=False),
        help="The server's data folder. [$XDG_DATA_HOME/batchrunner, else ~/.local/share/batchrunner]",
    )(command)


def folder_of(settings: Settings) -> Path:
    """Where the server keeps its state."""
    if settings.server_folder is not None:
        return Path(settings.server_folder).expanduser().absolute()
    return home_folder().absolute()


def home_folder() -> Path:
    """Where lies what is this user's and was given no other place."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "batchrunner"


@contextmanager
def open_store(folder: Path) -> Iterator[Adapters]:
    """Open the folder's store for a while, beside a server or run or without one."""
    from batchrunner.app import open_adapters

    with _closing(open_adapters, folder) as adapters:
        yield adapters


@contextmanager
def open_store_to_read(folder: Path) -> Iterator[Adapters]:
    """Open it for this thread alone, which only reads; a full disk is no hindrance."""
    from batchrunner.app import open_to_read

    with _closing(open_to_read, folder) as adapters:
        yield adapters


@contextmanager
def _closing(opened: Callable[[Path, Settings], Adapters], folder: Path) -> Iterator[Adapters]:
    from batchrunner.cli.configuring import load_settings

    settings, _ = load_settings({})
    adapters = opened(folder, settings)
    try:
        yield adapters
    finally:
        adapters.store.close()
