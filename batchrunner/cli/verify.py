"""`batchrunner verify`: the ledger from the files alone, without a line of the engine's own bookkeeping.

Every custom_id of the input stands exactly once in the output and error files together, and nothing else does.
"""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import click
import orjson

from batchrunner.cli.exits import ExitCode
from batchrunner.cli.inputs import plain
from batchrunner.cli.run_folder import errors_path_for
from batchrunner.errors import NotFound

_SHOWN = 20
_BUCKETS = 64
# Hashes that look wrong and are looked at again with their real ids; of more than that, the count is by hash alone.
_CONFIRMED_MAX = 1 << 14
_PLACES_MAX = 4
_INPUT, _OUTPUT, _ERRORS = "input", "output", "errors"


@click.command("verify")
@click.argument("input_path", metavar="INPUT", type=click.Path(path_type=Path))
@click.argument("output_path", metavar="OUTPUT", type=click.Path(path_type=Path))
@click.argument("errors_path", metavar="[ERRORS]", required=False, type=click.Path(path_type=Path))
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object with the first 20 findings of each kind.")
def verify(*, input_path: Path, output_path: Path, errors_path: Path | None, is_json: bool) -> None:
    """Prove that OUTPUT and ERRORS together hold every line of INPUT exactly once.

    ERRORS is OUTPUT with .errors before its suffix unless it is named; when it is not there, no line failed. Where
    OUTPUT.run/manifest.json exists, the files' checksums are held against it.

    Exit codes: 0 every line is there once, 1 something is missing, doubled, foreign or broken.
    """
    files = [_File(_INPUT, _there(input_path)), _File(_OUTPUT, _there(output_path))]
    default = errors_path_for(output_path)
    if errors_path is not None or default.exists():
        files.append(_File(_ERRORS, _there(errors_path or default)))
    else:
        files.append(_File(_ERRORS, None))
    ledger = examine(*files)
    ledger.manifest = _against_manifest(output_path.with_name(f"{output_path.name}.run") / "manifest.json", files)
    if is_json:
        click.echo(orjson.dumps(ledger.as_json(files)))
    else:
        for line in ledger.as_text(files):
            click.echo(line)
    sys.exit(int(ExitCode.OK if ledger.is_clean else ExitCode.TROUBLE))


def _there(path: Path) -> Path:
    if not path.is_file():
        raise NotFound(f"{path} is not there" if not path.exists() else f"{path} is not a file")
    return path


# -- reading -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _File:
    """One of the three files, and what one pass over it tells. `hashes` are those of its custom_ids, in file order."""

    role: str
    path: Path | None
    hashes: array[int] = field(default_factory=lambda: array("q"))
    line_count: int = 0
    unnamed_count: int = 0
    unnamed_first: list[int] = field(default_factory=list)
    sha256: str = hashlib.sha256().hexdigest()

    def unnamed(self, number: int) -> None:
        """Count a line without a usable custom_id."""
        self.unnamed_count += 1
        if len(self.unnamed_first) < _SHOWN:
            self.unnamed_first.append(number)


def _lines(path: Path | None, digest: Callable[[bytes], None] | None = None) -> Iterator[tuple[int, bytes]]:
    """Give number and bytes of every line that is not blank, split at 0x0A only, without a byte order mark."""
    rest, number = b"", 0
    for chunk in _chunks(path):
        if digest is not None:
            digest(chunk)
        parts = (rest + chunk).split(b"\n")
        rest = parts.pop()
        for raw in parts:
            number += 1
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")  # noqa: PLW2901 - only the first line can have one
            if raw and not raw.isspace():
                yield number, raw
    if rest and not rest.isspace():
        yield number + 1, rest if number else rest.removeprefix(b"\xef\xbb\xbf")


def _chunks(path: Path | None) -> Iterator[bytes]:
    return iter(()) if path is None else plain(path)


def _named(raw: bytes) -> str | None:
    """Give a line's custom_id, None when it has none that could be found again."""
    try:
        line = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    custom_id = line.get("custom_id") if isinstance(line, dict) else None
    return custom_id if isinstance(custom_id, str) else None


def _read_input(file: _File) -> None:
    digest = hashlib.sha256()
    append = file.hashes.append
    for number, raw in _lines(file.path, digest.update):
        file.line_count += 1
        custom_id = _named(raw)
        if custom_id is None:
            file.unnamed(number)
        else:
            append(hash(custom_id))
    file.sha256 = digest.hexdigest()


