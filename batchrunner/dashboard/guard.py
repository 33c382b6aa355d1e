"""Keeps the buttons of a page for whoever looks at it: tokens in its forms, and no posts from other sites. Pure."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from batchrunner.holdings import KeyId
from batchrunner.models import TenantId

_OWN_SITES = frozenset({"same-origin", "none"})


class FormTokens:
    """Makes and checks the tokens of forms, under a secret that no page shows."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def token(self, tenant: TenantId, key_id: KeyId | None) -> str:
        """Give what the forms of a page for that key carry; None is a server without keys."""
        return hmac.new(self._secret, f"{key_id or ''}\0{tenant}".encode(), hashlib.sha256).hexdigest()

    def fits(self, given: str, tenant: TenantId, key_id: KeyId | None) -> bool:
        """Tell whether a form carries its token, in the same time whatever it carries."""
        return hmac.compare_digest(given.encode("utf-8", "replace"), self.token(tenant, key_id).encode())


def is_own_page(headers: Mapping[str, str]) -> bool:
    """Tell whether a request may come from a page of this server: as far as the browser says, it was not another site.

    Source: Fetch Metadata Request Headers, and for browsers without them the Origin header of Fetch.
    """
    site = headers.get("Sec-Fetch-Site")
    if site is not None:
        return site in _OWN_SITES
    origin = headers.get("Origin")
    return origin is None or origin.partition("://")[2].lower() == headers.get("Host", "").lower()
