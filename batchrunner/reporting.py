"""What a worker tells of its batches once a second, so that anybody can see whether they move and how fast."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence

from batchrunner.fanout import Fanout
from batchrunner.holdings import LiveShare, UpstreamLive
from batchrunner.models import BatchId
from batchrunner.shards import ShardRun

REPORT_S = 1.0
# Rates are those of about this long.
_SMOOTHING_S = 10.0


class _Rate:
    """Lines a second, recent ones weighing more; from its first second on it is a fair mean of what there was."""

    __slots__ = ("_rate", "_weight", "fresh_count")

    def __init__(self) -> None:
        self.fresh_count = 0
        self._rate = 0.0
        self._weight = 0.0

    def advance(self, span_s: float) -> float:
        fading = math.exp(-span_s / _SMOOTHING_S)
        self._rate = self._rate * fading + self.fresh_count / span_s * (1.0 - fading)
        self._weight = self._weight * fading + 1.0 - fading
        self.fresh_count = 0
        return self._rate / self._weight


class LiveReports:
    """Follows the shards of one worker. Nothing of this costs a line anything."""

    def __init__(self, fanout: Fanout) -> None:
        self._fanout = fanout
        self._rates: dict[BatchId, _Rate] = {}
        self._seen: dict[ShardRun, int] = {}
        self._told_at_s = 0.0
        self._is_idle = True

    def follow(self, run: ShardRun) -> None:
        """Count a shard's lines from here on."""
        self._seen[run] = run.done_count
        self._rates.setdefault(run.batch.id, _Rate())

    def leave(self, run: ShardRun) -> None:
        """Count a shard's last lines."""
        self._count(run)
        self._seen.pop(run, None)

    def _count(self, run: ShardRun) -> None:
        if run in self._seen:
            self._rates[run.batch.id].fresh_count += run.done_count - self._seen[run]
            self._seen[run] = run.done_count

    def due(self, now_s: float) -> tuple[LiveShare, ...] | None:
        """Give what is to be told now, None if nothing is: a second has not passed, or it stands still and was told."""
        if self._is_idle:
            self._is_idle = not self._seen
            self._told_at_s = now_s
        span_s = now_s - self._told_at_s
        if self._is_idle or span_s < REPORT_S:
            return None
        self._told_at_s = now_s
        self._is_idle = not self._seen
        for run in self._seen:
            self._count(run)
        held = {run.batch.id for run in self._seen}
        self._rates = {batch_id: rate for batch_id, rate in self._rates.items() if batch_id in held}
        return self._shares(span_s)

    def _shares(self, span_s: float) -> tuple[LiveShare, ...]:
        fanout = self._fanout
        counts = fanout.in_flight_by_batch()
        on_their_way: dict[BatchId, int] = {}
        for run in self._seen:
            on_their_way[run.batch.id] = on_their_way.get(run.batch.id, 0) + run.in_flight_count
        bound_by, window = fanout.bound(), fanout.effective_window
        shares = []
        for batch_id, count in on_their_way.items():
            in_flight = sum(each[batch_id] for each in counts)
            share = LiveShare(
                batch_id=batch_id,
                in_flight=in_flight,
                waiting=max(0, count - in_flight),
                done_per_s=self._rates[batch_id].advance(span_s),
                window=window,
                bound_by=bound_by,
                upstreams=self._upstreams(batch_id, counts),
            )
            shares.append(share)
        return tuple(shares)

    def _upstreams(self, batch_id: BatchId, counts: Sequence[Counter[BatchId]]) -> tuple[UpstreamLive, ...]:
        if len(counts) == 1:
            return ()
        return tuple(
            UpstreamLive(
                name=pool.name,
                window=pool.effective_window,
                bound_by=pool.bound(),
                in_flight=count[batch_id],
                is_down=pool.is_down,
            )
            for pool, count in zip(self._fanout.pools, counts, strict=True)
        )
