"""Jobs that are there, and a worker's part in them, made by hand."""

from __future__ import annotations

from zlib import crc32

import orjson

from batchrunner.additions import NewAddition
from batchrunner.frames import header, seed
from batchrunner.jobs import InferenceType, Job, NewJob
from batchrunner.models import (
    CLUB,
    LOCAL_TENANT,
    NO_USAGE,
    BatchId,
    NewBatch,
    NewExtent,
    Progress,
    RecordKind,
    SegmentRef,
    SessionId,
    ShardCut,
    TaskKind,
    TenantId,
)
from batchrunner.results import ResultLines
from tests.api.serving import Served

WORKER = SessionId("worker")


def jobs_made(served: Served, *, tenant: TenantId = LOCAL_TENANT, count: int = 1) -> list[Job]:
    """Let jobs join the tenant's intake."""
    content = b'{"custom_id":"a","method":"POST","url":"/v1/images/generations","body":{"prompt":"x"}}\n' * count
    name = f"jobs/{served.parts.rng.token_hex(8)}"
    served.parts.store.register_blob(name, owner="test")
    writer = served.parts.blobs.writer(name)
    writer.write(content)
    writer.commit()
    intake = NewBatch(
        id=BatchId(f"batch_{served.parts.rng.token_hex(8)}"),
        tenant=tenant,
        dialect=CLUB,
        endpoint=None,
        input_file_id=None,
        source="",
        completion_window=None,
        deadline_at=None,
        is_open=True,
        is_intake=True,
    )
    cut = ShardCut(0, len(content), 1, 0, count, crc32(content))
    new = NewJob(url="/v1/images/generations", inference_type=InferenceType.IMAGE, model=None)
    addition = NewAddition(first_line=1, source=name, id_hashes=b"", shards=(cut,), model=None)
    return served.parts.store.scope(tenant).add_jobs(intake, addition, [new] * count)


def answer(served: Served, jobs: list[Job], bodies: list[object], kind: RecordKind = RecordKind.SUCCEEDED) -> None:
    """Do what a worker does with the shard of these jobs."""
    store = served.parts.store
    store.open_session(WORKER, host="here", pid=1)
    claim = store.claim(WORKER, lease_s=15.0, kinds=(TaskKind.SHARD,))
    assert claim is not None
    segment = SegmentRef(
        batch_id=claim.batch.id, task_id=claim.ref.task_id, epoch=claim.ref.epoch, session=WORKER, number=1
    )
    content = b""
    for job, body in zip(jobs, bodies, strict=True):
        line = ResultLines(job.batch_id).answered(job.line_number, "a", 200, None, orjson.dumps(body))
        content += header(seed(segment), job.line_number, kind, NO_USAGE, line) + line
    appender = served.parts.blobs.create_segment(segment.blob)
    appender.append(content)
    appender.sync()
    appender.close()
    is_good = kind is RecordKind.SUCCEEDED
    extent = NewExtent(
        session=WORKER,
        segment=1,
        byte_start=0,
        byte_end=len(content),
        succeeded_count=len(jobs) if is_good else 0,
        failed_count=0 if is_good else len(jobs),
        usage=NO_USAGE,
        lines=tuple((job.line_number, kind) for job in jobs),
    )
    store.settle(claim.ref, Progress(extents=(extent,)))
