"""A tenant's view of an SQL store: which transaction answers which method, and that each names the tenant."""

from __future__ import annotations

from collections.abc import Collection

from batchrunner.holdings import (
    NO_LIMITS,
    KeyLimits,
    LiveShare,
    OpenCounts,
    Replay,
    Upload,
    UploadId,
    UploadPart,
)
from batchrunner.lifecycle import BatchEvent
from batchrunner.models import Batch, BatchId, Extent, File, FileId, NewBatch, Order, Shard
from batchrunner.store import (
    queries_batches,
    queries_blobs,
    queries_files,
    queries_idempotency,
    queries_jobs,
    queries_live,
    queries_uploads,
)
from batchrunner.store.rows import batch_of, extent_of, file_of, part_of, shard_of
from batchrunner.store.tenant_jobs import SqlTenantJobs


class SqlTenantScope(SqlTenantJobs):
    """TenantScope over the statements of this package."""

    def add_file(self, file: File, *, replay: Replay | None = None) -> File:
        """See TenantScope."""
        self._require_own(file.tenant, file.id)
        with self._store.writing() as conn:
            moment = self._store.moment()
            made = self._made(conn, replay, file.id, moment)
            if made != file.id:
                queries_blobs.abandon_blob(conn, file.blob)
                return file_of(queries_files.file_of_tenant(conn, self._tenant, FileId(made), moment))
            queries_files.add_file(conn, file)
            return file

    def file(self, file_id: FileId) -> File:
        """See TenantScope."""
        with self._store.reading() as conn:
            return file_of(queries_files.file_of_tenant(conn, self._tenant, file_id, self._store.moment()))

    def files(
        self, *, limit: int, after: FileId | None = None, purpose: str | None = None, newest_first: bool = True
    ) -> list[File]:
        """See TenantScope."""
        with self._store.reading() as conn:
            rows = queries_files.files_of_tenant(
                conn,
                self._tenant,
                self._store.moment(),
                limit=limit,
                after=after,
                purpose=purpose,
                newest_first=newest_first,
            )
            return [file_of(row) for row in rows]

    def note_lines(self, file_id: FileId, *, line_count: int, validation_blob: str | None) -> None:
        """See TenantScope."""
        with self._store.writing() as conn:
            queries_files.note_lines(
                conn,
                self._tenant,
                file_id,
                self._store.moment(),
                line_count=line_count,
                validation_blob=validation_blob,
            )

    def delete_file(self, file_id: FileId) -> None:
        """See TenantScope."""
        with self._store.writing() as conn:
            queries_files.delete_file(conn, self._tenant, file_id, self._store.moment())

    def add_upload(self, upload: Upload, *, replay: Replay | None = None) -> Upload:
        """See TenantScope."""
        self._require_own(upload.tenant, upload.id)
        with self._store.writing() as conn:
            moment = self._store.moment()
            made = self._made(conn, replay, upload.id, moment)
            if made != upload.id:
                return queries_uploads.upload_of_tenant(conn, self._tenant, UploadId(made), moment)
            queries_uploads.add_upload(conn, upload)
            return upload

    def upload(self, upload_id: UploadId) -> Upload:
        """See TenantScope."""
        with self._store.reading() as conn:
            return queries_uploads.upload_of_tenant(conn, self._tenant, upload_id, self._store.moment())

    def add_part(self, part: UploadPart, *, replay: Replay | None = None) -> UploadPart:
        """See TenantScope."""
        with self._store.writing() as conn:
            moment = self._store.moment()
            made = self._made(conn, replay, part.id, moment)
            if made != part.id:
                queries_blobs.abandon_blob(conn, part.blob)
                return part_of(queries_uploads.part_of_upload(conn, part.upload_id, made))
            queries_uploads.add_part(conn, self._tenant, part, moment)
            return part

    def parts(self, upload_id: UploadId) -> list[UploadPart]:
        """See TenantScope."""
        with self._store.reading() as conn:
            queries_uploads.upload_of_tenant(conn, self._tenant, upload_id, self._store.moment())
            return [part_of(row) for row in queries_uploads.parts_of_upload(conn, upload_id)]

    def complete_upload(self, upload_id: UploadId, file: File) -> Upload:
        """See TenantScope."""
        self._require_own(file.tenant, file.id)
        with self._store.writing() as conn:
            moment = self._store.moment()
            upload = queries_uploads.complete_upload(conn, self._tenant, upload_id, file, moment)
            if upload.file_id != file.id:
                queries_blobs.abandon_blob(conn, file.blob)
            return upload

    def cancel_upload(self, upload_id: UploadId) -> Upload:
        """See TenantScope."""
        with self._store.writing() as conn:
            return queries_uploads.cancel_upload(conn, self._tenant, upload_id, self._store.moment())

    def create_batch(
        self,
        new: NewBatch,
        *,
        replay: Replay | None = None,
        limits: KeyLimits = NO_LIMITS,
        file: File | None = None,
        family: Collection[BatchId] | None = None,
    ) -> Batch:
        """See TenantScope."""
        self._require_own(new.tenant, new.id)
        if file is not None:
            self._require_own(file.tenant, file.id)
        with self._store.writing() as conn:
            moment = self._store.moment()
            row = queries_batches.create_batch(
                conn, new, moment, replay=replay, limits=limits, file=file, family=family
            )
            batch = batch_of(row)
            if batch.id != new.id:
                for blob in (new.chosen_blob, file.blob if file is not None else None):
                    if blob is not None:
                        queries_blobs.abandon_blob(conn, blob)
            return batch

    def batch(self, batch_id: BatchId) -> Batch:
        """See TenantScope."""
        with self._store.reading() as conn:
            return self._told(conn, batch_id)

    def batches(self, *, limit: int, after: BatchId | None = None) -> list[Batch]:
        """See TenantScope."""
        with self._store.reading() as conn:
            rows = queries_batches.batches_of_tenant(conn, self._tenant, limit=limit, after=after)
            return queries_jobs.told(conn, [batch_of(row) for row in rows])

    def family(self, batch_id: BatchId) -> list[Batch]:
        """See TenantScope."""
        with self._store.reading() as conn:
            return [batch_of(row) for row in queries_batches.family_of_batch(conn, self._tenant, batch_id)]

    def delete_batch(self, batch_id: BatchId) -> None:
        """See TenantScope."""
        with self._store.writing() as conn:
            queries_batches.delete_batch(conn, self._tenant, batch_id, self._store.moment())

    def live(self, batch_id: BatchId) -> list[LiveShare]:
        """See TenantScope."""
        with self._store.reading() as conn:
            queries_batches.batch_of_tenant(conn, self._tenant, batch_id)
            return queries_live.live_of_batch(conn, batch_id, self._store.moment())

    def open_counts(self) -> OpenCounts:
        """See TenantScope."""
        with self._store.reading() as conn:
            return queries_batches.open_counts(conn, self._tenant)

    def begin_idempotent(self, route: str, key: str, fingerprint: str | None, *, lease_s: float) -> Replay | None:
        """See TenantScope."""
        with self._store.writing() as conn:
            return queries_idempotency.begin(
                conn, self._tenant, route, key, self._store.moment(), fingerprint=fingerprint, lease_s=lease_s
            )

    def renew_idempotent(self, route: str, key: str, *, lease_s: float) -> None:
        """See TenantScope."""
        with self._store.writing() as conn:
            queries_idempotency.renew(conn, self._tenant, route, key, self._store.moment(), lease_s=lease_s)

    def finish_idempotent(self, replay: Replay) -> None:
        """See TenantScope."""
        with self._store.writing() as conn:
            queries_idempotency.finish(conn, self._tenant, replay, self._store.moment())

    def drop_idempotent(self, route: str, key: str) -> None:
        """See TenantScope."""
        with self._store.writing() as conn:
            queries_idempotency.drop(conn, self._tenant, route, key)

    def send(self, batch_id: BatchId, event: BatchEvent) -> bool:
        """See TenantScope."""
        with self._store.writing() as conn:
            return queries_batches.send(conn, self._tenant, batch_id, event, self._store.moment())

    def pause(self, batch_id: BatchId, reason: str) -> None:
        """See TenantScope."""
        with self._store.writing() as conn:
            queries_batches.pause(conn, self._tenant, batch_id, reason, self._store.moment())

    def resume(self, batch_id: BatchId, *, only_if: Collection[str] = ()) -> None:
        """See TenantScope."""
        with self._store.writing() as conn:
            queries_batches.resume(conn, self._tenant, batch_id, only_if=only_if)

    def adjust(self, batch_id: BatchId, *, hold_at: int | None, order: Order) -> None:
        """See TenantScope."""
        with self._store.writing() as conn:
            queries_batches.adjust(conn, self._tenant, batch_id, hold_at=hold_at, order=order)

    def extents(self, batch_id: BatchId, *, after: int = 0, limit: int = 1000) -> list[Extent]:
        """See TenantScope."""
        with self._store.reading() as conn:
            queries_batches.batch_of_tenant(conn, self._tenant, batch_id)
            return [extent_of(row) for row in queries_batches.extents_after(conn, batch_id, after=after, limit=limit)]

    def shards(self, batch_id: BatchId) -> list[Shard]:
        """See TenantScope."""
        with self._store.reading() as conn:
            queries_batches.batch_of_tenant(conn, self._tenant, batch_id)
            return [shard_of(row) for row in queries_batches.shards_of_batch(conn, batch_id)]
