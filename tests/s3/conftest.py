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


@pytest.fixture
def on_seaweedfs(s3_service: Callable[[str], Service], monkeypatch: pytest.MonkeyPatch) -> str:
    """Have every command of the test keep its blobs there; gives the service's address.

    Segments are as short as lets the bounds hold that the tests have for a folder.
    """
    url = s3_service("seaweedfs").url
    monkeypatch.setattr(harness, "AMBIENT", environment_of(url, BATCHRUNNER_SEGMENT_S="200ms"))
    return url
