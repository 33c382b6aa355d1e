"""A place for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from batchrunner import crash
from tests.pipeline.hands import Place


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path)
    yield made
    crash.arm("", _never)
    made.close()


def _never() -> None:
    """No point is armed."""
