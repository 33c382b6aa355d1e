"""A long run with its blobs on SeaweedFS: memory, requests to the service, and the sealing held against a copy of the
same bytes through boto3.

python -m bench.s3 [--lines 1000000] [--workers 2]
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

from batchrunner.app import open_adapters
from batchrunner.models import LOCAL_TENANT, BatchId
from bench.inputs import is_in_order, write_requests
from bench.measuring import Command, batchrunner, scratch
from bench.results import Figure, print_table
from bench.upstream import simulator
from tests.s3.proxy import proxied
from tests.s3.services import BUCKET, CREDENTIALS, client_of, seaweedfs

_MB = 1_000_000


def measure(*, lines: int, workers: int = 2) -> list[Figure]:
    with scratch() as folder, seaweedfs(_made(folder / "weed")) as service, proxied(service.url) as proxy:
        os.environ.update(CREDENTIALS)
        source = write_requests(folder / "in.jsonl", lines)
        output = folder / "out.jsonl"
        environment = CREDENTIALS | {
            "BATCHRUNNER_S3_ENDPOINT_URL": proxy.url,
            "BATCHRUNNER_S3_ADDRESSING": "path",
            "BATCHRUNNER_BLOBS": f"s3://{BUCKET}/bench",
        }
        with simulator() as upstream:
            command = batchrunner("run", str(source), "-o", str(output), "-u", upstream.base_url)
            command += ["--workers", str(workers), "--concurrency", "64", "--json"]
            ran = Command(command, environment=environment, is_sampled=True, folder=folder).wait()
        if ran.code != 0 or not is_in_order(output, lines):
            raise RuntimeError(f"run ended with {ran.code}: {ran.stderr[-2000:]} {ran.stdout[-2000:]}")
        requests = dict(proxy.counts)
        sealed_s = _sealing_s(folder / "out.jsonl.run", json.loads(ran.stdout)["batch_id"])
        copied_s = _copy_s(service.url)
        size_mb = output.stat().st_size / _MB
        return _figures(
            lines=lines,
            peaks_mb=sorted(each / _MB for each in ran.peak_bytes.values()),
            wall_s=ran.wall_s,
            requests=requests,
            sealed_mb_s=size_mb / sealed_s,
            copied_mb_s=size_mb / copied_s,
        )


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _sealing_s(folder: Path, batch_id: str) -> float:
    """From the fence to the published files."""
    adapters = open_adapters(folder)
    try:
        batch = adapters.store.scope(LOCAL_TENANT).batch(BatchId(batch_id))
    finally:
        adapters.store.close()
    assert batch.finalizing_at is not None
    assert batch.completed_at is not None
    return (batch.completed_at - batch.finalizing_at).total_seconds()


def _copy_s(url: str) -> float:
    """Read the sealed object and write it again, as boto3 does it by itself."""
    client = client_of(url)
    pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix="bench/")
    keys = [each["Key"] for page in pages for each in page.get("Contents", []) if each["Key"].endswith("output.jsonl")]
    began_s = time.perf_counter()
    client.upload_fileobj(client.get_object(Bucket=BUCKET, Key=keys[0])["Body"], BUCKET, "copy")
    return time.perf_counter() - began_s


def _figures(
    *,
    lines: int,
    peaks_mb: list[float],
    wall_s: float,
    requests: dict[str, int],
    sealed_mb_s: float,
    copied_mb_s: float,
) -> list[Figure]:
    per_1000 = sum(requests.values()) / lines * 1000
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(requests.items()))
    return [
        Figure("s3.peak_mb", peaks_mb[-1], "MB", "peak RSS of the largest process", "< 200", peaks_mb),
        Figure("s3.requests", per_1000, "per 1,000 lines", kinds, "<= 5"),
        Figure("s3.sealing", sealed_mb_s, "MB/s", "from the fence to the published files"),
        Figure("s3.copying", copied_mb_s, "MB/s", "the same bytes through boto3"),
        Figure("s3.sealing_ratio", sealed_mb_s / copied_mb_s, "x", "sealing / copying", ">= 0.5"),
        Figure("s3.lines_per_s", lines / wall_s, "lines/s", "the whole run, start and export included"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.s3")
    parser.add_argument("--lines", type=int, default=1_000_000)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    print_table(measure(lines=options.lines, workers=options.workers))


if __name__ == "__main__":
    main()
