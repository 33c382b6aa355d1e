"""Commands whose blobs lie on SeaweedFS."""

from __future__ import annotations

from collections.abc import Callable
from uuid import uuid4

import pytest

from tests.e2e import harness
from tests.s3.services import BUCKET, CREDENTIALS, Service


def environment_of(url: str, **settings: str) -> dict[str, str]:
    """Settings and credentials that lead a command to a service, with a prefix of its own."""
    return CREDENTIALS | {
        "BATCHRUNNER_S3_ENDPOINT_URL": url,
        "BATCHRUNNER_S3_ADDRESSING": "path",
        "BATCHRUNNER_BLOBS": f"s3://{BUCKET}/{uuid4().hex}",
        **settings,
    }


# What was proven in a folder is asked of a bucket once for each way of dying; the rest is for the long lane.
_IN_EVERY_RUN = frozenset(
    {
        "test_killed_server_is_started_again_and_the_batch_completes",
        "test_no_line_is_torn_or_given_twice_over_a_kill[all]",
        "test_worker_dies_at_point_and_then_all_and_the_batch_completes[seal.files_committed]",
    }
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the lane of every run short."""
    for item in items:
        if item.path.name == "test_as_in_a_folder.py" and item.name not in _IN_EVERY_RUN:
            item.add_marker(pytest.mark.long)


@pytest.fixture
def on_seaweedfs(s3_service: Callable[[str], Service], monkeypatch: pytest.MonkeyPatch) -> str:
    """Have every command of the test keep its blobs there; gives the service's address.

    Segments are as short as lets the bounds hold that the tests have for a folder.
    """
    url = s3_service("seaweedfs").url
    monkeypatch.setattr(harness, "AMBIENT", environment_of(url, BATCHRUNNER_SEGMENT_S="200ms"))
    return url
