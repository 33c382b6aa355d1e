"""`batchrunner keys`: make, list, revoke and rotate the API keys of a server. A secret is printed once, kept never."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import click
import orjson

from batchrunner.cli.configuring import load_settings
from batchrunner.cli.console import say
from batchrunner.cli.server_folder import folder_of, folder_option, open_store
from batchrunner.errors import NotFound, UsageError
from batchrunner.holdings import ApiKey, KeyId, KeyLimits, KeyScope
from batchrunner.models import LOCAL_TENANT, TenantId
from batchrunner.settings import parse_duration

if TYPE_CHECKING:
    from batchrunner.app import Adapters

_PREFIX = "br_"
_SECRET_BYTES = 32
_SHOWN_CHARS = 9


def _folder(server_folder: str | None) -> Path:
    settings, _ = load_settings({"server_folder": server_folder})
    return folder_of(settings)


@click.group("keys")
def keys() -> None:
    """Make, list, revoke and rotate the API keys of a server.

    With the first key the server asks for one; a running server notices within seconds.
    """


@keys.command("create")
@click.option(
    "--tenant", metavar="NAME", default=LOCAL_TENANT, show_default=True, help="Whose files and batches it sees."
)
@click.option("--name", metavar="TEXT", default="", help="What it is for, to tell it from others.")
@click.option("--scopes", metavar="LIST", default="read,write", show_default=True, help="Of read, write and admin.")
@click.option("--expires", metavar="DURATION", help="When it ends, such as 90d; never by default.")
@click.option("--open-batches", type=click.IntRange(min=1), metavar="N", help="Unfinished batches at a time.")
@click.option("--queued-lines", type=click.IntRange(min=1), metavar="N", help="Unfinished lines at a time.")
@click.option("--rpm", type=click.IntRange(min=1), metavar="N", help="Requests a minute to this server.")
@click.option("--priority", type=int, metavar="N", help="The highest priority that its batches may have.")
@folder_option
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object.")
def create(
    *,
    tenant: str,
    name: str,
    scopes: str,
    expires: str | None,
    server_folder: str | None,
    is_json: bool,
    **limits: int | None,
) -> None:
    """Make a key and print its secret, this once: only its SHA-256 is kept."""
    wanted = _scopes(scopes)
    if not tenant.strip():
        raise UsageError("--tenant is empty")
    expires_s = parse_duration(expires, what="--expires") if expires else None
    with open_store(_folder(server_folder)) as adapters:
        now = adapters.clock.now()
        secret, key = _made(
            adapters,
            tenant=TenantId(tenant),
            name=name,
            scopes=wanted,
            limits=KeyLimits(
                open_batches_max=limits["open_batches"],
                queued_lines_max=limits["queued_lines"],
                rpm=limits["rpm"],
                priority_max=limits["priority"],
            ),
        )
        if expires_s is not None:
            key = replace(key, expires_at=now + timedelta(seconds=expires_s))
        adapters.store.add_key(key)
    _print_secret(secret, key, is_json=is_json)


@keys.command("list")
@click.option("--tenant", metavar="NAME", help="Only those of one tenant.")
@folder_option
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object for each key.")
def list_keys(*, tenant: str | None, server_folder: str | None, is_json: bool) -> None:
    """List all keys, oldest first, without their secrets."""
    with open_store(_folder(server_folder)) as adapters:
        found = adapters.store.keys(tenant=TenantId(tenant) if tenant is not None else None)
        now = adapters.clock.now()
        rows = [(key, _state(key, now=now)) for key in found]
    for key, state in rows:
        if is_json:
            click.echo(orjson.dumps(_described(key) | {"state": state}))
        else:
            scopes = ",".join(key.scopes)
            click.echo(
                f"{key.id}  {key.shown}...  {key.tenant}  {scopes}  {state}  {_limits(key)}  {key.name}".rstrip()
            )
    if not rows:
        say("no keys; the server answers this machine only")


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
@folder_option
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object.")
def revoke(*, key_id: str, server_folder: str | None, is_json: bool) -> None:
    """End a key. A running server refuses it within 5 s."""
    with open_store(_folder(server_folder)) as adapters:
        key = adapters.store.revoke_key(KeyId(key_id), at=adapters.clock.now())
    click.echo(orjson.dumps(_described(key)) if is_json else f"{key.id} revoked")


@keys.command("rotate")
@click.argument("key_id", metavar="ID")
@click.option("--grace", metavar="DURATION", default="0s", show_default=True, help="How long the old secret goes on.")
@folder_option
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object.")
def rotate(*, key_id: str, grace: str, server_folder: str | None, is_json: bool) -> None:
    """Make a new secret with the tenant, name, scopes and limits of a key, which then ends."""
    grace_s = parse_duration(grace, what="--grace")
    with open_store(_folder(server_folder)) as adapters:
        known = adapters.store.keys()
        old = next((key for key in known if key.id == key_id), None)
        if old is None:
            raise NotFound(f"no key {key_id}", hint="`batchrunner keys list` shows all.")
        now = adapters.clock.now()
        if _state(old, now=now) != "valid":
            raise UsageError(f"{key_id} has ended: it is {_state(old, now=now)}", hint="Make one with `keys create`.")
        secret, key = _made(adapters, tenant=old.tenant, name=old.name, scopes=old.scopes, limits=old.limits)
        adapters.store.add_key(replace(key, expires_at=old.expires_at))
        adapters.store.revoke_key(old.id, at=now + timedelta(seconds=grace_s))
    _print_secret(secret, key, is_json=is_json)


def _made(
    adapters: Adapters, *, tenant: TenantId, name: str, scopes: tuple[KeyScope, ...], limits: KeyLimits
) -> tuple[str, ApiKey]:
    from batchrunner.api.auth import digest_of

    secret = _PREFIX + adapters.rng.token_hex(_SECRET_BYTES)
    key = ApiKey(
        id=KeyId(f"key_{adapters.rng.token_hex(8)}"),
        tenant=tenant,
        name=name,
        digest=digest_of(secret),
        shown=secret[:_SHOWN_CHARS],
        scopes=scopes,
        limits=limits,
        created_at=adapters.clock.now(),
    )
    return secret, key


def _scopes(text: str) -> tuple[KeyScope, ...]:
    wanted = list(dict.fromkeys(part.strip() for part in text.split(",")))
    known = [scope.value for scope in KeyScope]
    unknown = [each for each in wanted if each not in known]
    if unknown:
        raise UsageError(f"--scopes: there is no {unknown[0]!r}, but {', '.join(known)}")
    return tuple(KeyScope(each) for each in wanted)


def _state(key: ApiKey, *, now: datetime) -> str:
    if key.revoked_at is not None and key.revoked_at <= now:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= now else "valid"


def _limits(key: ApiKey) -> str:
    given = [
        f"{name}={value}" for name in key.limits.__struct_fields__ if (value := getattr(key.limits, name)) is not None
    ]
    return ",".join(given) or "no limits"


def _described(key: ApiKey) -> dict[str, object]:
    """Give what may be shown of a key."""
    return {
        "id": key.id,
        "tenant": key.tenant,
        "name": key.name,
        "shown": key.shown,
        "scopes": list(key.scopes),
        "limits": {name: getattr(key.limits, name) for name in key.limits.__struct_fields__},
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
    }


def _print_secret(secret: str, key: ApiKey, *, is_json: bool) -> None:
    if is_json:
        click.echo(orjson.dumps(_described(key) | {"secret": secret}))
        return
    say(f"{key.id} for tenant {key.tenant}; this is the only time that the secret is shown:")
    click.echo(secret)
