"""The official SDKs as their registries have them: fetched when first needed, kept beside the environment."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
KEPT = Path(sys.prefix) / "sdk"
# An old client that many still have: its listings end only with an empty page.
OLD_PYTHON = "1.60.0"
# What only it needs; the rest has the versions of this environment.
OLD_PYTHON_NEEDS = ("distro==1.9.0", "tqdm==4.67.1")
NODE = "7.57.0"
# The last that says it runs on Node 20.
OLD_NODE = "6.49.0"
# The newest whose requirements can all be had.
LITELLM = "1.106.2"
# The last browser that says its package unpacks on Node 20, and what drives it.
CHROMIUM = "147.0.2"
PLAYWRIGHT = "1.65.1"
FETCH_S = 240


def official_suite() -> Path:
    """Give the unpacked source of the openai-python that is installed: its own tests are in there."""
    newest = version("openai")

    def fetch(folder: Path) -> None:
        _pip("download", "--no-deps", "--no-binary", "openai", "--dest", str(folder), f"openai=={newest}")
        packed = folder / f"openai-{newest}.tar.gz"
        with tarfile.open(packed) as archive:
            archive.extractall(folder, filter="data")
        packed.unlink()

    return _kept(f"suite-{newest}", fetch) / f"openai-{newest}"


def old_python() -> Path:
    """Give a folder that puts an old openai-python before the installed one when it is on the path."""

    def fetch(folder: Path) -> None:
        pinned = ("--constraint", str(folder / "constraints.txt"))
        others = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("openai==")]
        (folder / "constraints.txt").write_text("\n".join(others))
        _pip("install", *pinned, "--target", str(folder), f"openai=={OLD_PYTHON}", *OLD_PYTHON_NEEDS)

    return _kept(f"python-{OLD_PYTHON}", fetch)


def litellm() -> Path:
    """Give a folder that puts LiteLLM, with all that it needs, on the path."""

    def fetch(folder: Path) -> None:
        _pip("install", "--target", str(folder), f"litellm=={LITELLM}")

    return _kept(f"litellm-{LITELLM}", fetch)


def node(package_version: str) -> Path:
    """Give a folder in which Node finds that version of the package openai."""
    return _kept(f"node-{package_version}", lambda folder: _npm_install(folder, f"openai@{package_version}"))


def browser() -> Path:
    """Give a folder with `chromium`, a browser without a window, in which Node finds playwright-core to drive it."""

    def fetch(folder: Path) -> None:
        _npm_install(folder, f"playwright-core@{PLAYWRIGHT}", f"@sparticuz/chromium@{CHROMIUM}")
        # It unpacks into the folder for what is temporary.
        _run("node", "-e", "require('@sparticuz/chromium').executablePath()", inside=folder)

    return _kept(f"browser-{CHROMIUM}-{PLAYWRIGHT}", fetch)


def _npm_install(folder: Path, *packages: str) -> None:
    flags = ("--no-audit", "--no-fund", "--ignore-scripts", "--no-save", "--loglevel=error")
    _run("npm", "install", *flags, "--prefix", str(folder), *packages)


def _kept(name: str, fetch: Callable[[Path], None]) -> Path:
    """Give what was fetched under a name; of several test runs that fetch it at once, the first one stays."""
    folder = KEPT / name
    if not folder.exists():
        KEPT.mkdir(exist_ok=True)
        fresh = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=KEPT))
        try:
            fetch(fresh)
            with contextlib.suppress(OSError):
                fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _pip(command: str, *arguments: str) -> None:
    _run(sys.executable, "-m", "pip", command, "--quiet", *arguments)


def _run(*command: str, inside: Path | None = None) -> None:
    """Run a command, and inside a folder keep all that it writes there."""
    environment = None if inside is None else dict(os.environ) | {"TMPDIR": str(inside)}
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=FETCH_S, check=False, cwd=inside, env=environment
    )
    if done.returncode:
        raise AssertionError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
