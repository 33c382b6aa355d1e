"""What every test shares: marks that follow from other marks."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says something about the machine, and nothing about the product.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count a long test as slow too, so that `-m "not slow"` leaves only the quick ones."""
    for item in items:
        if item.get_closest_marker("long") is not None:
            item.add_marker("slow")