def _read_results(file: _File, ledger: Ledger) -> None:
    """Read the output or the error file, whose lines have a shape that is checked too."""
    digest = hashlib.sha256()
    append = file.hashes.append
    is_errors = file.role == _ERRORS
    for number, raw in _lines(file.path, digest.update):
        file.line_count += 1
        try:
            line = orjson.loads(raw)
            custom_id, error, response = line["custom_id"], line["error"], line["response"]
            is_success = error is None and 200 <= response["status_code"] < 300
        except (orjson.JSONDecodeError, KeyError, TypeError):
            custom_id, is_success = _shape(raw, number, file, ledger)
            if custom_id is _BROKEN:
                continue
        if is_success is is_errors:
            what = "a success in the errors file" if is_errors else "a failure in the output file"
            ledger.misfiled.add({"file": file.role, "line": number, "what": what})
        if isinstance(custom_id, str):
            append(hash(custom_id))
        elif custom_id is None and is_errors:
            file.unnamed(number)
        else:
            ledger.broken.add({"file": file.role, "line": number, "what": "custom_id is not a string"})
    file.sha256 = digest.hexdigest()


_BROKEN = object()


def _shape(raw: bytes, number: int, file: _File, ledger: Ledger) -> tuple[object, bool]:
    """Look closer at a line that is not a success: a failure without an answer, or no result line at all."""
    what = "not a result line"
    try:
        line = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        line, what = None, f"not JSON, perhaps torn: {error.msg}"
    if isinstance(line, dict) and "custom_id" in line and isinstance(line.get("error"), dict):
        return line["custom_id"], False
    ledger.broken.add({"file": file.role, "line": number, "what": what})
    return _BROKEN, False


# -- the ledger --------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Findings:
    """One kind of trouble: how often, and the first cases."""

    count: int = 0
    first: list[dict[str, object]] = field(default_factory=list)

    def add(self, case: dict[str, object], count: int = 1) -> None:
        """Take a case that stands for `count` lines."""
        self.count += count
        if len(self.first) < _SHOWN:
            self.first.append(case)


@dataclass(slots=True)
class Ledger:
    """What the three files say together."""

    missing: Findings = field(default_factory=Findings)
    doubled: Findings = field(default_factory=Findings)
    foreign: Findings = field(default_factory=Findings)
    broken: Findings = field(default_factory=Findings)
    misfiled: Findings = field(default_factory=Findings)
    matched_by_count: int = 0
    is_in_input_order: bool = True
    manifest: dict[str, bool] | None = None

    @property
    def kinds(self) -> dict[str, Findings]:
        """The findings by name."""
        return {
            "missing": self.missing,
            "doubled": self.doubled,
            "foreign": self.foreign,
            "broken": self.broken,
            "misfiled": self.misfiled,
        }

    @property
    def is_clean(self) -> bool:
        """Whether every line is there once and every checksum is the manifest's."""
        return not any(each.count for each in self.kinds.values()) and all((self.manifest or {}).values())

    def as_json(self, files: list[_File]) -> dict[str, object]:
        """The object that --json prints."""
        described = {
            file.role: {"path": str(file.path) if file.path else None, "lines": file.line_count, "sha256": file.sha256}
            for file in files
        }
        found = {name: {"count": each.count, "first": each.first} for name, each in self.kinds.items()}
        return {
            "is_clean": self.is_clean,
            **described,
            **found,
            "matched_by_count": self.matched_by_count,
            "is_in_input_order": self.is_in_input_order,
            "manifest": self.manifest,
        }

    def as_text(self, files: list[_File]) -> Iterator[str]:
        """The lines for people: findings first, the verdict last."""
        for name, each in self.kinds.items():
            for case in each.first:
                yield f"{name}: {_case_text(case)}"
            if each.count > len(each.first):
                yield f"{name}: {each.count:,} altogether"
        for role, is_same in (self.manifest or {}).items():
            if not is_same:
                yield f"manifest: the {role} file is not the one that the run wrote down"
        given, output, errors = files
        if self.matched_by_count:
            yield f"matched by number, having no usable custom_id: {self.matched_by_count:,}"
        yield f"output in input order: {'yes' if self.is_in_input_order else 'no'}"
        yield f"manifest: {'none' if self.manifest is None else 'same' if all(self.manifest.values()) else 'differs'}"
        sums = f"{given.line_count:,} input lines, {output.line_count:,} output + {errors.line_count:,} error lines"
        yield f"{'ok: each line exactly once' if self.is_clean else 'BROKEN'}: {sums}"


def _case_text(case: dict[str, object]) -> str:
    custom_id = case.get("custom_id")
    places = case.get("places") or [f"{case.get('file')}:{case.get('line')}"]
    assert isinstance(places, list)
    name = "(no custom_id)" if custom_id is None else orjson.dumps(custom_id).decode()
    return f"{', '.join(map(str, places))}: {case.get('what') or name}"


