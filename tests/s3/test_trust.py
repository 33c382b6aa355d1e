"""What an operator asks of a service: a certificate of its own, and encryption of whatever is kept there."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from batchrunner.blobs.s3 import S3Blobs
from batchrunner.blobs.s3_address import S3Address
from batchrunner.clock import SystemClock
from batchrunner.errors import BlobsUnavailable
from batchrunner.settings import MIB, Settings
from tests.s3.services import ACCESS_KEY, BUCKET, CREDENTIALS, SECRET_KEY, client_of, free_port, seaweedfs

CERTIFICATES = Path(__file__).parents[1] / "hostile" / "certificates"
CERTIFICATE = CERTIFICATES / "localhost.crt"
KEY_ID = "testing-key-of-ours"
CONTENT = os.urandom(18 * MIB)

pytestmark = [pytest.mark.real, pytest.mark.slow]


@pytest.fixture(autouse=True)
def _credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)


@pytest.fixture(scope="module")
def addresses(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """A SeaweedFS that encrypts; gives its plain address and the one behind a certificate that nobody signed."""
    folder = tmp_path_factory.mktemp("weed")
    who = {"name": "we", "actions": ["Admin", "Read", "Write", "List"]}
    credentials = [{"accessKey": ACCESS_KEY, "secretKey": SECRET_KEY}]
    keys = {"default_provider": "local", "providers": {"local": {"type": "local", "enableOnDemandCreate": True}}}
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [who | {"credentials": credentials}], "kms": keys}), encoding="utf-8")
    port = free_port()
    flags = (
        f"-s3.config={config}",
        f"-s3.port.https={port}",
        f"-s3.cert.file={CERTIFICATE}",
        f"-s3.key.file={CERTIFICATES / 'localhost.key'}",
    )
    with seaweedfs(folder, *flags, env={"WEED_S3_SSE_KEY": "what wraps the keys"}) as service:
        yield service.url, f"https://localhost:{port}"


@pytest.mark.parametrize(("wanted", "key_id"), [("AES256", None), ("aws:kms", KEY_ID)])
def test_all_that_is_kept_is_encrypted_as_asked_and_comes_back(
    addresses: tuple[str, str], wanted: str, key_id: str | None
) -> None:
    plain, encrypted = addresses
    settings = Settings(
        s3_endpoint_url=encrypted,
        s3_addressing="path",
        s3_ca_bundle=str(CERTIFICATE),
        s3_sse=wanted,
        s3_sse_kms_key_id=key_id,
    )
    prefix = wanted.replace(":", "-")
    blobs = S3Blobs(S3Address(BUCKET, prefix), settings, SystemClock())

    segment = blobs.create_segment("journal/a.seg")
    segment.append(b"records")
    segment.sync()
    for name, content in (("files/large", CONTENT), ("assets/unnamed", b"sound")):
        writer = blobs.writer(name)
        writer.write(content)
        writer.commit("named.mp3" if name == "assets/unnamed" else None)

    client = client_of(plain)
    found = {name: client.head_object(Bucket=BUCKET, Key=f"{prefix}/{name}") for name in blobs.list("")}
    assert set(found) == {"journal/a.seg", "files/large", "assets/named.mp3"}
    assert {(each["ServerSideEncryption"], each.get("SSEKMSKeyId")) for each in found.values()} == {(wanted, key_id)}
    assert blobs.read("journal/a.seg", 0, 100) == b"records"
    assert blobs.read("files/large", 0, len(CONTENT)) == CONTENT
    blobs.close()


def test_large_blob_that_is_named_late_stays_encrypted(addresses: tuple[str, str]) -> None:
    """It is copied inside the service, in parts; SeaweedFS copies none under a key of KMS."""
    settings = Settings(s3_endpoint_url=addresses[0], s3_addressing="path", s3_sse="AES256")
    blobs = S3Blobs(S3Address(BUCKET, "late"), settings, SystemClock())
    writer = blobs.writer("assets/unnamed")
    writer.write(CONTENT)

    writer.commit("named.mp3")

    found = client_of(addresses[0]).head_object(Bucket=BUCKET, Key="late/assets/named.mp3")
    assert (found["ServerSideEncryption"], found["ContentLength"]) == ("AES256", len(CONTENT))
    assert blobs.read("assets/named.mp3", 0, len(CONTENT)) == CONTENT
    blobs.close()


def test_certificate_that_is_not_trusted_is_told_with_what_to_set(addresses: tuple[str, str]) -> None:
    settings = Settings(s3_endpoint_url=addresses[1], s3_addressing="path")
    blobs = S3Blobs(S3Address(BUCKET, "untrusted"), settings, SystemClock())

    with pytest.raises(BlobsUnavailable, match="certificate") as caught:
        blobs.exists("a")

    assert "s3_ca_bundle" in caught.value.advice
    blobs.close()
