"""Who calls: API keys by the digest of their secret, what they may do, and how often."""

from __future__ import annotations

import base64
import hashlib
import hmac
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from aiohttp import web

from batchrunner.api.envelope import Refusal
from batchrunner.holdings import ApiKey, KeyId, KeyScope
from batchrunner.models import LOCAL_TENANT, TenantId
from batchrunner.ports import Clock

# A revoked key works at most so long.
CACHED_S = 5.0
_CACHED_MAX = 10_000
_MINUTE_S = 60.0
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]", "::1"})
# Source: recorded answers of the OpenAI API.
_NO_KEY = (
    "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth "
    "(i.e. Authorization: Bearer YOUR_KEY). `batchrunner keys create` makes a key."
)
_CHALLENGE = {"www-authenticate": 'Bearer realm="OpenAI API"'}


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whoever sent a request. Without a key everybody is the local tenant."""

    tenant: TenantId
    key: ApiKey | None = None


OPEN_CALLER = Caller(tenant=LOCAL_TENANT)


def bearer_of(headers: Mapping[str, str]) -> str | None:
    """Give the secret that a request carries, as a bearer token or as Azure's `api-key`; None without one."""
    kind, _, token = headers.get("Authorization", "").strip().partition(" ")
    if kind.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("api-key", "").strip() or None


def password_of(headers: Mapping[str, str]) -> str | None:
    """Give the secret that a browser carries, as the password of HTTP Basic under any user name; None without one."""
    kind, _, told = headers.get("Authorization", "").strip().partition(" ")
    if kind.lower() != "basic":
        return None
    try:
        _, _, secret = base64.b64decode(told.strip(), validate=True).decode("utf-8").partition(":")
    except ValueError:
        return None
    return secret or None


def digest_of(secret: str) -> str:
    """Give what is kept of a secret: its SHA-256 in hex."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


class KeyRing:
    """Finds keys in the Store and remembers them for a few seconds. `find` blocks; one thread at a time may `look`."""

    def __init__(self, find: Callable[[str], ApiKey | None], clock: Clock) -> None:
        self._find = find
        self._clock = clock
        self._seen: OrderedDict[str, tuple[float, ApiKey]] = OrderedDict()

    def remembered(self, digest: str) -> ApiKey | None:
        """Give a key that was found just now, without asking the Store."""
        seen = self._seen.get(digest)
        if seen is None or self._clock.monotonic_s() - seen[0] > CACHED_S:
            return None
        return seen[1]

    def look_up(self, digest: str) -> ApiKey | None:
        """Ask the Store. Blocks."""
        key = self._find(digest)
        # The Store found it by an index; what is compared here takes the same time for every secret.
        return key if key is not None and hmac.compare_digest(key.digest, digest) else None

    def remember(self, digest: str, key: ApiKey) -> None:
        """Keep a key that was found. On the event loop."""
        self._seen[digest] = (self._clock.monotonic_s(), key)
        self._seen.move_to_end(digest)
        while len(self._seen) > _CACHED_MAX:
            self._seen.popitem(last=False)


def check_scope(key: ApiKey, scope: KeyScope) -> None:
    """Raises: Refusal when the key does not cover the scope."""
    if scope not in key.scopes:
        names = ", ".join(key.scopes) or "none"
        raise Refusal(
            f"You have insufficient permissions for this operation. Missing scopes: {scope}; this key has: {names}.",
            status=403,
            code="missing_scope",
        )


def no_key() -> Refusal:
    """What a request without a key is answered."""
    return Refusal(_NO_KEY, status=401, headers=_CHALLENGE)


def wrong_key(secret: str) -> Refusal:
    """What an unknown, revoked or expired key is answered; it is shown as far as it tells nothing."""
    shown = f"{secret[:5]}***{secret[-2:]}" if len(secret) >= 16 else "***"
    shown = "".join(each if each.isascii() and each.isprintable() else "?" for each in shown)
    message = f"Incorrect API key provided: {shown}. `batchrunner keys list` shows the keys of this server."
    return Refusal(message, status=401, code="invalid_api_key", headers=_CHALLENGE)


def check_open_door(request: web.Request) -> None:
    """Keep web pages out of a server without keys: it may be called by a loopback name only, and by no foreign page.

    Raises:
        Refusal: a browser was sent here by another site.
    """
    host = request.headers.get("Host", "")
    name = host if host.startswith("[") and host.endswith("]") else host.rpartition(":")[0] or host
    origin = request.headers.get("Origin")
    origin_name = origin.partition("://")[2] if origin else ""
    origin_host = origin_name.rpartition(":")[0] or origin_name
    is_foreign = origin is not None and origin_host.lower() not in _LOOPBACK
    if (host and name.lower() not in _LOOPBACK) or is_foreign:
        raise Refusal(
            "This server has no API keys and answers only requests to a loopback name from this machine.",
            status=403,
            code="host_refused",
        )


class Meter:
    """Requests a minute of one key: a minute's worth at once, then as many as flow back."""

    __slots__ = ("_level", "_rpm", "_seen_s")

    def __init__(self, rpm: int, now_s: float) -> None:
        self._rpm = rpm
        self._level = float(rpm)
        self._seen_s = now_s

    def take(self, rpm: int, now_s: float) -> float:
        """Take one and give 0, or give the seconds to wait."""
        self._rpm = rpm
        self._level = min(self._level + (now_s - self._seen_s) * rpm / _MINUTE_S, float(rpm))
        self._seen_s = now_s
        if self._level < 1.0:
            return (1.0 - self._level) * _MINUTE_S / rpm
        self._level -= 1.0
        return 0.0

    def headers(self) -> dict[str, str]:
        """Tell limit, rest and the time until all is back. Source: rate limit headers of the OpenAI API."""
        reset_s = (self._rpm - self._level) * _MINUTE_S / self._rpm
        return {
            "x-ratelimit-limit-requests": str(self._rpm),
            "x-ratelimit-remaining-requests": str(math.floor(self._level)),
            "x-ratelimit-reset-requests": f"{round(reset_s * 1000)}ms" if reset_s < 1 else f"{reset_s:.3g}s",
        }


class Meters:
    """One meter for each key that has a limit, the most recently used."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._meters: OrderedDict[KeyId, Meter] = OrderedDict()

    def admit(self, key: ApiKey) -> Mapping[str, str]:
        """Count a request; give the headers that tell how the limit stands, none without a limit.

        Raises:
            Refusal: the limit is reached.
        """
        rpm = key.limits.rpm
        if rpm is None:
            return {}
        now_s = self._clock.monotonic_s()
        meter = self._meters.setdefault(key.id, Meter(rpm, now_s))
        self._meters.move_to_end(key.id)
        while len(self._meters) > _CACHED_MAX:
            self._meters.popitem(last=False)
        wait_s = meter.take(rpm, now_s)
        if wait_s <= 0.0:
            return meter.headers()
        raise Refusal(
            f"Rate limit reached for requests: limit {rpm} a minute. Please try again in {wait_s:.3g}s.",
            status=429,
            kind="requests",
            code="rate_limit_exceeded",
            retry_after_s=wait_s,
            headers=meter.headers(),
        )
