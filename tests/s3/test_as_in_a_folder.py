"""Runs and servers that are killed, taken over and asked as in a folder, with their blobs on SeaweedFS."""

from __future__ import annotations

import pytest

from tests.e2e.test_kills import (  # noqa: F401 - the same tests, elsewhere
    test_run_killed_as_a_whole_fifty_times_ends_whole,
    test_run_killed_as_a_whole_three_times_ends_whole,
    test_run_whose_workers_are_killed_fifty_times_goes_on_and_ends_whole,
    test_run_whose_workers_are_killed_one_by_one_goes_on_and_ends_whole,
    test_run_with_lines_sent_at_most_once_is_killed_and_repeats_nothing,
    test_run_with_lines_sent_at_most_once_is_killed_fifty_times_and_repeats_nothing,
)
from tests.e2e.test_server_crash_points import (  # noqa: F401 - the same tests, elsewhere
    test_api_that_dies_in_its_sweep_leaves_nothing_behind,
    test_server_killed_while_cancelling_ends_the_batch_cancelled,
    test_worker_dies_at_point_and_then_all_and_the_batch_completes,
)
from tests.e2e.test_server_processes import (  # noqa: F401 - the same tests, elsewhere
    test_first_key_closes_an_open_server,
    test_first_lines_are_the_base_url_and_a_curl_line_that_works,
    test_followed_batch_does_not_hold_up_the_end,
    test_killed_api_comes_back_on_its_port_and_the_batch_goes_on,
    test_killed_server_is_started_again_and_the_batch_completes,
    test_killed_worker_comes_back_and_its_lines_at_once,
    test_others_are_served_only_with_keys,
    test_readiness_tells_that_no_worker_reports,
    test_request_under_way_is_answered_before_the_end,
    test_second_server_on_the_folder_is_refused_with_the_pid_of_the_first,
    test_second_signal_ends_at_once,
    test_server_may_be_started_while_the_children_of_a_killed_one_still_end,
    test_server_without_upstream_says_so_validates_and_waits,
    test_server_without_workers_takes_batches_and_one_with_workers_does_them,
    test_signal_to_all_processes_is_a_clean_end,
    test_sigterm_lets_what_is_in_flight_end_and_nothing_is_sent_again,
    test_taken_port_is_said_and_exits_1,
)
from tests.e2e.test_server_results import (  # noqa: F401 - the same tests, elsewhere
    test_no_line_is_torn_or_given_twice_over_a_kill,
    test_progress_tells_what_the_workers_do,
)

pytestmark = [pytest.mark.real, pytest.mark.slow, pytest.mark.usefixtures("on_seaweedfs")]
