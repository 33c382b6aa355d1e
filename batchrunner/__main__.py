"""`python -m batchrunner` is the command `batchrunner`."""

from __future__ import annotations


def main() -> None:
    """Run the command line; Ctrl-C while it is imported, or after it has told how it ended, shows no traceback."""
    try:
        from batchrunner.cli import main as command_line

        command_line()
    except KeyboardInterrupt:
        import sys

        sys.stderr.write("interrupted\n")
        sys.exit(130)
    finally:
        import signal

        signal.signal(signal.SIGINT, signal.SIG_IGN)


if __name__ == "__main__":
    main()
