"""Talk goes to stderr: one line, with a time in front when nobody watches a terminal."""

from __future__ import annotations

import os
import sys

import click


def say(text: str) -> None:
    """Print a line of talk. That nobody reads it any more ends nothing."""
    try:
        click.echo(text, err=True)
    except OSError:
        # What is left in its buffer would fail once more at the end of the process.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def is_terminal() -> bool:
    """Whether somebody watches stderr and wants a panel."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def duration_text(seconds: float) -> str:
    """A duration for people: 42 s, 3 min 10 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def counted(count: int, noun: str) -> str:
    """A number of things: 1 line, 1,200 lines."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def count_text(count: float) -> str:
    """A count for people: 950, 12,400, 3.1 M."""
    return f"{count / 1e6:.1f} M" if count >= 1e7 else f"{round(count):,}"
