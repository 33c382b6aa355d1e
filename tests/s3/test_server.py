"""A server whose files, journals and results lie on SeaweedFS, as the official SDK sees it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import aiohttp
import openai
import pytest
from yarl import URL

from tests.e2e.served import site
from tests.invariants import check_run
from tests.s3.services import BUCKET, client_of

pytestmark = [pytest.mark.real, pytest.mark.slow]
LINES = 400


def sdk_flow(base_url: str, source: Path, output: Path) -> str:
    """Upload, create, poll, download, as the SDK's guide has it; gives the output file's id."""
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=2) as client:
        with source.open("rb") as stream:
            file = client.files.create(file=stream, purpose="batch")
        batch = client.batches.create(input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h")
        while batch.status not in ("completed", "failed", "expired", "cancelled"):
            batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed", batch
        assert batch.output_file_id is not None
        output.write_bytes(client.files.content(batch.output_file_id).read())
        listed = [each.id for each in client.files.list()]
        assert {file.id, batch.output_file_id} <= set(listed)
        assert client.files.delete(file.id).deleted
        return batch.output_file_id


async def test_sdk_flow_is_as_in_a_folder_and_everything_lies_in_the_bucket(tmp_path: Path, on_seaweedfs: str) -> None:
    output = tmp_path / "out.jsonl"
    async with site(tmp_path) as here:
        source = here.write_input(LINES)
        server = await here.serve("--workers", "1")

        file_id = await asyncio.to_thread(sdk_flow, server.base_url, source, output)

        check_run(source, output, tmp_path / "none.jsonl", sim_stats=here.simulator.stats())
        address = (here.data / "blobs.address").read_text().strip()
        prefix = address.removeprefix(f"s3://{BUCKET}/")
        found = client_of(on_seaweedfs).list_objects_v2(Bucket=BUCKET, Prefix=prefix)["Contents"]
        kinds = {each["Key"].removeprefix(f"{prefix}/").partition("/")[0] for each in found}
        assert {"files", "journal"} <= kinds
        local = here.data / "blobs"
        assert not [each for each in local.rglob("*") if each.is_file() and each.name != "reserve~"]
        await redirected(server.session, f"{server.base_url}/files/{file_id}/content", output.read_bytes())
        assert (await server.stop()).code == 0


async def redirected(session: aiohttp.ClientSession, url: str, content: bytes) -> None:
    """The bytes come from the bucket when that is asked for."""
    async with session.get(url, params={"redirect": "true"}, allow_redirects=False) as answer:
        assert answer.status == 307
        location = answer.headers["Location"]
    async with session.get(URL(location, encoded=True)) as answer:
        assert answer.status == 200
        assert await answer.read() == content
    async with session.get(url, headers={"Range": "bytes=10-19"}) as answer:
        assert answer.status == 206
        assert await answer.read() == content[10:20]
