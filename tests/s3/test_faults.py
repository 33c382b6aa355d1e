"""What an S3 service may do to a blob on its way, and that nothing of it is left."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from batchrunner.blobs import s3_client
from batchrunner.blobs.s3 import S3Blobs
from batchrunner.blobs.s3_address import S3Address
from batchrunner.blobs.s3_files import S3Files
from batchrunner.clock import SystemClock
from batchrunner.errors import BatchrunnerError, BlobsUnavailable, DiskFull
from batchrunner.settings import MIB, Settings
from tests.cli.calling import ENVIRONMENT, Called, call, simulator
from tests.s3.proxy import Fault, Proxy, Request, proxied
from tests.s3.services import BUCKET, Service, client_of

CONTENT = os.urandom(18 * MIB)
CHUNK = 256 * 1024
LINE = b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":{"model":"m","messages":[]}}\n'


@pytest.fixture
def proxy(s3_service: Callable[[str], Service]) -> Iterator[Proxy]:
    with proxied(s3_service("moto").url) as made:
        yield made


@pytest.fixture
def settings(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Tries follow each other at once."""
    monkeypatch.setattr(s3_client, "_WAIT_MAX_S", 0.01)
    return Settings(s3_endpoint_url=proxy.url, s3_addressing="path", s3_timeout_s=5.0)


@pytest.fixture
def blobs(settings: Settings, request: pytest.FixtureRequest) -> Iterator[S3Blobs]:
    prefix = f"faults/{abs(hash(request.node.nodeid))}"
    made = S3Blobs(S3Address(BUCKET, prefix), settings, SystemClock())
    yield made
    made.close()


def write(blobs: S3Blobs, name: str, content: bytes = CONTENT) -> None:
    writer = blobs.writer(name)
    for start in range(0, len(content), CHUNK):
        writer.write(content[start : start + CHUNK])
    writer.commit()


def spoil(kind: str, fault: Fault, *, times: int = 1) -> Callable[[Request], Fault | None]:
    """Spoil the first requests of a kind."""
    left = [times]

    def rule(request: Request) -> Fault | None:
        if request.kind != kind or not left[0]:
            return None
        left[0] -= 1
        return fault

    return rule


def uploads_left(service_url: str) -> list[str]:
    return [each["Key"] for each in client_of(service_url).list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])]


@pytest.mark.slow
@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.CUT, Fault.LOST])
@pytest.mark.parametrize("kind", ["CreateUpload", "UploadPart", "Complete"])
def test_one_failure_in_an_upload_leaves_the_blob_whole_and_no_part_behind(
    blobs: S3Blobs, proxy: Proxy, kind: str, fault: Fault
) -> None:
    proxy.rule = spoil(kind, fault)

    write(blobs, "files/a")

    assert blobs.read("files/a", 0, len(CONTENT)) == CONTENT
    assert uploads_left(proxy.url) == []


@pytest.mark.parametrize("fault", [Fault.BUSY, Fault.CUT])
def test_segment_and_read_outlive_a_failure(blobs: S3Blobs, proxy: Proxy, fault: Fault) -> None:
    proxy.rule = spoil("PUT", fault, times=3)
    segment = blobs.create_segment("journal/a.seg")
    segment.append(b"records")
    segment.sync()

    proxy.rule = spoil("GET", fault, times=3)

    assert blobs.read("journal/a.seg", 0, 100) == b"records"


def test_segment_whose_sync_failed_is_written_again_with_the_same_bytes(blobs: S3Blobs, proxy: Proxy) -> None:
    proxy.rule = lambda _request: Fault.BUSY if _request.kind == "PUT" else None
    segment = blobs.create_segment("journal/a.seg")
    segment.append(b"records")
    with pytest.raises(BlobsUnavailable):
        segment.sync()

    proxy.rule = lambda _request: None
    segment.sync()

    assert blobs.read("journal/a.seg", 0, 100) == b"records"


