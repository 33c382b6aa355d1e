"""The command `config`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from batchrunner.settings import Settings
from tests.cli.calling import call

KEY = "sk-this-must-never-be-seen"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("OPENAI_BASE_URL", "OPENAI_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    return tmp_path


def test_every_setting_is_shown_with_its_value():
    called = call("config", "show", "--json")

    assert called.code == 0
    assert set(called.json) == {knob.name for knob in dataclasses.fields(Settings)}
    assert called.json["max_tries"] == 5
    assert called.json["base_url"] is None


def test_origins_follow_the_order_flag_env_file_default(folder, monkeypatch):
    (folder / "batchrunner.toml").write_text("max_tries = 7\nrpm = 60\n")
    (folder / "home" / "batchrunner").mkdir(parents=True)
    (folder / "home" / "batchrunner" / "config.toml").write_text("rpm = 30\ntpm = 9\n")
    monkeypatch.setenv("BATCHRUNNER_MAX_TRIES", "9")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")

    shown = call("config", "show", "--origin", "--json").json

    assert shown["max_tries"] == {"value": 9, "origin": "env BATCHRUNNER_MAX_TRIES"}
    assert shown["rpm"] == {"value": 60, "origin": "batchrunner.toml"}
    assert shown["tpm"] == {"value": 9, "origin": str(folder / "home" / "batchrunner" / "config.toml")}
    assert shown["base_url"] == {"value": "http://localhost:8000/v1", "origin": "env OPENAI_BASE_URL"}
    assert shown["window_max"] == {"value": 4096, "origin": "default"}


def test_the_text_form_can_be_a_config_file(folder):
    first = call("config", "show")
    (folder / "batchrunner.toml").write_text(first.out)

    again = call("config", "show", "--origin")

    assert again.code == 0
    assert "max_tries = 5  # batchrunner.toml" in again.out


def test_the_files_looked_at_are_named_on_stderr(folder):
    (folder / "batchrunner.toml").write_text("")

    called = call("config", "show")

    assert "batchrunner.toml: read" in called.err
    assert f"{folder / 'home' / 'batchrunner' / 'config.toml'}: not there" in called.err


def test_no_secret_is_printed(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("OPENAI_BASE_URL", f"https://user:{KEY}@host:8443/v1?key={KEY}")

    for options in ([], ["--origin"], ["--json"], ["--origin", "--json"]):
        called = call("config", "show", *options)

        assert KEY not in called.out + called.err
        assert "https://***@host:8443/v1?***" in called.out
        assert "OPENAI_API_KEY is set" in called.err


def test_an_unknown_name_in_a_file_exits_2_and_names_the_file(folder):
    (folder / "batchrunner.toml").write_text("max_trys = 7\n")

    called = call("config", "show")

    assert called.code == 2
    assert "batchrunner.toml: there is no setting 'max_trys'" in called.err


TABLES = """max_tries = 7

[[upstream]]
name = "box"
base_url = "http://user:hidden@10.0.0.5:8000/v1?k=hidden"
models = ["llama*"]
aliases = { "fast one" = "llama-3" }
window = 8

[[upstream]]
name = "cloud"
base_url = "https://api.example.com/v1"
api_key_file = "cloud.key"
weight = 0
"""


def test_upstreams_are_shown_as_tables_with_their_origin_and_never_with_a_key(folder, monkeypatch):
    (folder / "batchrunner.toml").write_text(TABLES)
    (folder / "cloud.key").write_text(KEY)

    text, found = call("config", "show", "--origin"), call("config", "show", "--origin", "--json").json
    (folder / "batchrunner.toml").write_text(call("config", "show").out)
    again = call("config", "show", "--origin", "--json").json

    assert "[[upstream]]  # batchrunner.toml" in text.out
    assert 'aliases = { "fast one" = "llama-3" }' in text.out
    assert "key of box: none is named" in text.err
    assert f"key of cloud: {folder / 'cloud.key'} is set" in text.err
    assert KEY not in text.out + text.err + str(found)
    assert "hidden" not in text.out + text.err + str(found)
    assert [table["name"] for table in found["upstream"]["value"]] == ["box", "cloud"]
    assert again["upstream"] == found["upstream"]


def test_base_url_from_the_environment_goes_before_the_tables(folder, monkeypatch):
    (folder / "batchrunner.toml").write_text(TABLES)
    monkeypatch.setenv("BATCHRUNNER_BASE_URL", "http://one/v1")

    shown = call("config", "show", "--origin", "--json").json

    assert shown["upstream"] == {"value": [], "origin": "default"}
    assert shown["base_url"]["value"] == "http://one/v1"


def test_key_file_that_cannot_be_read_is_an_error_that_names_it(folder):
    (folder / "batchrunner.toml").write_text(TABLES)

    called = call("config", "show")

    assert called.code == 2
    assert "upstream cloud: api_key_file" in called.err
