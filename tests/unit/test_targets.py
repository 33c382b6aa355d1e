"""`[[upstream]]` tables: what they may say, what is refused and how, and which layer of settings wins."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from batchrunner.errors import UsageError
from batchrunner.settings import Settings, has_upstream, resolve, targets_of
from batchrunner.targets import Target, read_targets

TABLE: dict[str, Any] = {"name": "a", "base_url": "http://h/v1"}


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"window": "7"}, "window"),
        ({"window": 0}, "window"),
        ({"weight": -1}, "weight"),
        ({"weight": True}, "weight"),
        ({"name": "a b"}, "name"),
        ({"name": ""}, "name"),
        ({"models": []}, "models"),
        ({"models": "m"}, "models"),
        ({"aliases": {"m": ""}}, "aliases"),
        ({"base_url": 7}, "base_url"),
        ({"api_key": "sk-secret"}, "api_key"),
        ({"api_key_env": "A", "api_key_file": "f"}, "api_key_file"),
    ],
)
def test_table_that_does_not_fit_is_refused_with_its_place_and_key(change: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError) as refused:
        read_targets([TABLE, {**TABLE, "name": "b", **change}], "x.toml")

    assert "x.toml: [[upstream]] 2" in refused.value.message
    assert word in refused.value.message
    assert "sk-secret" not in refused.value.message


@pytest.mark.parametrize("value", ["a", {"name": "a"}, [1], 7])
def test_what_is_no_list_of_tables_is_refused(value: object) -> None:
    with pytest.raises(UsageError):
        read_targets(value, "x.toml")


def test_name_twice_and_only_spares_are_refused() -> None:
    with pytest.raises(UsageError, match="twice"):
        read_targets([TABLE, TABLE], "x.toml")
    with pytest.raises(UsageError, match="weight"):
        read_targets([TABLE | {"weight": 0}], "x.toml")


def test_targets_survive_the_pipe_to_a_worker() -> None:
    tables = [TABLE | {"models": ["m", "n*"], "aliases": {"f": "m"}, "weight": 0}, TABLE | {"name": "b"}]
    settings, _ = resolve([("x.toml", {"upstream": tables})])

    assert msgspec.json.decode(msgspec.json.encode(settings), type=Settings) == settings


def test_tables_take_from_the_settings_what_they_leave_out() -> None:
    tables = [TABLE | {"window": 4, "rpm": 60}, TABLE | {"name": "b"}]
    settings, origins = resolve([("flag", {"concurrency": 9, "tpm": 1000}), ("x.toml", {"upstream": tables})])

    found = {each.name: (each.window, each.rpm, each.tpm) for each in targets_of(settings)}

    assert found == {"a": (4, 60, 1000), "b": (9, None, 1000)}
    assert origins["upstream"] == "x.toml"


def test_stronger_layer_decides_between_one_upstream_and_several() -> None:
    one, several = {"base_url": "http://one/v1"}, {"upstream": [TABLE]}

    settings, origins = resolve([("flag", one), ("x.toml", several)])
    assert [target.base_url for target in targets_of(settings)] == ["http://one/v1"]
    assert (origins["base_url"], origins["upstream"]) == ("flag", "default")

    settings, origins = resolve([("x.toml", several), ("user.toml", one)])
    assert [target.name for target in targets_of(settings)] == ["a"]
    assert settings.base_url is None
    assert (origins["base_url"], origins["upstream"]) == ("default", "x.toml")


def test_both_in_one_layer_are_refused() -> None:
    with pytest.raises(UsageError, match="base_url"):
        resolve([("x.toml", {"base_url": "http://one/v1", "upstream": [TABLE]})])


def test_without_any_there_is_none_but_a_place_to_wait_at() -> None:
    assert not has_upstream(Settings())
    assert has_upstream(Settings(base_url="http://h"))
    assert has_upstream(Settings(upstream=(Target(name="a", base_url="http://h"),)))
    assert [target.name for target in targets_of(Settings())] == ["default"]