def test_write_that_failed_took_nothing_and_goes_on_when_the_service_is_back(blobs: S3Blobs, proxy: Proxy) -> None:
    writer = blobs.writer("files/a")
    refused = 0
    proxy.rule = lambda request: Fault.BUSY if request.kind == "UploadPart" else None

    content = CONTENT * 2
    for start in range(0, len(content), CHUNK):
        try:
            writer.write(content[start : start + CHUNK])
        except BlobsUnavailable:
            refused += 1
            proxy.rule = lambda _request: None
            writer.write(content[start : start + CHUNK])
    writer.commit()

    assert refused >= 1
    assert blobs.read("files/a", 0, 2 * len(CONTENT)) == content
    assert uploads_left(proxy.url) == []


def test_aborted_upload_leaves_no_part(blobs: S3Blobs, proxy: Proxy) -> None:
    writer = blobs.writer("files/a")
    for start in range(0, len(CONTENT), CHUNK):
        writer.write(CONTENT[start : start + CHUNK])
    assert uploads_left(proxy.url) != []

    writer.abort()

    assert uploads_left(proxy.url) == []
    assert not blobs.exists("files/a")


def test_upload_that_never_joins_fails_and_its_abort_leaves_nothing(blobs: S3Blobs, proxy: Proxy) -> None:
    proxy.rule = lambda request: Fault.BUSY if request.kind == "Complete" else None
    writer = blobs.writer("files/a")
    writer.write(CONTENT)
    with pytest.raises(BlobsUnavailable):
        writer.commit()

    writer.abort()

    assert uploads_left(proxy.url) == []
    assert not blobs.exists("files/a")


def test_large_blob_whose_last_part_is_known_late_has_that_name_alone(blobs: S3Blobs) -> None:
    writer = blobs.writer("assets/b/line_7")
    writer.write(CONTENT)
    writer.write(b"more")

    writer.commit("asset_7.mp3")

    assert list(blobs.list("")) == ["assets/b/asset_7.mp3"]
    assert blobs.read("assets/b/asset_7.mp3", len(CONTENT) - 1, len(CONTENT) + 10) == CONTENT[-1:] + b"more"


def test_full_bucket_is_a_full_disk(blobs: S3Blobs, proxy: Proxy) -> None:
    proxy.rule = lambda request: Fault.FULL if request.method in ("PUT", "POST") else None
    segment = blobs.create_segment("journal/a.seg")
    segment.append(b"records")
    with pytest.raises(DiskFull):
        segment.sync()
    writer = blobs.writer("files/a")
    writer.write(b"small")
    with pytest.raises(DiskFull):
        writer.commit()

    proxy.rule = lambda _request: None
    segment.sync()
    writer.commit()

    assert blobs.read("files/a", 0, 10) == b"small"


@pytest.mark.real
def test_what_a_killed_writer_left_is_dropped(s3_service: Callable[[str], Service]) -> None:
    url = s3_service("seaweedfs").url
    blobs = S3Blobs(S3Address(BUCKET, "killed"), Settings(s3_endpoint_url=url, s3_addressing="path"), SystemClock())
    client = client_of(url)
    for name in ("a", "a", "b"):
        upload = client.create_multipart_upload(Bucket=BUCKET, Key=f"killed/{name}")
        client.upload_part(Bucket=BUCKET, Key=f"killed/{name}", UploadId=upload["UploadId"], PartNumber=1, Body=CONTENT)
    other = client.create_multipart_upload(Bucket=BUCKET, Key="others/a")

    young = blobs.drop_unfinished()
    of_the_dead = blobs.drop_unfinished(dead=["killed/b"])
    dropped = blobs.drop_begun()

    assert (young, of_the_dead, dropped) == (0, 1, 2)
    assert uploads_left(url) == ["others/a"]
    client.abort_multipart_upload(Bucket=BUCKET, Key="others/a", UploadId=other["UploadId"])
    blobs.close()


