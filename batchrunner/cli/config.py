"""`batchrunner config`: every setting with its value and where that comes from. The key itself is never read out."""

from __future__ import annotations

from urllib.parse import urlsplit, urlunsplit

import click
import orjson

from batchrunner.cli.configuring import config_paths, load_settings, told_keys
from batchrunner.cli.console import say
from batchrunner.settings import describe
from batchrunner.targets import Target, describe_target


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
    for line in told_keys(settings):
        say(line)
    rows = [(name, _shown(getattr(settings, name)), origins[name]) for name, *_ in describe() if name != "upstream"]
    tables, source = [_table(target) for target in settings.upstream], origins["upstream"]
    if is_json:
        rows.append(("upstream", tables, source))
        click.echo(orjson.dumps({name: _entry(value, each, origin=origin) for name, value, each in rows}))
        return
    for name, value, each in rows:
        _print(f"{name} = {_written(value)}" if value is not None else f"# {name} is not set", each, origin=origin)
    # A table ends only where the next begins, so these come last.
    for table in tables:
        _print("\n[[upstream]]", source, origin=origin)
        for name, value in table.items():
            click.echo(f"{name} = {_written(value)}")
    if not tables:
        _print("# upstream is not set", source, origin=origin)


def _print(line: str, source: str, *, origin: bool) -> None:
    click.echo(f"{line}  # {source}" if origin else line)


def _table(target: Target) -> dict[str, object]:
    """Give a table as it was written, without what may be secret in it."""
    return {
        name: _shown(value)
        for name, default, _ in describe_target()
        if (value := getattr(target, name)) != default or name == "weight"
    }


def _written(value: object) -> str:
    """Write a value as TOML does; text and lists are written as in JSON."""
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_written(name)} = {_written(each)}' for name, each in value.items())} }}"
    return orjson.dumps(value).decode()


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
