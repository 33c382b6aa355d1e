"""The composition root: what the settings say reaches those that it is meant for."""

from __future__ import annotations

from pathlib import Path

from batchrunner.app import open_adapters, worker_session
from batchrunner.settings import Settings


async def test_an_upstream_that_was_never_there_is_given_up_when_the_settings_say(tmp_path: Path) -> None:
    settings = Settings(base_url="http://127.0.0.1:9/v1", first_contact_s=2.5)
    adapters = open_adapters(tmp_path, settings)

    async with worker_session(adapters, tmp_path, settings, api_keys={}, pacer=lambda _fanout: None) as worker:
        (pool,) = worker.fanout.pools
        contact = pool.gate.first_contact
    adapters.store.close()

    contact.note_failure(100.0)
    assert not contact.is_lost(102.4)
    assert contact.is_lost(102.5)
