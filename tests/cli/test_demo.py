"""The command `demo`: the first thing that anybody types."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.calling import Called, call, finish, spawn


def demo(folder: Path, *options: object) -> Called:
    return finish(spawn("demo", *options, cwd=folder))


@pytest.mark.slow
def test_it_runs_the_sample_and_the_second_time_says_that_all_is_done(tmp_path):
    first = demo(tmp_path, "--lines", 30)
    second = demo(tmp_path, "--lines", 30)

    files = tmp_path / "demo" / "in.jsonl", tmp_path / "demo" / "out.jsonl"
    assert first.code == 0
    assert "completed: 30 lines, 30 succeeded" in first.err
    assert "batchrunner verify demo/in.jsonl demo/out.jsonl" in first.err
    assert call("verify", *files).code == 0
    assert second.code == 0
    assert "already done" in second.err
    assert "completed" not in second.err
    assert "http" not in second.err


@pytest.mark.slow
def test_another_number_of_lines_starts_over_and_keeps_the_old_state(tmp_path):
    demo(tmp_path, "--lines", 5)

    again = demo(tmp_path, "--lines", 7)

    assert again.code == 0
    assert len((tmp_path / "demo" / "out.jsonl").read_text().splitlines()) == 7
    assert (tmp_path / "demo" / "out.jsonl.run.1").is_dir()


@pytest.mark.slow
def test_more_lines_than_the_sample_has_are_made_of_the_same_kind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    import batchrunner.cli.demo as demo_module

    lines = demo_module._requests()
    content = b"".join(next(lines) for _ in range(1200))
    (tmp_path / "in.jsonl").write_bytes(content)

    assert call("validate", "in.jsonl").code == 0
