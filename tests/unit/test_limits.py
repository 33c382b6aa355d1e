"""Rates, the shared cooldown and the breakers, on invented clocks."""

from __future__ import annotations

import random
from bisect import bisect_left
from itertools import accumulate, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrunner.limits import Breaker, Cooldown, FirstContact, Outage, ReadBudget, TokenBucket, estimate_tokens
from batchrunner.models import PauseReason

AUTH, MODEL = PauseReason.AUTHENTICATION, PauseReason.MODEL_UNKNOWN


# Rates.


def taken_at(bucket: TokenBucket, amounts: list[float], until_s: float) -> list[tuple[float, float]]:
    """Take greedily, waiting as told; give (moment, amount) of each take."""
    now_s, takes = 0.0, []
    while amounts and now_s < until_s:
        wait_s = bucket.take(now_s, amounts[0])
        if wait_s > 0.0:
            now_s += wait_s
        else:
            takes.append((now_s, amounts.pop(0)))
    return takes


def most_in_a_minute(takes: list[tuple[float, float]]) -> float:
    moments = [at_s for at_s, _ in takes]
    sums = [0.0, *accumulate(amount for _, amount in takes)]
    return max(sums[bisect_left(moments, start + 60.0)] - sums[first] for first, start in enumerate(moments))


@pytest.mark.parametrize("per_minute", [1, 10, 59, 600, 6000])
def test_no_minute_exceeds_the_limit_and_little_of_it_is_left_unused(per_minute: int) -> None:
    takes = taken_at(TokenBucket(per_minute), [1.0] * (per_minute * 4), 240.0)

    assert most_in_a_minute(takes) <= max(per_minute, 1)
    assert len(takes) >= 0.97 * per_minute * 4 - 1


@given(st.lists(st.integers(1, 3000), min_size=50, max_size=80))
def test_amounts_larger_than_the_burst_are_paid_off(amounts: list[int]) -> None:
    takes = taken_at(TokenBucket(10_000), [float(each) for each in amounts], 10_000.0)

    assert len(takes) == len(amounts)
    # Each amount is let through before it is paid, so a minute may end with one that is not yet.
    assert most_in_a_minute(takes) <= 10_000 * 0.99 + max(amounts)


def test_taking_too_early_takes_nothing() -> None:
    bucket = TokenBucket(60)
    assert bucket.take(0.0, 1) == 0.0

    first = bucket.take(0.0, 1)
    second = bucket.take(0.0, 1)

    assert first == second > 0.9
    assert bucket.take(first, 1) == 0.0


def test_settling_charges_and_gives_back_the_difference() -> None:
    bucket = TokenBucket(6000)
    assert bucket.take(0.0, 60) == 0.0
    full_wait_s = bucket.wait_s(0.0, 60)

    bucket.settle(98.0)
    assert bucket.wait_s(0.0, 60) == pytest.approx(full_wait_s + 1.0)

    bucket.settle(-98.0)
    assert bucket.wait_s(0.0, 60) == pytest.approx(full_wait_s)


def test_giving_back_never_saves_up_more_than_the_burst() -> None:
    bucket = TokenBucket(6000)

    bucket.settle(-5000.0)

    assert bucket.take(0.0, 60) == 0.0
    assert bucket.take(0.0, 60) > 0.0


def test_a_share_changes_the_rate_and_keeps_the_debt() -> None:
    bucket = TokenBucket(6000)
    bucket.take(0.0, 60)
    wait_s = bucket.wait_s(0.0, 30)

    bucket.set_rate(3000, 0.0)

    assert bucket.wait_s(0.0, 30) == pytest.approx(2 * wait_s)


def test_a_clock_that_stands_or_steps_back_fills_nothing() -> None:
    bucket = TokenBucket(60)
    bucket.take(100.0, 1)
    wait_s = bucket.wait_s(100.0, 1)

    assert bucket.wait_s(90.0, 1) == wait_s
    assert bucket.wait_s(100.0, 1) == wait_s


