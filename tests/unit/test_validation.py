"""A whole input: problems in line order, duplicates as a set would find them, shards that cover every request."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from batchrunner import repeats, validation
from batchrunner.cutting import split_lines
from batchrunner.errors import InputChanged
from batchrunner.lines import CHAT_COMPLETIONS, EMBEDDINGS, LineRules, ProblemCode, is_blank, parse_line
from batchrunner.models import LineProblem, OnInvalid, RequestLine
from batchrunner.soundness import sound_lines
from batchrunner.validation import Validation, Validator

SAMPLES = Path(__file__).parents[2] / "sample_inputs"
CHAT = LineRules(endpoint=CHAT_COMPLETIONS)
BODY = {"model": "m", "messages": []}


def line(custom_id: str, **fields: object) -> bytes:
    whole = {"custom_id": custom_id, "method": "POST", "url": CHAT_COMPLETIONS, "body": BODY} | fields
    return json.dumps({name: value for name, value in whole.items() if value is not ...}).encode()


def validate(
    content: bytes,
    rules: LineRules = CHAT,
    on_invalid: OnInvalid = OnInvalid.SKIP,
    *,
    chunk_bytes: int = 1 << 20,
    seen: list[LineProblem] | None = None,
    lines_max: int = 10_000,
    bytes_max: int = 1 << 30,
    problems_max: int = 1000,
    shard_lines_max: int = 1000,
    chosen: Sequence[int] | None = None,
) -> Validation:
    validator = Validator(
        rules,
        on_invalid,
        lines_max=lines_max,
        bytes_max=bytes_max,
        problems_max=problems_max,
        shard_lines_max=shard_lines_max,
        chosen=chosen,
        on_problem=None if seen is None else seen.append,
    )
    for start in range(0, len(content), chunk_bytes):
        validator.feed(content[start : start + chunk_bytes])
    while looks := validator.candidates():
        for look in looks:
            validator.confirm(look, content[look.byte_start : look.byte_end])
    return validator.finish()


def codes(found: Validation) -> list[tuple[int | None, str]]:
    return [(problem.line_number, problem.code) for problem in found.problems]


def requests(content: bytes, found: Validation) -> list[int]:
    """The line numbers that a runner would send, read from the shards alone."""
    numbers: list[int] = []
    for shard in found.shards:
        block = content[shard.byte_start : shard.byte_end]
        assert zlib.crc32(block) == shard.checksum
        assert shard.first_index == len(numbers)
        assert list(shard.skipped) == sorted(shard.skipped)
        to_run = [
            number
            for number, raw in split_lines(block, shard.first_line)
            if not is_blank(raw) and number not in shard.skipped
        ]
        assert len(to_run) == shard.line_count > 0
        numbers += to_run
    return numbers


def test_every_sample_of_a_refusal_is_found_where_it_stands() -> None:
    expected = json.loads((SAMPLES / "every_error.expected.json").read_bytes())
    content = (SAMPLES / "every_error.jsonl").read_bytes()

    found = validate(content)

    got = [{"line": each.line_number, "code": each.code, "param": each.param} for each in found.problems]
    assert got == expected
    assert (found.refused_count, found.problem_count) == (len(expected), len(expected))
    assert found.total_count == len(requests(content, found)) + len(expected)
    assert found.shards[0].byte_start == 3


@pytest.mark.parametrize("name", ["chat", "chat_1000", "embeddings", "mixed"])
def test_good_samples_have_no_problem(name: str) -> None:
    content = (SAMPLES / f"{name}.jsonl").read_bytes()

    found = validate(content, LineRules(), OnInvalid.FAIL)

    assert (found.is_rejected, found.problem_count) == (False, 0)
    assert requests(content, found) == list(range(1, content.count(b"\n") + 1))
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert (found.model is None) == (name == "mixed")


def test_a_bad_line_fails_the_batch_unless_bad_lines_are_skipped() -> None:
    content = b"\n".join([line("a"), b"nonsense", line("c")])

    failed = validate(content, on_invalid=OnInvalid.FAIL)
    skipped = validate(content, on_invalid=OnInvalid.SKIP)

    assert (failed.is_rejected, failed.shards, codes(failed)) == (True, (), [(2, "invalid_json_line")])
    assert (skipped.is_rejected, requests(content, skipped), codes(skipped)) == (False, [1, 3], codes(failed))
    assert (skipped.total_count, skipped.refused_count) == (3, 1)


def test_a_shard_without_a_request_to_run_is_left_out() -> None:
    content = b"\n".join([line("a"), b"", b"no", b"no", line("b")])

    found = validate(content, shard_lines_max=2)

    assert [(shard.first_line, shard.first_index) for shard in found.shards] == [(1, 0), (5, 1)]
    assert requests(content, found) == [1, 5]


def test_when_every_line_is_skipped_nothing_runs_and_nothing_is_rejected() -> None:
    found = validate(b"no\nno\n")

    assert (found.is_rejected, found.shards, found.total_count, found.refused_count) == (False, (), 2, 2)


@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf", b"\n \r\n\t"])
def test_a_file_without_requests_is_refused(content: bytes) -> None:
    found = validate(content)

    assert found.is_rejected
    assert found.problems == (
        LineProblem(
            "empty_file",
            "The input file is empty. Please ensure that the batch contains at least one request.",
            None,
            None,
        ),
    )


def test_too_many_requests_refuse_the_file_whatever_is_skipped() -> None:
    content = b"\n".join(line(str(number)) for number in range(40))

    found = validate(content, lines_max=19, shard_lines_max=10)

    assert found.is_rejected
    assert codes(found) == [(None, "too_many_tasks")]
    assert "19 requests" in found.problems[0].message
    assert found.sha256 == hashlib.sha256(content).hexdigest()
    assert not validate(content, lines_max=40).is_rejected


@pytest.mark.parametrize("chunk_bytes", [1, 50, 1 << 20])
def test_a_file_that_is_too_large_is_refused_with_what_was_found_so_far(chunk_bytes: int) -> None:
    content = b"no\n" + b"\n".join(line(str(number)) for number in range(40))

    found = validate(content, bytes_max=2000, shard_lines_max=10, chunk_bytes=chunk_bytes)

    assert codes(found) == [(None, "file_too_large"), (1, "invalid_json_line")]
    assert "larger than the 2000 maximum" in found.problems[0].message
    assert not validate(content, bytes_max=len(content)).is_rejected


def test_a_line_that_is_too_long_is_one_refused_line() -> None:
    content = b"\n".join([line("a"), line("b", extra="x" * 500), line("c")])

    found = validate(content, replace(CHAT, line_bytes_max=300), chunk_bytes=100)

    assert codes(found) == [(2, "line_too_long")]
    assert "at most 300 bytes" in found.problems[0].message
    assert requests(content, found) == [1, 3]


def test_with_more_problems_than_are_listed_the_last_entry_counts_them_all() -> None:
    seen: list[LineProblem] = []
    content = b"\n".join([line("a"), line("a"), *[b"no"] * 9])

    found = validate(content, problems_max=4, seen=seen)

    assert codes(found) == [
        (2, "duplicate_custom_id"),
        *[(n, "invalid_json_line") for n in (3, 4, 5)],
        (None, "too_many_errors"),
    ]
    assert found.problems[-1].message == "There are 10 problems in all; this list holds the first 4."
    assert found.problem_count == len(seen) == 10
    assert [problem.line_number for problem in seen] == [*range(3, 12), 2]


def test_the_later_line_is_the_duplicate_and_its_shard_loses_it() -> None:
    content = b"\n".join([line("a"), line("b"), line("a"), line("c"), line("a")])

    found = validate(content, shard_lines_max=2)

    assert codes(found) == [(3, "duplicate_custom_id"), (5, "duplicate_custom_id")]
    assert (found.problems[0].param, found.problems[0].custom_id) == ("custom_id", "a")
    assert found.problems[0].message == (
        "The custom_id 'a' for this request is a duplicate of another request. "
        "The custom_id parameter must be unique for each request in a batch."
    )
    assert requests(content, found) == [1, 2, 4]
    assert [shard.skipped for shard in found.shards] == [(), (3,)]


def test_a_refused_line_uses_up_its_id_and_keeps_its_own_problem() -> None:
    content = b"\n".join([line("a", method="GET"), line("a"), line("a", url="/v1/none"), line("b")])

    found = validate(content)

    assert codes(found) == [(1, "invalid_method"), (2, "duplicate_custom_id"), (3, "url_not_found")]
    assert requests(content, found) == [4]


def test_equal_hashes_of_different_ids_are_no_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "hash", lambda _: 7, raising=False)
    content = b"\n".join([line("a"), line("b"), line("a")])

    found = validate(content)

    assert codes(found) == [(3, "duplicate_custom_id")]


def test_candidates_come_in_several_rounds_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_TOLD_AT_ONCE", 3)
    content = b"\n".join(line(str(number)) for number in [*range(20), *range(10)])

    found = validate(content, shard_lines_max=4)

    assert codes(found) == [(number, "duplicate_custom_id") for number in range(21, 31)]


def test_neighbouring_ranges_are_read_again_at_one_go_no_longer_than_a_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_IDS_PER_MARK", 1)
    rows = [line(f"{number:02}") + b"\n" for number in [1, 2, 3, 4, 9, 4, 3, 2, 1]]
    size_bytes = len(rows[0])
    content = b"".join(rows)
    validator = Validator(
        CHAT, OnInvalid.SKIP, lines_max=10, bytes_max=10_000, shard_lines_max=1, shard_bytes_max=3 * size_bytes
    )
    validator.feed(content)

    looks = validator.candidates()

    ranges = [(look.byte_start // size_bytes, look.byte_end // size_bytes) for look in looks]
    assert ranges == [(0, 3), (3, 4), (5, 8), (8, 9)]
    for look in looks:
        validator.confirm(look, content[look.byte_start : look.byte_end])
    assert validator.candidates() == ()
    assert codes(validator.finish()) == [(number, "duplicate_custom_id") for number in (6, 7, 8, 9)]


@pytest.mark.parametrize("size_bytes", [100, 70_000])
def test_little_is_read_again_for_one_repeated_id(size_bytes: int) -> None:
    count = 400 if size_bytes > 1000 else 20_000
    rows = [line(f"{number:05}", x="y" * size_bytes) for number in [*range(count), 7]]
    content = b"\n".join(rows)
    validator = Validator(CHAT, OnInvalid.SKIP, lines_max=30_000, bytes_max=1 << 30, shard_bytes_max=1 << 20)
    validator.feed(content)

    looks = validator.candidates()

    assert sum(look.byte_end - look.byte_start for look in looks) < len(content) / 8
    for look in looks:
        validator.confirm(look, content[look.byte_start : look.byte_end])
    assert codes(validator.finish()) == [(count + 1, "duplicate_custom_id")]


def test_a_file_without_repeated_ids_has_nothing_to_read_again() -> None:
    validator = Validator(CHAT, OnInvalid.FAIL, lines_max=10, bytes_max=10_000)
    validator.feed(line("b") + b"\n" + line("a"))

    assert validator.candidates() == ()
    assert not validator.finish().is_rejected


def test_nothing_is_given_before_candidates_are_confirmed() -> None:
    validator = Validator(CHAT, OnInvalid.FAIL, lines_max=10, bytes_max=10_000)
    content = line("a") + b"\n" + line("a")
    validator.feed(content)

    with pytest.raises(ValueError, match="candidates"):
        validator.finish()
    (look,) = validator.candidates()
    with pytest.raises(InputChanged):
        validator.confirm(look, content.replace(b'"a"', b'"b"'))


def test_only_chosen_lines_count() -> None:
    content = b"\n".join([line("a"), b"no", line("b"), line("a"), b"no", line("c"), b"", line("a")])

    found = validate(content, chosen=[3, 4, 5, 7], shard_lines_max=3)

    assert codes(found) == [(5, "invalid_json_line")]
    assert (found.total_count, found.refused_count) == (3, 1)
    assert sum(shard.line_count for shard in found.shards) == 2
    assert [(shard.first_line, shard.line_count) for shard in found.shards] == [(1, 1), (4, 1)]


def test_the_first_line_decides_about_urls() -> None:
    with_url, without = line("a"), line("b", url=...)

    assert codes(validate(with_url + b"\n" + without)) == [(2, "missing_required_parameter")]
    assert codes(validate(without + b"\n" + with_url)) == []
    assert codes(validate(b"no\n" + without + b"\n" + with_url)) == [(1, "invalid_json_line")]


def test_strict_batches_take_the_model_of_their_first_good_line() -> None:
    other = line("b", body=BODY | {"model": "other"})
    content = b"\n".join([b"no", line("a"), other, line("c")])

    strict = validate(content, replace(CHAT, is_strict=True), shard_lines_max=2)

    assert codes(strict) == [(1, "invalid_json_line"), (3, "mismatched_model")]
    assert strict.model == "m"
    assert validate(content).model is None


def test_a_known_digest_is_taken_over() -> None:
    validator = Validator(CHAT, OnInvalid.FAIL, lines_max=10, bytes_max=10_000, sha256="known")
    validator.feed(line("a"))

    assert validator.finish().sha256 == "known"


def test_large_chunks_are_hashed_in_their_order() -> None:
    content = b"\n".join(line(str(number), extra="x" * 1000) for number in range(400))

    for chunk_bytes in (70_000, 100_001, 1 << 20):
        assert validate(content, chunk_bytes=chunk_bytes).sha256 == hashlib.sha256(content).hexdigest()


LINE = st.one_of(
    st.builds(line, st.sampled_from("abcdefgh")),
    st.builds(lambda number: line(f"n{number}"), st.integers(0, 60)),
    st.sampled_from(
        [
            b"",
            b" \r",
            line("a") + b"\r",
            line("n1", url=...),
            line("n2", url=EMBEDDINGS, body={"model": "m", "input": "x"}),
            line("n3", body=BODY | {"model": "other"}),
            line("n4", body=BODY | {"stream": True}),
            line("n5", body=BODY | {"stream": None, "n": None}),
            line("n6") + line("n7"),
            line("n8") + b" ",
            b" " + line("n9"),
            line("n10") + b"\r\r",
            b"[]",
            b"no",
            b'{"custom_id":"half","x":{}',
            b',"y":{}}',
            b"\xff",
        ]
    ),
)


def naive(content: bytes, rules: LineRules) -> tuple[list[int], dict[int, str]]:
    """What should run, and what is wrong, line by line with a set."""
    ids: set[str] = set()
    running, wrong = [], {}
    for number, raw in split_lines(content, 1):
        if is_blank(raw):
            continue
        rules = rules.learn_url(raw)
        found = parse_line(raw, number, rules)
        if isinstance(found, LineProblem):
            wrong[number] = found.code
        elif found.custom_id in ids:
            wrong[number] = ProblemCode.DUPLICATE_CUSTOM_ID
            rules = rules.learn_model(found)
        else:
            running.append(number)
            rules = rules.learn_model(found)
        if found.custom_id is not None:
            ids.add(found.custom_id)
    return running, wrong


@settings(max_examples=200, deadline=None)
@given(
    st.lists(LINE, min_size=1, max_size=40),
    st.integers(1, 300),
    st.integers(1, 12),
    st.booleans(),
    st.sampled_from([None, CHAT_COMPLETIONS]),
)
def test_validation_finds_what_a_naive_reader_finds_whatever_the_chunks(rows, chunk_bytes, width, is_strict, endpoint):
    content = b"\n".join(rows)
    rules = LineRules(endpoint=endpoint, is_strict=is_strict)
    running, wrong = naive(content, rules)
    seen: list[LineProblem] = []

    found = validate(content, rules, chunk_bytes=chunk_bytes, shard_lines_max=width, seen=seen)

    assert found == validate(content, rules, shard_lines_max=width)
    assert requests(content, found) == running
    if running or wrong:
        assert codes(found) == sorted(wrong.items())
        assert sorted((problem.line_number, problem.code) for problem in seen) == sorted(wrong.items())
    assert (found.total_count, found.refused_count) == (len(running) + len(wrong), len(wrong))


LIMITS = st.fixed_dictionaries(
    {
        "lines_max": st.sampled_from([1, 2, 5, 10_000]),
        "bytes_max": st.sampled_from([900, 3000, 1 << 30]),
        "shard_lines_max": st.integers(1, 12),
        "chosen": st.none() | st.sets(st.integers(1, 40)).map(sorted),
    }
)


@settings(deadline=None)
@given(
    st.lists(LINE, min_size=1, max_size=40),
    st.integers(1, 300),
    st.builds(LineRules, is_strict=st.booleans(), line_bytes_max=st.sampled_from([120, 200, 1 << 24])),
    LIMITS,
)
def test_limits_hold_and_lines_are_chosen_alike_whatever_the_chunks(rows, chunk_bytes, rules, limits):
    def found(chunk_bytes: int) -> tuple[Validation, list[LineProblem]]:
        seen: list[LineProblem] = []
        return validate(b"\n".join(rows), rules, chunk_bytes=chunk_bytes, seen=seen, **limits), seen

    assert found(chunk_bytes) == found(1 << 20)


def test_models_after_the_last_request_allowed_do_not_count() -> None:
    content = b"".join(line(str(at), body=BODY | {"model": model}) + b"\n" for at, model in enumerate("mmn"))

    for chunk_bytes in (1, 1 << 20):
        assert validate(content, chunk_bytes=chunk_bytes, lines_max=1, shard_lines_max=2).model == "m"


def test_an_odd_line_leaves_the_lines_of_other_shards_to_be_judged_together(monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[int] = []

    def parse_and_note(raw: bytes, line_number: int, rules: LineRules) -> RequestLine | LineProblem:
        judged.append(line_number)
        return parse_line(raw, line_number, rules)

    monkeypatch.setattr(validation, "parse_line", parse_and_note)
    rows = [line(str(number)) for number in range(12)]
    rows[5] = b""

    found = validate(b"\n".join(rows), replace(CHAT, wants_url=True), shard_lines_max=4)

    assert (found.total_count, judged) == (11, [5, 7, 8])


@settings(deadline=None)
@given(st.lists(LINE.filter(lambda raw: not is_blank(raw)), min_size=1, max_size=6))
def test_a_block_is_sound_only_if_each_of_its_lines_is(rows: list[bytes]) -> None:
    rules = replace(CHAT, wants_url=True)
    each = [parse_line(raw, 1, rules) for raw in rows]

    found = sound_lines(b"\n".join(rows), rules)

    if all(isinstance(one, RequestLine) for one in each):
        assert found is not None
        assert found.custom_ids == [one.custom_id for one in each]
    else:
        assert found is None


@pytest.mark.parametrize(
    "odd",
    [
        line("b", url=...),
        line("b", url=EMBEDDINGS, body={"model": "m", "input": "x"}),
        line("b", body={"model": "other", "messages": []}),
        line("b", body={"model": "", "messages": []}),
        line("b", body={"messages": []}),
        line("b", body={"model": "m"}),
        line("b", body={"model": "m", "messages": None}),
        line("b", body={"model": "m", "messages": 1234}),
        line("b", body=BODY | {"stream": True}),
        line("b", body=BODY | {"stream": False}),
        line("b", body=BODY | {"stream": 1}),
        line("b", method="GET"),
        line(""),
        line("a\0b"),
        line("x" * 513),
        line("b", x=json.loads("[" * 125 + "]" * 125)),
        line("b", x=json.loads("[" * 128 + "]" * 128)),
        line("b").replace(b'"messages"', b'"x":"\xff","messages"'),
    ],
)
@pytest.mark.parametrize("rules", [replace(CHAT, wants_url=True), LineRules(wants_url=False)])
def test_a_line_unlike_the_first_is_judged_as_it_is_alone(odd: bytes, rules: LineRules) -> None:
    is_sound = isinstance(parse_line(odd, 2, rules), RequestLine)

    assert (sound_lines(line("a") + b"\n" + odd + b"\n", rules) is not None) == is_sound
    assert (sound_lines(odd + b"\n" + line("a"), rules) is not None) == is_sound


def nested(depth: int) -> object:
    return json.loads("[" * depth + "1" + "]" * depth)


@st.composite
def nested_lines(draw: st.DrawFn, depths: st.SearchStrategy[int]) -> bytes:
    """A line with lists in lists, beside its body or within one of a few messages."""
    nest = nested(draw(depths))
    text = "y" * draw(st.integers(0, 900))
    messages: list[object] = [{} for _ in range(draw(st.integers(0, 5)))]
    is_within = draw(st.booleans())
    if messages and is_within:
        messages[draw(st.integers(0, len(messages) - 1))] = draw(st.sampled_from([{"content": nest}, nest]))
        return line("a", body={"model": "m", "messages": messages}, y=text)
    return line("a", body={"model": "m", "messages": messages}, x=nest, y=text)


DEPTHS = st.sampled_from([0, 1, 20, 60, *range(119, 132)])
ONE_MESSAGE = line("a", body=BODY | {"messages": [{}]})


@given(rows=st.lists(nested_lines(DEPTHS), min_size=1, max_size=40), has_end=st.booleans())
@example(rows=[ONE_MESSAGE, line("b", body=BODY | {"messages": [{"c": nested(125)}]})], has_end=True)
@example(rows=[ONE_MESSAGE, line("b", body=BODY | {"messages": [{"c": nested(125)}, {}]})], has_end=True)
def test_lines_taken_together_are_nested_no_deeper_than_each_may_be(rows: list[bytes], has_end: bool) -> None:
    """The brackets of many lines are counted together; what is too deep for one line is never taken for sound."""
    rules = replace(CHAT, wants_url=True)

    found = sound_lines(b"\n".join(rows) + (b"\n" if has_end else b""), rules)

    is_each_sound = all(isinstance(parse_line(raw, 1, rules), RequestLine) for raw in rows)
    assert (found is not None) <= is_each_sound


@given(st.lists(nested_lines(st.integers(0, 60)), min_size=1, max_size=40), st.booleans())
def test_lines_that_are_hardly_nested_are_taken_together(rows: list[bytes], has_end: bool) -> None:
    assert sound_lines(b"\n".join(rows) + (b"\n" if has_end else b""), replace(CHAT, wants_url=True))


def test_a_long_line_of_small_objects_takes_little_more_than_its_bytes() -> None:
    content = line("a", body=BODY | {"messages": [{}] * 500_000})

    tracemalloc.start()
    try:
        assert sound_lines(content, replace(CHAT, wants_url=True)) is None
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak_bytes < 3 * len(content)


@pytest.mark.parametrize("is_strict", [False, True])
def test_the_first_block_is_judged_at_once_too(monkeypatch: pytest.MonkeyPatch, is_strict: bool) -> None:
    judged: list[int] = []

    def parse_and_note(raw: bytes, line_number: int, rules: LineRules) -> RequestLine | LineProblem:
        judged.append(line_number)
        return parse_line(raw, line_number, rules)

    monkeypatch.setattr(validation, "parse_line", parse_and_note)

    found = validate(b"\n".join(line(str(number)) for number in range(50)), replace(CHAT, is_strict=is_strict))

    assert (found.total_count, found.model, judged) == (50, "m", [1])


def test_a_value_over_two_lines_is_not_made_up_for_by_two_values_on_one() -> None:
    """As many values as lines, and yet two lines are no JSON: the cut of each line has to be seen."""
    whole = line("a")
    half = whole.index(b', "method"')
    content = whole[:half] + b"\n" + whole[half:] + b" " + line("b")

    assert [number for number, _ in codes(validate(content, replace(CHAT, wants_url=True)))] == [1, 2]
