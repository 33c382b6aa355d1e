"""The documentation cannot drift: every command, setting, code and make target is looked up in it."""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import re
from collections.abc import Iterator
from enum import Enum, IntEnum
from functools import cache
from pathlib import Path

import click
import pytest

import batchrunner
from batchrunner import errors
from batchrunner.metrics import METRICS
from batchrunner.settings import Settings
from tests.generated import BLOCKS, commands, found, root_command, subclasses

ROOT = Path(__file__).parents[1]
# Enums whose values are a contract with people and their scripts.
CODE_ENUMS = re.compile(r".*Code|AttemptError|PauseReason|BatchStatus")


@cache
def documentation() -> str:
    """Read README and everything in docs/ as one text."""
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return "\n".join(page.read_text(encoding="utf-8") for page in pages)


def mentions(word: str) -> bool:
    """Tell whether the docs name a word, not as a part of a longer one."""
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", documentation()) is not None


def enums() -> Iterator[type[Enum]]:
    """Give the enums that the package's own modules define, without starting its entry points."""
    for each in pkgutil.walk_packages(batchrunner.__path__, "batchrunner."):
        if each.name.endswith("__main__") or ".migrations" in each.name:
            continue
        module = importlib.import_module(each.name)
        for value in vars(module).values():
            if isinstance(value, type) and issubclass(value, Enum) and value.__module__ == each.name:
                yield value


def test_every_command_is_documented() -> None:
    missing = [words for words, _ in commands(root_command(), ("batchrunner",)) if words not in documentation()]

    assert missing == []


def test_every_option_is_documented() -> None:
    missing = [
        f"{words} {option}"
        for words, command in commands(root_command(), ("batchrunner",))
        for parameter in command.params
        if isinstance(parameter, click.Option) and not parameter.hidden
        for option in [*parameter.opts, *parameter.secondary_opts]
        if option.startswith("--") and not mentions(option)
    ]

    assert missing == []


def test_every_setting_is_documented() -> None:
    missing = [field.name for field in dataclasses.fields(Settings) if not mentions(field.name)]

    assert missing == []


def test_every_error_code_is_documented() -> None:
    codes = {error.code for error in subclasses(errors.BatchrunnerError)}

    missing = sorted(code for code in codes if not mentions(code))

    assert missing == []


def test_every_code_enum_is_documented() -> None:
    kinds = [each for each in enums() if CODE_ENUMS.fullmatch(each.__name__) and not issubclass(each, IntEnum)]

    missing = [f"{each.__name__}.{code.name}" for each in kinds for code in each if not mentions(str(code.value))]

    assert kinds
    assert missing == []


def test_every_exit_code_is_documented() -> None:
    codes = next(each for each in enums() if each.__name__ == "ExitCode")
    assert issubclass(codes, IntEnum)

    missing = [
        code.name for code in codes if not re.search(rf"^\|\s*`?{code.value}`?\s*\|", documentation(), re.MULTILINE)
    ]

    assert missing == []


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_pages_name_no_make_target_that_is_missing(page: str) -> None:
    named = set(
        re.findall(r"`make ([a-z-]+)`|^make ([a-z-]+)", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    )

    unknown = {first or second for first, second in named} - make_targets()

    assert unknown == set()


def test_every_make_target_is_documented() -> None:
    text = documentation() + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

    missing = sorted(target for target in make_targets() if not re.search(rf"\b{target}\b", text))

    assert missing == []


def make_targets() -> set[str]:
    """Give the targets that `make help` lists."""
    return set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))


@pytest.mark.parametrize(("page", "name"), BLOCKS)
def test_what_is_made_from_code_is_as_the_code_makes_it(page: str, name: str) -> None:
    """`python -m tests.generated` mends it."""
    assert found(page, name).group() == BLOCKS[page, name]()


def test_every_metric_is_documented() -> None:
    missing = [metric.name for metric in METRICS if not mentions(metric.name)]

    assert missing == []


def test_links_to_headings_lead_somewhere() -> None:
    broken = [
        f"{page.relative_to(ROOT)}: {file}#{anchor}"
        for page in [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]
        for file, anchor in re.findall(r"\]\(([^)#\s:]*)#([^)]*)\)", page.read_text(encoding="utf-8"))
        if anchor not in headings(page.parent / file if file else page)
    ]

    assert broken == []


def headings(page: Path) -> set[str]:
    """Give the anchors that a page's headings make."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def test_links_between_pages_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]

    broken = [
        f"{page.relative_to(ROOT)}: {target}"
        for page in pages
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists()
    ]

    assert broken == []
