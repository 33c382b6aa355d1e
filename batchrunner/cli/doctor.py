"""`batchrunner doctor`: is this upstream, and is this machine, ready for a run? Only GET /models is ever asked for.

It prints whether a key is set, never the key.
"""

from __future__ import annotations

import asyncio
import os
import platform
import resource
import shutil
import socket
import ssl
import sys
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

import click
import orjson

from batchrunner.cli.configuring import load_settings, read_api_keys
from batchrunner.cli.exits import ExitCode
from batchrunner.cli.validate import printable
from batchrunner.clock import SystemClock
from batchrunner.errors import FolderUnsuitable, UsageError
from batchrunner.settings import GIB, Settings, has_upstream, targets_of
from batchrunner.targets import Target

if TYPE_CHECKING:
    from aiohttp import ClientSession
    from yarl import URL

_OK, _WARN, _FAIL = "ok", "warn", "fail"
_COLOURS = {_OK: "green", _WARN: "yellow", _FAIL: "red"}
_ANSWER_S = 10.0
_ANSWER_BYTES_MAX = 8 << 20
_MODELS_SHOWN = 10
_TIMED = 3
# Files that a run has open besides its connections: database, journal segments, input, output, pipes.
_FILES_OF_A_RUN = 128


@click.command("doctor")
@click.option("-u", "--base-url", metavar="URL", help="The upstream, as for run. [OPENAI_BASE_URL]")
@click.option("--api-key-env", metavar="NAME", help="Environment variable that holds the key. [OPENAI_API_KEY]")
@click.option("--blobs", metavar="s3://BUCKET/PREFIX", help="A bucket to try out as well. [BATCHRUNNER_BLOBS]")
@click.option("--json", "is_json", is_flag=True, help="Print one JSON object.")
def doctor(*, base_url: str | None, api_key_env: str | None, blobs: str | None, is_json: bool) -> None:
    """Check that the upstream answers, or each of several, and that this machine can keep many requests in flight.
    Nothing is paid for.

    Where blobs are kept in a bucket, an object is written, read and deleted there too; then -u may be missing.

    Exit codes: 0 all is well or only warned of, 1 a check failed, 4 the upstream refused the key.
    """
    settings, _ = load_settings({"base_url": base_url, "api_key_env": api_key_env, "blobs": blobs})
    if not has_upstream(settings) and settings.blobs is None:
        raise UsageError("no upstream is named", hint="Give -u URL or set OPENAI_BASE_URL.")
    findings, keys = Findings(), read_api_keys(settings)
    for target in targets_of(settings) if has_upstream(settings) else ():
        findings.about = f"{target.name}: " if settings.upstream else ""
        asyncio.run(_examine_upstream(findings, settings, target, keys.get(target.name)))
    findings.about = ""
    if settings.blobs is not None:
        from batchrunner.cli.doctor_bucket import examine_bucket

        examine_bucket(findings, settings, settings.blobs)
    _examine_machine(findings, settings)
    if is_json:
        click.echo(orjson.dumps(findings.as_json()))
    else:
        for check in findings.checks:
            _show(check)
    sys.exit(int(findings.exit_code))


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; `state` is ok, warn or fail, and then `hint` says what to do."""

    name: str
    state: str
    message: str
    hint: str = ""


@dataclass(slots=True)
class Findings:
    """All checks, in the order in which they were made. `about` stands before the names of those that follow."""

    about: str = ""
    checks: list[Check] = field(default_factory=list)
    models: list[str] = field(default_factory=list)
    is_key_refused: bool = False

    def ok(self, name: str, message: str) -> None:
        """Note what is well."""
        self.checks.append(Check(self.about + name, _OK, message))

    def warn(self, name: str, message: str, hint: str) -> None:
        """Note what may hurt."""
        self.checks.append(Check(self.about + name, _WARN, message, hint))

    def fail(self, name: str, message: str, hint: str) -> None:
        """Note what keeps a run from working."""
        self.checks.append(Check(self.about + name, _FAIL, message, hint))

    @property
    def exit_code(self) -> ExitCode:
        """What the command ends with."""
        if self.is_key_refused:
            return ExitCode.AUTHENTICATION
        return ExitCode.TROUBLE if any(check.state == _FAIL for check in self.checks) else ExitCode.OK

    def as_json(self) -> dict[str, object]:
        """The object that --json prints."""
        checks = [asdict(check) for check in self.checks]
        return {"exit_code": int(self.exit_code), "checks": checks, "models": self.models}


def _show(check: Check) -> None:
    is_plain = bool(os.environ.get("NO_COLOR"))
    state = f"{check.state:<4}"
    state = state if is_plain else click.style(state, fg=_COLOURS[check.state])
    click.echo(f"{state}  {check.name}: {check.message}")
    if check.hint:
        click.echo(f"      {check.hint}")


# -- the upstream ------------------------------------------------------------------------------------------------------


async def _examine_upstream(findings: Findings, settings: Settings, target: Target, api_key: str | None) -> None:
    """Go from the address to the answer; the first thing that fails makes the rest pointless."""
    base = await _address(findings, target.base_url, api_key)
    if base is None or not await _resolve(findings, base) or not await _connect(findings, settings, base):
        return
    place = target.api_key_file or target.api_key_env
    if api_key:
        findings.ok("key", f"{place} is set")
    else:
        findings.ok("key", f"{f'{place} is not set' if place else 'none is named'}; no Authorization is sent")
    from aiohttp import ClientSession, ClientTimeout

    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    timeout = ClientTimeout(total=_ANSWER_S)
    async with ClientSession(headers=headers, timeout=timeout, auto_decompress=True) as session:
        if await _models(findings, session, base, place or "api_key_env"):
            await _latency(findings, session, base)


async def _address(findings: Findings, base_url: str, api_key: str | None) -> URL | None:
    """Judge the address as a run would."""
    from yarl import URL

    from batchrunner.upstream import AiohttpUpstream

    try:
        await AiohttpUpstream(base_url, clock=SystemClock(), api_key=api_key).close()
    except UsageError as error:
        findings.fail("address", error.message, error.advice)
        return None
    base = URL(base_url, encoded=True)
    base = base.with_path(base.raw_path.rstrip("/") or "/v1", encoded=True)
    findings.ok("address", f"requests go to {base}/...")
    return base


async def _resolve(findings: Findings, base: URL) -> bool:
    host = base.host or ""
    try:
        async with asyncio.timeout(_ANSWER_S):
            found = await asyncio.get_running_loop().getaddrinfo(host, base.port, type=socket.SOCK_STREAM)
    except (OSError, TimeoutError, UnicodeError) as error:
        findings.fail("name", f"{host} is not known: {_reason(error)}", "Check the spelling of the host, and the DNS.")
        return False
    addresses = sorted({str(each[4][0]) for each in found})
    findings.ok("name", f"{host} is {', '.join(addresses[:4])}")
    return True


async def _connect(findings: Findings, settings: Settings, base: URL) -> bool:
    """Open a TCP connection, and TLS on top where the address asks for it."""
    host, port = base.host or "", base.port or 0
    place = f"{host}:{port}"
    context = ssl.create_default_context() if base.scheme == "https" else None
    clock = SystemClock()
    began_s = clock.monotonic_s()
    try:
        async with asyncio.timeout(settings.connect_timeout_s):
            _, writer = await asyncio.open_connection(host, port, ssl=context)
    except ssl.SSLError as error:
        findings.ok("connection", f"{place} accepts connections")
        hint = "A certificate of your own? Set SSL_CERT_FILE. A server without TLS? Write http://."
        findings.fail("tls", f"{place}: {_reason(error)}", hint)
        return False
    except (OSError, TimeoutError) as error:
        findings.fail("connection", f"{place}: {_reason(error)}", "Is the server running, and is this its port?")
        return False
    elapsed_ms = (clock.monotonic_s() - began_s) * 1000
    findings.ok("connection", f"{place} accepts connections, in {elapsed_ms:.0f} ms")
    if context is not None:
        found = writer.get_extra_info("ssl_object")
        findings.ok("tls", f"{found.version() if found is not None else 'TLS'}, the certificate is valid")
    writer.close()
    return True


async def _models(findings: Findings, session: ClientSession, base: URL, key_place: str) -> bool:
    """Ask for the models; tells whether the upstream answered at all."""
    try:
        status, body = await _get(session, base)
    except (OSError, TimeoutError, ValueError) as error:
        findings.fail(
            "models", f"GET {base}/models: {_reason(error)}", "Does an OpenAI-compatible server listen there?"
        )
        return False
    if status in (401, 403):
        findings.is_key_refused = True
        findings.fail("models", f"GET {base}/models: status {status}", f"Set the right key in {key_place}.")
        return False
    if 300 <= status < 400:
        hint = "Redirects are never followed: give the final address with -u."
        findings.fail("models", f"GET {base}/models: status {status}, a redirect", hint)
        return False
    if status >= 500:
        findings.fail("models", f"GET {base}/models: status {status}", "The server is there but not well: see its log.")
        return False
    names = _model_names(body) if status == 200 else None
    if names is None:
        hint = "Some servers do not list models; the path of -u may also be wrong (most end in /v1)."
        findings.warn("models", f"GET {base}/models: status {status} without a list of models", hint)
        return True
    findings.models += names
    shown = ", ".join(printable(name) for name in names[:_MODELS_SHOWN])
    more = f" and {len(names) - _MODELS_SHOWN:,} more" if len(names) > _MODELS_SHOWN else ""
    findings.ok("models", f"{len(names):,}: {shown}{more}" if names else "none is loaded")
    return True


async def _get(session: ClientSession, base: URL) -> tuple[int, bytes]:
    """Ask for the models once; reads a bounded answer and follows no redirect."""
    from aiohttp import ClientError

    try:
        async with session.get(f"{base}/models", allow_redirects=False) as response:
            body = bytearray()
            async for piece in response.content.iter_any():
                body += piece
                if len(body) > _ANSWER_BYTES_MAX:
                    raise ValueError(f"the answer is larger than {_ANSWER_BYTES_MAX:,} bytes")
            return response.status, bytes(body)
    except ClientError as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _model_names(body: bytes) -> list[str] | None:
    """Read the ids of a model list. Source: OpenAI API, GET /v1/models."""
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    entries = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(entries, list):
        return None
    return [str(each["id"]) for each in entries if isinstance(each, dict) and "id" in each]


async def _latency(findings: Findings, session: ClientSession, base: URL) -> None:
    clock, times_ms = SystemClock(), []
    try:
        for _ in range(_TIMED):
            began_s = clock.monotonic_s()
            await _get(session, base)
            times_ms.append((clock.monotonic_s() - began_s) * 1000)
    except (OSError, TimeoutError, ValueError) as error:
        hint = "A run repeats what fails, but look at the server's log."
        findings.warn("latency", f"a request for /models failed: {_reason(error)}", hint)
        return
    findings.ok("latency", f"GET /models in {', '.join(f'{each:.0f}' for each in times_ms)} ms")


def _reason(error: BaseException) -> str:
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


# -- this machine ------------------------------------------------------------------------------------------------------


def _examine_machine(findings: Findings, settings: Settings) -> None:
    _descriptors(findings, settings)
    _disk(findings)
    _versions(findings, settings)


def _descriptors(findings: Findings, settings: Settings) -> None:
    wanted = (settings.concurrency or settings.window_max) + _FILES_OF_A_RUN
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        findings.ok("open files", f"up to {'any number' if soft == resource.RLIM_INFINITY else f'{soft:,}'}")
        return
    can = hard == resource.RLIM_INFINITY or hard >= wanted
    hint = (
        f"ulimit -n {wanted}" if can else f"the hard limit is {hard:,}; raise it, or run with --concurrency {hard // 2}"
    )
    message = f"up to {soft:,}; {wanted - _FILES_OF_A_RUN:,} requests in flight need {wanted:,}"
    findings.warn("open files", message, hint)


def _disk(findings: Findings) -> None:
    from batchrunner.store.sqlite import require_local_disk

    here = Path.cwd()
    free = shutil.disk_usage(here).free
    if free < GIB:
        findings.warn("disk", f"{free / GIB:.1f} GiB are free in {here}", "Results of a large run need more.")
    else:
        findings.ok("disk", f"{free / GIB:.1f} GiB are free in {here}")
    try:
        require_local_disk(here)
    except FolderUnsuitable as error:
        findings.warn("file system", error.message, error.advice)
    else:
        findings.ok("file system", f"{here} can hold a run's state")


def _versions(findings: Findings, settings: Settings) -> None:
    names = ("batchrunner", "aiohttp", "uvloop", "boto3") if settings.blobs else ("batchrunner", "aiohttp", "uvloop")
    found = {name: _version(name) for name in names}
    python = f"Python {platform.python_version()}"
    shown = ", ".join([python, *(f"{name} {number or 'not installed'}" for name, number in found.items())])
    if found["uvloop"] is None and sys.platform != "win32":
        findings.warn("versions", shown, "pip install 'batchrunner[speed]' makes requests cheaper.")
    else:
        findings.ok("versions", shown)


def _version(name: str) -> str | None:
    if name == "batchrunner":
        from batchrunner import __version__

        return __version__
    try:
        return version(name)
    except PackageNotFoundError:
        return None
