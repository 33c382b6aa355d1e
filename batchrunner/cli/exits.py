"""The exit codes and which error ends with which."""

from __future__ import annotations

from enum import IntEnum

from batchrunner.errors import (
    AuthenticationRefused,
    BatchrunnerError,
    InputChanged,
    InputInvalid,
    KeyRefused,
    ModelUnknown,
    OutputExists,
    PermissionRefused,
    RunDiffers,
    ServerRefused,
    UsageError,
    WebhookUnreachable,
)


class ExitCode(IntEnum):
    """What the exit code of a command says; scripts may rely on it."""

    OK = 0
    TROUBLE = 1
    USAGE = 2
    SOME_FAILED = 3
    AUTHENTICATION = 4
    INPUT_INVALID = 5
    STOPPED = 6
    DEADLINE = 7
    INTERRUPTED = 130


MEANINGS = {
    ExitCode.OK: "every line ok",
    ExitCode.TROUBLE: "tool or infrastructure error; run the same command again",
    ExitCode.USAGE: "usage: a flag, setting or identity does not fit",
    ExitCode.SOME_FAILED: "finished, some lines failed",
    ExitCode.AUTHENTICATION: "the key was refused: by the upstream for every line (resumable), or by the batch server",
    ExitCode.INPUT_INVALID: "the input has problems; nothing was sent",
    ExitCode.STOPPED: "stopped on purpose (limit, model unknown on every line); resumable",
    ExitCode.DEADLINE: "the deadline passed; unfinished lines are in the error file",
    ExitCode.INTERRUPTED: "interrupted; resumable",
}

_OF_ERROR: tuple[tuple[type[BatchrunnerError], ExitCode], ...] = (
    (AuthenticationRefused, ExitCode.AUTHENTICATION),
    (KeyRefused, ExitCode.AUTHENTICATION),
    (PermissionRefused, ExitCode.AUTHENTICATION),
    (ModelUnknown, ExitCode.STOPPED),
    (InputInvalid, ExitCode.INPUT_INVALID),
    (InputChanged, ExitCode.INPUT_INVALID),
    (UsageError, ExitCode.USAGE),
    (RunDiffers, ExitCode.USAGE),
    (OutputExists, ExitCode.USAGE),
    (ServerRefused, ExitCode.USAGE),
    (WebhookUnreachable, ExitCode.SOME_FAILED),
)


def exit_code_of(error: BatchrunnerError) -> ExitCode:
    """Give the exit code that an error ends a command with."""
    return next((code for kind, code in _OF_ERROR if isinstance(error, kind)), ExitCode.TROUBLE)
