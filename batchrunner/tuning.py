"""What makes a process fast before its work begins: the event loop, the allocator and the garbage collector."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import logging
import os
import platform
import resource
from collections.abc import Callable

logger = logging.getLogger(__name__)

# Thousands of live connections are no garbage, and with the default of 700 the collector walks them all the time.
GC_THRESHOLDS = (100_000, 50, 100)
# Names and numbers are those of glibc's <malloc.h>.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD_BYTES = 1024 * 1024
_TRIM_THRESHOLD_BYTES = 4 * 1024 * 1024


def tune_process(*, use_uvloop: bool = True) -> Callable[[], asyncio.AbstractEventLoop]:
    """Set thresholds and give the factory of the fastest event loop there is, for `asyncio.Runner`."""
    gc.set_threshold(*GC_THRESHOLDS)
    raise_mmap_threshold()
    return find_loop_factory() if use_uvloop else asyncio.new_event_loop


def find_loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """Give uvloop's factory where it is installed, else asyncio's."""
    try:
        import uvloop
    except ImportError:
        logger.debug("uvloop is not installed", extra={"action": "uvloop_missing"})
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


def raise_mmap_threshold() -> bool:
    """Keep buffers below 1 MiB on the heap: input and results are read 256 KiB at a time, as asyncio reads, and glibc
    would map, fill with zeros and unmap that much each time, which takes a third of validation.

    False where there is no glibc; nothing is changed then.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        logger.debug("glibc offers no mallopt", extra={"action": "mallopt_missing"})
        return False
    mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
    mallopt.restype = ctypes.c_int
    outcomes = (mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD_BYTES), mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD_BYTES))
    return outcomes == (1, 1)


def take_long_turns() -> bool:
    """Have no thread of this process interrupt whoever has the core when it wakes up, where the system knows how. Call
    it before other threads start: those inherit it.

    A thread that wakes up for Python's lock could not go on anyway, and processes that share a core would empty each
    other's caches many times more often. False where nothing is changed: a policy that somebody chose stays.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return False
    try:
        if os.sched_getscheduler(0) != os.SCHED_OTHER:
            return False
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError as error:
        logger.debug("the system keeps its turns: %s", error, extra={"action": "long_turns_refused"})
        return False
    return True


def allow_open_files(wanted: int) -> int:
    """Raise this process's limit of open files to `wanted` where the system lets it; give what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return wanted
    granted = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (granted, hard))
    return granted


def freeze_start_up() -> None:
    """Call once when everything is imported and set up: what lives then is never looked at by the collector again."""
    gc.collect()
    gc.freeze()
