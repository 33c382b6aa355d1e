"""Every hostile test runs on each event loop that a process may get."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from batchrunner.tuning import find_loop_factory


def pytest_asyncio_loop_factories(
    config: pytest.Config, item: pytest.Item
) -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Plain asyncio, and uvloop where it is installed."""
    factories = {"asyncio": asyncio.new_event_loop, "fastest": find_loop_factory()}
    return factories if factories["fastest"] is not asyncio.new_event_loop else {"asyncio": asyncio.new_event_loop}
