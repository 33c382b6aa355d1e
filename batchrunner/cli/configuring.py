"""Where settings come from on the command line: flag, environment, ./batchrunner.toml, the user's config, default."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

from batchrunner.errors import UsageError
from batchrunner.settings import Settings, resolve

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


def config_paths() -> list[Path]:
    """The config files that are looked at, strongest first."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return [Path("batchrunner.toml"), home / "batchrunner" / "config.toml"]


def api_key_for(settings: Settings) -> str | None:
    """The upstream's key, None when the variable is unset or empty: then no Authorization is sent."""
    return os.environ.get(settings.api_key_env) or None


def _read_toml(path: Path) -> Mapping[str, object]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from error
