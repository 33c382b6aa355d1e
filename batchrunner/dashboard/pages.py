"""Writes the pages as HTML: everything that is shown is escaped, and no page loads or runs anything."""

from __future__ import annotations

import base64
import hashlib
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from batchrunner.dashboard import graph
from batchrunner.dashboard.views import SHOWN_MAX, BatchPage, Queue

HTML = "text/html; charset=utf-8"
REFRESH_S = 4
_AFTER_TROUBLE_S = 10
_TEMPLATES = Path(__file__).with_name("templates")
_STYLE = (_TEMPLATES / "style.css").read_text(encoding="utf-8")
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()

HEADERS: Mapping[str, str] = MappingProxyType(
    {
        "content-security-policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; form-action 'self'; "
        "frame-ancestors 'none'; base-uri 'none'",
        # With no-referrer a browser would not say either that a form is the page's own.
        "referrer-policy": "same-origin",
        "x-frame-options": "DENY",
        "cache-control": "no-store",
    }
)
# Besides control characters: those that turn the text around them.
_TURNING = frozenset("\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How a page is looked at. Its forms carry `token`; None leaves them out, for whoever may only look. A server
    that takes no jobs leaves out their buttons.
    """

    token: str | None
    is_refreshing: bool
    takes_jobs: bool


def queue_page(queue: Queue, look: Look) -> bytes:
    """Write the page of the queue."""
    return _render("queue.html", queue=queue, look=look, shown_max=SHOWN_MAX)


def batch_page(page: BatchPage, look: Look) -> bytes:
    """Write the page of a batch."""
    return _render("batch.html", page=page, look=look, graph_width=graph.WIDTH)


def refusal_page(*, title: str, message: str, is_passing: bool) -> bytes:
    """Write what somebody reads in place of a page; one that is passing leads back to the queue by itself."""
    refresh_s = _AFTER_TROUBLE_S if is_passing else None
    return _render("refusal.html", title=title, message=message, refresh_s=refresh_s)


def _render(name: str, **shown: object) -> bytes:
    text = _TEMPLATING.get_template(name).render(style=Markup(_STYLE), refresh_after_s=REFRESH_S, **shown)  # noqa: S704
    return text.encode()


def _visible(value: object) -> object:
    """Show what cannot be seen, or would change how the rest is seen, by its escape; escaping for HTML comes after."""
    if not isinstance(value, str) or isinstance(value, Markup):
        return value
    return "".join(each.encode("unicode_escape").decode() if _is_hidden(each) else each for each in str(value))


def _is_hidden(character: str) -> bool:
    return character in _TURNING or unicodedata.category(character) in ("Cc", "Cs")


_TEMPLATING = Environment(
    loader=FileSystemLoader(_TEMPLATES),
    autoescape=True,
    undefined=StrictUndefined,
    finalize=_visible,
    auto_reload=False,
    trim_blocks=True,
    lstrip_blocks=True,
)
