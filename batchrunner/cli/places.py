"""INPUT, OUTPUT and the errors file of a run where they are objects in a bucket. Inside a run each has a path that
stands for it and bears its name; here is what such a path means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click

from batchrunner.blobs.s3_address import S3Address, is_s3, parse_address
from batchrunner.cli.run_folder import Fingerprint
from batchrunner.durable import telling_full
from batchrunner.errors import OutputExists, UsageError
from batchrunner.settings import Settings

if TYPE_CHECKING:
    from batchrunner.blobs.s3_files import S3Files


class Place(click.ParamType[Path | S3Address]):
    """A path, - or s3://BUCKET/KEY."""

    name = "place"

    def convert(self, value: object, param: click.Parameter | None, ctx: click.Context | None) -> Path | S3Address:
        """See click.ParamType."""
        del param, ctx
        if isinstance(value, Path | S3Address):
            return value
        text = str(value)
        if not is_s3(text):
            return Path(text)
        address = parse_address(text)
        if not address.key.rpartition("/")[2]:
            raise UsageError(f"{text} names a bucket or a folder, not a file in it")
        return address


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Which objects a run reads and writes; empty where all is on this disk."""

    settings: Settings
    source: S3Address | None = None
    objects: Mapping[Path, S3Address] = field(default_factory=dict)

    def shown(self, path: Path) -> str:
        """Give the name of what a path stands for."""
        return str(self.objects.get(path, path))

    def open(self) -> S3Files:
        """Open the way to the objects; the caller closes it."""
        from batchrunner.blobs.s3_files import S3Files

        return S3Files(self.settings)

    def require_source(self) -> None:
        """Raises: UsageError when the input is no object of its bucket."""
        if self.source is not None and self.mark(self.source) is None:
            raise UsageError(f"INPUT {self.source} is not there", hint="Check the bucket and the key.")

    def mark(self, address: S3Address) -> Fingerprint | None:
        """Look at an object without reading it, None if there is none."""
        with self.open() as files:
            seen = files.look(address)
        return Fingerprint(*seen) if seen is not None else None

    def fetch_source(self, target: Path) -> None:
        """Copy the input into a file, whole or not at all."""
        assert self.source is not None
        temporary = target.with_name(f".{target.name}.tmp")
        with telling_full(temporary), self.open() as files:
            files.fetch(self.source, temporary)
        temporary.replace(target)

    def check_free(self, path: Path, *, what: str) -> bool:
        """Tell whether the path stands for an object; refuse one that is there.

        Raises:
            OutputExists: it is not ours.
        """
        address = self.objects.get(path)
        if address is not None and self.mark(address) is not None:
            raise OutputExists(f"{what} {address} exists and was not written by this run")
        return address is not None

    def store(self, source: Path | None, address: S3Address) -> dict[str, Fingerprint]:
        """Make the object, empty without a source; gives what it looks like."""
        with self.open() as files:
            return {str(address): Fingerprint(*files.store(source, address))}

    def remove(self, address: S3Address) -> None:
        """Remove the object, if it is there."""
        with self.open() as files:
            files.remove(address)

    def is_as_written(self, name: str, mark: Fingerprint) -> bool:
        """Tell whether an object is still the one that a run wrote."""
        return self.mark(parse_address(name)) == mark
