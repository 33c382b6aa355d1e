"""Servers for the tests of the API."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.api.serving import Served, serving


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    """An open server."""
    async with serving(tmp_path) as served:
        yield served


@pytest.fixture
async def keyed(tmp_path: Path) -> AsyncIterator[Served]:
    """A server with keys; its client has a key of tenant `acme` for everything."""
    async with serving(tmp_path, is_open=False) as served:
        served.secret = served.add_key("acme")
        yield served
