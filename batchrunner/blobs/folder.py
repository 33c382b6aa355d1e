"""The blobs of a data folder: in the folder itself, or in a bucket with what was fetched or adopted beside it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Protocol

from batchrunner.blobs.local import LocalBlobs
from batchrunner.durable import write_whole
from batchrunner.ports import Blobs, Clock, Rng
from batchrunner.settings import Settings

logger = logging.getLogger(__name__)


class FolderBlobs(Blobs, Protocol):
    """Blobs with a folder on this disk at their side."""

    def adopt(self, name: str, path: Path) -> None:
        """Make `name` a link to a user's own file, so that it is read in place; an earlier adoption is replaced.

        Raises:
            NotFound: no such file.
            NameTaken: the name is a blob of ours.
            OwnError: `path` is not absolute.
        """

    def path(self, name: str) -> Path:
        """Give the file of this disk that holds a blob, fetched if it lies elsewhere. Nobody may write to it."""


def open_blobs(folder: Path, settings: Settings, clock: Clock, rng: Rng) -> FolderBlobs:
    """Open the blobs of a folder where they began; those of a new one begin where the settings say.

    Every folder has a part of the bucket to itself, so that whoever holds the folder knows of all writers there.

    Raises:
        UsageError: the address is none, or boto3 is not installed.
        BlobsUnavailable: a new folder's bucket does not answer, or refuses.
    """
    local = LocalBlobs(folder / "blobs")
    note = folder / "blobs.address"
    if not note.exists():
        if settings.blobs is None:
            return local
        if any(local.list("")):
            logger.warning(
                "%s keeps its blobs on this disk, where they began; BATCHRUNNER_BLOBS is for new folders",
                folder,
                extra={"action": "blobs_stay"},
            )
            return local
    from batchrunner.blobs.s3_address import parse_address
    from batchrunner.blobs.s3_home import HomedBlobs

    if not note.exists():
        assert settings.blobs is not None
        address = parse_address(settings.blobs).below(rng.token_hex(8))
        made = HomedBlobs(address, settings, clock, local=local)
        # An address that refuses is not kept: nothing would be read that is paid for, and no other could be named.
        try:
            list(made.list(""))
        except BaseException:
            made.close()
            raise
        write_whole(note, f"{address}\n".encode())
        return made
    return HomedBlobs(parse_address(note.read_text().strip()), settings, clock, local=local)
