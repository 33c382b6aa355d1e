"""What every test shares: marks that follow from other marks, and the S3 services that some of them talk to."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

# How long an example takes says something about the machine, and nothing about the product.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

if TYPE_CHECKING:
    from tests.s3.services import Service


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Count a long test as slow too, so that `-m "not slow"` leaves only the quick ones."""
    for item in items:
        if item.get_closest_marker("long") is not None:
            item.add_marker("slow")


@pytest.fixture(scope="session")
def s3_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Service]]:
    """Start S3 services by name, each once for all tests, and give them credentials that boto3 finds."""
    from tests.s3 import services

    running: dict[str, Service] = {}
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as patch:
        for name, value in services.CREDENTIALS.items():
            patch.setenv(name, value)

        def start(name: str) -> Service:
            if name not in running:
                folder = tmp_path_factory.mktemp(name)
                running[name] = stack.enter_context(getattr(services, name)(folder))
            return running[name]

        yield start