def test_tokens_are_estimated_from_bytes_and_what_may_be_generated() -> None:
    pad = "x" * 3971

    assert estimate_tokens(b'{"max_tokens":500,"prompt":"%b"}' % pad.encode()) == 4003 // 4 + 500
    assert estimate_tokens(b'{"max_completion_tokens":500,"max_tokens":7}') == 44 // 4 + 500
    assert estimate_tokens(b'{"max_output_tokens":500}') == 25 // 4 + 500
    assert estimate_tokens(b'{"max_tokens":null}') == 19 // 4
    assert estimate_tokens(b'{"max_tokens":"lots"}') == 21 // 4
    assert estimate_tokens(b'{"max_tokens":-1e9}') == 19 // 4
    assert estimate_tokens(b"") == 1


# Cooldown.


def test_a_cooldown_is_extended_and_never_shortened() -> None:
    cooldown = Cooldown()

    cooldown.ask(10.0, 5.0)
    cooldown.ask(11.0, 1.0)
    assert cooldown.until_s == 15.0

    cooldown.ask(12.0, 20.0)
    assert cooldown.until_s == 32.0


@pytest.mark.parametrize("hostile_s", [600.0, 1e12, float("inf")])
def test_a_cooldown_is_at_most_a_minute(hostile_s: float) -> None:
    cooldown = Cooldown()

    cooldown.ask(0.0, hostile_s)

    assert cooldown.until_s == 60.0


@pytest.mark.parametrize("nonsense_s", [0.0, -5.0, float("nan")])
def test_nonsense_asks_for_no_cooldown(nonsense_s: float) -> None:
    cooldown = Cooldown()

    cooldown.ask(0.0, nonsense_s)

    assert cooldown.until_s < 0.0


def test_one_odd_answer_of_many_does_not_stall_all() -> None:
    cooldown = Cooldown()

    for second in range(100):
        cooldown.ask(2.0 * second, 60.0, in_flight=64)
    assert cooldown.until_s < 0.0

    for _ in range(16):
        cooldown.ask(300.0, 5.0, in_flight=64)
    assert cooldown.until_s == 305.0


def test_processes_resume_at_different_moments() -> None:
    moments = set()
    for uniform in (0.0, 0.5, 0.9):
        cooldown = Cooldown()
        cooldown.ask(0.0, 5.0, uniform=uniform)
        moments.add(cooldown.until_s)

    assert moments == {5.0, 5.25, 5.45}


# Suspicion.


def test_the_breaker_trips_on_five_lines_of_one_reason() -> None:
    breaker = Breaker()

    for line in range(1, 5):
        breaker.note(AUTH, line)
        assert breaker.tripped(is_nothing_left=False) is None
    breaker.note(AUTH, 5)

    assert breaker.tripped(is_nothing_left=False) is AUTH


def test_one_line_asked_five_times_is_one_line() -> None:
    breaker = Breaker()

    for _ in range(5):
        breaker.note(MODEL, 1)

    assert breaker.tripped(is_nothing_left=False) is None
    assert breaker.tripped(is_nothing_left=True) is MODEL


@pytest.mark.parametrize("other", [None, MODEL])
def test_any_other_answer_ends_the_suspicion_for_good(other: PauseReason | None) -> None:
    breaker = Breaker()
    breaker.note(AUTH, 1)
    assert breaker.is_undecided

    breaker.note(other, 2)
    for line in range(3, 20):
        breaker.note(AUTH, line)

    assert not breaker.is_undecided
    assert breaker.tripped(is_nothing_left=True) is None


def test_a_breaker_without_an_answer_does_not_trip() -> None:
    assert Breaker().tripped(is_nothing_left=True) is None


def test_a_breaker_that_probes_trips_at_the_first_line() -> None:
    breaker = Breaker(suspects_min=1)
    assert not breaker.has_suspects

    breaker.note(AUTH, 1)

    assert breaker.has_suspects
    assert breaker.tripped(is_nothing_left=False) is AUTH


# Outage.


def dead_outage(at_s: float = 100.0) -> Outage:
    outage = Outage()
    outage.note_failure(at_s, 1)
    assert outage.is_down
    return outage


