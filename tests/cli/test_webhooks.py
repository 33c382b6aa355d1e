"""Webhooks from the command line, against a server of ours: listen, trigger, the log, secrets, and the end of a run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import stat
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest

from batchrunner.simulate import Simulator, SimulatorSettings
from tests.api.receiving import Got, carrying, receiving
from tests.api.serving import Served, serving
from tests.cli.calling import chat_line

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Served]:
    folder = tmp_path / "server"
    folder.mkdir()
    async with serving(folder) as served:
        yield served


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("BATCHRUNNER_", "OPENAI_"))}
    return kept | {"HOME": str(home), "XDG_DATA_HOME": str(home / "share"), "NO_COLOR": "1"} | more


async def started(home: Path, *words: str, **more: str) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "batchrunner",
        *words,
        cwd=home,
        env=environment(home, **more),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


async def called(home: Path, *words: str, **more: str) -> tuple[int | None, str, str]:
    """Run a command to its end: exit code, stdout, stderr."""
    process = await started(home, *words, **more)
    async with asyncio.timeout(LIMIT_S):
        out, err = await process.communicate()
    return process.returncode, out.decode(), err.decode()


def verified(got: Got, secret: str) -> Any:
    return openai.OpenAI(api_key="none").webhooks.unwrap(got.body, got.headers, secret=secret)


@contextlib.asynccontextmanager
async def listening(home: Path, api: Served, *words: str) -> AsyncIterator[tuple[asyncio.subprocess.Process, str]]:
    """Have `listen` until the block ends; gives its secret, once it listens."""
    process = await started(home, "listen", "--server", api.base, *words)
    assert process.stderr is not None
    try:
        async with asyncio.timeout(LIMIT_S):
            secret = (await process.stderr.readline()).decode().removeprefix("signing secret: ").strip()
            assert b"listening to" in await process.stderr.readline()
        yield process, secret
    finally:
        process.kill()
        await process.wait()


async def first_line(api: Served, process: asyncio.subprocess.Process, kind: str) -> str:
    """Trigger an event, and give what the listener shows of the first one that it heard."""
    assert process.stdout is not None
    await api.call("POST", "/v1/webhook_events", json={"type": kind})
    async with asyncio.timeout(LIMIT_S):
        return (await process.stdout.readline()).decode()


async def test_listen_forwards_signed_events_and_shows_what_came_of_them(tmp_path: Path, api: Served) -> None:
    async with (
        receiving() as receiver,
        listening(tmp_path, api, "--forward-to", f"{receiver.base}/hook") as (process, secret),
    ):
        line = await first_line(api, process, "batch.failed")
        got = (await receiver.wait(1))[0]
        again = await called(tmp_path, "webhooks", "secret", "--server", api.base)

    event = verified(got, secret)
    assert (event.type, got.path) == ("batch.failed", "/hook")
    assert f" batch.failed {event.id} -> 200 in " in line
    assert again == (0, f"{secret}\n", ""), "the secret is the same the next time"


async def test_listen_to_one_type_without_a_receiver_only_shows(tmp_path: Path, api: Served) -> None:
    async with listening(tmp_path, api, "--event", "batch.expired") as (process, _):
        await api.call("POST", "/v1/webhook_events", json={"type": "batch.failed"})
        line = await first_line(api, process, "batch.expired")

    assert " batch.expired evt_" in line


async def test_trigger_log_and_resend(tmp_path: Path, api: Served) -> None:
    server = ("--server", api.base)
    async with receiving(lambda number: 500 if number == 1 else 200) as receiver, carrying(api):
        code, out, _ = await called(tmp_path, "trigger", "batch.completed", "--url", receiver.base, *server)
        assert (code, out.split()[0]) == (0, "batch.completed")
        (got,) = await receiver.wait(1)
        async with asyncio.timeout(LIMIT_S):
            while "500 (1)" not in (told := (await called(tmp_path, "webhooks", "list", *server))[1]):
                pass
        code, _, _ = await called(tmp_path, "webhooks", "resend", got.id, *server)
        await receiver.wait(2)

    assert code == 0
    assert f"{got.id}  pending  batch.completed  batch_test  {receiver.base}" in told
    assert "  next " in told
    assert {each.id for each in receiver.got} == {got.id}


@pytest.mark.parametrize(("status", "code"), [(200, 0), (418, 3)])
async def test_a_test_tells_what_the_receiver_answers(tmp_path: Path, api: Served, status: int, code: int) -> None:
    server = ("--server", api.base)
    async with receiving(lambda _number: status) as receiver:
        wanted = {"name": "\x1b]0;mine", "url": receiver.base, "event_types": ["batch.completed"]}
        made = (await api.call("POST", "/v1/webhook_endpoints", json=wanted)).json
        listed = await called(tmp_path, "webhooks", "list", "--endpoints", *server)
        tested = await called(tmp_path, "webhooks", "test", made["id"], *server)

    assert tested[:2] == (code, f"{status}\n")
    assert listed[1] == f"{made['id']}  {receiver.base}  ?]0;mine  batch.completed\n"


async def test_the_log_is_narrowed_and_printed_as_the_server_shows_it(tmp_path: Path, api: Served) -> None:
    wanted = {"name": "mine", "url": "http://127.0.0.1:1023/", "event_types": ["batch.completed", "batch.failed"]}
    made = (await api.call("POST", "/v1/webhook_endpoints", json=wanted)).json
    for kind in ("batch.completed", "batch.failed"):
        await api.call("POST", "/v1/webhook_events", json={"type": kind, "url": "http://127.0.0.1:1022/"})

    async def listed(*words: str) -> Any:
        code, out, _ = await called(tmp_path, "webhooks", "list", "--json", *words, "--server", api.base)
        assert code == 0
        return json.loads(out)["data"]

    one = await listed("--event", "batch.failed", "--endpoint", made["id"])
    assert [(each["event_type"], each["webhook_endpoint_id"]) for each in one] == [("batch.failed", made["id"])]
    assert len(await listed("--event", "batch.completed")) == 2
    assert len(await listed("--batch", "batch_test", "--status", "pending")) == 4
    assert await listed("--status", "delivered") == await listed("--batch", "batch_other") == []
    assert [each["id"] for each in await listed("--endpoints", "--limit", "1")] == [made["id"]]
    code, _, _ = await called(tmp_path, "webhooks", "list", "--endpoints", "--event", "batch.failed")
    assert code == 2


async def test_what_is_for_a_deleted_receiver_is_not_sent_again(tmp_path: Path, api: Served) -> None:
    wanted = {"name": "mine", "url": "http://127.0.0.1:1023/", "event_types": ["batch.completed"]}
    made = (await api.call("POST", "/v1/webhook_endpoints", json=wanted)).json
    await api.call("POST", "/v1/webhook_events", json={"type": "batch.completed"})
    (told,) = (await api.call("GET", "/v1/webhook_deliveries")).json["data"]
    await api.call("DELETE", f"/v1/webhook_endpoints/{made['id']}")

    code, _, err = await called(tmp_path, "webhooks", "resend", told["id"], "--server", api.base)

    assert code == 1
    assert "was deleted" in err
    assert "Any change of a disabled receiver enables it" in err


async def test_a_receiver_that_is_not_there_has_not_taken_its_test(tmp_path: Path, api: Served) -> None:
    wanted = {"name": "mine", "url": "http://127.0.0.1:1023/", "event_types": ["batch.completed"]}
    made = (await api.call("POST", "/v1/webhook_endpoints", json=wanted)).json

    code, out, err = await called(tmp_path, "webhooks", "test", made["id"], "--server", api.base)

    assert (code, out) == (3, "")
    assert "did not answer: unreachable (cannot connect: Connection refused)" in err


async def test_rotate_prints_another_secret(tmp_path: Path, api: Served) -> None:
    server = ("--server", api.base)
    _, first, _ = await called(tmp_path, "webhooks", "secret", *server)
    _, rotated, _ = await called(tmp_path, "webhooks", "secret", "--rotate", *server)
    _, shown, _ = await called(tmp_path, "webhooks", "secret", *server)

    assert first != rotated == shown
    assert rotated.startswith("whsec_")


@pytest.mark.parametrize("words", [("--at-once",), ("--local", "--rotate")])
async def test_what_makes_no_sense_together_is_refused(tmp_path: Path, words: tuple[str, ...]) -> None:
    code, out, _ = await called(tmp_path, "webhooks", "secret", *words)

    assert (code, out) == (2, "")


async def test_submit_names_who_is_told(tmp_path: Path, api: Served) -> None:
    (tmp_path / "in.jsonl").write_bytes(chat_line("a"))
    words = ("submit", "in.jsonl", "--server", api.base, "--json")

    code, out, _ = await called(tmp_path, *words, "--webhook-url", "https://hooks.example/a")
    refused = await called(tmp_path, *words, "--webhook-url", "https://10.0.0.1/")

    assert (code, json.loads(out)["webhook_url"]) == (0, "https://hooks.example/a")
    assert refused[:2] == (2, "")
    assert "10.0.0.1 is private" in refused[2]


# -- run ---------------------------------------------------------------------------------------------------------------


def run_words(folder: Path, simulator: Simulator, url: str) -> tuple[str, ...]:
    (folder / "in.jsonl").write_bytes(b"".join(chat_line(name) for name in "abc"))
    return ("run", "in.jsonl", "-o", "out.jsonl", "-u", simulator.url, "--webhook-url", url)


async def test_a_run_tells_its_end_once(tmp_path: Path) -> None:
    async with receiving() as receiver, Simulator(SimulatorSettings(latency="1ms")) as simulator:
        words = run_words(tmp_path, simulator, f"{receiver.base}/hook")
        code, _, err = await called(tmp_path, *words)
        again = await called(tmp_path, *words)
        _, secret, _ = await called(tmp_path, "webhooks", "secret", "--local")

    assert (code, again[0]) == (0, 0)
    assert f"told {receiver.base}/hook: 200" in err
    (got,) = receiver.got
    assert verified(got, secret.strip()).type == "batch.completed"
    assert got.event["data"]["request_counts"] == {"total": 3, "completed": 3, "failed": 0}
    path = tmp_path / "share" / "batchrunner" / "webhook_secret"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_a_run_whose_receiver_is_away_ends_well_and_tells_the_next_time(tmp_path: Path) -> None:
    async with (
        receiving(lambda number: 500 if number <= 2 else 200) as receiver,
        Simulator(SimulatorSettings(latency="1ms")) as simulator,
    ):
        words = run_words(tmp_path, simulator, receiver.base)
        code, _, err = await called(tmp_path, *words)
        again = await called(tmp_path, *words)

    assert (code, again[0]) == (0, 0)
    assert "could not tell" in err
    assert "told " in again[2]
    assert len({each.id for each in receiver.got}) == 1
    assert len(receiver.got) == 3


async def test_the_sdks_variable_signs_the_end_of_a_run(tmp_path: Path) -> None:
    secret = "whsec_" + "QUJD" * 10
    async with receiving() as receiver, Simulator(SimulatorSettings(latency="1ms")) as simulator:
        words = run_words(tmp_path, simulator, receiver.base)
        await called(tmp_path, *words, OPENAI_WEBHOOK_SECRET=secret)

    assert verified(receiver.got[0], secret).type == "batch.completed"


async def test_the_setting_names_who_is_told_of_a_run(tmp_path: Path) -> None:
    async with receiving() as receiver, Simulator(SimulatorSettings(latency="1ms")) as simulator:
        *words, _flag, _url = run_words(tmp_path, simulator, "")
        await called(tmp_path, *words, BATCHRUNNER_WEBHOOK_URL=f"{receiver.base}/setting")

    assert [each.path for each in receiver.got] == ["/setting"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("WEBHOOK_URL", "https://u:secret@hooks.example/"),
        ("WEBHOOK_URL", "http://10.1.1.1/"),
        ("WEBHOOK_NETWORKS", "x"),
    ],
)
async def test_a_server_that_could_send_nothing_does_not_begin(tmp_path: Path, name: str, value: str) -> None:
    words = ("serve", "-u", "http://127.0.0.1:9/v1", "--data", "served", "--port", "0")
    code, _, err = await called(tmp_path, *words, **{f"BATCHRUNNER_{name}": value})

    assert code == 2
    assert name.lower() in err
    assert "secret" not in err


@pytest.mark.parametrize("url", ["ftp://x/", "http://", "https://user:pass@x/", "nowhere"])
async def test_a_url_that_is_no_receivers_is_refused_before_anything_is_sent(tmp_path: Path, url: str) -> None:
    async with Simulator(SimulatorSettings()) as simulator:
        code, _, err = await called(tmp_path, *run_words(tmp_path, simulator, url))

    assert code == 2
    assert "--webhook-url: it " in err
    assert "pass" not in err
    assert not (tmp_path / "out.jsonl.run").exists()
