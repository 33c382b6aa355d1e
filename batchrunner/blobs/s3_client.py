"""Requests to an S3 service: the client that settings describe, which failures are tried again, and what they mean in
our words. boto3 is imported when the first client is made.
"""

from __future__ import annotations

import base64
import hashlib
import logging
import ssl
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from batchrunner.errors import BatchrunnerError, BlobsUnavailable, DiskFull, NotFound, UsageError
from batchrunner.settings import Settings

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client
    from types_boto3_s3.type_defs import (
        CopySourceTypeDef,
        HeadObjectOutputTypeDef,
        ListMultipartUploadsOutputTypeDef,
        ListObjectsV2OutputTypeDef,
        MultipartUploadTypeDef,
    )

logger = logging.getLogger(__name__)

_T = TypeVar("_T")

_TRIES = 5
_FIRST_WAIT_S, _WAIT_MAX_S = 0.2, 5.0
# Source: the error codes of Amazon S3, and those of MinIO for a full disk.
_MISSING = frozenset({"NoSuchKey", "NoSuchUpload", "404", "NotFound"})
_FULL = frozenset({"XMinioStorageFull", "InsufficientStorage", "QuotaExceeded", "StorageFull", "507"})
_PASSING = frozenset({"RequestTimeout", "BadDigest", "XAmzContentSHA256Mismatch", "SlowDown", "OperationAborted"})
_CREDENTIALS_HINT = (
    "Give boto3 credentials that may list, read, write and delete there: AWS_ACCESS_KEY_ID and"
    " AWS_SECRET_ACCESS_KEY, a profile, or a role. `batchrunner doctor` tries them out."
)


def digest(content: bytes) -> str:
    """Give what Content-MD5 says of a body, which every service compares with what it got."""
    return base64.b64encode(hashlib.md5(content, usedforsecurity=False).digest()).decode()


