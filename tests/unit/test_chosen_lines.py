"""A batch of chosen lines, as `run --retry-failed` makes it, runs these lines of its input and no others."""

from __future__ import annotations

import pytest

from batchrunner.lines import LineRules
from batchrunner.models import OnInvalid
from batchrunner.validation import Validator
from tests.cli.calling import chat_line

LINES = [b"{broken\n", b"\n", *(chat_line(name) for name in "abcdef")]


@pytest.mark.parametrize("on_invalid", OnInvalid)
def test_lines_that_were_not_chosen_are_left_out_of_their_shard(on_invalid):
    validator = Validator(LineRules(), on_invalid, lines_max=100, bytes_max=1 << 20, shard_lines_max=5, chosen=(4, 8))

    validator.feed(b"".join(LINES))
    assert validator.candidates() == ()
    found = validator.finish()

    assert not found.is_rejected
    assert found.total_count == 2
    assert [(cut.first_line, cut.line_count, cut.skipped) for cut in found.shards] == [
        (1, 1, (1, 3, 5)),
        (6, 1, (6, 7)),
    ]
