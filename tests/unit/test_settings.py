"""Settings: what text means, which layer wins, and errors that name where a bad value came from."""

from __future__ import annotations

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrunner.errors import UsageError
from batchrunner.settings import ENDPOINTS, MIB, Settings, describe, parse_duration, parse_size, parse_window, resolve


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90.0),
        ("0", 0.0),
        ("1.5s", 1.5),
        ("200ms", 0.2),
        (" 10m ", 600.0),
        ("24h", 86_400.0),
        ("14d", 1_209_600.0),
    ],
)
def test_duration_is_read_in_seconds(text: str, seconds: float) -> None:
    assert parse_duration(text, what="x") == pytest.approx(seconds)


@pytest.mark.parametrize(
    "text", ["", "h", "-1s", "1 s", "1w", "1e3", "inf", "nan", "1.s", "24H", "1h30m", "\u0663s", "9" * 400]
)
def test_duration_that_is_none_is_refused_with_its_name_and_value(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_duration(text, what="--window")

    assert "--window" in refused.value.message
    assert repr(text) in refused.value.message


@pytest.mark.parametrize(("text", "seconds"), [("1m", 60.0), ("60s", 60.0), ("14d", 14 * 86400.0)])
def test_window_is_from_a_minute_to_two_weeks(text: str, seconds: float) -> None:
    assert parse_window(text, what="--window") == seconds


@pytest.mark.parametrize("text", ["0s", "59s", "14.1d", "15d"])
def test_window_beyond_these_is_refused_with_both_ends(text: str) -> None:
    with pytest.raises(UsageError, match=f"--window {text}: from 1m to 14d"):
        parse_window(text, what="--window")


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("16MiB", 16 * MIB),
        ("16 mib", 16 * MIB),
        ("1GiB", 1024 * MIB),
        ("1KB", 1000),
        ("2GB", 2 * 10**9),
        ("7", 7),
        ("7B", 7),
    ],
)
def test_size_is_read_in_bytes(text: str, size_bytes: int) -> None:
    assert parse_size(text, what="x") == size_bytes


@pytest.mark.parametrize("text", ["", "MiB", "-1", "1TiB", "1e6", "0x10", "1 2", "9" * 400])
def test_size_that_is_none_is_refused_with_its_name_and_value(text: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse_size(text, what="env: line_bytes_max")

    assert "env: line_bytes_max" in refused.value.message
    assert repr(text) in refused.value.message


def test_without_layers_all_is_default() -> None:
    settings, origins = resolve([])

    assert settings == Settings()
    assert origins == {knob.name: "default" for knob in fields(Settings)}


def test_strongest_layer_wins_and_its_origin_is_kept() -> None:
    settings, origins = resolve(
        [
            ("flag", {"concurrency": 8, "rpm": None}),
            ("BATCHRUNNER_*", {"concurrency": "16", "rpm": "1,000", "max_tries": "3"}),
            ("batchrunner.toml", {"max_tries": 4, "tpm": 90_000, "idle_timeout_s": 7}),
        ]
    )

    assert (settings.concurrency, settings.rpm, settings.max_tries, settings.tpm) == (8, 1000, 3, 90_000)
    assert settings.idle_timeout_s == 7.0
    assert isinstance(settings.idle_timeout_s, float)
    assert origins["concurrency"] == "flag"
    assert origins["rpm"] == origins["max_tries"] == "BATCHRUNNER_*"
    assert origins["tpm"] == "batchrunner.toml"
    assert origins["lease_s"] == "default"


@pytest.mark.parametrize(
    ("name", "given_value", "wanted"),
    [
        ("request_timeout_s", "5m", 300.0),
        ("request_timeout_s", "250ms", 0.25),
        ("request_timeout_s", 2.5, 2.5),
        ("memory_bytes_max", "64MiB", 64 * MIB),
        ("concurrency", "auto", None),
        ("concurrency", "", None),
        ("workers", "2", 2),
        ("lines_max", "10_000", 10_000),
        ("base_url", "http://h/v1", "http://h/v1"),
        ("base_url", "123", "123"),
        ("endpoints", "/v1/a,/v1/b", ("/v1/a", "/v1/b")),
        ("endpoints", ["/v1/a"], ("/v1/a",)),
        ("async_enabled", "false", False),
        ("async_enabled", "On", True),
        ("async_enabled", "0", False),
        ("async_enabled", False, False),
    ],
)
def test_value_is_brought_to_the_type_of_its_setting(name: str, given_value: object, wanted: object) -> None:
    settings, _ = resolve([("env", {name: given_value})])

    assert getattr(settings, name) == wanted


@pytest.mark.parametrize(
    ("name", "given_value"),
    [
        ("concurrency", "many"),
        ("concurrency", "1.5"),
        ("concurrency", 1.5),
        ("concurrency", True),
        ("max_tries", "none"),
        ("max_tries", [3]),
        ("request_timeout_s", "soon"),
        ("request_timeout_s", True),
        ("memory_bytes_max", "lots"),
        ("base_url", 7),
        ("endpoints", 7),
        ("async_enabled", "perhaps"),
        ("async_enabled", ["true"]),
    ],
)
def test_value_that_does_not_fit_names_origin_setting_and_value(name: str, given_value: object) -> None:
    with pytest.raises(UsageError) as refused:
        resolve([("batchrunner.toml", {name: given_value})])

    assert "batchrunner.toml" in refused.value.message
    assert name in refused.value.message
    assert str(given_value) in refused.value.message


def test_unknown_setting_is_refused_with_its_origin() -> None:
    with pytest.raises(UsageError) as refused:
        resolve([("BATCHRUNNER_CONCURENCY", {"concurency": "4"})])

    assert "BATCHRUNNER_CONCURENCY" in refused.value.message
    assert "'concurency'" in refused.value.message
    assert "config show" in refused.value.advice


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("concurrency", 0),
        ("workers", 0),
        ("rpm", 0),
        ("max_tries", 0),
        ("shard_lines_max", 0),
        ("memory_bytes_max", 1000),
        ("lease_s", 1.0),
        ("request_timeout_s", 0.0),
        ("line_bytes_max", 1),
    ],
)
def test_value_below_its_least_is_refused_with_both(name: str, value: float) -> None:
    with pytest.raises(UsageError) as refused:
        resolve([("flag", {name: value})])

    assert name in refused.value.message
    assert str(value) in refused.value.message
    assert "at least" in refused.value.message


def test_lease_that_would_end_before_it_is_renewed_is_refused() -> None:
    with pytest.raises(UsageError) as refused:
        resolve([("flag", {"lease_s": 8.0, "renew_s": 5.0})])

    assert "renew_s" in refused.value.message


def test_every_setting_has_a_meaning_and_is_described_in_order() -> None:
    rows = describe()

    assert [name for name, _, _ in rows] == [knob.name for knob in fields(Settings)]
    assert all(len(meaning) > 10 for _, _, meaning in rows)
    assert {name: default for name, default, _ in rows}["endpoints"] == ENDPOINTS


def test_durations_and_sizes_carry_their_unit_in_the_name() -> None:
    for knob in fields(Settings):
        if isinstance(knob.default, float):
            assert knob.name.endswith("_s"), knob.name


@given(st.text(max_size=12))
def test_any_text_is_a_value_or_a_usage_error(text: str) -> None:
    for name in ("concurrency", "request_timeout_s", "memory_bytes_max", "lines_max", "retry_after_max_s"):
        try:
            settings, origins = resolve([("env", {name: text})])
        except UsageError:
            continue
        assert origins[name] == "env"
        assert isinstance(getattr(settings, name), int | float | None)
