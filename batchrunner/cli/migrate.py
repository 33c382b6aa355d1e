"""`batchrunner migrate`: bring a server's database up to this version's schema, or only tell how it stands."""

from __future__ import annotations

import sys

import click

from batchrunner.cli.configuring import load_settings
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.run_folder import RunFolder
from batchrunner.cli.server_folder import folder_of, folder_option, open_store
from batchrunner.errors import SchemaNewer


@click.command("migrate", short_help="Bring a server's database up to this version, or check it.")
@click.option("--check", "is_check", is_flag=True, help="Change nothing; exit 0 if there is nothing to do, else 1.")
@folder_option
def migrate(*, is_check: bool, server_folder: str | None) -> None:
    """Bring the database of a data folder up to this version's schema. `serve` does it by itself at its start.

    Exit codes: 0 the schema is this version's, 1 it is not (--check), a newer one, or a server runs.
    """
    settings, _ = load_settings({"server_folder": server_folder})
    folder = folder_of(settings)
    from batchrunner.app import schema_versions

    found, known = schema_versions(folder)
    if found is not None and found > known:
        raise SchemaNewer(f"{folder}: the database has schema {found}, this program knows up to {known}")
    if found == known:
        click.echo(f"schema {known}: nothing to do")
        return
    told = f"schema {found}" if found else "no database"
    if is_check:
        click.echo(f"{told}; this version has schema {known}: run `batchrunner migrate`")
        sys.exit(int(ExitCode.TROUBLE))
    lock = RunFolder(folder)
    lock.lock()
    try:
        with open_store(folder):
            click.echo(f"{told} before, schema {known} now")
    finally:
        lock.unlock()
