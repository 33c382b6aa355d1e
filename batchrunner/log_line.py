"""How a log record is shown to people, in the logs of every process."""

from __future__ import annotations

import logging

from batchrunner.errors import BatchrunnerError


class LogLine(logging.Formatter):
    """A log record as one line: an error of ours tells in its words, only one that nobody expects has its traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """See logging.Formatter."""
        error = record.exc_info[1] if record.exc_info else None
        if not isinstance(error, BatchrunnerError):
            return super().format(record)
        told = logging.makeLogRecord(record.__dict__ | {"exc_info": None, "exc_text": None})
        return f"{super().format(told)}: {error.code}: {error.message}"