def test_list_of_many_pages_is_whole_and_in_order(
    blobs: S3Blobs, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    names = [f"files/{number}" for number in range(5)]
    for name in reversed(names):
        write(blobs, name, b"x")
    proxy.counts.clear()

    assert list(blobs.list("files/")) == names
    assert proxy.counts["List"] == 3


@pytest.mark.real
def test_unfinished_uploads_of_many_pages_are_all_dropped(s3_service: Callable[[str], Service]) -> None:
    url = s3_service("seaweedfs").url
    blobs = S3Blobs(S3Address(BUCKET, "pages"), Settings(s3_endpoint_url=url, s3_addressing="path"), SystemClock())
    pages: list[str] = []

    def two_each(params: dict[str, object], **_: object) -> None:
        pages.append(str(params.get("KeyMarker")))
        params["MaxUploads"] = 2

    blobs._client.meta.events.register("provide-client-params.s3.ListMultipartUploads", two_each)
    for name in ("a", "b", "b", "b", "c"):
        client_of(url).create_multipart_upload(Bucket=BUCKET, Key=f"pages/{name}")

    dropped = blobs.drop_begun()

    assert dropped == 5
    assert len(pages) >= 3
    assert not [each for each in uploads_left(url) if each.startswith("pages/")]
    blobs.close()


def test_service_that_is_gone_is_no_bug_and_no_missing_blob(blobs: S3Blobs, proxy: Proxy) -> None:
    proxy.rule = lambda _request: Fault.CUT

    for ask in (lambda: blobs.exists("a"), lambda: blobs.read("a", 0, 1), lambda: list(blobs.list(""))):
        with pytest.raises(BatchrunnerError) as caught:
            ask()
        assert type(caught.value) is BlobsUnavailable


def test_file_takes_the_place_of_an_object_and_is_fetched_again(
    settings: Settings, tmp_path: Path, proxy: Proxy
) -> None:
    (tmp_path / "a").write_bytes(CONTENT)
    (tmp_path / "b").write_bytes(CONTENT[::-1])
    address = S3Address(BUCKET, "own/out.jsonl")
    with S3Files(settings) as files:
        files.store(tmp_path / "a", address)
        proxy.rule = spoil("Complete", Fault.LOST)
        seen = files.store(tmp_path / "b", address)

        assert files.fetch(address, tmp_path / "c") == seen
        files.remove(address)
        assert files.look(address) is None
    assert (tmp_path / "c").read_bytes() == CONTENT[::-1]


def test_download_url_gives_the_bytes_to_anybody(blobs: S3Blobs) -> None:
    import urllib.request

    write(blobs, "files/a", b"content")

    url = blobs.download_url("files/a", expires_s=60, filename="output.jsonl")

    assert url is not None
    with urllib.request.urlopen(url) as answer:
        assert answer.read() == b"content"
        assert answer.headers["Content-Disposition"] == 'attachment; filename="output.jsonl"'


def doctor(*arguments: str) -> Called:
    return call("doctor", *arguments, "--json")


@pytest.fixture
def commands(settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Have commands of this process ask the service, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    assert settings.s3_endpoint_url is not None
    monkeypatch.setenv("BATCHRUNNER_S3_ENDPOINT_URL", settings.s3_endpoint_url)
    monkeypatch.setenv("BATCHRUNNER_S3_ADDRESSING", "path")
    return tmp_path


@pytest.mark.slow
@pytest.mark.usefixtures("commands")
def test_doctor_tries_out_the_bucket_and_leaves_nothing_there(proxy: Proxy) -> None:
    good = doctor("--blobs", f"s3://{BUCKET}/tried")
    no_bucket = doctor("--blobs", "s3://no-such-bucket/tried")
    no_address = doctor("--blobs", "s3:/batches")
    proxy.rule = lambda request: Fault.BUSY if request.method == "PUT" else None
    no_put = doctor("--blobs", f"s3://{BUCKET}/tried")

    assert (good.code, failed(good)) == (0, {})
    assert no_bucket.code == no_address.code == no_put.code == 1
    assert "Make the bucket" in failed(no_bucket)["bucket list"]
    assert "bucket" in failed(no_address)
    assert list(failed(no_put)) == ["bucket put"]
    assert "It needs" not in failed(no_put)["bucket put"]
    assert "Contents" not in client_of(proxy.url).list_objects_v2(Bucket=BUCKET, Prefix="tried/")


@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize(
    ("kind", "step", "permission"),
    [
        ("List", "list", "s3:ListBucket"),
        ("ListUploads", "list uploads", "s3:ListBucketMultipartUploads"),
        ("PUT", "put", "s3:PutObject"),
        ("GET", "ranged get", "s3:GetObject"),
        ("Abort", "abort upload", "s3:AbortMultipartUpload"),
        ("DELETE", "delete", "s3:DeleteObject"),
    ],
)
def test_doctor_names_the_permission_that_is_missing_and_no_other(
    proxy: Proxy, kind: str, step: str, permission: str
) -> None:
    proxy.rule = lambda request: Fault.DENIED if request.kind == kind else None

    found = failed(doctor("--blobs", f"s3://{BUCKET}/denied"))

    assert list(found) == [f"bucket {step}"]
    assert found[f"bucket {step}"].endswith(f"It needs {permission}.")


@pytest.mark.slow
def test_new_run_whose_bucket_refuses_sends_nothing_and_may_be_given_another(
    commands: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (commands / "in.jsonl").write_bytes(LINE)
    command = ("run", "in.jsonl", "-o", "out.jsonl", "-u")
    state = commands / "out.jsonl.run"
    with simulator() as upstream:
        monkeypatch.setenv("BATCHRUNNER_BLOBS", "s3://no-such-bucket/runs")
        refused = call(*command, upstream)
        was_begun = (state / "state.db").exists()
        monkeypatch.setenv("BATCHRUNNER_BLOBS", f"s3://{BUCKET}/runs")
        ended = call(*command, upstream)

    assert (refused.code, was_begun, ended.code) == (1, False, 0), refused.err + ended.err
    assert "Make the bucket" in refused.err
    assert (state / "blobs.address").read_text().startswith(f"s3://{BUCKET}/runs/")


@pytest.mark.slow
@pytest.mark.parametrize(("blobs", "is_imported"), [(None, False), (f"s3://{BUCKET}/lazy", True)])
def test_boto3_is_imported_for_a_bucket_only(commands: Path, blobs: str | None, *, is_imported: bool) -> None:
    code = f"""
import sys
from pathlib import Path
import batchrunner.cli.run, batchrunner.cli.running, batchrunner.cli.serve, batchrunner.hosting, batchrunner.serving
from batchrunner.app import open_adapters
from batchrunner.cli.configuring import load_settings
open_adapters(Path("state"), load_settings({{"blobs": {blobs!r}}})[0])
sys.exit(10 + ("boto3" in sys.modules))
"""

    ran = subprocess.run([sys.executable, "-c", code], cwd=commands, env=ENVIRONMENT | os.environ, check=False)

    assert ran.returncode == 10 + is_imported


@pytest.mark.usefixtures("commands")
@pytest.mark.parametrize("content", [None, b"no certificate"])
def test_certificates_that_cannot_be_read_are_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    bundle = tmp_path / "ca.pem"
    if content is not None:
        bundle.write_bytes(content)
    monkeypatch.setenv("BATCHRUNNER_S3_CA_BUNDLE", str(bundle))
    monkeypatch.setenv("BATCHRUNNER_BLOBS", f"s3://{BUCKET}/runs")
    (tmp_path / "in.jsonl").write_bytes(LINE)

    ended = call("run", "in.jsonl", "-o", "out.jsonl", "-u", "http://127.0.0.1:9/v1")

    assert ended.code == 2
    assert f"cannot read s3_ca_bundle {bundle}" in ended.err


def failed(called: Called) -> dict[str, str]:
    """The hints of the checks that failed, by name."""
    return {check["name"]: check["hint"] for check in called.json["checks"] if check["state"] == "fail"}