class S3Requests:
    """One process's way to a bucket: a client whose requests are bounded in time and tried again. Any thread may
    call.
    """

    def __init__(self, settings: Settings, bucket: str, *, tries: int = _TRIES) -> None:
        self.bucket = bucket
        self.client = _make_client(settings)
        self._tries = tries
        # What every request that makes an object has to say.
        self.encryption: dict[str, Any] = {}
        if settings.s3_sse is not None:
            self.encryption["ServerSideEncryption"] = settings.s3_sse
        if settings.s3_sse_kms_key_id is not None:
            self.encryption["SSEKMSKeyId"] = settings.s3_sse_kms_key_id

    def call(self, name: str, function: Callable[[], _T]) -> _T:
        """Do a request about `name`, again while the service is down, slow or busy: full jitter, a few times.

        Raises:
            NotFound, DiskFull, BlobsUnavailable: as the answer means.
        """
        from botocore.exceptions import BotoCoreError, ClientError, SSLError

        attempts = Retrying(
            stop=stop_after_attempt(self._tries),
            wait=wait_random_exponential(multiplier=_FIRST_WAIT_S, max=_WAIT_MAX_S),
            retry=retry_if_exception(_is_passing),
            before_sleep=_note,
            reraise=True,
        )
        try:
            return attempts(function)
        except ClientError as error:
            _translate(error, f"s3://{self.bucket}/{name}")
        except BotoCoreError as error:
            hint = None if _is_passing(error) else _CREDENTIALS_HINT
            if isinstance(error, SSLError):
                hint = "s3_ca_bundle or AWS_CA_BUNDLE names the file with the certificates to trust."
            raise BlobsUnavailable(f"s3://{self.bucket}/{name}: {error}", hint=hint) from error

    def head(self, key: str) -> HeadObjectOutputTypeDef | None:
        """Look at an object, None if there is none."""
        try:
            return self.call(key, lambda: self.client.head_object(Bucket=self.bucket, Key=key))
        except NotFound:
            return None

    def size_bytes(self, key: str) -> int | None:
        """Give an object's size, None without one."""
        found = self.head(key)
        return None if found is None else found["ContentLength"]

    def read(self, key: str, start: int, end: int) -> bytes:
        """Read bytes [start, end); fewer come back only where the object ends."""
        return self.call(key, lambda: self._read_once(key, start, end)) if end > start else b""

    def _read_once(self, key: str, start: int, end: int) -> bytes:
        from botocore.exceptions import ClientError, IncompleteReadError

        try:
            answer = self.client.get_object(Bucket=self.bucket, Key=key, Range=f"bytes={start}-{end - 1}")
        except ClientError as error:
            if status_of(error) == 416:
                return b""
            raise
        with answer["Body"] as body:
            content: bytes = body.read()
        if len(content) != answer["ContentLength"] or len(content) > end - start:
            raise IncompleteReadError(actual_bytes=len(content), expected_bytes=answer["ContentLength"])
        return content

    def keys(self, prefix: str) -> list[str]:
        """Give all keys that begin so, in order: services over file systems do not keep to it."""
        found: set[str] = set()
        token: str | None = ""
        while token is not None:
            page = self.call(prefix, partial(self._keys_page, prefix, token))
            found.update(each["Key"] for each in page.get("Contents", []))
            token = page["NextContinuationToken"] if page.get("IsTruncated") else None
        return sorted(found)

    def _keys_page(self, prefix: str, token: str) -> ListObjectsV2OutputTypeDef:
        more: dict[str, Any] = {"ContinuationToken": token} if token else {}
        return self.client.list_objects_v2(Bucket=self.bucket, Prefix=prefix, **more)

    def delete(self, key: str) -> None:
        """Remove an object; a missing one is no error."""
        try:
            self.call(key, lambda: self.client.delete_object(Bucket=self.bucket, Key=key))
        except NotFound:
            return

    def uploads(self, prefix: str) -> Iterator[MultipartUploadTypeDef]:
        """Give the unfinished uploads of keys that begin so."""
        markers: dict[str, Any] = {}
        while True:
            page = self.call(prefix, partial(self._uploads_page, prefix, markers))
            yield from (each for each in page.get("Uploads", []) if each["Key"].startswith(prefix))
            # SeaweedFS goes by ids, and gives no key to go on from.
            given = {"KeyMarker": page.get("NextKeyMarker"), "UploadIdMarker": page.get("NextUploadIdMarker")}
            markers = {name: value for name, value in given.items() if value}
            if not page.get("IsTruncated") or not markers:
                return

    def _uploads_page(self, prefix: str, markers: dict[str, Any]) -> ListMultipartUploadsOutputTypeDef:
        return self.client.list_multipart_uploads(Bucket=self.bucket, Prefix=prefix, **markers)

    def drop_upload(self, key: str, upload_id: str) -> None:
        """Have the parts of an upload removed; one that has ended is no error."""
        try:
            self.call(key, lambda: self.client.abort_multipart_upload(Bucket=self.bucket, Key=key, UploadId=upload_id))
        except NotFound:
            logger.info("the upload of %s had ended", key, extra={"action": "upload_gone"})

    def drop_uploads(self, key: str) -> None:
        """Drop what writers of this one key left that were killed."""
        for each in list(self.uploads(key)):
            if each["Key"] == key:
                self.drop_upload(key, each["UploadId"])

    def put(self, key: str, content: bytes) -> None:
        """Make an object in one request; repeated, it is the same object."""
        check = digest(content)
        self.call(
            key,
            lambda: self.client.put_object(
                Bucket=self.bucket, Key=key, Body=content, ContentMD5=check, **self.encryption
            ),
        )

    def begin_upload(self, key: str) -> str:
        """Begin an upload in parts, tried once: a second one would be another upload. Gives its id."""
        return self.client.create_multipart_upload(Bucket=self.bucket, Key=key, **self.encryption)["UploadId"]

    def move(self, key: str, target: str) -> None:
        """Give an object another key, inside the service."""
        from boto3.s3.transfer import TransferConfig

        source: CopySourceTypeDef = {"Bucket": self.bucket, "Key": key}
        config = TransferConfig(use_threads=False)
        self.call(
            key, lambda: self.client.copy(source, self.bucket, target, ExtraArgs=self.encryption or None, Config=config)
        )
        self.call(key, lambda: self.client.delete_object(Bucket=self.bucket, Key=key))

    def close(self) -> None:
        """Let go of the connections."""
        self.client.close()


