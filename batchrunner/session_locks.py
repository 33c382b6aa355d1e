"""Which worker sessions of this host live, by locks that end with their process."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from batchrunner.models import SessionId


class SessionLocks:
    """Liveness on a host: each session holds a lock on a file of its own for life, and whoever gets that lock knows
    it dead.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "sessions"
        self._held: dict[SessionId, int] = {}

    def hold(self, session: SessionId) -> None:
        """Lock the session's file until `let_go` or the end of the process."""
        handle = os.open(self._folder / session, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._held[session] = handle

    def let_go(self, session: SessionId) -> None:
        """Give the lock up and remove the file."""
        (self._folder / session).unlink(missing_ok=True)
        os.close(self._held.pop(session))

    def leave(self, session: SessionId) -> None:
        """Give the lock up and let the session be found dead: it still has leases."""
        os.close(self._held.pop(session))

    def dead_sessions(self) -> list[SessionId]:
        """The sessions whose process is gone."""
        dead = []
        for path in self._folder.iterdir():
            session = SessionId(path.name)
            if session not in self._held and self._is_dead(path):
                dead.append(session)
        return dead

    def bury(self, session: SessionId) -> None:
        """Forget a dead session whose leases have been released."""
        (self._folder / session).unlink(missing_ok=True)

    def _is_dead(self, path: Path) -> bool:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
        return True
