"""An HTTP server that answers at once with the same bytes, in a process of its own: only the client is measured."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

BODY = b'{"id":"c","object":"chat.completion","choices":[{"index":0,"message":{"content":"' + b"a" * 500 + b'"}}]}'
BODY = BODY[:-1] + b',"usage":{"prompt_tokens":9,"completion_tokens":12,"total_tokens":21}}'
ANSWER = (
    b"HTTP/1.1 200 OK\r\nServer: instant\r\nDate: Tue, 01 Jan 2030 00:00:00 GMT\r\nContent-Type: application/json\r\n"
    b"x-request-id: req_0123456789abcdef\r\nContent-Length: %d\r\n\r\n" % len(BODY)
) + BODY


class Instant(asyncio.Protocol):
    """Counts off requests by their Content-Length and answers each."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.unread = b""

    def data_received(self, data: bytes) -> None:
        self.unread += data
        while (head_end := self.unread.find(b"\r\n\r\n")) >= 0:
            head = self.unread[:head_end].lower() + b"\r\n"
            start = head.index(b"content-length:") + len(b"content-length:")
            end = head_end + 4 + int(head[start : head.index(b"\r\n", start)])
            if len(self.unread) < end:
                return
            self.unread = self.unread[end:]
            self.transport.write(ANSWER)


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Instant, "127.0.0.1", 0, backlog=1024)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


@contextmanager
def instant_server() -> Iterator[str]:
    """Run the server and give its base URL."""
    process = subprocess.Popen([sys.executable, "-m", "bench.instant"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


if __name__ == "__main__":
    from batchrunner.tuning import tune_process

    with asyncio.Runner(loop_factory=tune_process()) as runner:
        runner.run(serve())
