"""What users of LiteLLM do with xAI's batches, in a process of its own: `litellm_flow.py ADDRESS FILE` uploads,
creates, waits and downloads, and prints what came of it.
"""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

ENDED = {"completed", "failed", "cancelled"}


def main(address: str, path: str) -> None:
    litellm: Any = import_module("litellm")
    who = {"custom_llm_provider": "xai", "api_base": address, "api_key": "k"}
    with Path(path).open("rb") as stream:
        file = litellm.create_file(file=stream, purpose="batch", **who)
    wanted = {"completion_window": "24h", "endpoint": "/v1/chat/completions", "metadata": {"name": "nightly"}}
    batch = litellm.create_batch(input_file_id=file.id, **wanted, **who)
    while batch.status not in ENDED:
        batch = litellm.retrieve_batch(batch_id=batch.id, **who)
    content = litellm.file_content(file_id=batch.output_file_id, **who).content
    lines = [json.loads(line) for line in content.splitlines()]
    counts = batch.request_counts
    told = {"status": batch.status, "total": counts.total, "completed": counts.completed, "failed": counts.failed}
    print(json.dumps(told | {"name": batch.metadata["name"], "lines": lines}))


if __name__ == "__main__":
    main(*sys.argv[1:])
