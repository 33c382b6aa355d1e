"""How a command ends before its time: what is said of its error, the command that goes on, and the object that
`run --json` promises.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import click

from batchrunner.cli.exits import ExitCode, exit_code_of
from batchrunner.errors import BatchrunnerError, CallerError, UsageError


@dataclass(slots=True)
class Ending:
    """What the end of a command has to tell besides its error. `run` sets `next_command` as soon as it has begun
    something that the command would go on with.
    """

    arguments: Sequence[str] = ()
    next_command: str | None = None

    @property
    def same_command(self) -> str:
        """The command that goes on with this one: beyond the lines that --limit let run, and without --fresh, which
        would set aside what is done.
        """
        kept = [word for word in self.arguments if word != "--fresh" and not word.startswith("--limit=")]
        if "--limit" in kept:
            place = kept.index("--limit")
            del kept[place : place + 2]
        return shlex.join(["batchrunner", *kept])

    def interrupted(self) -> ExitCode:
        """Tell that somebody interrupted the command."""
        click.echo("interrupted", err=True)
        self._tell_next()
        self._print_failure(
            ExitCode.INTERRUPTED,
            error_code="interrupted",
            message="interrupted",
            hint="Run the same command again." if self.next_command is None else "The next command goes on.",
        )
        return ExitCode.INTERRUPTED

    def failed(self, error: BatchrunnerError) -> ExitCode:
        """Tell of an error of ours. Where the caller is at fault, the same command would fail again."""
        code = exit_code_of(error)
        click.echo(f"error: {error.message}", err=True)
        click.echo(f"hint: {error.advice}", err=True)
        if isinstance(error, CallerError):
            self.next_command = None
        self._tell_next()
        self._print_failure(code, error_code=error.code, message=error.message, hint=error.advice)
        return code

    def misused(self, error: click.ClickException) -> ExitCode:
        """Tell of arguments that do not fit."""
        error.show()
        is_usage = isinstance(error, click.UsageError)
        code = ExitCode.USAGE if is_usage else ExitCode.TROUBLE
        kind = UsageError if is_usage else BatchrunnerError
        self._print_failure(code, error_code=kind.code, message=error.format_message(), hint=kind.hint)
        return code

    def _tell_next(self) -> None:
        if self.next_command is not None:
            click.echo(f"next: {self.next_command}", err=True)

    def _print_failure(self, code: ExitCode, *, error_code: str, message: str, hint: str) -> None:
        """Keep the promise of `run --json`: one object, also when there is nothing else to tell."""
        if self.arguments[:1] != ["run"] or "--json" not in self.arguments:
            return
        from batchrunner.cli.summary import failure_summary, print_json

        print_json(
            failure_summary(code, error_code=error_code, message=message, hint=hint, next_command=self.next_command)
        )
