"""API keys from the command line: shown once, hashed at rest, ended at once or after a grace."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchrunner.app import open_adapters
from batchrunner.holdings import KeyScope
from tests.cli.calling import Called, call

Keys = Callable[..., Called]


@pytest.fixture
def keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keys:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    return lambda *words: call("keys", *words)


def listed(keys: Keys, *words: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in keys("list", "--json", *words).out.splitlines()]


def test_secret_is_the_only_output_and_only_its_digest_is_kept(keys: Keys, tmp_path: Path) -> None:
    created = keys("create", "--tenant", "acme", "--name", "ci")

    secret = created.out.strip()
    assert created.code == 0
    assert secret.startswith("br_")
    assert len(secret) == 3 + 64
    assert "only time" in created.err
    assert secret not in created.err
    stored = b"".join(path.read_bytes() for path in (tmp_path / "batchrunner").glob("state.db*"))
    assert secret.encode() not in stored
    assert hashlib.sha256(secret.encode()).hexdigest().encode() in stored


def test_secrets_differ(keys: Keys) -> None:
    assert keys("create").out != keys("create").out


def test_key_is_found_by_its_digest_with_what_it_was_given(keys: Keys, tmp_path: Path) -> None:
    created = keys(
        "create",
        *("--tenant", "acme", "--scopes", "read,admin", "--expires", "90d"),
        *("--open-batches", "3", "--queued-lines", "1000", "--rpm", "60", "--priority", "5", "--json"),
    ).json

    adapters = open_adapters(tmp_path / "batchrunner")
    try:
        key = adapters.store.find_key(hashlib.sha256(created["secret"].encode()).hexdigest())
    finally:
        adapters.store.close()

    assert key is not None
    assert (key.id, key.tenant) == (created["id"], "acme")
    assert key.scopes == (KeyScope.READ, KeyScope.ADMIN)
    assert key.limits.open_batches_max == 3
    assert key.limits.queued_lines_max == 1000
    assert key.limits.rpm == 60
    assert key.limits.priority_max == 5
    assert key.expires_at is not None
    assert round((key.expires_at - key.created_at).total_seconds()) == 90 * 86400


def test_list_shows_all_that_is_known_but_no_secret(keys: Keys) -> None:
    secret = keys("create", "--tenant", "acme", "--name", "ci", "--rpm", "60").out.strip()
    keys("create", "--tenant", "other")

    shown = keys("list")

    assert secret not in shown.out
    assert secret[:9] in shown.out
    assert "rpm=60" in shown.out
    assert [each["tenant"] for each in listed(keys)] == ["acme", "other"]
    assert [each["name"] for each in listed(keys, "--tenant", "acme")] == ["ci"]


def test_no_keys_are_said(keys: Keys) -> None:
    assert keys("list").out == ""
    assert "no keys" in keys("list").err


def test_revoked_key_is_listed_as_such(keys: Keys) -> None:
    key_id = keys("create", "--json").json["id"]

    assert keys("revoke", key_id).code == 0

    assert [each["state"] for each in listed(keys)] == ["revoked"]


def test_unknown_key_is_refused(keys: Keys) -> None:
    keys("create")

    assert keys("revoke", "key_none").code == 1
    assert "no key key_none" in keys("rotate", "key_none").err


def test_rotation_keeps_everything_but_the_secret(keys: Keys) -> None:
    old = keys("create", "--tenant", "acme", "--name", "ci", "--scopes", "read", "--rpm", "6", "--json").json

    new = keys("rotate", old["id"], "--json").json

    assert new["secret"] != old["secret"]
    assert new["id"] != old["id"]
    assert {name: new[name] for name in ("tenant", "name", "scopes", "limits")} == {
        name: old[name] for name in ("tenant", "name", "scopes", "limits")
    }
    assert [each["state"] for each in listed(keys)] == ["revoked", "valid"]


def test_rotation_with_grace_lets_both_secrets_work(keys: Keys) -> None:
    old = keys("create", "--json").json

    keys("rotate", old["id"], "--grace", "1h")

    assert [each["state"] for each in listed(keys)] == ["valid", "valid"]
    assert listed(keys)[0]["revoked_at"] is not None


def test_ended_key_is_not_rotated(keys: Keys) -> None:
    old = keys("create", "--json").json
    keys("revoke", old["id"])

    refused = keys("rotate", old["id"])

    assert refused.code == 2
    assert "revoked" in refused.err
    assert len(listed(keys)) == 1


@pytest.mark.parametrize(
    "words", [("--scopes", "read,all"), ("--scopes", ""), ("--expires", "soon"), ("--tenant", " "), ("--rpm", "0")]
)
def test_what_does_not_fit_is_refused_and_makes_no_key(keys: Keys, words: tuple[str, str]) -> None:
    assert keys("create", *words).code == 2
    assert listed(keys) == []
