"""The live panel of a run on stderr: a few lines on a terminal, one line every 30 s elsewhere, nothing with --json."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live as RichLive
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchrunner.cli.console import count_text, duration_text, is_terminal, say
from batchrunner.clock import SystemClock
from batchrunner.log_line import LogLine
from batchrunner.models import Batch
from batchrunner.supervisor import Live

_LINE_EVERY_S = 30.0
_RATE_OVER_S = 10.0
_clock = SystemClock()
_logger = logging.getLogger("batchrunner")


class Rate:
    """Lines and tokens a second over the last ten seconds."""

    def __init__(self) -> None:
        self._points: list[tuple[float, int, int]] = []

    def add(self, now_s: float, lines: int, tokens: int) -> None:
        """Take in the present totals."""
        self._points.append((now_s, lines, tokens))
        while len(self._points) > 2 and now_s - self._points[0][0] > _RATE_OVER_S:
            del self._points[0]

    def per_second(self) -> tuple[float, float]:
        """Lines and tokens a second."""
        if len(self._points) < 2:
            return 0.0, 0.0
        (then_s, lines, tokens), (now_s, lines_now, tokens_now) = self._points[0], self._points[-1]
        span_s = max(1e-6, now_s - then_s)
        return (lines_now - lines) / span_s, (tokens_now - tokens) / span_s


class _LogTalk(logging.Handler):
    """Shows log records as talk above the panel."""

    def __init__(self, say_it: Callable[[str], None]) -> None:
        super().__init__(logging.WARNING)
        self.setFormatter(LogLine())
        self._say = say_it

    def emit(self, record: logging.LogRecord) -> None:
        """See logging.Handler."""
        # The panel tells by itself what the work waits for, and when it goes on.
        if getattr(record, "action", None) != "worker_waits":
            self._say(self.format(record))


class Panel:
    """Shows how a run stands; use as a context around the run."""

    def __init__(self, *, is_json: bool) -> None:
        self._is_silent = is_json
        self._is_live = is_terminal() and not is_json
        self._rate = Rate()
        self._line_at_s = _clock.monotonic_s() + _LINE_EVERY_S
        self._trouble: str | None = None
        self._live: RichLive | None = None
        self._log = _LogTalk(self.say)

    def __enter__(self) -> Self:
        _logger.addHandler(self._log)
        if self._is_live:
            self._live = RichLive(console=Console(stderr=True), refresh_per_second=5, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _logger.removeHandler(self._log)
        if self._live is not None:
            self._live.stop()

    def say(self, text: str) -> None:
        """Print a line of talk above the panel."""
        if self._live is not None:
            self._live.console.print(Text(text))
        else:
            say(text)

    def show(self, batch: Batch, live: Live) -> None:
        """Bring the panel up to date."""
        now_s = _clock.monotonic_s()
        self._rate.add(now_s, batch.done_count, live.tally.tokens_in + live.tally.tokens_out)
        if live.trouble != self._trouble:
            self._trouble = live.trouble
            self.say(f"waiting: {live.trouble}" if live.trouble else "going on")
        if self._live is not None:
            self._live.update(self._panel(batch, live))
        elif not self._is_silent and now_s >= self._line_at_s:
            self._line_at_s = now_s + _LINE_EVERY_S
            say(self._one_line(batch, live))

    def _eta(self, batch: Batch) -> str:
        rate, _ = self._rate.per_second()
        return duration_text(batch.pending_count / rate) if rate > 0 and batch.pending_count else "-"

    def _one_line(self, batch: Batch, live: Live) -> str:
        rate, _ = self._rate.per_second()
        return (
            f"{batch.done_count:,}/{batch.total_count:,} lines, {rate:.1f}/s, {self._eta(batch)} left, "
            f"{batch.failed_count:,} failed, {live.in_flight} in flight (window {live.window}, {live.bound_by}), "
            f"{'1 retry' if live.tally.retries == 1 else f'{live.tally.retries:,} retries'}"
        )

    def _panel(self, batch: Batch, live: Live) -> RenderableType:
        rate, token_rate = self._rate.per_second()
        tally = live.tally
        head = Text(
            f"{batch.status}  {batch.done_count:,}/{batch.total_count:,} lines  {rate:.1f}/s  ETA {self._eta(batch)}"
        )
        grid = Table.grid(padding=(0, 2))
        grid.add_row(
            "in flight", f"{live.in_flight} of {live.window} ({live.bound_by})", "retries", f"{tally.retries:,}"
        )
        p50, p99 = tally.latencies.quantile(0.5), tally.latencies.quantile(0.99)
        latency = f"p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms" if p50 and p99 else "-"
        grid.add_row("latency", latency, "tokens/s", count_text(token_rate))
        grid.add_row("failed", f"{batch.failed_count:,}", "errors", _top(tally.failures))
        for each in live.upstreams if len(live.upstreams) > 1 else ():
            state = "down" if each.is_down else each.bound_by
            grid.add_row(each.name, f"{each.in_flight} of {each.window} ({state})", "waiting", f"{each.waiting:,}")
        rows: list[RenderableType] = [head, bar(done=batch.done_count, total=batch.total_count), grid]
        if live.trouble:
            rows.append(Text(f"waiting: {live.trouble}", style="yellow"))
        return Group(*rows)


def bar(*, done: int, total: int) -> RenderableType:
    """Draw how much is done, on a line of its own: a bare ProgressBar does not end its line."""
    return Padding(ProgressBar(total=max(1, total), completed=done, width=60), 0)


def _top(failures: dict[str, int]) -> str:
    most = sorted(failures.items(), key=lambda item: -item[1])[:4]
    return ", ".join(f"{code} x{count:,}" for code, count in most) or "-"