def test_more_than_half_in_flight_failing_within_a_second_is_a_death() -> None:
    outage = Outage()

    for failure in range(32):
        outage.note_failure(1.0 + failure / 100, 64 - failure)
    assert not outage.is_down

    outage.note_failure(1.9, 32)
    assert outage.is_down


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_few_in_flight_that_all_fail_one_after_the_other_are_a_death(in_flight: int) -> None:
    outage = Outage()

    for failure in range(in_flight):
        assert not outage.is_down
        outage.note_failure(10.0 + 4.0 * failure, in_flight)

    assert outage.is_down
    assert outage.covers(10.0)


def test_ever_more_knocks_go_before_an_excused_send_until_one_was_answered() -> None:
    outage = Outage()

    excuses = [outage.note_knock(is_answered=False) for _ in range(15)]

    assert [number for number, is_excused in enumerate(excuses, 1) if is_excused] == [1, 3, 7, 15]
    assert not outage.note_knock(is_answered=True)
    assert not any(outage.note_knock(is_answered=False) for _ in range(1000))


def test_one_of_few_that_fails_while_others_are_answered_is_not() -> None:
    outage = Outage()

    for second in range(0, 100, 2):
        outage.note_failure(float(second), 3)
        outage.note_answer(float(second))

    assert not outage.is_down


def test_the_same_failures_spread_over_longer_are_not() -> None:
    outage = Outage()

    for failure in range(1000):
        outage.note_failure(failure * 0.1, 64)

    assert not outage.is_down


def test_failures_between_answers_are_not() -> None:
    outage = Outage()

    for moment in range(1000):
        outage.note_failure(moment / 1000, 16)
        outage.note_answer(moment / 1000)

    assert not outage.is_down


def test_a_death_covers_the_failures_that_came_before_it_was_known() -> None:
    outage = Outage()
    for failure in range(4):
        outage.note_failure(5.0 + failure / 10, 6)
    outage.note_answer(9.0)

    assert not outage.is_down
    assert outage.covers(5.0)
    assert outage.covers(8.0)
    assert not outage.covers(4.9)
    assert not outage.covers(9.5)


def test_no_failure_is_covered_while_nothing_died() -> None:
    outage = Outage()
    outage.note_failure(5.0, 10)

    assert not outage.covers(5.0)


def test_one_probe_at_a_time_with_backoff_to_five_seconds() -> None:
    outage = dead_outage(at_s=0.0)

    probes, now_s = [], 0.0
    while now_s < 30.0:
        if outage.may_send(now_s):
            probes.append(now_s)
            assert not outage.may_send(now_s)
            outage.note_failure(now_s, 1)
        now_s += 0.05

    gaps = [later - earlier for earlier, later in pairwise(probes)]
    assert probes[0] == pytest.approx(0.25, abs=0.06)
    assert gaps == pytest.approx([0.5, 1.0, 2.0, 4.0, 5.0, 5.0, 5.0, 5.0], abs=0.06)


def test_a_probe_without_news_is_followed_by_another_after_five_seconds() -> None:
    outage = dead_outage(at_s=0.0)

    assert outage.may_send(1.0)
    assert not outage.may_send(5.9)
    assert outage.may_send(6.0)


def test_stragglers_do_not_lengthen_the_backoff() -> None:
    outage = dead_outage(at_s=0.0)

    for _ in range(50):
        outage.note_failure(0.1, 50)

    assert outage.may_send(0.25)


def silent_outage(lines: int, *, in_flight: int = 1, line_count: int = 100) -> Outage:
    outage = Outage()
    outage.note_silence(10.0, 9.0, 0, in_flight=in_flight, line_count=line_count)
    for line in range(lines):
        outage.note_silence(11.0 + line / 100, 10.995 + line / 100, line, in_flight=in_flight, line_count=line_count)
    return outage


@pytest.mark.parametrize(("line_count", "lines_min"), [(100, 8), (3, 3), (1, 2)])
def test_silence_of_many_lines_or_of_all_but_never_of_one_is_an_outage(line_count: int, lines_min: int) -> None:
    assert not silent_outage(lines_min - 1, line_count=line_count).is_down

    outage = silent_outage(lines_min, line_count=line_count)

    assert outage.is_down
    assert outage.is_silent
    assert outage.covers(10.0)


def test_one_line_that_is_refused_many_times_is_no_outage() -> None:
    outage = Outage()
    for moment in range(100):
        outage.note_silence(float(moment), moment - 0.1, "line", in_flight=1, line_count=1)

    assert not outage.is_down


