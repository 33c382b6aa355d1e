"""The parts of the Store and Blobs ports that serve no line: keys, and what is dropped when its time is over."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Protocol

from batchrunner.holdings import ApiKey, Expired, KeyId
from batchrunner.lifecycle import BatchStatus
from batchrunner.models import BatchId, TenantId


class KeyRing(Protocol):
    """Who may ask. Secrets never come here, only their digests."""

    def add_key(self, key: ApiKey) -> None:
        """Keep a key. May be repeated. Raises: NameTaken."""

    def find_key(self, digest: str) -> ApiKey | None:
        """Give the key with this digest if it is valid now: not revoked, not expired."""

    def keys(self, *, tenant: TenantId | None = None) -> list[ApiKey]:
        """All keys, valid or not, oldest first."""

    def has_keys(self) -> bool:
        """Tell whether a key was ever made: one that is revoked does not open the server again."""

    def revoke_key(self, key_id: KeyId, *, at: datetime) -> ApiKey:
        """End the key at that time, or earlier if it was to end earlier. Raises: NotFound."""


class Upkeep(Protocol):
    """The ways of blobs from their first byte to their last, and what ends by time."""

    def register_blob(self, name: str, *, owner: str) -> None:
        """Make a name known before its first byte; without a row that needs it within 24 h it is dropped. May be
        repeated by its owner.

        Raises:
            NameTaken: it is another owner's, or a row needs it already, or it was dropped.
        """

    def abandon_blob(self, name: str) -> None:
        """Say that a registered blob will not be needed; one that a row needs stays."""

    def check(self) -> None:
        """Read a little, to see whether the Store answers.

        Raises:
            SchemaNewer: it has another schema than this program's.
        """

    def unfinished_counts(self) -> dict[BatchStatus, int]:
        """Count the batches of all tenants that are not over, by status; none is left out."""

    def expire(self) -> Expired:
        """Hide files past their time, end uploads past theirs, drop answers of idempotent requests after 24 h and blobs
        that nothing came to need within 24 h, and the extents of batches that ended 24 h ago or were deleted.
        """

    def forget_journals(self, batch_ids: Collection[BatchId]) -> None:
        """Say that the journals of these batches, which `expire` named, are deleted."""

    def freeable_blobs(self, *, limit: int, in_use: Collection[str] = ()) -> list[str]:
        """Name blobs to delete: of hidden files that no unfinished batch reads, of uploads that are over, and dropped
        ones. A name that ends in a slash stands for all blobs below it. From then on nothing can begin to need them.
        Those `in_use` are left for another time. Named again and again until `forget_blobs`.
        """

    def forget_blobs(self, names: Collection[str]) -> None:
        """Say that these blobs, which `freeable_blobs` named, are deleted."""


class BlobUpkeep(Protocol):
    """The space of blobs, those that nobody finished, and downloads that pass the server by. Raises as Blobs does."""

    def free_bytes(self) -> int | None:
        """Tell the space left for writing, None where that has no meaning."""

    def keep_reserve(self, size_bytes: int) -> None:
        """Hold back some space, so that the Store can still write statuses on a full disk. May do nothing."""

    def release_reserve(self) -> None:
        """Give the reserve up; `keep_reserve` takes it again."""

    def drop_unfinished(self, *, dead: Collection[str] = ()) -> int:
        """Remove what dead processes left half written, and count it; where nobody can tell the dead from the living,
        blobs whose names bear a word of `dead`, and those begun more than a day ago. For sweepers; reads every name.
        """

    def drop_begun(self) -> int:
        """Remove whatever is half written, and count it: only for who knows that nobody is at work."""

    def download_url(self, name: str, *, expires_s: float, filename: str) -> str | None:
        """Give an address at which anybody can fetch the blob for a while; None where there is no such thing."""
