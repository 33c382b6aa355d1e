"""What is made from code: the OpenAPI document, and blocks of README and docs/. `python -m tests.generated` rewrites
them; a test holds them to the code.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import click
import orjson

from batchrunner import cli, errors, lifecycle, metrics, settings, targets
from batchrunner.api.openapi import document
from batchrunner.api.routes import described
from batchrunner.cli.exits import MEANINGS, exit_code_of
from batchrunner.queue_pages import queue_routes

ROOT = Path(__file__).parents[1]
OPENAPI = ROOT / "schemas" / "openapi.json"
REFERENCE = "docs/reference.md"
UNITS = ((settings.GIB, "GiB"), (settings.MIB, "MiB"), (settings.KIB, "KiB"))


def root_command() -> click.Group:
    """Find the click group that the console script runs."""
    groups = [value for value in vars(cli).values() if isinstance(value, click.Group)]
    assert len(groups) == 1, "batchrunner.cli holds exactly one click group"
    return groups[0]


def commands(command: click.Command, path: tuple[str, ...]) -> Iterator[tuple[str, click.Command]]:
    """Walk a click group and give every command with the words that call it."""
    yield " ".join(path), command
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            found = command.get_command(context, name)
            assert found is not None
            if not found.hidden:
                yield from commands(found, (*path, name))


def subclasses(root: type[errors.BatchrunnerError]) -> Iterator[type[errors.BatchrunnerError]]:
    """Give a class and everything below it."""
    yield root
    for each in root.__subclasses__():
        yield from subclasses(each)


def _table(*rows: tuple[str, ...]) -> str:
    head, *rest = [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return "\n".join([head, "|---" * len(rows[0]) + "|", *rest])


def lifecycle_diagram() -> str:
    return f"```mermaid\n{lifecycle.mermaid()}\n```"


def commands_section() -> str:
    return "\n\n".join(
        _command(words, command)
        for words, command in commands(root_command(), ("batchrunner",))
        if not isinstance(command, click.Group)
    )


def _command(words: str, command: click.Command) -> str:
    context = click.Context(command, info_name=words)
    # What stands behind a \b is laid out for a terminal.
    text = inspect.cleandoc(command.help or "").partition("\b")[0].strip()
    prose = [paragraph.replace("\n", " ") for paragraph in text.split("\n\n")]
    options = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
    parts = [f"### `{words}`", f"`{' '.join([words, *command.collect_usage_pieces(context)])}`", *prose]
    if options:
        parts.append(_table(("option", "meaning"), *map(_option, options)))
    return "\n\n".join(parts)


def _option(option: click.Option) -> tuple[str, str]:
    default = f" [default: {option.default}]" if option.show_default else ""
    required = " [required]" if option.required else ""
    return f"`{', '.join(option.opts)}{_operand(option)}`", f"{option.help}{default}{required}"


def _operand(option: click.Option) -> str:
    if option.metavar:
        return f"{'' if option.metavar.startswith('[') else ' '}{option.metavar}"
    if isinstance(option.type, click.Choice):
        return f" {'|'.join(map(str, option.type.choices))}"
    is_switch = option.is_flag or isinstance(option.flag_value, str)
    return "" if is_switch else f" {'N' if isinstance(option.type, click.types.IntParamType) else 'TEXT'}"


def settings_table() -> str:
    flags = {option.name: option.opts[-1] for option in _run_options()}
    rows = []
    for name, default, meaning in settings.describe():
        if name == "upstream":
            rows.append((f"`{name}`", "unset", "", "", meaning))
            continue
        flag = flags.get(name) or flags.get(name.removesuffix("_s"))
        shown = f"`{flag}`" if flag else ""
        rows.append((f"`{name}`", _value(name, default), f"`BATCHRUNNER_{name.upper()}`", shown, meaning))
    return _table(("setting", "default", "variable", "flag of run", "meaning"), *rows)


def targets_table() -> str:
    rows = [(f"`{name}`", _key_value(name, default), meaning) for name, default, meaning in targets.describe_target()]
    return _table(("key", "default", "meaning"), *rows)


def _key_value(name: str, default: object) -> str:
    return "must be given" if default is ... else "none" if default == {} else _value(name, default)


def _run_options() -> list[click.Option]:
    run = root_command().get_command(click.Context(root_command()), "run")
    assert run is not None
    return [each for each in run.params if isinstance(each, click.Option)]


def _value(name: str, default: object) -> str:
    match default:
        case None:
            return "unset"
        case ():
            return "none"
        case tuple():
            return f"all {len(default)}, see below"
        case bool():
            return str(default).lower()
        case float():
            return f"{default:g} s"
        case int() if "bytes" in name:
            size, unit = next((size, unit) for size, unit in UNITS if default % size == 0)
            return f"{default // size} {unit}"
        case int():
            return f"{default:,}"
        case _:
            return f"`{default}`"


def endpoints_list() -> str:
    return ", ".join(f"`{each}`" for each in settings.ENDPOINTS)


def exit_codes() -> str:
    return _table(("code", "meaning"), *((str(int(code)), meaning) for code, meaning in MEANINGS.items()))


def error_codes() -> str:
    rows = []
    for each in subclasses(errors.BatchrunnerError):
        meaning = (each.__doc__ or "").partition("\n")[0].partition(";")[0].rstrip(".")
        rows.append((f"`{each.code}`", str(each.http_status), str(int(exit_code_of(each("")))), meaning, each.hint))
    return _table(("code", "HTTP status", "exit code", "meaning", "what to do"), *rows)


def metric_names() -> str:
    rows = ((f"`{each.name}`", each.kind, each.label or "", each.meaning) for each in metrics.METRICS)
    return _table(("metric", "kind", "label", "meaning"), *rows)


BLOCKS: Mapping[tuple[str, str], Callable[[], str]] = {
    ("README.md", "lifecycle"): lifecycle_diagram,
    ("README.md", "exit-codes"): exit_codes,
    (REFERENCE, "commands"): commands_section,
    (REFERENCE, "settings"): settings_table,
    (REFERENCE, "upstream"): targets_table,
    (REFERENCE, "endpoints"): endpoints_list,
    (REFERENCE, "errors"): error_codes,
    (REFERENCE, "metrics"): metric_names,
}


def found(page: str, name: str) -> re.Match[str]:
    """Find what stands between the two markers of a block."""
    text = (ROOT / page).read_text(encoding="utf-8")
    match = re.search(rf"(?<=<!-- {name}:begin -->\n).*?(?=\n<!-- {name}:end -->)", text, re.DOTALL)
    assert match is not None, f"{page} has no block {name}"
    return match


def openapi() -> bytes:
    """Write the OpenAPI document as it stands in schemas/."""
    return orjson.dumps(document(described(*queue_routes(b""))), option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)


def main() -> None:
    if OPENAPI.read_bytes() != openapi():
        OPENAPI.write_bytes(openapi())
        print(f"{OPENAPI.name} rewritten")
    for (page, name), make in BLOCKS.items():
        match, path = found(page, name), ROOT / page
        text = match.string[: match.start()] + make() + match.string[match.end() :]
        if text != match.string:
            path.write_text(text, encoding="utf-8")
            print(f"{page}: {name} rewritten")


if __name__ == "__main__":
    main()