def test_silence_is_no_outage_while_anything_is_under_way_that_is_older() -> None:
    outage = silent_outage(8, in_flight=2)
    assert not outage.is_down

    outage.note_silence(12.0, 10.9, 9, in_flight=1, line_count=100)
    assert outage.is_down


def test_silence_of_less_than_a_second_is_no_outage() -> None:
    outage = Outage()
    for moment in range(99):
        outage.note_silence(moment / 100, (moment - 0.5) / 100, moment, in_flight=1, line_count=100)
    assert not outage.is_down

    outage.note_silence(1.0, 0.9, 100, in_flight=1, line_count=100)
    assert outage.is_down


def test_any_answer_begins_the_silence_anew() -> None:
    outage = silent_outage(7)
    outage.note_answer(5.0)
    for line in range(8):
        outage.note_silence(11.5, 11.4, line, in_flight=1, line_count=100)

    assert not outage.is_down


def test_silence_ends_with_an_answer_to_whatever_was_sent_since_it_began() -> None:
    outage = silent_outage(8)
    outage.note_answer(9.9)
    assert outage.is_down

    outage.note_answer(10.1)
    assert not outage.is_down
    assert not outage.is_silent


def test_new_batch_is_asked_for_at_once_in_a_silence_only() -> None:
    silent, dead = silent_outage(8), dead_outage(at_s=11.0)
    for outage in (silent, dead):
        outage.ask_again(11.1)

    assert silent.may_send(11.1)
    assert not dead.may_send(11.1)


def test_the_first_answer_to_a_probe_ends_the_outage() -> None:
    outage = dead_outage(at_s=0.0)
    assert outage.may_send(0.3)

    outage.note_answer(0.3)

    assert not outage.is_down
    assert outage.may_send(0.31)


def test_an_answer_sent_for_before_the_death_proves_nothing() -> None:
    outage = dead_outage(at_s=100.0)

    outage.note_answer(99.0)

    assert outage.is_down


def test_a_second_death_starts_the_backoff_anew() -> None:
    outage = dead_outage(at_s=0.0)
    for moment in (1.0, 3.0, 7.0):
        assert outage.may_send(moment)
        outage.note_failure(moment, 1)
    assert outage.may_send(12.0)
    outage.note_answer(12.0)

    outage.note_failure(20.0, 1)

    assert outage.is_down
    assert outage.may_send(20.25)


# First contact.


def test_ten_seconds_without_any_answer_lose_the_first_contact() -> None:
    contact = FirstContact()
    assert not contact.is_lost(1000.0)

    contact.note_failure(1000.0)
    contact.note_failure(1009.0)

    assert not contact.is_lost(1009.9)
    assert contact.is_lost(1010.0)


def test_after_an_answer_contact_is_never_lost() -> None:
    contact = FirstContact()
    contact.note_failure(0.0)
    contact.note_answer()

    contact.note_failure(100.0)

    assert not contact.is_lost(1e6)


class PaperReader:
    """An answer of `size_bytes` that is read in steps."""

    def __init__(self, budget: ReadBudget, started_at_s: float, size_bytes: int) -> None:
        self.started_at_s = started_at_s
        self.is_paused = False
        self.read_bytes = 0
        self._budget = budget
        self._size_bytes = size_bytes

    @property
    def missing_bytes(self) -> int:
        return max(1, self._size_bytes - self.read_bytes)

    def pause(self) -> None:
        assert not self.is_paused
        self.is_paused = True

    def resume(self) -> None:
        assert self.is_paused
        self.is_paused = False

    def read(self, size_bytes: int) -> bool:
        """Read on; true at the end."""
        assert not self.is_paused
        size_bytes = min(size_bytes, self._size_bytes - self.read_bytes)
        self.read_bytes += size_bytes
        if self.read_bytes == self._size_bytes:
            self._budget.release(self, self.read_bytes - size_bytes, is_delivered=True)
            return True
        self._budget.take(self, size_bytes)
        return False


