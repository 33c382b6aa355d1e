"""Where a webhook may go: which URLs are addresses of receivers, and which machines a connection may reach.

A URL that looks well may still lead anywhere: what counts is judged again for the very address of each connection.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from batchrunner.errors import UsageError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

URL_CHARS_MAX = 2048

# Source: IANA's IPv4 special-purpose registry, multicast and reserved space, and Azure's wire server, which is
# reachable from every machine there although its address looks public.
_REFUSED_V4: tuple[tuple[str, str], ...] = (
    ("0.0.0.0/8", "this network"),
    ("10.0.0.0/8", "private"),
    ("100.64.0.0/10", "shared by carriers"),
    ("127.0.0.0/8", "loopback"),
    ("169.254.0.0/16", "link-local"),
    ("172.16.0.0/12", "private"),
    ("192.0.0.0/24", "reserved for protocols"),
    ("192.0.2.0/24", "for documentation"),
    ("192.88.99.0/24", "a relay of 6to4"),
    ("192.168.0.0/16", "private"),
    ("198.18.0.0/15", "for benchmarks"),
    ("198.51.100.0/24", "for documentation"),
    ("203.0.113.0/24", "for documentation"),
    ("224.0.0.0/4", "multicast"),
    ("240.0.0.0/4", "reserved"),
    ("168.63.129.16/32", "a cloud's metadata"),
)
# Source: IANA's IPv6 special-purpose registry. Outside 2000::/3 nothing is a public host.
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_REFUSED_V6: tuple[tuple[str, str], ...] = (
    ("2001::/23", "reserved for protocols"),
    ("2001:db8::/32", "for documentation"),
    ("2002::/16", "6to4"),
    ("3fff::/20", "for documentation"),
)
# RFC 6052: an IPv4 address seen through a translator, which a host without IPv4 has for every public one.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_SPECIAL: tuple[tuple[Network, str], ...] = tuple(
    (ipaddress.ip_network(network), what) for network, what in (*_REFUSED_V4, *_REFUSED_V6)
)

# Source: the Fetch standard, "port blocking": services that could take a POST for something else.
_BAD_PORTS = frozenset(
    (
        *(0, 1, 7, 9, 11, 13, 15, 17, 19, 20, 21, 22, 23, 25, 37, 42, 43, 53, 69, 77, 79, 87, 95, 101, 102, 103, 104),
        *(109, 110, 111, 113, 115, 117, 119, 123, 135, 137, 139, 143, 161, 179, 389, 427, 465, 512, 513, 514, 515),
        *(526, 530, 531, 532, 540, 548, 554, 556, 563, 587, 601, 636, 989, 990, 993, 995, 1719, 1720, 1723, 2049),
        *(3659, 4045, 4190, 5060, 5061, 6000, 6379, 6566, 6665, 6666, 6667, 6668, 6669, 6679, 6697, 10080, 11211),
    )
)
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST = re.compile(rf"{_LABEL}(?:\.{_LABEL})*\.?")
# Old ways of writing IPv4: the last label is a number, in whatever base.
_NUMBER = re.compile(r"(?:.*\.)?(?:\d+|0[xX][0-9A-Fa-f]*)\.?")


@dataclass(frozen=True, slots=True, kw_only=True)
class AddressRules:
    """What is allowed beside public addresses over https: this machine, and networks that the operator names. Plain
    http is for these only.
    """

    is_loopback_allowed: bool = False
    networks: tuple[Network, ...] = ()

    @property
    def is_plain_allowed(self) -> bool:
        """Tell whether http may lead anywhere at all."""
        return self.is_loopback_allowed or bool(self.networks)

    def refusal(self, address: str, *, is_plain: bool) -> str | None:
        """Say why no connection to an IP address may be made; None where it may."""
        try:
            found = ipaddress.ip_address(address)
        except ValueError:
            return "it is no IP address"
        if self._is_allowed(found):
            return None
        if what := special(found):
            return f"{address} is {what}"
        return f"{address} is public and http is not encrypted" if is_plain else None

    def _is_allowed(self, address: Address) -> bool:
        if self.is_loopback_allowed and address.is_loopback and not _is_mapped(address):
            return True
        return any(address in network for network in self.networks if network.version == address.version)


def parse_networks(texts: Sequence[str]) -> tuple[Network, ...]:
    """Read address ranges such as 10.0.0.0/8 or a single address.

    Raises:
        UsageError: one is none.
    """
    try:
        return tuple(ipaddress.ip_network(text.strip()) for text in texts if text.strip())
    except ValueError as error:
        raise UsageError(f"webhook_networks: {error}", hint="Write ranges such as 10.0.0.0/8,fd00::/8.") from error


def special(address: Address) -> str | None:
    """Say what an address is if it is no public host's."""
    if isinstance(address, ipaddress.IPv6Address):
        if address in _NAT64:
            return special(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        if _is_mapped(address):
            return "an IPv4 address in disguise"
        if address == ipaddress.IPv6Address("::1"):
            return "loopback"
        if address not in _PUBLIC_V6:
            return "not public"
    return next((what for network, what in _SPECIAL if address in network), None)


def _is_mapped(address: Address) -> bool:
    return isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None


def url_problem(url: str, rules: AddressRules) -> str | None:
    """Say why a URL can be no receiver's; None if it may be one. Names are looked up only when it is called."""
    if not (url.isascii() and url.isprintable()) or set(url) & set(' \\<>"`{}|^'):
        return "it has characters that a URL cannot have"
    if len(url) > URL_CHARS_MAX:
        return f"it is {len(url)} characters, at most {URL_CHARS_MAX}"
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return "its host or port cannot be read"
    schemes = ("https", "http") if rules.is_plain_allowed else ("https",)
    if parts.scheme not in schemes or "://" not in url[:8]:
        return f"it does not begin with {' or '.join(f'{each}://' for each in schemes)}"
    if "@" in parts.netloc:
        return "it has credentials"
    if parts.fragment:
        return "it has a fragment"
    if port is not None and port in _BAD_PORTS:
        return f"port {port} belongs to another service"
    return _host_problem(host, is_bracketed="[" in parts.netloc, is_plain=parts.scheme == "http", rules=rules)


def _host_problem(host: str, *, is_bracketed: bool, is_plain: bool, rules: AddressRules) -> str | None:
    """Judge addresses that stand in the URL; a name is left to whoever looks it up."""
    if is_bracketed:
        return "it names an interface" if "%" in host else rules.refusal(host, is_plain=is_plain)
    if not host or len(host) > 254 or not _HOST.fullmatch(host):
        return "it has no valid host"
    if _NUMBER.fullmatch(host):
        try:
            return rules.refusal(str(ipaddress.IPv4Address(host)), is_plain=is_plain)
        except ValueError:
            return "its host is a number that is no IPv4 address"
    return None
