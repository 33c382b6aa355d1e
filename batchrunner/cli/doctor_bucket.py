"""What `doctor` tries out in a bucket: everything that a run or server will ask of it, on objects of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from batchrunner.blobs.s3_address import S3Address, parse_address
from batchrunner.clock import SystemRng
from batchrunner.errors import BatchrunnerError, BlobsUnavailable, NotFound, UsageError
from batchrunner.settings import Settings

if TYPE_CHECKING:
    from batchrunner.blobs.s3_client import S3Requests
    from batchrunner.cli.doctor import Findings

_CONTENT = b"0123456789" * 10
# An answer is waited for: whoever asks wants to know now.
_TRIES = 2


def examine_bucket(findings: Findings, settings: Settings, blobs: str) -> None:
    """List, write, read a range of, and delete an object below the address; tells each permission that is missing."""
    from batchrunner.blobs.s3_client import S3Requests

    try:
        address = parse_address(blobs)
        requests = S3Requests(settings, address.bucket, tries=_TRIES)
    except UsageError as error:
        findings.fail("bucket", error.message, error.advice)
        return
    try:
        if _try_out(findings, requests, address.below(f"doctor-{SystemRng().token_hex(8)}")):
            findings.ok("bucket", f"{address}: list, put, ranged get and delete work")
    finally:
        requests.close()


def _try_out(findings: Findings, requests: S3Requests, place: S3Address) -> bool:
    """Do all that it needs and tell what fails; a service that fails at once for another reason is asked no more."""
    from batchrunner.blobs.s3_client import is_denied

    key = place.below("tried-out").key
    steps: tuple[tuple[str, str, Callable[[], None]], ...] = (
        ("list", "s3:ListBucket", lambda: _expect(requests.keys(place.key), [])),
        ("list uploads", "s3:ListBucketMultipartUploads", lambda: _expect(list(requests.uploads(place.key)), [])),
        ("put", "s3:PutObject", lambda: requests.put(key, _CONTENT)),
        ("ranged get", "s3:GetObject", lambda: _expect(requests.read(key, 10, 20), _CONTENT[10:20])),
        ("abort upload", "s3:AbortMultipartUpload", lambda: _abort(requests, key)),
        ("delete", "s3:DeleteObject", lambda: requests.delete(key)),
    )
    failed = 0
    for what, permission, step in steps:
        try:
            step()
        except BatchrunnerError as error:
            if failed and isinstance(error, NotFound):
                # What could not be put cannot be read.
                continue
            failed += 1
            hint = error.advice if error.advice != error.hint else "Is the service well, and the address right?"
            is_missing = is_denied(error)
            findings.fail(f"bucket {what}", error.message, f"{hint} It needs {permission}." if is_missing else hint)
            if step is steps[0][-1] and not is_missing:
                break
    return not failed


def _abort(requests: S3Requests, key: str) -> None:
    requests.drop_upload(key, requests.call(key, lambda: requests.begin_upload(key)))


def _expect(found: object, wanted: object) -> None:
    if found != wanted:
        raise BlobsUnavailable(f"the service gave {found!r} where {wanted!r} was due")
