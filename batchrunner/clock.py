"""The machine's own clocks and randomness behind the Clock and Rng ports."""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from datetime import UTC, datetime
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class SystemClock:
    """Clock over the kernel's clocks. Where a kernel has no boot id, the empty name stands for every boot."""

    def monotonic_s(self) -> float:
        """See Clock."""
        return time.monotonic()

    def boot_s(self) -> float:
        """See Clock."""
        return time.clock_gettime(_BOOT_CLOCK)

    def boot_id(self) -> str:
        """See Clock."""
        try:
            return _BOOT_ID.read_text().strip()
        except OSError:
            return ""

    def now(self) -> datetime:
        """See Clock."""
        return datetime.now(UTC)

    async def sleep(self, duration_s: float) -> None:
        """See Clock."""
        await asyncio.sleep(duration_s)


class SystemRng:
    """Rng over the interpreter's generators; tokens come from the system's."""

    def uniform(self) -> float:
        """See Rng."""
        return random.random()

    def token_hex(self, size_bytes: int) -> str:
        """See Rng."""
        return secrets.token_hex(size_bytes)
