"""What `doctor` tries out in a bucket: everything that a run or server will ask of it, on objects of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from batchrunner.blobs.s3_address import S3Address, parse_address
from batchrunner.clock import SystemClock, SystemRng
from batchrunner.errors import BatchrunnerError, NotFound, UsageError
from batchrunner.settings import Settings

if TYPE_CHECKING:
    from batchrunner.blobs.s3 import S3Blobs
    from batchrunner.cli.doctor import Findings

_CONTENT = b"0123456789" * 10
_NAME = "tried-out"


def examine_bucket(findings: Findings, settings: Settings, blobs: str) -> None:
    """List, write, read a range of, and delete an object below the address; the first failure ends it."""
    from batchrunner.blobs.s3 import S3Blobs

    try:
        address = parse_address(blobs)
        bucket = S3Blobs(address.below(f"doctor-{SystemRng().token_hex(8)}"), settings, SystemClock())
    except UsageError as error:
        findings.fail("bucket", error.message, error.advice)
        return
    try:
        _try_out(findings, bucket, address)
    finally:
        bucket.close()


def _try_out(findings: Findings, bucket: S3Blobs, address: S3Address) -> None:
    steps: tuple[tuple[str, str, Callable[[], None]], ...] = (
        ("list", "s3:ListBucket", lambda: _expect(list(bucket.list("")), [])),
        ("list uploads", "s3:ListBucketMultipartUploads", lambda: _expect(bucket.drop_begun(), 0)),
        ("put", "s3:PutObject", lambda: _put(bucket)),
        ("ranged get", "s3:GetObject", lambda: _expect(bucket.read(_NAME, 10, 20), _CONTENT[10:20])),
        ("delete", "s3:DeleteObject", lambda: _delete(bucket)),
    )
    for what, permission, step in steps:
        try:
            step()
        except BatchrunnerError as error:
            hint = error.advice if error.advice != error.hint else "Is the service well, and the address right?"
            findings.fail(f"bucket {what}", error.message, f"{hint} It needs {permission}.")
            return
    findings.ok("bucket", f"{address}: list, put, ranged get and delete work")


def _put(bucket: S3Blobs) -> None:
    segment = bucket.create_segment(_NAME)
    segment.append(_CONTENT)
    segment.sync()


def _delete(bucket: S3Blobs) -> None:
    bucket.delete(_NAME)
    _expect(bucket.exists(_NAME), False)


def _expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise NotFound(f"the service gave {found!r} where {wanted!r} was due")
