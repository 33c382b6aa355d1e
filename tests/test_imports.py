"""Imports point in one direction: the contracts of pyproject.toml hold, and they speak of every module."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from importlinter.cli import lint_imports

ROOT = Path(__file__).parents[1]
# Everything else in the package is story, rules or words.
EDGES = re.compile(
    r"clock|tuning|simulate\w*|store|blobs|upstream\w*|poster|client|supervisor|app|api|dashboard|cli|__init__|__main__"
)


def contract(contract_id: str) -> dict[str, Any]:
    """Read one contract from pyproject.toml."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return next(each for each in contracts if each["id"] == contract_id)


def test_import_contracts_are_kept(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)

    exit_code = lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True)

    assert exit_code == 0, capsys.readouterr().out


def test_purity_contract_names_every_core_module() -> None:
    core = {
        f"batchrunner.{path.stem}"
        for path in (ROOT / "batchrunner").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists()) and not EDGES.fullmatch(path.stem)
    }

    named = set(contract("core-is-pure")["source_modules"])

    assert named == core
