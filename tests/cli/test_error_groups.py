"""An error of ours that ends a group of tasks is told like any other; a bug among them is seen whole."""

from __future__ import annotations

import click
import pytest

from batchrunner.cli import cli, main
from batchrunner.errors import DiskFull, StoreUnavailable


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(**_: object) -> None:
        raise error

    monkeypatch.setattr(cli, "get_command", lambda _context, _name: click.Command("run", callback=fail))


def test_error_in_nested_groups_is_told_with_its_hint(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inner = ExceptionGroup("inner", [StoreUnavailable("the database is gone")])
    fail_with(monkeypatch, ExceptionGroup("outer", [inner, DiskFull("no space")]))

    with pytest.raises(SystemExit) as ended:
        main(["run"])

    assert ended.value.code == 1
    talk = capsys.readouterr().err
    assert talk.startswith("error: the database is gone\nhint: ")
    assert "Traceback" not in talk


def test_bug_in_a_group_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ExceptionGroup("outer", [StoreUnavailable("gone"), ZeroDivisionError()]))

    with pytest.raises(ExceptionGroup):
        main(["run"])