def test_read_budget_reads_on_only_the_oldest_once_it_is_exceeded() -> None:
    budget = ReadBudget()
    budget.set_limit(100)
    young, oldest, youngest = (PaperReader(budget, at_s, 1000) for at_s in (2.0, 1.0, 3.0))
    young.read(40)
    oldest.read(40)
    assert [reader.is_paused for reader in (young, oldest)] == [False, False]

    youngest.read(40)

    assert [reader.is_paused for reader in (young, oldest, youngest)] == [True, False, True]
    oldest.read(40)
    assert [reader.is_paused for reader in (young, oldest, youngest)] == [True, False, True]


def test_read_budget_lets_the_next_oldest_go_on_when_there_is_room() -> None:
    budget = ReadBudget()
    budget.set_limit(100)
    leader, young, old = (PaperReader(budget, at_s, 80) for at_s in (1.0, 3.0, 2.0))
    for reader in (leader, young, old):
        reader.read(40)
    assert [reader.is_paused for reader in (leader, young, old)] == [False, True, True]

    leader.read(40)
    assert [young.is_paused, old.is_paused] == [True, True]
    budget.set_limit(100)
    assert [young.is_paused, old.is_paused] == [True, False]
    budget.set_limit(200)

    assert not young.is_paused


def test_read_budget_counts_what_was_delivered_until_the_limit_is_set_anew() -> None:
    budget = ReadBudget()
    budget.set_limit(100)
    delivered = PaperReader(budget, 1.0, 90)
    delivered.read(89)
    assert delivered.read(1)
    leader, late = (PaperReader(budget, at_s, 60) for at_s in (2.0, 3.0))
    leader.read(20)
    late.read(20)
    assert late.is_paused

    budget.set_limit(100)

    assert not late.is_paused


def test_read_budget_without_any_room_still_reads_one_answer_after_the_other() -> None:
    budget = ReadBudget()
    budget.set_limit(-1000)
    readers = [PaperReader(budget, float(number), 50) for number in range(20)]
    for reader in readers:
        reader.read(10)
    ended: list[PaperReader] = []
    while len(ended) < 20:
        going = [reader for reader in readers if not reader.is_paused and reader not in ended]
        assert len(going) == 1
        if going[0].read(10):
            ended.append(going[0])
            assert all(reader.is_paused for reader in readers if reader not in ended)
            budget.set_limit(-1000)

    assert [reader.started_at_s for reader in ended] == [float(number) for number in range(20)]


def test_read_budget_begins_nothing_beyond_the_limit_where_nobody_may_lead() -> None:
    budget = ReadBudget()
    budget.set_limit(-1000, may_lead=False)
    readers = [PaperReader(budget, float(number), 50) for number in range(3)]
    for reader in readers:
        reader.read(10)
    assert all(reader.is_paused for reader in readers)

    budget.set_limit(-1000)

    assert [reader.is_paused for reader in readers] == [False, True, True]


def test_read_budget_goes_on_when_a_part_is_given_back() -> None:
    budget = ReadBudget()
    budget.set_limit(100)
    leader, late = (PaperReader(budget, at_s, 1000) for at_s in (1.0, 2.0))
    leader.read(80)
    late.read(80)
    assert (late.is_paused, budget.is_short, budget.is_leader(leader)) == (True, True, True)

    budget.give_back(70)

    assert (late.is_paused, budget.is_short) == (False, False)


@pytest.mark.parametrize("seed", range(30))
def test_read_budget_is_kept_to_one_read_each_and_one_whole_answer(seed: int) -> None:
    """Answers of many sizes, some cut off, with a limit that moves: memory is bounded and everybody ends."""
    draw = random.Random(seed)
    budget = ReadBudget()
    budget.set_limit(1000)
    readers = [PaperReader(budget, float(number), draw.randrange(2, 400)) for number in range(60)]
    running = list(readers)
    for _ in range(100_000):
        going = [reader for reader in running if not reader.is_paused]
        if not running:
            break
        if not going:
            budget.set_limit(1000)
            continue
        reader = draw.choice(going)
        if draw.random() < 0.01:
            budget.release(reader, reader.read_bytes, is_delivered=False)
            running.remove(reader)
        elif reader.read(20):
            running.remove(reader)
        held = sum(each.read_bytes for each in running)
        assert held <= 1000 + 20 * len(running) + 400
        if draw.random() < 0.2:
            budget.set_limit(1000)

    assert running == []
