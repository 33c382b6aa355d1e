"""What the API is compared with: an aiohttp handler that writes and hashes a raw body, and one that answers a word.

python -m bench.raw_server FOLDER prints its address. POST /raw takes a body; with ?sync=1 it is on the disk before the
answer, as a file of ours is. GET /word answers at once.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import sys
from pathlib import Path

from aiohttp import web

from batchrunner.tuning import tune_process


def _app(folder: Path) -> web.Application:
    numbers = itertools.count()

    async def take(request: web.Request) -> web.Response:
        digest = hashlib.sha256()
        # A new file each time, as ours is: written over, one would get the pages that are warm from the last time.
        with (folder / f"raw-{next(numbers)}").open("wb") as stream:
            async for chunk in request.content.iter_any():
                digest.update(chunk)
                stream.write(chunk)
            stream.flush()
            if "sync" in request.query:
                os.fsync(stream.fileno())
        return web.json_response({"id": digest.hexdigest()})

    async def word(_: web.Request) -> web.Response:
        return web.json_response({"id": "word"})

    app = web.Application(client_max_size=1 << 40)
    app.add_routes([web.post("/raw", take), web.get("/word", word)])
    return app


async def _serve(folder: Path) -> None:
    runner = web.AppRunner(_app(folder), access_log=None)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    host, port = runner.addresses[0][:2]
    print(f"http://{host}:{port}", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=tune_process()) as loop:
        loop.run(_serve(Path(sys.argv[1])))
