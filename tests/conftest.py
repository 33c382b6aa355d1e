"""What every test shares: marks that follow from other marks."""

from __future__ import annotations

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count a long test as slow too, so that `-m "not slow"` leaves only the quick ones."""
    for item in items:
        if item.get_closest_marker("long") is not None:
            item.add_marker("slow")
