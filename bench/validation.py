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
from pathlib import Path

import orjson

from batchrunner.lines import CHAT_COMPLETIONS, LineRules
from batchrunner.models import OnInvalid
from batchrunner.tuning import raise_mmap_threshold
from batchrunner.validation import Validation, Validator

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

# name -> share of accented words, share of words in other scripts, number of turns
CORPORA = {
    "chat, four turns, some accents in every line": (0.08, 0.0, 4),
    "chat, four turns, a quarter in other scripts": (0.10, 0.25, 4),
    "one long turn, ASCII only (least to do for a parser)": (0.0, 0.0, 1),
}


def body(rng: random.Random, accented: float, other: float, turns: int) -> dict[str, object]:
    """Make a chat body of about 850 bytes."""

    def word() -> str:
        chance = rng.random()
        return rng.choice(OTHER if chance < other else ACCENTED if chance < other + accented else ENGLISH)

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


def write_lines(path: Path, lines: int, accented: float, other: float, turns: int) -> None:
    """Write chat lines; 5,000 different bodies in turn."""
    rng = random.Random(1)
    bodies = [json.dumps(body(rng, accented, other, turns), ensure_ascii=False) for _ in range(min(lines, 5_000))]
    with path.open("w", encoding="utf-8", newline="\n") as file:
        for index in range(lines):
            head = f'{{"custom_id": "request-{index:09}", "method": "POST", "url": "{CHAT_COMPLETIONS}", "body": '
            file.write(f"{head}{bodies[index % len(bodies)]}}}\n")


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
        raise SystemExit("the ids ascend, yet there are candidates")
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
    accented, other, turns = next(iter(CORPORA.values()))
    few, many = lines // 4, lines
    peaks = []
    for count in (few, many):
        path = folder / f"memory-{count}.jsonl"
        write_lines(path, count, accented, other, turns)
        peaks.append(peak_bytes(path))
    return (peaks[1] - peaks[0]) / (many - few)


def main(lines: int = LINES) -> dict[str, dict[str, float]]:
    """Measure every corpus, print a table, and give the figures."""
    figures: dict[str, dict[str, float]] = {}
    raise_mmap_threshold()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        print(f"{lines} lines; us per line, wall (CPU); ratio = orjson / ours, above 1 is faster than orjson")
        for corpus, shape in CORPORA.items():
            path = folder / "lines.jsonl"
            write_lines(path, lines, *shape)
            row = compare(path, lines)
            figures[corpus] = row
            print(
                f"  {corpus} ({row['line_bytes']:.0f} B): "
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
