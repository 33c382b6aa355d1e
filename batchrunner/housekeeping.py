"""What time has ended leaves the disk: expired files, parts of dead uploads, journals of batches long over.

The Store decides what may go, and knows it as gone only after it is; so every step may run twice. Blocks.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass

from batchrunner import crash
from batchrunner.errors import BatchrunnerError
from batchrunner.ports import Blobs
from batchrunner.upkeep import Upkeep

logger = logging.getLogger(__name__)

_BLOBS_MAX = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Cleared:
    """What one sweep hid, ended and deleted, and how many names could not be deleted now."""

    files: int = 0
    uploads: int = 0
    journals: int = 0
    blobs: int = 0
    failed: int = 0


def clear(
    store: Upkeep,
    blobs: Blobs,
    *,
    in_use: Callable[[], Collection[str]],
    is_stopping: Callable[[], bool] = lambda: False,
) -> Cleared:
    """Hide what is past its time and delete what nothing reads any more; blobs that are `in_use` when it comes to them
    stay for another time. What cannot be deleted is logged and tried again by the next sweep.
    """
    expired = store.expire()
    failed: set[str] = set()
    journals = 0
    for batch_id in expired.journals:
        if is_stopping():
            break
        if _is_deleted(blobs, f"journal/{batch_id}/", failed):
            crash.point("clear.journal_deleted")
            store.forget_journals([batch_id])
            journals += 1
    return Cleared(
        files=expired.files,
        uploads=expired.uploads,
        journals=journals,
        blobs=_delete_freeable(store, blobs, in_use, is_stopping, failed),
        failed=len(failed),
    )


def drop_unfinished(blobs: Blobs, *, is_alone: bool = False, dead: Collection[str] = ()) -> None:
    """Remove what dead writers, among them the `dead` sessions, left half written, all of it for who `is_alone`; where
    that fails, a later sweep does it.
    """
    try:
        count = blobs.drop_begun() if is_alone else blobs.drop_unfinished(dead=dead)
    except BatchrunnerError as error:
        logger.warning("half written blobs stay for now: %s", error, extra={"action": "unfinished_left"})
        return
    if count:
        logger.info("%d half written blobs of dead writers deleted", count, extra={"action": "unfinished_deleted"})


def _delete_freeable(
    store: Upkeep,
    blobs: Blobs,
    in_use: Callable[[], Collection[str]],
    is_stopping: Callable[[], bool],
    failed: set[str],
) -> int:
    count = 0
    while not is_stopping() and (names := store.freeable_blobs(limit=_BLOBS_MAX, in_use={*in_use(), *failed})):
        deleted = [name for name in names if _is_deleted(blobs, name, failed)]
        crash.point("clear.blobs_deleted")
        store.forget_blobs(deleted)
        count += len(deleted)
    return count


def _is_deleted(blobs: Blobs, name: str, failed: set[str]) -> bool:
    """Delete a name, which stands for all below it if it ends in a slash; what resists keeps nothing else."""
    try:
        for each in blobs.list(name) if name.endswith("/") else [name]:
            blobs.delete(each)
    except BatchrunnerError as error:
        logger.warning("%s cannot be deleted now: %s", name, error, extra={"action": "blob_stays", "code": error.code})
        failed.add(name)
        return False
    return True
