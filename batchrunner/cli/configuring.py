"""Where settings come from on the command line: flag, environment, ./batchrunner.toml, the user's config, default; and
what of them can be found wrong before anything begins.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from batchrunner.errors import UsageError
from batchrunner.settings import Settings, has_upstream, resolve, targets_of
from batchrunner.targets import Target

_PREFIX = "BATCHRUNNER_"
# Variables of other tools that say the same thing, weaker than our own.
_FOREIGN = {"base_url": "OPENAI_BASE_URL"}


def load_settings(flags: Mapping[str, object]) -> tuple[Settings, dict[str, str]]:
    """Gather all layers; gives the settings and the origin of each value.

    Raises:
        UsageError: an unknown name or a value that does not fit; the message names the origin.
    """
    names = [knob.name for knob in fields(Settings)]
    layers: list[tuple[str, Mapping[str, object]]] = [("flag", flags)]
    for name in names:
        variable = _PREFIX + name.upper()
        if os.environ.get(variable):
            layers.append((f"env {variable}", {name: os.environ[variable]}))
    for name, variable in _FOREIGN.items():
        if os.environ.get(variable):
            layers.append((f"env {variable}", {name: os.environ[variable]}))
    layers += [(str(path), _read_toml(path)) for path in config_paths() if path.is_file()]
    return resolve(layers)


def check_upstreams(settings: Settings) -> None:
    """Look at the addresses of the upstreams, if any are named. Raises: UsageError."""
    from batchrunner.upstream_address import join_url

    for target in targets_of(settings) if has_upstream(settings) else ():
        join_url(target.base_url, "/v1/chat/completions")


def check_endpoint(settings: Settings, endpoint: str | None) -> None:
    """Refuse an --endpoint that no line may name. Raises: UsageError."""
    if endpoint is not None and endpoint not in settings.endpoints:
        raise UsageError(
            f"--endpoint {endpoint}: lines may go to {', '.join(settings.endpoints)}",
            hint="Name one of these; the setting `endpoints` says which there are.",
        )


def config_paths() -> list[Path]:
    """The config files that are looked at, strongest first."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [Path("batchrunner.toml"), home / "batchrunner" / "config.toml"]


def read_api_keys(settings: Settings) -> dict[str, str]:
    """The keys of the upstreams by their names; where one is not set, no Authorization is sent.

    Raises:
        UsageError: a file that should hold a key cannot be read; what is in it is not repeated.
    """
    keys = {target.name: _api_key_of(target) for target in targets_of(settings)}
    return {name: key for name, key in keys.items() if key}


def told_keys(settings: Settings) -> list[str]:
    """Say of each upstream where its key comes from and whether it is set, never the key."""
    keys, several = read_api_keys(settings), bool(settings.upstream)
    told = []
    for target in targets_of(settings):
        place = target.api_key_file or target.api_key_env
        state = f"{place} is {'set' if target.name in keys else 'not set'}" if place else "none is named"
        told.append(f"key of {target.name}: {state}" if several else f"key: {state}")
    return told


def check_webhook_url(settings: Settings, *, is_loopback_allowed: bool, called: str) -> None:
    """Find out before the start what no notification could be sent with. Raises: UsageError."""
    from batchrunner.addresses import AddressRules, parse_networks, url_problem

    networks = parse_networks(settings.webhook_networks)
    rules = AddressRules(is_loopback_allowed=is_loopback_allowed, networks=networks)
    if settings.webhook_url is not None and (why := url_problem(settings.webhook_url, rules)):
        # The URL is not repeated: it may hold a password.
        raise UsageError(f"{called}: {why}")


def _api_key_of(target: Target) -> str:
    if target.api_key_file is None:
        return os.environ.get(target.api_key_env, "") if target.api_key_env else ""
    try:
        return Path(target.api_key_file).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"upstream {target.name}: api_key_file {target.api_key_file!r} cannot be read: "
            f"{getattr(error, 'strerror', None) or 'it is no text'}"
        ) from error


def _read_toml(path: Path) -> Mapping[str, object]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
    tables = found.get("upstream")
    for table in tables if isinstance(tables, list) else ():
        if isinstance(table, dict) and isinstance(table.get("api_key_file"), str):
            table["api_key_file"] = str(path.parent.resolve() / Path(table["api_key_file"]).expanduser())
    return found
