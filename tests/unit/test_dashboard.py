"""The pages for people: how the steps of a batch stand, how they are drawn, and that a stranger's text stays text."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from html import unescape
from html.parser import HTMLParser
from itertools import combinations
from types import MappingProxyType
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrunner.dashboard.graph import WIDTH, Box, graph_of
from batchrunner.dashboard.guard import FormTokens, is_own_page
from batchrunner.dashboard.pages import HEADERS, Look, batch_page, queue_page, refusal_page
from batchrunner.dashboard.steps import SHARDS_SHOWN_MAX, TASK_STEPS, Facts, Part, Step, StepState, steps_of
from batchrunner.dashboard.views import BatchPage, BatchRow, DeliveryRow, JobRow, Moment, Queue, distance_text
from batchrunner.deliveries import DeliveryState
from batchrunner.holdings import KeyId
from batchrunner.lifecycle import BatchStatus
from batchrunner.models import CLUB, BatchId, LineProblem, Shard, TaskId, TaskKind, TaskState, TenantId
from tests.unit.test_batch_object import BATCH, START

WAITING, RUNNING, DONE, FAILED, NOT_NEEDED = StepState
Tasks = Mapping[TaskKind, Mapping[TaskState, int]]
NOBODY: Mapping[DeliveryState, int] = MappingProxyType({})
VALIDATED = {TaskKind.VALIDATE: {TaskState.SETTLED: 1}}
# A name, a model and a message of somebody who wants to be more than shown.
EVIL = '"><script>alert(1)</script><style>*{display:none}</style>&lt;\x00\x1b[2J\x7f\u202egnp\ud800'


def facts(
    status: BatchStatus = BatchStatus.IN_PROGRESS,
    *,
    tasks: Tasks = VALIDATED,
    shards: Sequence[Shard] = (),
    told: Mapping[DeliveryState, int] = NOBODY,
    has_receivers: bool = False,
    **changes,
) -> Facts:
    batch = replace(BATCH, status=status, **changes)
    return Facts(batch=batch, tasks=tasks, shards=shards, told=told, has_receivers=has_receivers)


def states(given: Facts) -> list[StepState]:
    return [step.state for step in steps_of(given)]


def shards(**counts: int) -> dict[TaskKind, dict[TaskState, int]]:
    return VALIDATED | {TaskKind.SHARD: {TaskState(state): count for state, count in counts.items()}}


def shard(first_line: int, state: TaskState) -> Shard:
    return Shard(
        task_id=TaskId(first_line),
        batch_id=BATCH.id,
        byte_start=0,
        byte_end=1,
        first_line=first_line,
        first_index=first_line - 1,
        line_count=1000,
        checksum=0,
        skipped=(),
        intent_mark=0,
        deaths=0,
        is_quarantined=False,
        state=state,
        epoch=1,
    )


def seal(state: str) -> dict[TaskKind, dict[TaskState, int]]:
    return VALIDATED | {TaskKind.SEAL: {TaskState(state): 1}}


def validate(state: str) -> dict[TaskKind, dict[TaskState, int]]:
    return {TaskKind.VALIDATE: {TaskState(state): 1}}


new = partial(facts, BatchStatus.VALIDATING, in_progress_at=None)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (new(tasks=validate("queued")), [WAITING, WAITING, WAITING, NOT_NEEDED]),
        (new(tasks=validate("leased")), [RUNNING, WAITING, WAITING, NOT_NEEDED]),
        (new(tasks=validate("parked")), [FAILED, WAITING, WAITING, NOT_NEEDED]),
        (
            facts(BatchStatus.FAILED, in_progress_at=None, problem_count=2),
            [FAILED, NOT_NEEDED, NOT_NEEDED, NOT_NEEDED],
        ),
        (facts(BatchStatus.CANCELLED, in_progress_at=None), [NOT_NEEDED, NOT_NEEDED, DONE, NOT_NEEDED]),
        (facts(tasks=shards(queued=2)), [DONE, WAITING, WAITING, NOT_NEEDED]),
        (facts(tasks=shards(queued=1, leased=1)), [DONE, RUNNING, WAITING, NOT_NEEDED]),
        (facts(tasks=shards(leased=1, parked=1)), [DONE, FAILED, WAITING, NOT_NEEDED]),
        (facts(tasks={TaskKind.SHARD: {TaskState.SETTLED: 1}}), [NOT_NEEDED, WAITING, WAITING, NOT_NEEDED]),
        (facts(has_receivers=True), [DONE, WAITING, WAITING, WAITING]),
        (facts(BatchStatus.FINALIZING, tasks=seal("queued")), [DONE, DONE, WAITING, NOT_NEEDED]),
        (facts(BatchStatus.FINALIZING, tasks=seal("leased")), [DONE, DONE, RUNNING, NOT_NEEDED]),
        (facts(BatchStatus.FINALIZING, tasks=seal("parked")), [DONE, DONE, FAILED, NOT_NEEDED]),
        (facts(BatchStatus.CANCELLING, tasks=shards(leased=1)), [DONE, RUNNING, WAITING, NOT_NEEDED]),
        (facts(BatchStatus.CANCELLING, tasks=seal("leased")), [DONE, DONE, RUNNING, NOT_NEEDED]),
        (facts(BatchStatus.COMPLETED), [DONE, DONE, DONE, NOT_NEEDED]),
        (facts(BatchStatus.EXPIRED), [DONE, DONE, DONE, NOT_NEEDED]),
        (facts(BatchStatus.FAILED), [DONE, FAILED, NOT_NEEDED, NOT_NEEDED]),
        (facts(BatchStatus.FAILED, finalizing_at=START), [DONE, FAILED, FAILED, NOT_NEEDED]),
        (facts(BatchStatus.COMPLETED, told={DeliveryState.PENDING: 1}), [DONE, DONE, DONE, RUNNING]),
        (facts(BatchStatus.COMPLETED, told={DeliveryState.DELIVERED: 1}), [DONE, DONE, DONE, DONE]),
        (
            facts(BatchStatus.COMPLETED, told={DeliveryState.DELIVERED: 1, DeliveryState.UNDELIVERED: 1}),
            [DONE, DONE, DONE, FAILED],
        ),
        (facts(dialect=CLUB, has_receivers=True), [NOT_NEEDED, WAITING, NOT_NEEDED, NOT_NEEDED]),
    ],
)
def test_steps_stand_as_their_batch_does(given: Facts, wanted: list[StepState]) -> None:
    assert states(given) == wanted


@pytest.mark.parametrize("status", BatchStatus)
def test_every_status_has_its_four_steps(status: BatchStatus) -> None:
    assert [step.name for step in steps_of(facts(status))] == ["validate", "shards", "seal", "notify"]


def test_every_state_of_a_task_is_one_of_a_step() -> None:
    assert set(TASK_STEPS) == set(TaskState)


def test_few_shards_are_shown_one_by_one_and_many_by_their_state() -> None:
    few = facts(tasks=shards(settled=1, leased=1), shards=[shard(1, TaskState.SETTLED), shard(1001, TaskState.LEASED)])
    many = facts(tasks=shards(settled=9_000, sealed=2, queued=999, leased=1))

    assert steps_of(few)[1].parts == (
        Part(label="from line 1", state=DONE),
        Part(label="from line 1,001", state=RUNNING),
    )
    assert steps_of(many)[1].parts == (
        Part(label="999 shards", state=WAITING),
        Part(label="1 shard", state=RUNNING),
        Part(label="9,002 shards", state=DONE),
    )


def test_shards_of_a_batch_that_was_given_up_wait_no_more() -> None:
    (part,) = steps_of(facts(BatchStatus.FAILED, tasks=shards(queued=9)))[1].parts

    assert part == Part(label="9 shards", state=NOT_NEEDED)


def test_steps_say_why_they_stand_still_and_how_lines_ended() -> None:
    paused = steps_of(facts(paused_reason="operator"))[1]
    ended = steps_of(
        facts(
            BatchStatus.CANCELLED,
            total_count=1000,
            succeeded_count=380,
            failed_count=20,
            refused_count=5,
            expired_count=0,
            cancelled_count=600,
        )
    )

    assert paused.notes[-1] == "paused: operator"
    assert ended[0].notes == ("1,000 lines", "5 refused")
    assert ended[1].notes == ("395 of 995 lines answered", "600 cancelled")


def lies_in(inner: Box, outer: Box) -> bool:
    return (
        outer.x < inner.x
        and outer.y < inner.y
        and inner.x + inner.width < outer.x + outer.width
        and inner.y + inner.height < outer.y + outer.height
    )


def are_apart(one: Box, other: Box) -> bool:
    return (
        one.x + one.width < other.x
        or other.x + other.width < one.x
        or one.y + one.height < other.y
        or other.y + other.height < one.y
    )


@pytest.mark.parametrize("part_count", range(SHARDS_SHOWN_MAX + 1))
def test_boxes_lie_apart_and_arrows_lead_from_each_to_the_next(part_count: int) -> None:
    parts = tuple(Part(label=str(number), state=DONE) for number in range(part_count))
    steps = [Step(name=f"s{number}", state=DONE, notes=("a", "b")[:number], parts=parts) for number in range(3)]

    drawn = graph_of(steps)

    page = Box(x=-1, y=-1, width=WIDTH + 2, height=drawn.height + 2, label="", state=DONE)
    for box in drawn.boxes:
        assert lies_in(box, page)
        assert len(box.parts) == part_count
        assert all(lies_in(part, box) for part in box.parts)
        assert all(are_apart(one, other) for one, other in combinations(box.parts, 2))
        tops = [part.y for part in box.parts]
        assert all(box.y < note.y <= min(tops, default=box.y + box.height) for note in box.notes)
    assert all(are_apart(one, other) for one, other in combinations(drawn.boxes, 2))
    ends = [(arrow.y_start, arrow.y_end) for arrow in drawn.arrows]
    assert ends == [
        (drawn.boxes[0].y + drawn.boxes[0].height, drawn.boxes[1].y),
        (drawn.boxes[1].y + drawn.boxes[1].height, drawn.boxes[2].y),
    ]


MOMENT = Moment(at=START, distance="3 min")
LOOK = Look(token="t0k3n", is_refreshing=True, takes_jobs=True)
ROW = BatchRow(
    id=BATCH.id, name=EVIL, status="in progress", lines="1 of 2", made=MOMENT, can_cancel=True, can_retry=False
)
JOB = JobRow(
    number=42,
    type="LLM",
    model=EVIL,
    status="failed",
    batch_id=BatchId("7"),
    made=MOMENT,
    can_cancel=False,
    can_retry=True,
)
QUEUE = Queue(badges=("1 active",), is_stalled=False, jobs=(JOB,), batches=(ROW,))
PAGE = BatchPage(
    row=ROW,
    troubles=(EVIL,),
    steps=steps_of(facts(paused_reason=EVIL)),
    graph=graph_of(steps_of(facts(paused_reason=EVIL))),
    figures=(("Model", EVIL),),
    problems=(LineProblem(EVIL, EVIL, None, 3),),
    problem_count=9,
    deliveries=(DeliveryRow(type="e", receiver=EVIL, state="pending", attempt_count=1, outcome=EVIL, made=MOMENT),),
    jobs=(JOB,),
)
VOID = frozenset({"meta", "input"})


class Outline(HTMLParser):
    """Takes a page apart and finds what is not closed."""

    def __init__(self, page: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self._open: list[str] = []
        self.feed(page.decode())
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def count(self, tag: str) -> int:
        return sum(each == tag for each, _ in self.tags)

    def attributes(self, tag: str) -> list[dict[str, str | None]]:
        return [given for each, given in self.tags if each == tag]


@pytest.mark.parametrize(
    "page",
    [
        queue_page(QUEUE, LOOK),
        batch_page(PAGE, LOOK),
        refusal_page(title="Not found", message=EVIL, is_passing=False),
    ],
    ids=["queue", "batch", "refusal"],
)
def test_a_strangers_text_is_shown_and_is_nothing_else(page: bytes) -> None:
    outline = Outline(page)

    assert outline.count("script") == 0
    assert outline.count("style") == 1
    assert not any(name.startswith("on") or name == "style" for _, given in outline.tags for name in given)
    assert any(
        '"><script>alert(1)</script><style>*{display:none}</style>&lt;\\x00\\x1b[2J\\x7f\\u202egnp\\ud800' in text
        for text in outline.texts
    )
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e]", page.decode())


@given(st.text(min_size=1))
def test_any_name_is_a_heading_and_no_markup(name: str) -> None:
    page = batch_page(replace(PAGE, row=replace(ROW, name=name)), LOOK).decode()

    (heading,) = re.findall(r"<h1>(.*)</h1>", page)

    assert not set("<>\"'") & set(heading)
    assert not name.isprintable() or unescape(heading) == name


def test_the_page_of_a_batch_draws_its_steps_as_a_graph_that_can_be_read_aloud() -> None:
    (svg,) = re.findall(r"<svg.*?</svg>", batch_page(PAGE, LOOK).decode(), re.DOTALL)
    # As XML, which it need not be in a page, it has to be told its name.
    drawn = ET.fromstring(svg.replace("<svg", '<svg xmlns="http://www.w3.org/2000/svg"', 1))
    name = {"s": "http://www.w3.org/2000/svg"}

    assert drawn.get("aria-labelledby") == "graph-title graph-text"
    assert drawn.find("s:title[@id='graph-title']", name) is not None
    told = drawn.find("s:desc[@id='graph-text']", name)
    assert told is not None
    assert told.text is not None
    assert told.text.startswith("validate: done, 1,000 lines")
    assert "seal: waiting. notify: not needed." in told.text
    words = ["".join(each.itertext()) for each in drawn.iter("{http://www.w3.org/2000/svg}text")]
    for step in PAGE.steps:
        assert words[words.index(step.name) + 1] == step.state
    assert len(drawn.findall("s:path[@class='arrow']", name)) == 3


def test_forms_carry_the_token_and_the_way_back() -> None:
    queue, batch = Outline(queue_page(QUEUE, LOOK)), Outline(batch_page(PAGE, LOOK))

    assert [each["action"] for each in queue.attributes("form")] == [
        "/dashboard/queue/jobs/42/retry",
        "/dashboard/queue/batches/batch_1/cancel",
    ]
    assert {each["method"] for each in queue.attributes("form")} == {"post"}
    assert [(each["name"], each["value"]) for each in queue.attributes("input")] == [("token", "t0k3n")] * 2
    assert [(each["name"], each["value"]) for each in batch.attributes("input")] == [
        ("token", "t0k3n"),
        ("back", "batch_1"),
    ] * 2


@pytest.mark.parametrize("takes_jobs", [True, False])
def test_a_batch_has_the_buttons_that_do_something(takes_jobs: bool) -> None:
    both = replace(ROW, can_retry=True)
    given = replace(LOOK, takes_jobs=takes_jobs)
    queue = Outline(queue_page(replace(QUEUE, jobs=(), batches=(both, replace(both, can_cancel=False))), given))
    batch = Outline(batch_page(replace(PAGE, jobs=(), row=both), given))

    verbs = ["cancel", "retry"] if takes_jobs else ["cancel"]
    path = "/dashboard/queue/batches/batch_1"
    assert [each["action"] for each in batch.attributes("form")] == [f"{path}/{verb}" for verb in verbs]
    assert [each["action"] for each in queue.attributes("form")] == [f"{path}/{each}" for each in (*verbs, *verbs[1:])]
    assert queue.attributes("button")[-1]["aria-label"] == f"{verbs[-1].title()} batch batch_1"


def test_who_may_only_look_has_no_buttons() -> None:
    page = Outline(queue_page(QUEUE, replace(LOOK, token=None)))

    assert page.count("form") == 0
    assert page.count("button") == 0


def test_a_page_is_loaded_again_until_that_is_stopped() -> None:
    going = Outline(queue_page(QUEUE, LOOK))
    still = Outline(queue_page(QUEUE, replace(LOOK, is_refreshing=False)))

    assert [each["content"] for each in going.attributes("meta") if each.get("http-equiv") == "refresh"] == ["4"]
    assert {"href": "/dashboard/queue?refresh=off"} in going.attributes("a")
    assert [each for each in still.attributes("meta") if each.get("http-equiv") == "refresh"] == []
    assert {"href": "/dashboard/queue"} in still.attributes("a")
    # Whoever stopped it finds it so after a button.
    assert {"type": "hidden", "name": "refresh", "value": "off"} in still.attributes("input")


@pytest.mark.parametrize("is_stalled", [True, False])
def test_the_queue_warns_when_nothing_moves(*, is_stalled: bool) -> None:
    page = queue_page(replace(QUEUE, is_stalled=is_stalled), LOOK).decode()

    assert ("Nothing moves" in page) is is_stalled


def test_a_server_that_takes_no_jobs_says_so_and_has_no_buttons_for_them() -> None:
    page = Outline(queue_page(QUEUE, replace(LOOK, takes_jobs=False)))

    assert "No jobs are taken:" in page.texts
    assert [each["action"] for each in page.attributes("form")] == ["/dashboard/queue/batches/batch_1/cancel"]
    assert "No jobs are taken" not in queue_page(QUEUE, LOOK).decode()


def test_an_empty_queue_says_so() -> None:
    page = queue_page(replace(QUEUE, jobs=(), batches=()), LOOK).decode()

    assert "There are no jobs." in page
    assert "There are no batches." in page


def test_only_trouble_that_passes_leads_back_by_itself() -> None:
    passing = Outline(refusal_page(title="Too often", message="m", is_passing=True))
    lasting = Outline(refusal_page(title="Not found", message="m", is_passing=False))

    refresh = {"http-equiv": "refresh", "content": "10; url=/dashboard/queue"}
    assert refresh in passing.attributes("meta")
    assert [each for each in lasting.attributes("meta") if "http-equiv" in each] == []


def test_pages_may_load_and_run_nothing() -> None:
    policy = HEADERS["content-security-policy"]

    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert policy.endswith("; form-action 'self'; frame-ancestors 'none'; base-uri 'none'")
    assert "unsafe" not in policy


def test_a_token_is_of_one_key_of_one_tenant_and_one_process() -> None:
    tokens, ana, ben = FormTokens(b"secret"), TenantId("ana"), TenantId("ben")
    token = tokens.token(ana, KeyId("k1"))

    assert tokens.fits(token, ana, KeyId("k1"))
    assert not tokens.fits(token, ana, KeyId("k2"))
    assert not tokens.fits(token, ana, None)
    assert not tokens.fits(token, ben, KeyId("k1"))
    assert not FormTokens(b"other").fits(token, ana, KeyId("k1"))
    assert not tokens.fits("", ana, KeyId("k1"))
    assert not tokens.fits("\ud800é", ana, KeyId("k1"))


@pytest.mark.parametrize(
    ("headers", "is_own"),
    [
        ({}, True),
        ({"Sec-Fetch-Site": "same-origin"}, True),
        ({"Sec-Fetch-Site": "none"}, True),
        ({"Sec-Fetch-Site": "same-site"}, False),
        ({"Sec-Fetch-Site": "cross-site"}, False),
        ({"Sec-Fetch-Site": "cross-site", "Origin": "http://host:8080"}, False),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://outside.example"}, True),
        ({"Origin": "http://host:8080"}, True),
        ({"Origin": "https://HOST:8080"}, True),
        ({"Origin": "http://host:9090"}, False),
        ({"Origin": "https://evil.example"}, False),
        ({"Origin": "null"}, False),
    ],
)
def test_a_post_is_taken_from_own_pages_only(headers: dict[str, str], *, is_own: bool) -> None:
    assert is_own_page({"Host": "host:8080"} | headers) is is_own


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-3.0, "0 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (3599, "59 min"),
        (3600, "1 h 0 min"),
        (47 * 3600 + 59 * 60, "47 h 59 min"),
        (timedelta(days=6, hours=5).total_seconds(), "6 days"),
    ],
)
def test_distances_are_told_in_words(seconds: float, text: str) -> None:
    assert distance_text(seconds) == text
