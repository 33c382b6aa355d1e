"""The queue page as rows of the API's table: what is asked goes to the Store, and what is shown is drawn by the
dashboard.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from urllib.parse import parse_qsl, quote

import msgspec

from batchrunner.api import batches, club_jobs
from batchrunner.api.envelope import Refusal, no_such_batch
from batchrunner.api.http import Answer, Call, Route
from batchrunner.dashboard.guard import FormTokens, is_own_page
from batchrunner.dashboard.pages import HEADERS, HTML, Look, batch_page, queue_page, refusal_page
from batchrunner.dashboard.views import batch_page_of, queue_of
from batchrunner.errors import NotFound
from batchrunner.holdings import KeyScope
from batchrunner.models import BatchId

QUEUE = "/dashboard/queue"
FORM = "application/x-www-form-urlencoded"
_FORM_BYTES_MAX = 4096
_FORM_FIELDS_MAX = 8
_CHALLENGE = {"www-authenticate": 'Basic realm="batchrunner", charset="UTF-8"'}
_NEEDS_KEY = "This page asks for an API key: any user name, and the key as the password."
_TITLES = {401: "A key is needed", 403: "Not allowed", 404: "Not found", 409: "Too late", 429: "Too often"}
_PASSING = frozenset({429, 503})


class PageQuery(msgspec.Struct, frozen=True):
    """How a page is shown: with `off` it does not refresh itself."""

    refresh: str | None = None


class PageForm(msgspec.Struct, frozen=True):
    """What a button of a page sends: the page's token, and where to go back to."""

    token: str
    back: str | None = None
    refresh: str | None = None


def queue_routes(secret: bytes) -> tuple[Route, ...]:
    """Give the routes of the queue page, whose forms are good for one process, which draws the secret."""
    pages = _QueuePages(FormTokens(secret))
    batch, job = f"{QUEUE}/batches/{{batch_id}}", f"{QUEUE}/jobs/{{job_id}}"
    page = partial(Route, answer_media="text/html", refuse=refused)
    show = partial(page, method="GET", query=PageQuery)
    act = partial(
        page,
        method="POST",
        scope=KeyScope.WRITE,
        request=PageForm,
        request_media=FORM,
        body_bytes_max=_FORM_BYTES_MAX,
        leads_on=True,
    )
    return (
        page(
            method="GET", path="/dashboard", handler=pages.find_queue, summary="Lead to the queue page", leads_on=True
        ),
        show(path=QUEUE, handler=pages.show_queue, summary="Show the jobs and batches of the key's tenant"),
        show(path=batch, handler=pages.show_batch_steps, summary="Show a batch and its steps"),
        act(path=f"{batch}/cancel", handler=pages.cancel_shown_batch, summary="Cancel a batch and go back"),
        act(
            path=f"{batch}/retry",
            handler=pages.retry_shown_batch,
            summary="Queue failed jobs of a batch again and go back",
        ),
        act(path=f"{job}/cancel", handler=pages.cancel_shown_job, summary="Cancel a job and go back"),
        act(path=f"{job}/retry", handler=pages.retry_shown_job, summary="Queue a job again and go back"),
    )


def refused(refusal: Refusal) -> Answer:
    """Show a refusal as a page. A browser that is asked for a key in this way asks its user."""
    is_unknown = refusal.status == 401
    page = refusal_page(
        title=_TITLES.get(refusal.status, "That did not work"),
        message=_NEEDS_KEY if is_unknown else refusal.message,
        is_passing=refusal.status in _PASSING,
    )
    headers = {**refusal.headers(), **(_CHALLENGE if is_unknown else {}), **HEADERS}
    return Answer(body=page, status=refusal.status, content_type=HTML, headers=headers)


class _QueuePages:
    """The handlers of the pages."""

    def __init__(self, tokens: FormTokens) -> None:
        self._tokens = tokens

    async def find_queue(self, call: Call) -> Answer:  # noqa: ARG002 - handlers are called alike
        return _sent_to(QUEUE)

    async def show_queue(self, call: Call) -> Answer:
        parts, look = call.parts, self._look(call)
        is_silent = parts.vitals.is_stalled(parts.clock.monotonic_s())
        return await _drawn(
            call, lambda: queue_page(queue_of(call.scope, parts.clock.now(), is_silent=is_silent), look)
        )

    async def show_batch_steps(self, call: Call) -> Answer:
        look = self._look(call)

        def draw() -> bytes:
            batch_id = BatchId(call.path_params["batch_id"])
            try:
                return batch_page(batch_page_of(call.scope, batch_id, call.parts.clock.now()), look)
            except NotFound:
                raise no_such_batch(batch_id) from None

        return await _drawn(call, draw)

    async def cancel_shown_batch(self, call: Call) -> Answer:
        back = await self._admitted(call)
        await batches.cancel_batch(call)
        return back

    async def retry_shown_batch(self, call: Call) -> Answer:
        back = await self._admitted(call)
        await club_jobs.retry_jobs(call)
        return back

    async def cancel_shown_job(self, call: Call) -> Answer:
        back = await self._admitted(call)
        await club_jobs.cancel_job(call)
        return back

    async def retry_shown_job(self, call: Call) -> Answer:
        back = await self._admitted(call)
        await club_jobs.retry_job(call)
        return back

    def _look(self, call: Call) -> Look:
        can_act = call.key is None or KeyScope.WRITE in call.key.scopes
        token = self._tokens.token(call.tenant, call.key.id if call.key is not None else None)
        return Look(
            token=token if can_act else None,
            is_refreshing=call.request.query.get("refresh") != "off",
            takes_jobs=call.parts.settings.async_enabled,
        )

    async def _admitted(self, call: Call) -> Answer:
        """Make sure that a form is one of ours, and give the way back. Raises: Refusal."""
        if not is_own_page(call.request.headers):
            raise Refusal("This came from another site's page.", status=403, code="cross_site")
        try:
            pairs = parse_qsl((await call.body()).decode("utf-8", "replace"), max_num_fields=_FORM_FIELDS_MAX)
        except ValueError:
            # That is more than any form of ours has.
            pairs = []
        form = dict(pairs)
        if not self._tokens.fits(form.get("token", ""), call.tenant, call.key.id if call.key is not None else None):
            message = "This form is too old, or not of this server: go back, load the page again and repeat it."
            raise Refusal(message, status=403, code="wrong_form_token")
        path = f"{QUEUE}/batches/{quote(form['back'], safe='')}" if form.get("back") else QUEUE
        return _sent_to(path if form.get("refresh") != "off" else f"{path}?refresh=off")


async def _drawn(call: Call, draw: Callable[[], bytes]) -> Answer:
    return Answer(body=await call.blocking(draw), content_type=HTML, headers=HEADERS)


def _sent_to(path: str) -> Answer:
    return Answer(status=303, content_type=HTML, headers={"location": path, **HEADERS})