def _make_client(settings: Settings) -> S3Client:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise UsageError(
            "s3:// needs boto3, which is not installed", hint="pip install 'batchrunner[s3]' brings it."
        ) from error
    if settings.s3_ca_bundle is not None:
        _require_certificates(settings.s3_ca_bundle)
    # It tells where it found credentials each time, as news.
    logging.getLogger("botocore.credentials").setLevel(logging.WARNING)
    addressing: Any = {"addressing_style": settings.s3_addressing}
    config = Config(
        connect_timeout=min(settings.connect_timeout_s, settings.s3_timeout_s),
        read_timeout=settings.s3_timeout_s,
        # Tries are counted in one place, so that their time is bounded.
        retries={"total_max_attempts": 1},
        max_pool_connections=settings.s3_threads + 2,
        # Without this, addresses for downloads would be signed as few services still understand.
        signature_version="s3v4",
        s3=addressing,
        # Checksums in trailers are unknown to many services; Content-MD5 is sent instead, which all of them check.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        return boto3.client(
            "s3",
            endpoint_url=settings.s3_endpoint_url,
            region_name=settings.s3_region,
            verify=settings.s3_ca_bundle,
            config=config,
        )
    except (BotoCoreError, ValueError) as error:
        raise UsageError(f"no S3 client can be made: {error}", hint=_CREDENTIALS_HINT) from error


def _require_certificates(path: str) -> None:
    """Read a bundle once: botocore takes a missing one for an outage that may pass."""
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        raise UsageError(f"cannot read s3_ca_bundle {path}: {error.strerror or error}") from error


def _note(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome is not None else None
    logger.info("S3 is asked again: %s", error, extra={"action": "s3_retried"})


def _is_passing(error: BaseException) -> bool:
    """Whether the same request may succeed in a moment."""
    from botocore.exceptions import ClientError, ConnectionError, HTTPClientError, IncompleteReadError  # noqa: A004

    if isinstance(error, HTTPClientError | ConnectionError | IncompleteReadError):
        return True
    if not isinstance(error, ClientError):
        return False
    status, code = status_of(error), code_of(error)
    return (status >= 500 and status not in (501, 507) and code not in _FULL) or status == 429 or code in _PASSING


def status_of(error: BaseException) -> int:
    """Give the HTTP status of an answer, 0 without one."""
    answer = getattr(error, "response", None) or {}
    return int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def code_of(error: BaseException) -> str:
    """Give the code of an answer, empty without one."""
    answer = getattr(error, "response", None) or {}
    return str(answer.get("Error", {}).get("Code", ""))


def is_denied(error: BatchrunnerError) -> bool:
    """Whether the credentials are known, and a permission is missing. An answer to HEAD has no words."""
    cause = error.__cause__
    return cause is not None and code_of(cause) in ("AccessDenied", "403")


def is_unknown_outcome(error: BatchrunnerError) -> bool:
    """Whether the request that failed may have been done all the same."""
    cause = error.__cause__
    return cause is not None and (status_of(cause) in (0, 404) or status_of(cause) >= 500)


def _translate(error: Exception, place: str) -> NoReturn:
    """Raise our error for an answer of the service."""
    status, code = status_of(error), code_of(error)
    reason = f"{place}: {code or status}: {str(error).rpartition(': ')[2]}"
    if code in _MISSING:
        raise NotFound(f"{place} does not exist") from error
    if status == 507 or code in _FULL:
        raise DiskFull(reason, hint="Make space in the bucket; the run goes on by itself.") from error
    if code == "NoSuchBucket":
        raise BlobsUnavailable(reason, hint="Make the bucket, or correct its name.") from error
    if status in (401, 403):
        raise BlobsUnavailable(reason, hint=_CREDENTIALS_HINT) from error
    raise BlobsUnavailable(reason) from error
