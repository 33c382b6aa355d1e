"""An API server in a process of its own, so that its memory is its own too: `python -m tests.api.hosting FOLDER`."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.api.serving import serving

ROOT = Path(__file__).parents[2]
MIB = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Host:
    """A server process."""

    pid: int
    port: int
    folder: Path

    def peak_bytes(self) -> int:
        """The most memory that the process ever had. Linux only."""
        return self._status("VmHWM") * 1024

    def forget_peak(self) -> None:
        """Begin the peak anew."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def stored_names(self) -> set[str]:
        """What lies in the blob folder, half-written files too."""
        root = self.folder / "blobs"
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    def _status(self, name: str) -> int:
        match = re.search(rf"^{name}:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text(), re.MULTILINE)
        assert match is not None
        return int(match[1])


@contextmanager
def hosting(folder: Path) -> Iterator[Host]:
    """Run a server until the block ends."""
    command = [sys.executable, "-m", "tests.api.hosting", str(folder)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            port = int(process.stdout.readline())
            yield Host(process.pid, port, folder)
        finally:
            # The end of its input is what it waits for.
            process.stdin.close()
            process.wait(30)


async def main(folder: Path) -> None:
    async with serving(folder) as served:
        print(served.port, flush=True)
        await asyncio.to_thread(sys.stdin.buffer.read)


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
