"""The command `completion`."""

from __future__ import annotations

import pytest

from tests.cli.calling import ENVIRONMENT, call, finish, spawn


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_it_prints_a_script_that_asks_batchrunner(shell):
    called = call("completion", shell)

    assert called.code == 0
    assert f"_BATCHRUNNER_COMPLETE={shell}_complete" in called.out


def test_the_script_finds_commands_and_options():
    words = {"_BATCHRUNNER_COMPLETE": "bash_complete", "COMP_WORDS": "batchrunner val", "COMP_CWORD": "1"}
    options = words | {"COMP_WORDS": "batchrunner validate --end", "COMP_CWORD": "2"}

    command = finish(spawn(env=ENVIRONMENT | words))
    option = finish(spawn(env=ENVIRONMENT | options))

    assert command.out == "plain,validate\n"
    assert option.out == "plain,--endpoint\n"


def test_the_shell_of_the_user_is_the_default(monkeypatch):
    monkeypatch.setenv("SHELL", "/usr/bin/zsh")

    called = call("completion")

    assert called.code == 0
    assert called.out.startswith("#compdef batchrunner")


def test_an_unknown_shell_exits_2_and_lists_the_known_ones(monkeypatch):
    monkeypatch.setenv("SHELL", "/bin/tcsh")

    called = call("completion")

    assert called.code == 2
    assert "bash, zsh, fish" in called.err
