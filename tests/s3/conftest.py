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


# What a process of a server does whatever its blobs lie on is asked of a folder in every run, of a bucket in long ones.
_OF_PROCESSES = frozenset(
    {
        "test_first_key_closes_an_open_server",
        "test_first_lines_are_the_base_url_and_a_curl_line_that_works",
        "test_followed_batch_does_not_hold_up_the_end",
        "test_others_are_served_only_with_keys",
        "test_progress_tells_what_the_workers_do",
        "test_readiness_tells_that_no_worker_reports",
        "test_request_under_way_is_answered_before_the_end",
        "test_second_server_on_the_folder_is_refused_with_the_pid_of_the_first",
        "test_second_signal_ends_at_once",
        "test_server_may_be_started_while_the_children_of_a_killed_one_still_end",
        "test_server_without_upstream_says_so_validates_and_waits",
        "test_signal_to_all_processes_is_a_clean_end",
        "test_taken_port_is_said_and_exits_1",
    }
)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keep the lane of every run short."""
    for item in items:
        if item.path.name == "test_as_in_a_folder.py" and getattr(item, "originalname", None) in _OF_PROCESSES:
            item.add_marker(pytest.mark.long)


@pytest.fixture
def on_seaweedfs(s3_service: Callable[[str], Service], monkeypatch: pytest.MonkeyPatch) -> str:
    """Have every command of the test keep its blobs there; gives the service's address.

    Segments are as short as lets the bounds hold that the tests have for a folder.
    """
    url = s3_service("seaweedfs").url
    monkeypatch.setattr(harness, "AMBIENT", environment_of(url, BATCHRUNNER_SEGMENT_S="200ms"))
    return url
