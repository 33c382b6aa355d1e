"""Imports point in one direction: the contracts of pyproject.toml hold, and they speak of every module."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from tests.test_tidy import EDGES

ROOT = Path(__file__).parents[1]


def contract(contract_id: str) -> dict[str, Any]:
    """Read one contract from pyproject.toml."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    return next(each for each in contracts if each["id"] == contract_id)


def test_import_contracts_are_kept() -> None:
    # In a process of its own: the linter's logging set-up would silence every logger that exists.
    command = [sys.executable, "-c", "from importlinter.cli import lint_imports_command; lint_imports_command()"]

    linted = subprocess.run([*command, "--no-cache"], cwd=ROOT, capture_output=True, text=True, check=False)

    assert linted.returncode == 0, linted.stdout


def test_purity_contract_names_every_core_module() -> None:
    core = {
        f"batchrunner.{path.stem}"
        for path in (ROOT / "batchrunner").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").exists())
        and not EDGES.fullmatch(path.stem.removeprefix("__init__"))
    }

    named = set(contract("core-is-pure")["source_modules"])

    assert named == core
