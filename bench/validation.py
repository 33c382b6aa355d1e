"""Whole-file validation against the plainest reader there is, `orjson.loads` of each line, on the same lines.

Run it: python -m bench.validation [LINES]. Wall and CPU of this process with all threads, medians of pairs. The digest
of the input is given, as `run` gives it: it hashes its input in an earlier pass, which is not measured here. The
allocator is set up as in every process of ours, for both readers.
"""

from __future__ import annotations

import gc
import json
import random
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from hashlib import md5
from pathlib import Path
from typing import NamedTuple
from uuid import UUID

import orjson

from batchrunner.lines import CHAT_COMPLETIONS, LineRules
from batchrunner.models import OnInvalid
from batchrunner.tuning import raise_mmap_threshold
from batchrunner.validation import Validation, Validator

IdOf = Callable[[int], str]

LINES = 200_000
ROUNDS = 5
# What the pipeline reads at a time.
CHUNK_BYTES = 1 << 18
DIGEST = "0" * 64

# fmt: off
ENGLISH = (
    "people", "write", "about", "rivers", "bridges", "bread", "glaciers", "lighthouses", "violins", "bees", "printing",
    "maps", "and", "tides", "because", "the", "old", "city", "kept", "its", "records", "in", "order", "while", "every",
    "answer", "was", "short", "clear", "and", "useful", "to", "whoever", "had", "asked", "for", "it",
)
ACCENTED = ("naïve", "café", "Grüße", "Köln", "élève", "señor", "déjà", "über", "façade", "Ærø")
OTHER = ("東京", "こんにちは", "Привет", "мир", "質問", "ответ")
# fmt: on


class Corpus(NamedTuple):
    """Chat lines: their shares of accented words and of words in other scripts, their turns, and their ids."""

    accented: float
    other: float
    turns: int
    id_of: IdOf


def counted(index: int) -> str:
    """Ids as many scripts give them."""
    return f"request-{index:09}"


def random_uuid(index: int) -> str:
    """Ids in no order."""
    return str(UUID(bytes=md5(index.to_bytes(8), usedforsecurity=False).digest(), version=4))


CORPORA = {
    "chat, four turns, some accents in every line": Corpus(0.08, 0.0, 4, counted),
    "chat, four turns, a quarter in other scripts": Corpus(0.10, 0.25, 4, counted),
    "chat, four turns, some accents, UUIDs": Corpus(0.08, 0.0, 4, random_uuid),
    "one long turn, ASCII only (least to do for a parser)": Corpus(0.0, 0.0, 1, counted),
    "one long turn, ASCII only, UUIDs": Corpus(0.0, 0.0, 1, random_uuid),
}


def body(rng: random.Random, corpus: Corpus) -> dict[str, object]:
    """Make a chat body of about 850 bytes."""

    def word() -> str:
        chance = rng.random()
        words = OTHER if chance < corpus.other else ACCENTED if chance < corpus.other + corpus.accented else ENGLISH
        return rng.choice(words)

    turns = corpus.turns
    roles = ["system", *["user", "assistant"] * turns][:turns] if turns > 1 else ["user"]
    size_bytes = 560 if turns > 1 else 720
    messages = []
    for role in roles:
        text = word()
        while len(text.encode()) < size_bytes // turns:
            text += " " + word()
        messages.append({"role": role, "content": text})
    if turns == 1:
        return {"model": "small-chat", "messages": messages, "max_tokens": 64}
    settings = {"temperature": 0.7, "top_p": 0.95, "seed": 7, "n": 1, "user": "bench", "metadata": {"run": "a"}}
    return {"model": "small-chat", "messages": messages, "max_tokens": 64, **settings}


def write_lines(path: Path, lines: int, corpus: Corpus) -> None:
    """Write chat lines; 5,000 different bodies in turn."""
    rng = random.Random(1)
    bodies = [json.dumps(body(rng, corpus), ensure_ascii=False) for _ in range(min(lines, 5_000))]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for index in range(lines):
            head = f'{{"custom_id": "{corpus.id_of(index)}", "method": "POST", "url": "{CHAT_COMPLETIONS}"'
            file.write(f'{head}, "body": {bodies[index % len(bodies)]}}}\n')


