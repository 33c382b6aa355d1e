"""Runs that die at each durable step as in a folder, with their blobs on SeaweedFS.

One test stays behind: its second death is at a sync that comes while lines are still open, and a segment of S3 waits
for the last of them.
"""

from __future__ import annotations

import pytest

from tests.e2e.test_crash_points import (  # noqa: F401 - the same tests, elsewhere
    test_run_dies_at_point_later_and_ends_whole,
    test_run_dies_at_point_once_and_ends_whole,
    test_workers_that_die_whenever_they_start_end_the_run_and_lose_nothing,
)

pytestmark = [pytest.mark.real, pytest.mark.long, pytest.mark.usefixtures("on_seaweedfs")]
