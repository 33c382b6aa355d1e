"""The command line: a module for each command, imported only when it is called, and one place where errors become
exit codes.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from typing import Any

import click

from batchrunner import __version__
from batchrunner.cli.ending import Ending
from batchrunner.cli.exits import ExitCode
from batchrunner.durable import FULL
from batchrunner.errors import BatchrunnerError, DiskFull

# Name -> (module, one line of help). The help stands here so that listing the commands imports none of them.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("run", "Run a file of requests and write its output and error files."),
    "validate": ("validate", "Check a file of requests and list every problem."),
    "verify": ("verify", "Prove that an output holds every line of its input exactly once."),
    "errors": ("failures", "Group the failed lines of a run or batch, with counts, samples and hints."),
    "results": ("results", "Give the finished lines of a run or batch, while it runs or after."),
    "doctor": ("doctor", "Check that an upstream and this machine are ready for a run."),
    "config": ("config", "Show the settings and where each value comes from."),
    "serve": ("serve", "Serve an OpenAI Batch API over an upstream."),
    "keys": ("keys", "Make, list, revoke and rotate the API keys of a server."),
    "migrate": ("migrate", "Bring a server's database up to this version, or check it."),
    "submit": ("submit", "Send a file of requests to a server as a batch."),
    "status": ("status", "Tell where a batch on a server is, or wait for its end."),
    "cancel": ("cancel", "Cancel a batch on a server; finished results are kept."),
    "listen": ("listen", "Forward the events of a server to a receiver on this machine."),
    "trigger": ("trigger", "Have a server send a sample event."),
    "webhooks": ("webhooks", "Show the log of notifications, send one again, and the secret that signs them."),
    "demo": ("demo", "Run the sample file against a simulated upstream."),
    "simulate": ("simulate", "Serve an OpenAI-compatible upstream that calls no model."),
    "completion": ("completion", "Print the shell completion script."),
}


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """See click.Group."""
        return list(COMMANDS)

    def get_command(self, _ctx: click.Context, cmd_name: str) -> click.Command | None:
        """See click.Group."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"batchrunner.cli.{COMMANDS[cmd_name][0]}")
        command = getattr(module, COMMANDS[cmd_name][0])
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, _ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, meaning) for name, (_, meaning) in COMMANDS.items()])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Name the nearest command when there is no such one."""
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            near = difflib.get_close_matches(args[0], COMMANDS, n=3) if args else []
            if near:
                raise click.UsageError(f"{error.message} Did you mean {' or '.join(near)}?", ctx) from error
            raise


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="batchrunner")
def cli() -> None:
    """Run a file of LLM requests on any OpenAI-compatible server, each line exactly once.

    \b
    batchrunner run in.jsonl -o out.jsonl -u http://localhost:8000/v1
    """  # noqa: D301 - click wants the control character


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line and end the process with the exit code of the reference page."""
    ending = Ending(list(sys.argv[1:] if arguments is None else arguments))
    try:
        code = cli.main(args=list(ending.arguments), prog_name="batchrunner", standalone_mode=False, obj=ending)
    except click.exceptions.Exit as end:
        code = end.exit_code
    except click.ClickException as error:
        code = ending.misused(error)
    except (click.Abort, KeyboardInterrupt):
        code = ending.interrupted()
    except BrokenPipeError:
        # The reader of stdout has left, as `head` does; there is nobody to tell.
        sys.stdout = None
        code = ExitCode.TROUBLE
    except BatchrunnerError as error:
        code = ending.failed(error)
    except OSError as error:
        if error.errno not in FULL:
            raise
        code = ending.failed(DiskFull(f"{error.filename or 'the disk'}: {error.strerror}"))
    except BaseExceptionGroup as group:
        first = _first_error(group)
        if first is None:
            raise
        code = ending.failed(first)
    sys.exit(int(code or 0))


def _first_error(group: BaseExceptionGroup[BaseException]) -> BatchrunnerError | None:
    """The error of ours that ended a group of tasks; a group that holds any other is a bug to be seen whole."""
    leaves = [_first_error(each) if isinstance(each, BaseExceptionGroup) else each for each in group.exceptions]
    own = [each for each in leaves if isinstance(each, BatchrunnerError)]
    return own[0] if len(own) == len(leaves) else None