def chunks(path: Path) -> Iterator[bytes]:
    """Read a file as the pipeline does."""
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def validate(path: Path) -> Validation:
    """Do everything that validation does."""
    rules = LineRules(endpoint=CHAT_COMPLETIONS)
    validator = Validator(rules, OnInvalid.FAIL, lines_max=10**8, bytes_max=1 << 40, sha256=DIGEST)
    for chunk in chunks(path):
        validator.feed(chunk)
    while validator.candidates():
        raise SystemExit("all ids differ, yet there are candidates")
    return validator.finish()


def parse_each(path: Path) -> None:
    """Read it the plain way."""
    with path.open("rb") as file:
        for line in file:
            orjson.loads(line)


def timed(work: Callable[[Path], object], path: Path) -> tuple[float, float]:
    """Give seconds of wall and of CPU."""
    gc.collect()
    wall, cpu = time.perf_counter(), time.process_time()
    work(path)
    return time.perf_counter() - wall, time.process_time() - cpu


def compare(path: Path, lines: int) -> dict[str, float]:
    """Alternate both readers and give microseconds per line."""
    ours, plain = [], []
    for _ in range(ROUNDS):
        plain.append(timed(parse_each, path))
        ours.append(timed(validate, path))
    found = validate(path)
    if found.is_rejected or found.total_count != lines:
        raise SystemExit(f"{found.total_count} of {lines} lines were accepted")

    def us(runs: list[tuple[float, float]], which: int) -> float:
        return statistics.median(run[which] for run in runs) / lines * 1e6

    return {
        "line_bytes": path.stat().st_size / lines,
        "validation_us": us(ours, 0),
        "validation_cpu_us": us(ours, 1),
        "orjson_us": us(plain, 0),
        "orjson_cpu_us": us(plain, 1),
        "ratio": statistics.median(p[0] / o[0] for p, o in zip(plain, ours, strict=True)),
        "ratio_cpu": statistics.median(p[1] / o[1] for p, o in zip(plain, ours, strict=True)),
    }


def peak_bytes(path: Path) -> int:
    """Give the highest memory of one validation beyond what was there before."""
    tracemalloc.start()
    validate(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def memory_per_line(folder: Path, lines: int) -> float:
    """Give the bytes that each further line takes, from two file sizes."""
    few, many = lines // 4, lines
    peaks = []
    for count in (few, many):
        path = folder / f"memory-{count}.jsonl"
        write_lines(path, count, next(iter(CORPORA.values())))
        peaks.append(peak_bytes(path))
    return (peaks[1] - peaks[0]) / (many - few)


def main(lines: int = LINES) -> dict[str, dict[str, float]]:
    """Measure every corpus, print a table, and give the figures."""
    figures: dict[str, dict[str, float]] = {}
    raise_mmap_threshold()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        print(f"{lines} lines; us per line, wall (CPU); ratio = orjson / ours, above 1 is faster than orjson")
        for name, corpus in CORPORA.items():
            path = folder / "lines.jsonl"
            write_lines(path, lines, corpus)
            row = compare(path, lines)
            figures[name] = row
            print(
                f"  {name} ({row['line_bytes']:.0f} B): "
                f"ours {row['validation_us']:.2f} ({row['validation_cpu_us']:.2f}), "
                f"orjson {row['orjson_us']:.2f} ({row['orjson_cpu_us']:.2f}), "
                f"ratio {row['ratio']:.2f} ({row['ratio_cpu']:.2f})"
            )
        per_line = memory_per_line(folder, lines)
        figures["memory"] = {"bytes_per_line": per_line}
        print(f"  memory: {per_line:.1f} bytes a line")
    return figures


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else LINES)
