"""`batchrunner completion`: the script that makes a shell complete commands and options."""

from __future__ import annotations

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from batchrunner.errors import UsageError

_SHELLS = ("bash", "zsh", "fish")
_VARIABLE = "_BATCHRUNNER_COMPLETE"


@click.command("completion")
@click.argument("shell", required=False, type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, *, shell: str | None) -> None:
    """Print the completion script of SHELL (by default the one in $SHELL).

    \b
    bash: eval "$(batchrunner completion bash)"     in ~/.bashrc
    zsh:  eval "$(batchrunner completion zsh)"      in ~/.zshrc
    fish: batchrunner completion fish | source      in ~/.config/fish/config.fish
    """  # noqa: D301 - click wants the control character
    name = shell or Path(os.environ.get("SHELL", "")).name
    kind = get_completion_class(name) if name in _SHELLS else None
    if kind is None:
        raise UsageError(f"no completion for the shell {name!r}", hint=f"Name one of {', '.join(_SHELLS)}.")
    click.echo(kind(ctx.find_root().command, {}, "batchrunner", _VARIABLE).source())
