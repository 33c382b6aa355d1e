"""`batchrunner config`: every setting with its value and where that comes from. The key itself is never read out."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

import click
import orjson

from batchrunner.cli.configuring import api_key_for, config_paths, load_settings
from batchrunner.cli.console import say
from batchrunner.settings import describe


@click.group("config")
def config() -> None:
    """Show the settings and where each value comes from."""


@config.command("show")
@click.option("--origin", is_flag=True, help="Add where each value comes from.")
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object.")
def show(*, origin: bool, is_json: bool) -> None:
    """Print all settings as they hold in this folder, in the form of batchrunner.toml.

    A flag goes before BATCHRUNNER_NAME, that before ./batchrunner.toml, the user's config and the default.
    """
    for path in config_paths():
        say(f"{path}: {'read' if path.is_file() else 'not there'}")
    settings, origins = load_settings({})
    say(f"key: {settings.api_key_env} is {'set' if api_key_for(settings) else 'not set'}")
    rows = [(name, _shown(getattr(settings, name)), origins[name], meaning) for name, _, meaning in describe()]
    if is_json:
        click.echo(orjson.dumps({name: _entry(value, source, origin=origin) for name, value, source, _ in rows}))
        return
    for name, value, source, _ in rows:
        line = f"{name} = {orjson.dumps(value).decode()}" if value is not None else f"# {name} is not set"
        click.echo(f"{line}  # {source}" if origin else line)


def _entry(value: object, source: str, *, origin: bool) -> object:
    return {"value": value, "origin": source} if origin else value


def _shown(value: object) -> object:
    """Give a value without what may be secret in it: a URL's user, password and query."""
    if not isinstance(value, str) or "://" not in value:
        return value
    parts = urlsplit(value)
    place = parts.netloc.rpartition("@")
    netloc = f"***@{place[2]}" if place[1] else parts.netloc
    return urlunsplit((parts.scheme, netloc, parts.path, "***" if parts.query else "", ""))