def examine(given: _File, output: _File, errors: _File) -> Ledger:
    """Read the three files once, a second time only where something looks wrong, and compare."""
    ledger = Ledger()
    _read_input(given)
    _read_results(output, ledger)
    _read_results(errors, ledger)
    # Each search goes on behind the last hit, so all are found only if they are in order.
    remaining = iter(given.hashes)
    ledger.is_in_input_order = all(each in remaining for each in output.hashes)
    suspects = _suspects(given.hashes, output.hashes, errors.hashes, ledger)
    if suspects:
        for custom_id, places in _places(suspects, (given, output, errors)).items():
            _judge(custom_id, places, ledger)
    _match_unnamed(given, errors, ledger)
    return ledger


def _suspects(given: array[int], output: array[int], errors: array[int], ledger: Ledger) -> set[int]:
    """Find the hashes that do not occur once here and once there; what is too much to confirm is counted at once."""
    suspects: set[int] = set()
    for wanted, succeeded, failed in zip(_buckets(given), _buckets(output), _buckets(errors), strict=True):
        expected, outputs, found = Counter(wanted), Counter(succeeded), Counter(succeeded)
        found.update(failed)
        if expected == found and len(outputs) == len(succeeded):
            continue
        for each in expected.keys() | found.keys():
            if expected[each] == found[each] and outputs[each] < 2:
                continue
            if len(suspects) < _CONFIRMED_MAX:
                suspects.add(each)
            else:
                _count(ledger, expected[each], outputs[each], found[each], None)
    return suspects


def _buckets(hashes: array[int]) -> list[array[int]]:
    """Spread hashes over buckets, so that only one at a time is held as Python's large numbers."""
    buckets = [array("q") for _ in range(_BUCKETS)]
    appends = [bucket.append for bucket in buckets]
    for each in hashes:
        appends[each % _BUCKETS](each)
    return buckets


@dataclass(slots=True)
class _Places:
    """Where one custom_id occurs."""

    counts: Counter[str] = field(default_factory=Counter)
    first: list[str] = field(default_factory=list)


def _places(suspects: set[int], files: tuple[_File, ...]) -> dict[str, _Places]:
    """Read the files again for the real ids behind some hashes."""
    found: dict[str, _Places] = {}
    for file in files:
        for number, raw in _lines(file.path):
            custom_id = _named(raw)
            if custom_id is None or hash(custom_id) not in suspects:
                continue
            places = found.setdefault(custom_id, _Places())
            places.counts[file.role] += 1
            if places.counts[file.role] <= _PLACES_MAX:
                places.first.append(f"{file.role}:{number}")
    return found


def _judge(custom_id: str, places: _Places, ledger: Ledger) -> None:
    counts = places.counts
    case: dict[str, object] = {"custom_id": custom_id, "places": places.first}
    _count(ledger, counts[_INPUT], counts[_OUTPUT], counts[_OUTPUT] + counts[_ERRORS], case)


def _count(ledger: Ledger, expected: int, outputs: int, found: int, case: dict[str, object] | None) -> None:
    """Say what is wrong with one id; one that the input repeats has a success at most, and errors for the rest."""
    surplus = max(found - expected, outputs - 1, 0)
    if expected == 0:
        kind, count = ledger.foreign, found
    elif surplus:
        kind, count = ledger.doubled, surplus
    else:
        kind, count = ledger.missing, expected - found
    if case is not None and count:
        kind.add(case, count)
    else:
        kind.count += count


def _match_unnamed(given: _File, errors: _File, ledger: Ledger) -> None:
    """Match by number what has no custom_id: a refused line may be reported without the one that stands in it."""
    open_count = given.unnamed_count + ledger.missing.count
    ledger.matched_by_count = min(open_count, errors.unnamed_count)
    surplus = errors.unnamed_count - ledger.matched_by_count
    if surplus:
        ledger.foreign.add({"file": _ERRORS, "line": errors.unnamed_first[0], "what": "no custom_id"}, surplus)
    if open_count == ledger.matched_by_count:
        ledger.missing = Findings()
        return
    for number in given.unnamed_first:
        ledger.missing.add({"file": _INPUT, "line": number, "what": "no usable custom_id"}, 0)
    ledger.missing.count = open_count - ledger.matched_by_count


# -- the manifest ------------------------------------------------------------------------------------------------------


def _against_manifest(path: Path, files: list[_File]) -> dict[str, bool] | None:
    """Tell for each file whether it is the one whose checksum the run wrote down; None without a manifest."""
    try:
        manifest = orjson.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError:
        return dict.fromkeys((file.role for file in files), False)
    outcome = {}
    for file in files:
        entry = manifest.get(file.role) if isinstance(manifest, dict) else None
        if isinstance(entry, dict):
            outcome[file.role] = entry.get("sha256") == file.sha256
        else:
            outcome[file.role] = file.line_count == 0
    return outcome
